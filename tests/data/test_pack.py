"""Rows by hand, and the split of a step's pairs by a token budget."""

import random
from itertools import chain

import pytest
import torch

from qorpo.data.groups import Group, row_tokens
from qorpo.data.pack import PackedGroups, pack_groups, split_by_budget


def pair(prompt: int, chosen: int, rejected: int, source: str = "") -> Group:
    """A pair of these lengths; its tokens do not matter."""
    return Group((1,) * prompt, ((2,) * chosen, (3,) * rejected), source)


def pairs_of(*row_lengths: int) -> list[Group]:
    """Pairs that take these numbers of row tokens, each known by its place."""
    return [pair(1, 1, length - 2, f"pair {index}") for index, length in enumerate(row_lengths)]


# --- the row ---

#            row:  0   1   2   3   4   5   6   7   8 | 9  10  11
#          token: 11  12  13  21  22  31  32  33  34 |41  51  61
#                 prompt      chosen  rejected       |p   c   r
#       position:  0   1   2   3   4   3   4   5   6 | 0   1   1
BY_HAND = [
    Group((11, 12, 13), ((21, 22), (31, 32, 33, 34)), "a:1"),
    Group((41,), ((51,), (61,)), "a:2"),
]


def assert_row(
    packed: PackedGroups, predictors: list[list[int]], targets: list[list[int]], segments: list[list[int]]
):
    assert packed.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33, 34, 41, 51, 61]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 1]]
    assert packed.lengths == ((3, 2, 4), (1, 1, 1))
    assert packed.predictors.tolist() == [*chain(*predictors)]
    assert packed.targets.tolist() == [*chain(*targets)]
    assert packed.segments.tolist() == [*chain(*segments)]
    tensors = (packed.input_ids, packed.position_ids, packed.predictors, packed.targets, packed.segments)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_responses_are_scored_the_first_token_of_both_by_the_prompts_last():
    packed = pack_groups(BY_HAND)
    assert_row(
        packed,
        predictors=[[2, 3], [2, 5, 6, 7], [9], [9]],
        targets=[[21, 22], [31, 32, 33, 34], [51], [61]],
        segments=[[1, 1], [2, 2, 2, 2], [4], [5]],
    )
    assert packed.scored == ((0, 2, 4), (0, 1, 1))


def test_prompts_are_scored_from_their_second_token_where_asked_for():
    packed = pack_groups(BY_HAND, score_prompts=True)
    assert_row(
        packed,
        predictors=[[0, 1], [2, 3], [2, 5, 6, 7], [9], [9]],  # a prompt of one token has none to score
        targets=[[12, 13], [21, 22], [31, 32, 33, 34], [51], [61]],
        segments=[[0, 0], [1, 1], [2, 2, 2, 2], [4], [5]],
    )
    assert packed.scored == ((2, 2, 4), (0, 1, 1))


@pytest.mark.parametrize("score_prompts", [False, True])
def test_every_scored_token_follows_its_predictor_in_a_sequence_read_from_the_row(score_prompts):
    """The same said without counting, for any number of responses: a prompt with one of them, cut out of the row again,
    holds each target one position after its predictor."""
    generator = random.Random(0)

    def tokens() -> list[int]:
        return generator.choices(range(1000), k=generator.randint(1, 9))

    groups = [Group.of([tokens() for _ in range(1 + n)], f"{n}") for n in (1, 2, 3, 5) * 10]
    packed = pack_groups(groups, score_prompts=score_prompts)
    positions, segments = packed.position_ids[0], packed.segments
    assert segments.tolist() == sorted(segments.tolist())
    prompt_segment = 0
    for group, lengths, scored in zip(groups, packed.lengths, packed.scored, strict=True):
        assert lengths == group.lengths
        for number, response in enumerate(group.responses, start=1):
            sequence = (*group.prompt_ids, *response)
            mine = (segments == prompt_segment + number) | (segments == prompt_segment)
            predictors, targets = packed.predictors[mine], packed.targets[mine]
            assert [sequence[place] for place in positions[predictors]] == packed.input_ids[
                0, predictors
            ].tolist()
            assert [sequence[place + 1] for place in positions[predictors]] == targets.tolist()
            first = 1 if score_prompts else len(group.prompt_ids)
            assert (positions[predictors] + 1).tolist() == list(range(first, len(sequence)))
        assert scored == tuple(int((segments == prompt_segment + part).sum()) for part in range(len(lengths)))
        prompt_segment += len(lengths)
    assert prompt_segment == int(segments.max()) + 1


def test_a_pair_takes_each_of_its_tokens_once():
    assert [row_tokens(tokens) for tokens in BY_HAND] == [9, 3]
    assert pack_groups(BY_HAND).input_ids.shape == (1, 12)


def test_a_row_moves_to_a_device_whole():
    packed = pack_groups(BY_HAND, score_prompts=True)
    moved = packed.to(torch.device("meta"))
    tensors = (moved.input_ids, moved.position_ids, moved.predictors, moved.targets, moved.segments)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.lengths, moved.scored) == (packed.lengths, packed.scored)
    assert packed.input_ids.device.type == "cpu"


@pytest.mark.parametrize("lengths", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_empty_side_is_a_fault_of_ours_and_named(lengths):
    with pytest.raises(AssertionError, match=r"pairs\.jsonl:7: an empty prompt or response"):
        pack_groups([pair(2, 2, 2), pair(*lengths, "pairs.jsonl:7")])


# --- the split ---


def by_source(bins: list[list[Group]]) -> list[list[str]]:
    return [[tokens.source for tokens in micro_batch] for micro_batch in bins]


def tokens_of(micro_batch: list[Group]) -> int:
    return sum(map(row_tokens, micro_batch))


def next_fit(pairs: list[Group], budget: int) -> list[list[Group]]:
    """The naive way: in the order they come, a new micro-batch where one is full."""
    bins: list[list[Group]] = []
    for tokens in pairs:
        if not bins or tokens_of(bins[-1]) + row_tokens(tokens) > budget:
            bins.append([])
        bins[-1].append(tokens)
    return bins


def test_longest_first():
    # 7 opens the first and 6 the second; 4 fits beside the 6 alone, 3 then beside the 7: both are full.
    assert by_source(split_by_budget(pairs_of(3, 7, 4, 6), 10)) == [
        ["pair 1", "pair 0"],
        ["pair 3", "pair 2"],
    ]


def test_best_fit():
    # 13 opens the first (7 left), 8 the second (12 left), which takes the other 8 (4 left). Both have room for the
    # 4; it goes where it leaves none, not into the first.
    bins = split_by_budget(pairs_of(13, 8, 8, 4), 20)
    assert by_source(bins) == [["pair 0"], ["pair 1", "pair 2", "pair 3"]]


def test_a_pair_over_the_budget_is_alone():
    pairs = pairs_of(3, 50, 4, 11)
    assert by_source(split_by_budget(pairs, 10)) == [["pair 1"], ["pair 3"], ["pair 2", "pair 0"]]
    assert by_source(split_by_budget(pairs, 1)) == [["pair 1"], ["pair 3"], ["pair 2"], ["pair 0"]]


def test_a_pair_of_just_the_budget_fits():
    assert len(split_by_budget(pairs_of(10), 10)) == 1
    assert by_source(split_by_budget(pairs_of(4, 6), 10)) == [["pair 1", "pair 0"]]
    assert len(split_by_budget(pairs_of(5, 6), 10)) == 2


def test_no_pairs_are_no_micro_batches():
    assert split_by_budget([], 10) == []


def test_fewer_micro_batches_than_the_naive_way():
    pairs = pairs_of(6, 6, 4, 4, 7, 3, 3, 7)
    assert len(next_fit(pairs, 10)) == 5
    assert len(split_by_budget(pairs, 10)) == 4  # 40 tokens: no split has fewer


@pytest.mark.parametrize("seed", range(50))
def test_whatever_the_lengths(seed):
    generator = random.Random(seed)
    lengths = [generator.randint(3, 60) for _ in range(generator.randint(1, 60))]
    budget = generator.choice([1, 10, 30, 60, 100, 1000])
    pairs = pairs_of(*lengths)
    bins = split_by_budget(pairs, budget)

    # Every pair exactly once: none lost, none doubled.
    assert sorted(source for names in by_source(bins) for source in names) == sorted(
        tokens.source for tokens in pairs
    )
    assert all(bins)
    # The budget holds, but for a pair that is over it by itself.
    assert all(tokens_of(micro_batch) <= budget or len(micro_batch) == 1 for micro_batch in bins)
    # No two micro-batches would have fitted into one, so fewer than half of them can be half empty.
    smallest = sorted(map(tokens_of, bins))[:2]
    assert len(smallest) < 2 or sum(smallest) > budget
    # The same again for the same pairs; the pairs handed in are left in their order.
    assert split_by_budget(pairs, budget) == bins
    assert [row_tokens(tokens) for tokens in pairs] == lengths
    # Another order of the pairs gives micro-batches of the same lengths.
    generator.shuffle(pairs)
    again = split_by_budget(pairs, budget)
    assert [list(map(row_tokens, micro_batch)) for micro_batch in again] == [
        list(map(row_tokens, micro_batch)) for micro_batch in bins
    ]
