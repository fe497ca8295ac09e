"""What became of the records that were read: kept, and dropped by reason."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EXAMPLES_PER_REASON = 3


@dataclass(slots=True)
class DataReport:
    """What became of the records read; `read == kept + sum(dropped.values())` always.

    `dropped` and `noted` (kept at reading, but worth a look) count by reason; `examples` holds the first three
    places of each reason. `sources` are {"path", "sha256", "kept"} of the files. A record that makes several pairs
    counts once for each, and so does a pair for each time its source's weight has it. Tokenizing adds, for prompt,
    chosen and rejected, `cut`, how many were cut to the length limits, and `tokens`, {"total", "mean", "max"}.
    """

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def read(self) -> int:
        return self.kept + sum(self.dropped.values())

    def drop(self, reason: str, where: str) -> None:
        self._count(self.dropped, reason, where)

    def note(self, reason: str, where: str) -> None:
        self._count(self.noted, reason, where)

    def _count(self, counts: dict[str, int], reason: str, where: str) -> None:
        counts[reason] = counts.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(where)

    def summary(self) -> str:
        """Such as "read 12, dropped 7 empty, 5 same", the most frequent reason first."""
        counts = sorted(self.dropped.items(), key=lambda item: -item[1])
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts)
        return f"read {self.read:,}" + (f", dropped {dropped}" if dropped else "")

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"read": self.read, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataReport":
        return cls(**{name: value for name, value in values.items() if name != "read"})
