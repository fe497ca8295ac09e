"""The planned step against a real one, as torch's profiler saw its memory: real bitsandbytes layers, on the CPU."""

import json
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qorpo.build import build_objective
from qorpo.data.groups import GroupLengths
from qorpo.engine.optim import make_optimizer
from qorpo.engine.step import run_step
from qorpo.model.adapters import attach_lora
from qorpo.model.checkpointing import checkpoint_layers
from qorpo.model.load import load_model
from qorpo.model.parts import decoder_layers
from qorpo.model.scoring import Scorer
from qorpo.planning.fake_model import make_fake_model
from qorpo.planning.step_memory import CPU, HEAD, StepShape, filled_group, step_memory
from qorpo.recipe import load_recipe, resolve

SMALL = {
    "vocab_size": 3000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": SMALL,
    "qwen2": SMALL,
    "mistral": SMALL | {"sliding_window": 100},
    "phi": SMALL | {"num_key_value_heads": 8},
    "opt": {
        "vocab_size": 3000, "hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
        "max_position_embeddings": 2048, "word_embed_proj_dim": 256, "dropout": 0.0,
    },
    "gpt2": {
        "vocab_size": 3000, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 2048, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
ONE_PAIR = ((60, 200, 240),)
# Twice these make two micro-batches of them: the first is longer than the others together.
THREE_PAIRS = ((40, 120, 100), (30, 80, 10), (5, 40, 35))


class Case(NamedTuple):
    model: str
    quantization: str
    rows: tuple[GroupLengths, ...]
    recomputed: int | None = None
    optimizer: str = "paged_adamw_8bit"
    attention: str = "sdpa"
    accumulates: bool = True
    objective: str = "{}"  # its section of the recipe, JSON
    lora: str = "{}"  # the same


CASES = [
    Case("llama", "nf4", ONE_PAIR),
    Case("llama", "none", THREE_PAIRS, recomputed=0, optimizer="adamw_torch", accumulates=False),
    Case("qwen2", "nf4", THREE_PAIRS, recomputed=0, optimizer="adamw_torch_fused"),
    Case("mistral", "nf4", THREE_PAIRS, recomputed=2),
    Case("mistral", "nf4", ONE_PAIR, recomputed=2, attention="dense", optimizer="paged_adamw_32bit"),
    Case("phi", "none", ONE_PAIR, optimizer="adamw_8bit"),
    Case("opt", "nf4", THREE_PAIRS),
    Case("gpt2", "none", ONE_PAIR, recomputed=0),
    Case("llama", "none", ONE_PAIR, objective='{"name": "simpo"}'),
    Case("llama", "nf4", ((60, 240), (30, 90)), objective='{"name": "sft"}'),
    Case("llama", "nf4", ONE_PAIR, objective='{"name": "dpo"}'),
    Case("llama", "none", THREE_PAIRS, recomputed=0, objective='{"name": "mmpo"}'),
    Case("llama", "nf4", ((60, 240), (30, 90)), objective='{"name": "kto"}'),
    Case("llama", "none", ((60, 240), (30, 90)), recomputed=0, objective='{"name": "kto"}'),
    Case(
        "llama", "nf4", THREE_PAIRS, objective='{"name": "cpo", "nll_tokens": "all", "nll_average": "token"}'
    ),
    Case("llama", "nf4", ONE_PAIR, lora='{"use_dora": true}'),
    Case(
        "opt",
        "none",
        ONE_PAIR,
        recomputed=0,
        optimizer="adamw_torch",
        lora='{"use_dora": true, "dropout": 0.1}',
    ),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """folder_of("llama"): a random model's folder."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**MODELS[name]))
            model.to(torch.bfloat16).save_pretrained(made[name])
        return made[name]

    return of


def recipe_of(case: Case):
    raw = {"model": {"path": "x", "quantization": case.quantization}, "data": {"train": "x"}, "output": "x"}
    raw["objective"], raw["lora"] = json.loads(case.objective), json.loads(case.lora)
    return resolve(load_recipe(raw | {"train": {"optimizer": case.optimizer}}), device_type="cpu")


def loaded(folder: Path, recipe):
    model = load_model(str(folder), quantization=recipe.model.quantization)
    return attach_lora(model, **dict(recipe.lora))


def standing_storages(model, optimizer) -> dict[int, int]:
    """Bytes of every storage that is there between steps, quantization constants included."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            nested = state.state2
            tensors += [state.absmax, state.code, state.offset, nested.absmax, nested.code]
    for values in optimizer.state.values():
        tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measured_bytes(case: Case, folder: Path) -> tuple[int, int]:
    """What stands between steps, and the most that the second step adds to it at once."""
    recipe = recipe_of(case)
    model = loaded(folder, recipe)
    if case.recomputed != 0:
        checkpoint_layers(model, case.recomputed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, recipe.train)
    scorer = Scorer(model, case.attention, 64)
    pairs = [filled_group(lengths) for lengths in case.rows]
    model.train()

    def step():
        with scorer.packed_attention():
            run_step(
                scorer, pairs * (2 if case.accumulates else 1), build_objective(recipe.objective), device=CPU,
                microbatch_tokens=sum(map(sum, case.rows)), backward=torch.Tensor.backward,
            )  # fmt: skip
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    standing = sum(standing_storages(model, optimizer).values())
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step()
        changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        levels = list(
            accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
        )
        if levels[-1] == 0:  # else the profiler has lost events, as it does now and then
            return standing, max(levels)
    raise AssertionError("the profiler lost events three times over")


@pytest.mark.parametrize(
    "case",
    CASES,
    ids=lambda case: "-".join(map(str, (case.model, case.quantization, len(case.rows), case.recomputed))),
)
def test_the_planned_peak_is_the_measured_one(case, folder_of):
    folder = folder_of(case.model)
    shape = StepShape(
        case.rows, case.accumulates, case.attention, 64, case.recomputed, offload=False, on_cuda=False
    )
    planned = step_memory(AutoConfig.from_pretrained(folder), recipe_of(case), shape).peak
    standing, most = measured_bytes(case, folder)
    kinds = ("base weights", "quantization", "adapters", "optimizer", "buffers")
    planned_standing = sum(size for kind, size in planned.by_kind.items() if kind.startswith(kinds))
    assert most > 0.5 * standing  # the step is no rounding error of the whole
    assert planned.total_bytes == pytest.approx(standing + most, rel=0.02)
    assert planned_standing == pytest.approx(standing, rel=0.01)
    assert planned.total_bytes - planned_standing == pytest.approx(most, rel=0.02)


def test_the_stand_in_for_nf4_has_the_bytes_and_the_adapters_of_the_real_layers(folder_of):
    recipe = recipe_of(CASES[0])
    real = loaded(folder_of("llama"), recipe)
    fake, _ = make_fake_model(AutoConfig.from_pretrained(folder_of("llama")), recipe)
    packed = {name: p.nbytes for name, p in real.named_parameters() if p.dtype == torch.uint8}
    assert packed == {name: p.nbytes for name, p in fake.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 4 * 7

    def others(model):
        return {
            name: (p.shape, p.dtype, p.requires_grad)
            for name, p in model.named_parameters()
            if p.dtype != torch.uint8
        }

    assert others(real) == others(fake)
    state = real.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.quant_state
    constants = fake.get_base_model().model.layers[0].mlp.up_proj.base_layer.nf4_constants
    real_bytes = [
        state.absmax.nbytes,
        state.state2.absmax.nbytes + state.state2.code.nbytes + state.code.nbytes + 4,
    ]
    assert [tensor.nbytes for tensor in constants] == real_bytes


@pytest.mark.parametrize(
    ("has_card", "has_triton", "bytes_a_logit"), [(False, False, 2), (True, True, 2), (True, False, 6)]
)
def test_a_chunk_of_logits_is_counted_as_the_card_holds_it(
    folder_of, monkeypatch, has_card, has_triton, bytes_a_logit
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr("qorpo.planning.step_memory.triton_is_installed", lambda: has_triton)
    config = AutoConfig.from_pretrained(folder_of("llama"))

    def head_bytes(chunk_tokens: int) -> int:
        shape = StepShape(ONE_PAIR, True, "varlen", chunk_tokens, None, False, on_cuda=True)
        return step_memory(config, recipe_of(CASES[0]), shape).peaks[HEAD].by_kind["head"]

    more = head_bytes(200) - head_bytes(100)
    rows = 12 * 256  # of the head and of hidden states, in float32
    assert more == pytest.approx(100 * (bytes_a_logit * 3000 + rows), rel=0.02)


@pytest.mark.parametrize("recomputed", [None, 2])
def test_offload_moves_layers_inputs_to_the_host(folder_of, recomputed):
    case = CASES[0]
    config, layers = AutoConfig.from_pretrained(folder_of("llama")), recomputed or 4

    def count(offload: bool):
        shape = StepShape(ONE_PAIR, True, "varlen", 256, recomputed, offload, on_cuda=True)
        return step_memory(config, recipe_of(case), shape)

    kept, moved = count(False), count(True)
    one_input = sum(ONE_PAIR[0]) * 256 * 2
    assert moved.host_bytes == pytest.approx(layers * one_input, rel=0.01)
    assert kept.host_bytes == 0
    assert len(decoder_layers(make_fake_model(config, recipe_of(case))[0])) == kept.num_layers == 4
    saved = kept.peaks["forward of the head"].total_bytes - moved.peaks["forward of the head"].total_bytes
    assert saved == pytest.approx(layers * one_input, rel=0.01)


@pytest.mark.parametrize(
    ("card", "config", "mib"),
    [
        (None, "", 8.125),
        ((8, 6), "", 8.125),
        ((9, 0), "", 32),
        ((12, 0), "", 32),
        ((9, 0), ":4096:2:16:8", 8.125),
    ],
)
def test_workspaces_of_matrix_products_are_counted_by_the_card(folder_of, monkeypatch, card, config, mib):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)

    def counted(on_cuda: bool) -> int:
        shape = StepShape(ONE_PAIR, True, "sdpa", 256, None, False, on_cuda=on_cuda)
        llama = AutoConfig.from_pretrained(folder_of("llama"))
        return step_memory(llama, recipe_of(CASES[0]), shape).peak.by_kind.get(
            "matrix products' workspaces", 0
        )

    assert counted(on_cuda=True) == 2 * mib * 2**20  # of the threads of forward and backward
    assert counted(on_cuda=False) == 0
