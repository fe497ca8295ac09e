"""Plans as text: one at length, several as a table."""

from collections.abc import Sequence

from qorpo.planning.plan import Plan
from qorpo.planning.settings import CONTEXT_BYTES, GIB


def summary(plan: Plan) -> str:
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{plan.model}{_tuning(plan)}: {verdict} {plan.budget_gib:g} GiB; it needs {plan.needed_gib:.2f}: {plan.peak_gib:.2f} of tensors, "
        f"{plan.reserved_gib:.2f} as the allocator reserves them, and {CONTEXT_BYTES / GIB:.1f} of CUDA's own",
        f"peak: {plan.moment}, {plan.where}",
        *(f"  {size:7.3f}  {kind}" for kind, size in plan.by_kind.items() if size),
    ]
    if plan.host_gib:
        lines.append(f"pinned host memory: {plan.host_gib:.2f} GiB of layers' inputs")
    if plan.paged_gib:
        lines.append(f"optimizer states that may leave the card: {plan.paged_gib:.2f} GiB")
    if plan.traffic_gib:
        lines.append(
            f"between cards: {plan.traffic_gib:.2f} GiB to each for one micro-batch, and as much from it"
        )
    lines.append("memory: " + ", ".join(f"{key}: {_plain(value)}" for key, value in plan.memory.items()))
    lines.append(
        "largest that fits: " + ", ".join(f"{key} {_largest(size)}" for key, size in plan.largest.items())
    )
    return "\n".join([*lines, *(f"{'did' if plan.fits else 'do'}: {line}" for line in plan.advice)])


def table(plans: Sequence[Plan]) -> str:
    """A row a plan."""
    head = (
        "model",
        "GiB",
        "fits",
        "needs",
        "micro-batch",
        "chunk",
        "recomputed",
        "offload",
        "longest",
        "rank",
    )
    rows = [head]
    for plan in plans:
        memory, largest = plan.memory, plan.largest
        rows.append(
            (
                plan.model + _tuning(plan), f"{plan.budget_gib:g}", "yes" if plan.fits else "no", f"{plan.needed_gib:.2f}",
                str(memory["microbatch_tokens"]), str(memory["logprob_chunk_tokens"]),
                _plain(memory["activation_checkpointing"]), _plain(memory["activation_offload"]),
                _largest(largest["max_length"]), _largest(largest.get("lora_rank")),
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _tuning(plan: Plan) -> str:
    if plan.tuning == "lora":
        return ""
    return ", all parameters" if plan.ranks == 1 else f", all parameters, on each of {plan.ranks} ranks"


def _plain(value: object) -> str:
    return str(value).lower()


def _largest(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size:,}" if size else "none"
