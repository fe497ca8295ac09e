"""Adapters into base weights, on a small machine: check all of it, stream it shard by shard, then prove it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast, get_args

import torch

from qorpo.build import build_objective
from qorpo.data.groups import Group
from qorpo.engine.device import computing_device
from qorpo.errors import DataError, QorpoError, RecipeError, RunError
from qorpo.failed_write import failed_write
from qorpo.identity import base_identity
from qorpo.manifest import check_folder, write_manifest
from qorpo.merging.outline import Onto, Plan, make_plan
from qorpo.merging.output import (
    check_output,
    gib,
    tokenizer_folder,
    write_card,
    write_files,
)
from qorpo.merging.record import (
    NOT_VERIFIED,
    VERIFICATION,
    awaits_verification,
    merge_record,
    write_verification,
)
from qorpo.merging.shards import write_shards
from qorpo.merging.source import Base, Trained, find_base, find_trained
from qorpo.merging.verify import (
    Verification,
    evaluation_pairs,
    memory_free,
    memory_needed,
    unverifiable,
    verify_merged,
)
from qorpo.objectives.base import Objective
from qorpo.objectives.orpo import Orpo
from qorpo.objectives.sft import Sft
from qorpo.out_of_memory import is_out_of_memory, shortage_of
from qorpo.recipe import Recipe
from qorpo.storage import output_folder

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as a merge goes."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, or would have written."""

    output: Path | None  # None after checking only
    onto: Onto
    changed: int  # tensors that the adapters change
    total_bytes: int
    verification: Verification | None  # None where there was nothing to verify by, or no memory for it


def merge(
    adapter: str | Path,
    output: str | Path | None,
    *,
    adapters: Sequence[str] = (),
    base: str | Path | None = None,
    revision: str | None = None,
    onto: str = "original",
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool | str | Path = True,
    verify_only: bool = False,
    check_only: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Write the model that base and adapters make together, as one folder that transformers opens, and verify it.

    Tensors are streamed: memory does not grow with the model, only with its largest tensor. Verifying takes a model.

    Args:
        adapter: a run's folder, or an adapter in PEFT's format; `path=0.5` merges half of its change.
        output: the folder to make.
        adapters: more of them, merged in turn.
        base: a local folder or a hub id; None: the base that the adapters name.
        revision: branch, tag or commit of a hub's base; None: the one that was trained on.
        onto: original, the base's own weights, or dequantized, its NF4 weights as training saw them. The default
            is what scored better on held-out pairs of our own runs (scripts/bench/results/merge.jsonl).
        dtype: float32, bfloat16 or float16; None: each tensor keeps the base's.
        max_shard_bytes: the most in one file.
        verify: pairs to verify by; True: the run's own evaluation, where it has one and memory allows it.
        verify_only: verify what such a merge wrote before. A merge that was not verified is finished without it too.
        check_only: check everything and write nothing.
        allow_pickle: also read .bin weights (by torch's weights-only reader).
        trust_remote_code: run code that comes with the base; what a run's recipe says of it counts for nothing.

    Raises:
        QorpoError: what the user can fix, before anything is written where that can be known.
    """
    _check_options(onto, dtype, output, verify, verify_only=verify_only, check_only=check_only)
    job = _prepared(
        [adapter, *adapters], base, revision, cast(Onto, onto), dtype, max_shard_bytes,
        allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    output = None if output is None else Path(output).expanduser()
    is_merged = output is not None and job.awaits_verification(output, verify, verify_only=verify_only)
    pairs = job.pairs_to_verify_by(verify, or_fail=verify_only)
    if output is None or check_only:
        return job.result(None, None)
    if is_merged:
        logger.info("merge: %s is merged already; what is left is to verify it", output)
        check_folder(output, f"remove {output} and merge again", for_people=["README.md"])
    else:
        job.write(output, progress)
    return job.result(output, job.verified(output, pairs) if pairs else None)


def _check_options(
    onto: str,
    dtype: str | None,
    output: str | Path | None,
    verify: bool | str | Path,
    *,
    verify_only: bool,
    check_only: bool,
) -> None:
    """Raises RecipeError for what makes no merge."""
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"--dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
    if onto not in get_args(Onto):
        raise RecipeError(f"--onto: got {onto!r}; expected {' or '.join(get_args(Onto))}")
    if output is None and not check_only:
        raise RecipeError("--output: missing; give the folder to make, or --check-only")
    if verify_only and (check_only or verify is False):
        raise RecipeError(
            "--verify-only: not together with --no-verify or --check-only; leave one of them out"
        )


def _prepared(
    adapters: Sequence[str | Path],
    base: str | Path | None,
    revision: str | None,
    onto: Onto,
    dtype: str | None,
    max_shard_bytes: int,
    **trust: bool,
) -> "_Merge":
    """Find base and adapters, hold them together, and say what becomes of each tensor."""
    trained = [find_trained(str(path), **trust) for path in adapters]
    if onto == "dequantized" and any(
        each.recipe and each.recipe.model.quantization == "none" for each in trained
    ):
        raise RecipeError(
            "--onto dequantized: the run trained on unquantized weights; merge onto the original"
        )
    found = find_base(trained, str(base) if base else None, revision, **trust)
    plan = make_plan(
        found, trained, onto=onto, dtype=DTYPES[dtype] if dtype else None,
        max_shard_bytes=max_shard_bytes, allow_pickle=trust["allow_pickle"],
    )  # fmt: skip
    logger.info(
        "merge: %d of %d tensors change, onto the %s weights of %s; %s to write",
        plan.changed, sum(len(shard.tensors) for shard in plan.shards), onto, found.name, gib(plan.total_bytes),
    )  # fmt: skip
    return _Merge(found, trained, onto, plan, merge_record(found, trained, onto=onto, dtype=dtype))


@dataclass(frozen=True)
class _Merge:
    """A merge that was checked: all that writing and verifying it need."""

    base: Base
    trained: Sequence[Trained]
    onto: Onto
    plan: Plan
    record: Mapping[str, Any]

    @property
    def is_float32(self) -> bool:
        """Whether it is asked for in float32, and so compared in it."""
        return bool(self.record["dtype"] == "float32")

    def result(self, output: Path | None, verification: Verification | None) -> MergeResult:
        return MergeResult(output, self.onto, self.plan.changed, self.plan.total_bytes, verification)

    def awaits_verification(self, output: Path, verify: bool | str | Path, *, verify_only: bool) -> bool:
        """Whether the folder holds this merge already; raises RunError where it can't be made there."""
        if verify is not False and awaits_verification(output, self.record, verify_only=verify_only):
            return True
        check_output(output, self.plan.total_bytes)
        return False

    def write(self, output: Path, progress: Progress | None) -> None:
        done = 0

        def on_progress(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, self.plan.total_bytes)

        with output_folder(output) as folder:
            with torch.no_grad():
                hashes = write_shards(folder, self.plan.shards, on_progress)
            write_files(folder, self.base, self.trained, self.plan.config)
            write_card(folder, self.base, self.trained, self.onto)
            belongs_to = {
                "base": base_identity(self.base.folder),
                "adapters": [dict(each.belongs_to) for each in self.trained],
            }
            write_manifest(folder, belongs_to, hashes=hashes)
            write_verification(folder, self.record, NOT_VERIFIED)

    def pairs_to_verify_by(self, verify: bool | str | Path, *, or_fail: bool) -> list[Group]:
        """Pairs, where there are any and memory for them; says what it will take, or why there is no verification.

        Raises:
            QorpoError: where pairs that were asked for can't be used, or there are none and there have to be (`or_fail`).
        """
        if verify is False:
            return []
        asked_for = None if verify is True else verify
        try:
            if problem := unverifiable([each.adapter for each in self.trained]):
                raise RunError(problem)
            pairs = evaluation_pairs(
                asked_for,
                self.trained[0].recipe,
                str(tokenizer_folder(self.base, self.trained)),
                self.base.trust_remote_code,
            )
            if not pairs:
                raise DataError("the run has no evaluation pairs; give some with --verify")
            config = self.base.config.get_text_config()
            parameters = sum(prod(tensor.shape) for shard in self.plan.shards for tensor in shard.tensors)
            needed = memory_needed(
                parameters, config.vocab_size, config.hidden_size, pairs, in_float32=self.is_float32
            )
            free = memory_free(computing_device())
            if needed > free:
                raise RunError(f"verifying needs about {gib(needed)} of memory, and {gib(free)} are free")
        except QorpoError as problem:
            if asked_for is not None or or_fail:
                raise
            logger.warning("verify: not verified: %s", problem)
            return []
        logger.info("verify: by %d pairs, after merging; about %s of memory", len(pairs), gib(needed))
        return pairs

    def verified(self, output: Path, pairs: list[Group]) -> Verification:
        """Judged by the adapter on the weights that it was merged onto; those it was trained on are reported too."""
        recipe, onto = self.trained[0].recipe, self.onto
        references = ["nf4"] if onto == "dequantized" else ["none"]
        if recipe is not None and recipe.model.quantization == "nf4" and onto == "original":
            references.append("nf4")
        with _unverified_until_the_end(output):
            verification = verify_merged(
                output, self.base, [each.adapter for each in self.trained], pairs,
                references=references, objective=_compared_by(recipe), device=computing_device(),
                in_float32=self.is_float32,
            )  # fmt: skip
            write_verification(output, self.record, verification.as_dict())
        return verification


def _compared_by(recipe: Recipe | None) -> Objective:
    """What both models are measured by: the run's objective, or plain log-probs where that needs a reference."""
    objective = build_objective(recipe.objective) if recipe else Orpo()
    if not objective.needs_reference:
        return objective
    return Orpo() if objective.responses == 2 else Sft()


@contextmanager
def _unverified_until_the_end(output: Path) -> Iterator[None]:
    """Says of a verification that ends early that the model is there, and how to finish."""
    state = f"{output} is merged and not verified; verify it by the same command, or with --verify-only"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(state) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(
                f"verify: out of memory ({shortage_of(error)}); {state}, with more memory free"
            ) from error
        if failed := failed_write(error):
            raise RunError(
                f"{output / VERIFICATION}: could not be written ({failed.reason}); {failed.remedy}; {state}"
            ) from error
        raise
