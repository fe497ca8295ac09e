"""Adapters into base weights, on a small machine: check all of it, stream it shard by shard, then prove it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qorpo.errors import RecipeError
from qorpo.merging.output import check_output, gib, whole_folder, write_card, write_files
from qorpo.merging.plan import Onto, make_plan
from qorpo.merging.shards import write_shards
from qorpo.merging.source import find_base, find_trained

logger = logging.getLogger(__name__)

DEFAULT_ONTO: Onto = "original"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9

Progress = Callable[[int, int], None]
"""Told of (bytes done, bytes in all) as a merge goes."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, or would have written."""

    output: Path | None  # None after checking only
    onto: Onto
    changed: int  # tensors that the adapters change
    total_bytes: int


def merge(
    adapter: str,
    output: str | Path | None,
    *,
    adapters: Sequence[str] = (),
    base: str | None = None,
    revision: str | None = None,
    onto: Onto | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Write the model that base and adapters make together, as one folder that transformers opens.

    Tensors are streamed: memory does not grow with the model, only with its largest tensor.

    Args:
        adapter: a run's folder, or an adapter in PEFT's format; `path=0.5` merges half of its change.
        output: the folder to make; None checks everything and writes nothing.
        adapters: more of them, merged in turn.
        base: a local folder or a hub id; None: the base that the adapters name.
        revision: branch, tag or commit of a hub's base; None: the one that was trained on.
        onto: original, the base's own weights, or dequantized, its NF4 weights as training saw them.
        dtype: float32, bfloat16 or float16; None: each tensor keeps the base's.
        max_shard_bytes: the most in one file.
        allow_pickle: also read .bin weights (by torch's weights-only reader).

    Raises:
        QorpoError: what the user can mend, before anything is written where that can be known.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"--dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
    if onto not in (None, "original", "dequantized"):
        raise RecipeError(f"--onto: got {onto!r}; expected original or dequantized")
    trained = [find_trained(path, allow_pickle=allow_pickle) for path in (adapter, *adapters)]
    onto = onto or DEFAULT_ONTO
    found = find_base(trained, base, revision, allow_pickle=allow_pickle)
    plan = make_plan(
        found, trained, onto=onto, dtype=DTYPES[dtype] if dtype else None,
        max_shard_bytes=max_shard_bytes, allow_pickle=allow_pickle,
    )  # fmt: skip
    total = plan.total_bytes
    logger.info(
        "merge: %d of %d tensors change, onto the %s weights of %s; %s to write",
        plan.changed, sum(len(shard.tensors) for shard in plan.shards), onto, found.name, gib(total),
    )  # fmt: skip
    if output is None:
        return MergeResult(None, onto, plan.changed, total)
    output = Path(output).expanduser()
    check_output(output, total)
    done = 0

    def told(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    with whole_folder(output) as folder:
        with torch.no_grad():
            write_shards(folder, plan.shards, told)
        write_files(folder, found, trained, plan.config)
        write_card(folder, found, trained, onto)
    return MergeResult(output, onto, plan.changed, total)
