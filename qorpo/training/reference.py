"""The reference: log-probs by the model as it starts, scored once before step 1 and kept in the run folder.

One rule for all: the reference is scored, or read, before a checkpoint is loaded. Then the model is the start, whatever
trains (fresh adapters, one that training goes on from, all parameters; on one rank or several), and in a resumed run too.
So a reference that is missing or damaged is made again, and a pass that was killed simply begins anew.

Legend: P groups, N responses of each.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from qorpo.data.groups import Group
from qorpo.data.references import Mismatched, WithReference
from qorpo.engine.distributed import from_main
from qorpo.errors import DamageError, DataError, RunError
from qorpo.manifest import MANIFEST, check_folder, write_manifest
from qorpo.training.checkpoint import check_same
from qorpo.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

LOGPS = "logps.safetensors"

Score = Callable[[Sequence[Group]], torch.Tensor]  # groups -> (P, N) sums of log-probs, the same on all ranks


class Part(NamedTuple):
    """A set of groups, and the places of those that are scored together."""

    groups: Sequence[Group]
    windows: Sequence[Sequence[int]]


def with_reference(
    parts: Mapping[str, Part],
    score: Score,
    folder: RunFolder,
    belongs_to: Mapping[str, Any],
    *,
    mismatched_by: int | None,
    on_progress: Callable[[int, int], None],
) -> dict[str, Sequence[Group]]:
    """The groups of each part with the reference's log-probs: read from the run folder, else scored and kept there.

    All ranks call this together, before any checkpoint is loaded.

    Args:
        parts: by name (train, eval).
        belongs_to: the run's identity, by which another run's reference is told.
        mismatched_by: the seed of the partners whose answers are scored too, for kto; None: no partners.
        on_progress: told how many groups are scored, of how many.

    Raises:
        DataError: where kto has no two different prompts. RunError: where the folder holds another run's reference.
    """
    wanted = dict(parts)
    if mismatched_by is not None:
        for name, part in parts.items():
            wanted[f"{name}.mismatched"] = Part(_mismatched(name, part.groups, mismatched_by), part.windows)
    shapes = {name: (len(part.groups), len(part.groups[0].responses)) for name, part in wanted.items()}
    logps = _read(folder, belongs_to, shapes)
    if logps is None:
        logps = _scored(wanted, score, on_progress)
        _write(folder, belongs_to, logps)
    values = {name: logps_PN.tolist() for name, logps_PN in logps.items()}
    found: dict[str, Sequence[Group]] = {}
    for name, part in parts.items():
        other = f"{name}.mismatched"
        mismatched = WithReference(wanted[other].groups, values[other]) if other in wanted else None
        found[name] = WithReference(part.groups, values[name], mismatched)
    return found


def _mismatched(name: str, groups: Sequence[Group], seed: int) -> Mismatched:
    found = Mismatched(groups, seed)
    if not found.is_possible:
        raise DataError(
            f"data.{name}: objective.name: kto measures prompts with answers to others, and its {len(groups):,} rows have "
            "one prompt; give rows of at least two"
        )
    return found


def _scored(
    parts: Mapping[str, Part], score: Score, on_progress: Callable[[int, int], None]
) -> dict[str, torch.Tensor]:
    """(P, N) float64 of each part."""
    total, done = sum(len(part.groups) for part in parts.values()), 0
    counts = ", ".join(f"{name} {len(part.groups):,}" for name, part in parts.items())
    logger.info("reference: scoring by the model as it starts: %s", counts)
    found = {}
    for name, part in parts.items():
        logps_PN = torch.zeros(
            len(part.groups), len(part.groups[0].responses), dtype=torch.float64
        )  # each place is in one window
        for window in part.windows:
            logps_PN[list(window)] = score([part.groups[place] for place in window]).cpu()
            done += len(window)
            on_progress(done, total)
        found[name] = logps_PN
    return found


def _read(
    folder: RunFolder, belongs_to: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, torch.Tensor] | None:
    """What was kept, from the main rank to all; None where it is to be made."""

    def read() -> dict[str, torch.Tensor] | RunError | None:
        place = folder.reference
        if not place.exists():
            return None
        try:
            manifest = check_folder(place, "it is made again")
            if manifest is None or list(manifest.files) != [LOGPS]:
                raise DamageError(f"{place}: has no {MANIFEST} of its own; it is made again")
            check_same(place, manifest.belongs_to, belongs_to)
            found = load_file(place / LOGPS)
            if {name: tuple(logps_PN.shape) for name, logps_PN in found.items()} != dict(shapes):
                raise RunError(
                    f"{place}: is of other data; remove it to have it made again, or give another output"
                )
        except DamageError as error:
            logger.warning("reference: %s", error)
            return None
        except RunError as error:
            return error
        return found

    found = from_main(read)
    if isinstance(found, RunError):
        raise found
    return found


def _write(folder: RunFolder, belongs_to: Mapping[str, Any], logps: dict[str, torch.Tensor]) -> None:
    with folder.new_folder(folder.reference) as unfinished:
        if folder.is_main:
            save_file(logps, unfinished / LOGPS)
            write_manifest(unfinished, belongs_to)
