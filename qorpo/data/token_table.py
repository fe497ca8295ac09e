"""Groups in Arrow files, mapped into memory: a group is read when it is asked for.

Legend: P groups of a set, n responses of each; all groups of one set have as many.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from qorpo.data.groups import Group, GroupLengths


def read_table(folder: Path, name: str) -> Any:
    """A set's tokens, mapped into memory, not read."""
    import pyarrow

    return pyarrow.concat_tables(
        pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        for path in sorted(folder.glob(f"{name}*tokens*"))
    )


class ArrowGroups(Sequence[Group]):
    """Groups in Arrow files: some rows of a table, in order, each read when it is asked for.

    The table's columns are those of `Group` (`arrow_schema`); a row that is not taken may hold nulls.
    """

    def __init__(self, table: Any, rows: np.ndarray):
        self._table, self._rows = table, rows
        self._batches = table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = int(self._rows[index])
        place = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[place]
        row -= int(self._ends[place]) - batch.num_rows
        return Group(
            prompt_ids=_ids(batch["prompt_ids"][row]),
            responses=tuple(map(_ids, batch["responses"][row])),
            source=batch["source"][row].as_py(),
            cut=tuple(batch["cut"][row].as_py()),
            unscored=tuple(map(tuple, batch["unscored"][row].as_py())),
            margin=batch["margin"][row].as_py(),
            desirable=batch["desirable"][row].as_py(),
        )

    def column(self, name: str) -> Any:
        """A column's values, one a group."""
        return self._table[name].take(self._rows)

    def largest_token_id(self) -> int:
        import pyarrow.compute as compute

        prompts = compute.list_flatten(self._table["prompt_ids"])
        responses = compute.list_flatten(compute.list_flatten(self._table["responses"]))
        return max(compute.max(ids).as_py() for ids in (prompts, responses))

    def lengths(self) -> np.ndarray:
        """(P, 1 + n) token counts of each group's parts, from where lists begin and end: no token is read or copied."""
        import pyarrow.compute as compute

        # Of the rows that are taken: a dropped row is null, and a column with a null becomes floats or objects.
        prompts = compute.list_value_length(self._table["prompt_ids"]).take(self._rows).to_numpy()
        counts = [  # a batch at a time, since lists among nulls are copied to be flattened
            compute.list_value_length(batch["responses"].flatten()).to_numpy() for batch in self._batches
        ]
        is_group = self._table["responses"].is_valid().to_numpy()
        places = np.cumsum(is_group)[self._rows] - 1
        responses = np.concatenate(counts)
        responses = responses.reshape(-1, max(1, len(responses) // max(1, is_group.sum())))
        return np.column_stack([prompts, responses[places]]).astype(np.int64, casting="safe")

    def cuts(self) -> np.ndarray:
        """(P, 1 + n) whether each part was cut."""
        import pyarrow.compute as compute

        flags = compute.list_flatten(self._table["cut"].take(self._rows)).to_numpy()
        return self._by_group(flags).astype(np.bool_, casting="safe")

    def _by_group(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(len(self), len(values) // max(len(self), 1))


def _ids(values: Any) -> tuple[int, ...]:
    return tuple(values.values.to_numpy().tolist())


def arrow_schema() -> Any:
    """The columns of groups in a table, and `reason`, why a row is none."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        {
            "prompt_ids": ids, "responses": pa.list_(ids), "source": pa.string(), "cut": pa.list_(pa.bool_()),
            "unscored": pa.list_(ids),
            "margin": pa.float64(), "desirable": pa.bool_(), "reason": pa.string(),
        }
    )  # fmt: skip


def largest_token_id(groups: Sequence[Group]) -> int:
    """The largest id in any of the groups, -1 where there are none."""
    if isinstance(groups, ArrowGroups):
        return groups.largest_token_id()
    return max((max(*g.prompt_ids, *(max(ids) for ids in g.responses)) for g in groups), default=-1)


def sources_without(groups: Sequence[Group], name: Literal["margin", "desirable"]) -> list[str]:
    """Where the groups come from that don't have this value."""
    if isinstance(groups, ArrowGroups):
        return groups.column("source").filter(groups.column(name).is_null()).to_pylist()
    return [group.source for group in groups if getattr(group, name) is None]


def longest_group(groups: Sequence[Group]) -> GroupLengths:
    """The lengths of the group with most tokens."""
    if isinstance(groups, ArrowGroups):
        lengths = groups.lengths()
        return tuple(lengths[lengths.sum(1).argmax()].tolist())
    return max((group.lengths for group in groups), key=sum)


def longest_sequence(groups: Sequence[Group]) -> int:
    """The most tokens of a prompt with one of its responses, 0 where there are none."""
    if isinstance(groups, ArrowGroups):
        prompts, *responses = groups.lengths().T
        return int((prompts + np.max(responses, axis=0)).max(initial=0))
    return max((prompt + max(rest) for prompt, *rest in (group.lengths for group in groups)), default=0)
