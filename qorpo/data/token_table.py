"""Tokenized pairs in Arrow files, mapped into memory: a pair is read when it is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from qorpo.data.tokenize import TokenizedPair

SIDES = ("prompt", "chosen", "rejected")


def read_table(folder: Path, name: str) -> Any:
    """A set's tokens, mapped into memory, not read."""
    import pyarrow

    return pyarrow.concat_tables(
        pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        for path in sorted(folder.glob(f"{name}*tokens*"))
    )


class TokenizedPairs(Sequence[TokenizedPair]):
    """Tokenized pairs in Arrow files: some rows of a table, in order, each read when it is asked for."""

    def __init__(self, table: Any, rows: np.ndarray):
        self._table, self._rows = table, rows
        self._batches = table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = int(self._rows[index])
        place = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[place]
        row -= int(self._ends[place]) - batch.num_rows

        def ids(name: str) -> tuple[int, ...]:
            return tuple(batch[name][row].values.to_numpy().tolist())

        return TokenizedPair(
            *(ids("prompt_ids"), ids("chosen_ids"), ids("rejected_ids"), batch["source"][row].as_py()),
            *(batch[name][row].as_py() for name in ("prompt_cut", "chosen_cut", "rejected_cut")),
        )

    def largest_token_id(self) -> int:
        import pyarrow.compute as compute

        return max(compute.max(compute.list_flatten(self._table[f"{side}_ids"])).as_py() for side in SIDES)

    def lengths(self) -> np.ndarray:
        """(P, 3) token counts of prompt, chosen and rejected."""
        import pyarrow.compute

        columns = [pyarrow.compute.list_value_length(self._table[f"{side}_ids"]) for side in SIDES]
        return self._columns(columns, np.int64)

    def cuts(self) -> np.ndarray:
        """(P, 3) whether prompt, chosen and rejected were cut."""
        return self._columns([self._table[f"{side}_cut"] for side in SIDES], np.bool_)

    def _columns(self, columns: list[Any], dtype: type) -> np.ndarray:
        # Rows first: a dropped row is null, and a column with a null becomes floats or objects.
        taken = [column.take(self._rows).to_numpy() for column in columns]
        return np.stack(taken, axis=1).astype(dtype, casting="safe")


def largest_token_id(pairs: Sequence[TokenizedPair]) -> int:
    """The largest id in any of the pairs, -1 where there are none."""
    if isinstance(pairs, TokenizedPairs):
        return pairs.largest_token_id()
    return max((max(*p.prompt_ids, *p.chosen_ids, *p.rejected_ids) for p in pairs), default=-1)


def longest_pair(pairs: Sequence[TokenizedPair]) -> tuple[int, int, int]:
    """Token counts of prompt, chosen and rejected of the pair with most of them."""
    if isinstance(pairs, TokenizedPairs):
        lengths = pairs.lengths()
        return tuple(lengths[lengths.sum(1).argmax()].tolist())
    return max(((len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in pairs), key=sum)
