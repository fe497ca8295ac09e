"""Estimates from a few layers against counts of every layer, and what is searched and resolved by them."""

import pytest
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qorpo.planning import counter as counter_module
from qorpo.planning.counter import MemorySettings, StepCounter, group_of
from qorpo.planning.fake_model import make_fake_model, shortened
from qorpo.planning.largest import largest_rank_that_fits, largest_that_fits, longest_row_that_fits
from qorpo.planning.settings import fastest_that_fits, frugal, ladder, reserved_bytes
from qorpo.planning.step_memory import HEAD
from qorpo.recipe import MemoryRecipe, load_recipe, resolve

SEVEN_LAYERS = {
    "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def recipe_of(*overrides: str):
    raw = {"model": {"path": "x"}, "data": {"train": "x"}, "output": "x"}
    return resolve(load_recipe(raw, overrides), device_type="cuda")


def counter_of(*overrides: str, model="llama", longest=300, **config) -> StepCounter:
    config = CONFIG_MAPPING[model](**SEVEN_LAYERS | config)
    return StepCounter(config, recipe_of(*overrides), longest=group_of(longest, 2), on_cuda=True)


@pytest.mark.parametrize(("recomputed", "offload"), [(7, False), (7, True), (0, False), (4, False)])
def test_the_estimate_is_the_count(recomputed, offload):
    counter, settings = counter_of(), MemorySettings(300, 64, recomputed, offload)
    assert counter.peak_bytes(settings) == pytest.approx(counter.count(settings).peak.total_bytes, rel=0.003)


@pytest.mark.parametrize("settings", [MemorySettings(300, 64, 7, True), MemorySettings(300, 64, 3, False)])
def test_the_estimate_is_the_count_in_every_part(settings):
    counter = counter_of("lora.rank=1024")  # large enough for pages
    estimate, count = counter.estimate(settings), counter.count(settings)
    assert estimate.stretch == count.stretch
    assert estimate.peak.where == count.peak.where
    assert estimate.peak.by_kind.keys() == count.peak.by_kind.keys()
    for kind, size in count.peak.by_kind.items():
        assert estimate.peak.by_kind[kind] == pytest.approx(
            size, rel=0.01, abs=0.003 * count.peak.total_bytes
        )
    assert count.paged_bytes > 0
    for field in ("host_bytes", "paged_bytes", "num_layers", "traffic_bytes"):
        assert getattr(estimate, field) == getattr(count, field)


@pytest.mark.parametrize("recomputed", [9, 4])
@pytest.mark.parametrize("changes", [["tuning=full"], ["memory.sharding=full"]], ids=["full", "lora"])
def test_the_estimate_is_the_count_of_a_sharded_model(recomputed, changes):
    counter = counter_of(*changes, num_hidden_layers=9).changed(ranks=4)
    settings = MemorySettings(300, 64, recomputed, offload=False)
    assert counter.peak_bytes(settings) == pytest.approx(counter.count(settings).peak.total_bytes, rel=0.005)


def test_the_estimate_is_near_where_no_layer_is_like_the_first_and_the_last():
    # Gradients that grow during backward, and inputs fetched ahead: the peak is in the second layer, which is neither.
    counter, settings = counter_of("train.pairs_per_step=1"), MemorySettings(300, 64, 7, True)
    assert counter.peak_bytes(settings) == pytest.approx(counter.count(settings).peak.total_bytes, rel=0.015)


def test_the_estimate_is_near_where_windows_alternate():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2
    counter = counter_of(model="gemma3_text", head_dim=32, layer_types=kinds[:7])
    settings = MemorySettings(300, 64, 7, False)
    assert counter.peak_bytes(settings) == pytest.approx(counter.count(settings).peak.total_bytes, rel=0.02)


def test_models_of_unequal_layers_are_counted_whole():
    counter = counter_of(model="qwen2_moe", num_experts=4, mlp_only_layers=[0], decoder_sparse_step=1)
    assert not counter.can_shorten
    settings = MemorySettings(300, 64, 7, False)
    assert counter.peak_bytes(settings) == counter.count(settings).peak.total_bytes


def test_layers_are_left_out_where_a_config_works_their_kinds_out_by_itself():
    config = CONFIG_MAPPING["bamba"](**SEVEN_LAYERS)
    assert shortened(config, 2).num_hidden_layers == 2
    assert len(shortened(config, 2).layer_types) == 2


def test_a_model_that_makes_weights_elsewhere_than_it_is_told_is_faked_too():
    config = CONFIG_MAPPING["diffllama"](**SEVEN_LAYERS | {"num_hidden_layers": 1})
    model, _ = make_fake_model(config, recipe_of())
    assert all(isinstance(tensor, FakeTensor) for tensor in [*model.parameters(), *model.buffers()])


def test_adapters_on_the_last_layer_alone_need_no_gradient_before_it():
    counter, settings = (
        counter_of("lora.targets=[layers.6.self_attn.q_proj]"),
        MemorySettings(300, 64, 7, False),
    )
    assert counter.num_trained == counter_of("lora.targets=[q_proj]").num_trained / 7
    assert counter.peak_bytes(settings) < counter_of().peak_bytes(settings)


def test_a_model_that_packed_attention_does_not_reach_is_counted_another_way():
    counter = counter_of(model="gemma2", head_dim=32)  # with a soft cap, no kernel of PyTorch's
    counter.count(MemorySettings(300, 64, 7, False))
    assert counter.modes == ["sdpa"]
    assert counter_of("model.attention=flash").modes == ["varlen"]


def test_rows_are_filled_with_the_longest_pairs():
    counter = counter_of("train.pairs_per_step=3", longest=101)
    assert counter.longest == (1, 50, 50)

    def rows(tokens):
        return counter.rows(MemorySettings(tokens, 64, 7, False))

    assert rows(1) == rows(101) == rows(103) == (counter.longest,)
    assert rows(250) == (counter.longest, counter.longest, group_of(48, 2))
    assert sum(map(sum, rows(250))) == 250
    assert rows(10_000) == (counter.longest,) * 3


# --- searching and settling ---


@pytest.mark.parametrize(
    ("room", "ceiling"), [(1_000, 10_000), (40, 10_000), (37, 10_000), (100_000, 500), (29, 99)]
)
@pytest.mark.parametrize("guess", [11, 60, 5_000])
def test_the_largest_that_fits(room, ceiling, guess):
    def need(number: int) -> int:
        return 30 + max(number, 3 * (number - 100))  # bends upwards

    found = largest_that_fits(need, 16, guess, room, ceiling)
    best = max((number for number in range(1, ceiling + 1) if need(number) <= room), default=0)
    assert found <= best
    assert found >= min(0.6 * best, best - 1) or room < need(16)
    assert found == 0 or need(found) <= room


def test_the_longest_row_fits_by_a_full_count_and_hardly_a_longer_one():
    counter, recipe = counter_of(), recipe_of()
    room = 2 * reserved_bytes(counter.peak_bytes(frugal(recipe.memory, counter, 64)))
    row = longest_row_that_fits(recipe, counter, 64, room)
    longer = counter.changed(longest=group_of(row, 2))
    counted = longer.count(frugal(recipe.memory, longer, max(64, row // 16)))
    assert 0.96 * room < reserved_bytes(counted.peak.total_bytes) <= 1.005 * room


def test_the_largest_rank_fits_by_a_full_count_and_hardly_a_larger_one():
    counter, recipe = counter_of("lora.rank=32"), recipe_of("lora.rank=32")
    settings = frugal(recipe.memory, counter, 64)
    room = int(1.3 * reserved_bytes(counter.peak_bytes(settings)))
    rank = largest_rank_that_fits(recipe, counter, 64, room)
    assert 32 < rank < SEVEN_LAYERS["hidden_size"]
    counted = counter.changed(recipe.replace("lora.rank", rank)).count(settings)
    assert 0.96 * room < reserved_bytes(counted.peak.total_bytes) <= 1.005 * room


class LineCounter:
    """A model of ten layers whose needs can be added up by hand: 100 stand, a kept layer is 20, an input is 2."""

    num_layers, on_cuda, longest = 10, True, group_of(1001, 2)

    def rows(self, settings):
        return (self.longest,) * max(1, settings.microbatch_tokens // 1001)

    def peaks(self, settings):
        rows, recomputed = len(self.rows(settings)), settings.checkpointed_layers
        kept = rows * (20 * (10 - recomputed) + 2 * (2 if settings.offload else recomputed))
        return {HEAD: 100 + kept + settings.chunk_tokens // 16, "backward": 100 + kept + 32 * rows}

    def peak_bytes(self, settings):
        return max(self.peaks(settings).values())


AUTO = MemoryRecipe()
RUNGS = [
    MemorySettings(4096, 1024, 10, False),  # 100 + 4 · 20 + 128
    MemorySettings(1001, 1024, 10, False),  # 100 + 20 + 64, the head
    MemorySettings(1001, 512, 10, False),  # 100 + 20 + 32, either
    MemorySettings(1001, 256, 10, False),  # 100 + 20 + 32, backward
    MemorySettings(1001, 256, 10, True),  # 100 + 4 + 32
]


def test_the_ladder_saves_where_the_peak_is_and_time_last():
    counter = LineCounter()
    assert list(ladder(AUTO, counter)) == RUNGS
    assert [counter.peak_bytes(rung) for rung in RUNGS] == [308, 184, 152, 152, 136]


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (140, RUNGS[4]),
        (10, RUNGS[4]),  # nothing fits: the most frugal
        (160, RUNGS[2]),
        (200, RUNGS[1]),
        (330, RUNGS[0]),
        # 5% stay free: 1.03 · (100 + 72 a layer kept + 80 + 128) ≤ 0.95 · 600
        (600, MemorySettings(4096, 1024, 7, False)),
        (10_000, MemorySettings(4096, 1024, 0, False)),
    ],
)
def test_the_fastest_that_fits_is_settled_on(room, expected):
    assert fastest_that_fits(AUTO, LineCounter(), room) == expected


def test_what_is_given_is_kept():
    memory = MemoryRecipe(
        microbatch_tokens=700, logprob_chunk_tokens=33, activation_checkpointing=4, activation_offload=False
    )
    expected = MemorySettings(700, 33, 4, False)
    assert list(ladder(memory, LineCounter())) == [expected]
    assert (
        fastest_that_fits(memory, LineCounter(), 1)
        == fastest_that_fits(memory, LineCounter(), 10**12)
        == expected
    )


def test_each_count_is_made_once(monkeypatch):
    calls = []
    real = counter_module.step_memory
    monkeypatch.setattr(counter_module, "step_memory", lambda *a: calls.append(a) or real(*a))
    counter = counter_of()
    for _ in range(2):
        for recomputed in range(8):
            counter.peak_bytes(MemorySettings(300, 64, recomputed, False))
    assert len(calls) <= 12
