"""Win rates from judges' verdicts: AlpacaEval's annotation files, as its leaderboards publish them."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qorpo.console import aligned
from qorpo.errors import DataError
from qorpo.intervals import Interval, mean_interval

TIES = (0, 1.5)  # as older and newer files write them


@dataclass(frozen=True)
class WinRate:
    """How often a model's answer is preferred to the reference's, in percent; a tie is half a win.

    `standard_error` is that of a mean of independent verdicts, as AlpacaEval states it; the interval is a bootstrap
    over instructions.
    """

    file: str
    model: str
    reference: str
    annotations: int
    wins: int
    ties: int
    no_verdict: int  # left out
    win_rate: Interval
    standard_error: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge_annotations(path: str | Path) -> WinRate:
    """The win rate of an AlpacaEval annotation file: a JSON list of objects with `preference`.

    A preference of 1 is for output_1 (the reference), 2 for output_2 (the model), 0 or 1.5 a tie, null no verdict; a
    number between 1 and 2 counts as that share of a win, as in AlpacaEval 2.

    Raises:
        DataError: where the file can't be read, or a preference is none of these.
    """
    records = _read(Path(path).expanduser())
    verdicts = [(record, _wins(path, number, record)) for number, record in enumerate(records, start=1)]
    judged = [(record, wins) for record, wins in verdicts if wins is not None]
    if not judged:
        raise DataError(f"{path}: no record has a verdict ('preference'); give a judge's annotations")
    wins_P = [100 * wins for _, wins in judged]
    prompts = [
        json.dumps(record.get("instruction", f"record {place}")) for place, (record, _) in enumerate(judged)
    ]
    counts = Counter(wins for _, wins in judged)
    mean = sum(wins_P) / len(wins_P)
    spread = sum((wins - mean) ** 2 for wins in wins_P) / max(len(wins_P) - 1, 1)
    return WinRate(
        file=str(path),
        model=_name(records, "generator_2"),
        reference=_name(records, "generator_1"),
        annotations=len(judged),
        wins=sum(count for wins, count in counts.items() if wins > 0.5),
        ties=counts[0.5],
        no_verdict=len(records) - len(judged),
        win_rate=mean_interval(wins_P, prompts),
        standard_error=math.sqrt(spread / len(wins_P)),
    )


def as_table(rates: Sequence[WinRate]) -> list[str]:
    """Lines for a person: a line a file, in percent."""
    rows = [["", "win rate %", "standard error", "95% interval", "annotations", "ties", "no verdict"]]
    for each in rates:
        rate = each.win_rate
        rows.append(
            [
                f"{each.model} against {each.reference}", f"{rate.value:.2f}", f"{each.standard_error:.2f}",
                f"{rate.low:.2f} to {rate.high:.2f}", str(each.annotations), str(each.ties), str(each.no_verdict),
            ]
        )  # fmt: skip
    return aligned(rows)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(
            f"{path}: can't be read ({reason}); give a judge's annotations as a JSON list"
        ) from error
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise DataError(f"{path}: is no JSON list of objects; give a judge's annotations.json")
    return found


def _wins(path: str | Path, number: int, record: dict[str, Any]) -> float | None:
    """The share of a win of output_2, or None where there is no verdict."""
    place = f"{path}: record {number}"
    if "preference" not in record:
        raise DataError(f"{place}: has no 'preference'; give a judge's annotations, not a model's outputs")
    preference = record["preference"]
    if preference is None or (isinstance(preference, float) and math.isnan(preference)):
        return None
    if isinstance(preference, bool) or not isinstance(preference, int | float):
        raise DataError(f"{place}: preference is {preference!r}; expected a number from 1 to 2, 0 or null")
    if preference in TIES:
        return 0.5
    if not 1 <= preference <= 2:
        raise DataError(f"{place}: preference is {preference!r}; expected a number from 1 to 2, 0 or null")
    return float(preference) - 1


def _name(records: Sequence[dict[str, Any]], key: str) -> str:
    names = dict.fromkeys(str(record[key]) for record in records if record.get(key))
    return ", ".join(names) or key.replace("generator", "output")
