"""What only a CUDA device can show: kernels of variable-length attention, paged optimizer states, NF4 on the GPU.

Error budgets are against float64: a kernel in bfloat16 may be off by 1.5 times what the plain path in bfloat16 is, a whole
model, in which roundings meet, by 2. What kernels add by atomics differs in its last digits from run to run, so nothing that
went through attention's backward is compared by its bits.
"""

import gc
import importlib.util

import pytest
import torch
from helpers import architectures
from transformers import LlamaConfig, LlamaForCausalLM

from qorpo.data.groups import Group
from qorpo.data.pack import PackedGroups, pack_groups
from qorpo.engine.device import unpaged
from qorpo.engine.optim import load_optimizer_state, make_optimizer
from qorpo.errors import ModelError
from qorpo.model.adapters import attach_lora
from qorpo.model.attention import PackedLayout, dense_mask, packed_attention
from qorpo.model.liger import apply_liger
from qorpo.model.load import load_model
from qorpo.model.scoring import Scorer
from qorpo.model.selfcheck import make_scorer
from qorpo.ops.log_probs import token_logps, token_logps_plain
from qorpo.recipe import load_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]
DEVICE = torch.device("cuda")
BUDGET = 1.5
MODEL_BUDGET = 2.0

needs_flash = pytest.mark.skipif(
    not importlib.util.find_spec("flash_attn"), reason="flash-attn is not installed"
)
KERNELS = ["varlen", pytest.param("flash", marks=needs_flash)]


def packed_row(*lengths: tuple[int, int, int]) -> PackedGroups:
    pairs = [Group.of(((5,) * length for length in pair), "row") for pair in lengths]
    return pack_groups(pairs).to(DEVICE)


ROW = ((37, 21, 30), (5, 64, 1), (1, 3, 5), (130, 3, 70))


# --- attention ---


def truth(
    packed: PackedGroups,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """(1, T, heads, D) in float64, by the dense mask, written out."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return ((scores + dense_mask(packed, torch.float64, window)).softmax(-1) @ value).transpose(1, 2)


def output_and_gradients(attend, upstream, *inputs) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_kernel_is_as_exact_as_the_plain_path(kernel, window, heads, key_heads, head_size, softcap):
    packed = packed_row(*ROW)
    num_tokens = packed.input_ids.shape[1]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(count: int) -> torch.Tensor:
        shape = (1, count, num_tokens, head_size)
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)

    query, key, value = random(heads), random(key_heads), random(key_heads)
    upstream = random(heads).transpose(1, 2)

    def by(kernel):
        def attend(query, key, value):
            layout = PackedLayout.of(packed, kernel)
            return packed_attention(
                None, query, key, value, None, sliding_window=window, softcap=softcap, packed_layout=layout
            )[0]

        return attend

    wide = [tensor.double() for tensor in (query, key, value)]
    exact = output_and_gradients(lambda *leaves: truth(packed, *leaves, window, softcap), upstream, *wide)
    plain = errors(output_and_gradients(by("sdpa"), upstream, query, key, value), exact)
    try:
        fast = errors(output_and_gradients(by(kernel), upstream, query, key, value), exact)
    except ModelError as error:
        pytest.skip(str(error))  # PyTorch's varlen_attn has no soft cap, and an older one no window
    for name, fast_error, plain_error in zip(("output", "dq", "dk", "dv"), fast, plain, strict=True):
        assert fast_error <= BUDGET * plain_error, f"{name}: {fast_error:.2e}, plain {plain_error:.2e}"
        assert plain_error < 0.05


@pytest.mark.parametrize("kernel", ["sdpa", *KERNELS])
@pytest.mark.parametrize("window", [None, 8])
def test_causal_is_aligned_at_the_bottom_right(kernel, window):
    """All keys weigh the same and a value is its position, so a query's output is the mean position it attends to."""
    packed = packed_row((40, 3, 9))  # rejected: 9 queries over 49 keys
    positions = packed.position_ids[0].float()
    query = torch.zeros(1, 4, len(positions), 64, device=DEVICE, dtype=torch.bfloat16)
    value = positions.to(query.dtype)[None, None, :, None].expand_as(query).contiguous()
    layout = PackedLayout.of(packed, kernel)
    try:
        output, _ = packed_attention(
            None, query, query, value, None, sliding_window=window, packed_layout=layout
        )
    except ModelError as error:
        pytest.skip(str(error))
    first = torch.zeros_like(positions) if window is None else (positions - window + 1).clamp(min=0)
    torch.testing.assert_close(
        output[0, :, 0, 0].float(), (first + positions) / 2, atol=0.3, rtol=0
    )  # a top-left alignment would be off by 20


# --- a whole model ---


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def pairs():
    draw = torch.Generator().manual_seed(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(512, (count,), generator=draw).tolist())

    return pack_groups([Group(tokens(40), (tokens(21), tokens(9)), "pair") for _ in range(3)]).to(DEVICE)


def adapter_gradients(scorer, packed) -> torch.Tensor:
    """Of every adapter weight in one vector; B is moved off zero first, so that A has a gradient."""
    with scorer.packed_attention():
        loss = -scorer(packed).double().mean()
        loss.backward()
    trained = [p for p in scorer.parameters() if p.requires_grad]
    gradients = torch.cat([p.grad.flatten() for p in trained])
    scorer.zero_grad()
    return gradients


def test_nf4_gradients_stay_the_same_after_an_evaluation(base_folder, pairs):
    model = load_model(str(base_folder), quantization="nf4", device=DEVICE)
    model = attach_lora(model)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    scorer = make_scorer(model, "sdpa").train()
    before = adapter_gradients(scorer, pairs)
    scorer.eval()
    with torch.no_grad(), scorer.packed_attention():
        scorer(pairs)
    scorer.train()
    after = adapter_gradients(scorer, pairs)
    # Kernels that add in no fixed order differ in the last digits; a backward on repacked weights is off by 0.9.
    assert ((after - before).norm() / before.norm()).item() < 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_scores_the_same_by_every_kernel(base_folder, pairs, kernel):
    model = load_model(str(base_folder), quantization="nf4", device=DEVICE).eval()
    with torch.no_grad():
        logps = {}
        for mode in ("sdpa", kernel):
            scorer = make_scorer(model, mode)
            with scorer.packed_attention():
                logps[mode] = scorer(pairs)
    assert (logps["sdpa"] - logps[kernel]).abs().mean().item() < 0.05


@pytest.mark.parametrize("mode", ["sdpa", "dense", *KERNELS])
@pytest.mark.parametrize(
    "name", ["llama", "mistral-window", "qwen2-mixed-windows", "qwen3", "gemma2", "gemma3", "gpt2"]
)
def test_every_way_of_attending_is_as_exact_as_the_models_own(name, mode):
    packed = pack_groups([Group((5, 6, 7) * 9, ((8, 9) * 20, (10, 11, 12)), "row")] * 3).to(DEVICE)

    def logps(dtype, mode):
        scorer = Scorer(architectures.build(name).to(DEVICE, dtype), mode)
        scorer.fused_head = False  # nothing to compile for each of these small models
        with torch.no_grad(), scorer.packed_attention():
            return scorer(packed).double()

    exact = logps(torch.float64, "separate")
    plain = (logps(torch.bfloat16, "separate") - exact).norm()
    try:
        found = logps(torch.bfloat16, mode)
    except ModelError as error:
        pytest.skip(str(error))
    assert (found - exact).norm() <= MODEL_BUDGET * plain


# --- liger's modules ---

LIGER = ["llama", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite", "olmo2"]


@pytest.mark.parametrize("name", LIGER)
def test_ligers_modules_are_as_exact_as_the_models_own(name):
    pytest.importorskip("liger_kernel")
    packed = pack_groups([Group((5, 6, 7) * 9, ((8, 9) * 20, (10, 11, 12)), "row")] * 3).to(DEVICE)

    def logps_and_gradients(dtype, liger):
        model = architectures.build(name).to(DEVICE, dtype)
        assert apply_liger(model, liger) is liger
        scorer = Scorer(model, "sdpa")
        scorer.fused_head = False
        with scorer.packed_attention():
            logps = scorer(packed)
            logps.double().square().mean().backward()
        return [logps.detach(), torch.cat([weight.grad.flatten().double() for weight in model.parameters()])]

    exact = logps_and_gradients(torch.float64, False)
    own = errors(logps_and_gradients(torch.bfloat16, False), exact)
    fused = errors(logps_and_gradients(torch.bfloat16, True), exact)
    for what, error, own_error in zip(("logps", "gradients"), fused, own, strict=True):
        assert error <= MODEL_BUDGET * own_error, (
            f"{what}: {error:.2e}, the model's own modules {own_error:.2e}"
        )


# --- the head ---


@pytest.mark.parametrize(
    ("dtype", "head_trains", "fused"),
    [
        *((dtype, trains, False) for dtype in (torch.bfloat16, torch.float32) for trains in (False, True)),
        (torch.bfloat16, False, True),  # each is a compilation
        (torch.float32, True, True),
    ],
)  # fmt: skip
def test_the_head_on_the_gpu_is_as_exact_as_plain_pytorch(dtype, head_trains, fused, caplog):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=generator).to(dtype)
    weight = (torch.randn(4000, 256, generator=generator) * 0.2).to(dtype)
    targets = torch.randint(4000, (300,), generator=generator)
    hidden[:100] += weight[targets[:100]] * 2  # a third of the tokens are all but certain
    upstream = torch.rand(300, generator=generator, dtype=torch.float64)

    def logps_and_gradients(function, device, dtype):
        leaves = [
            hidden.to(device, dtype).requires_grad_(),
            weight.to(device, dtype).requires_grad_(head_trains),
        ]
        logps = function(*leaves, targets.to(device))
        gradients = torch.autograd.grad(logps, leaves[: 1 + head_trains], upstream.to(logps))
        return [logps.detach().cpu(), *(gradient.cpu() for gradient in gradients)]

    def chunked(*inputs):
        return token_logps(*inputs, chunk_tokens=100, fused=fused)

    exact = logps_and_gradients(token_logps_plain, "cpu", torch.float64)
    plain = errors(logps_and_gradients(token_logps_plain, DEVICE, dtype), exact)
    found = errors(logps_and_gradients(chunked, DEVICE, dtype), exact)
    for name, error, plain_error in zip(("logps", "dh", "dW"), found, plain, strict=False):
        assert error <= BUDGET * plain_error + 1e-6, f"{name}: {error:.2e}, plain {plain_error:.2e}"
    assert not [
        each for each in caplog.records if each.name.startswith("qorpo") and each.levelname == "WARNING"
    ]


def test_a_fused_head_holds_a_chunk_of_logits_once():
    pytest.importorskip("triton")
    tokens, hidden, vocab, chunk = 1024, 512, 32000, 512
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    hidden_SH = torch.randn(tokens, hidden, **options).requires_grad_()
    weight_VH, targets_S = (
        torch.randn(vocab, hidden, **options),
        torch.randint(vocab, (tokens,), device=DEVICE),
    )

    def extra_bytes():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_logps(hidden_SH, weight_VH, targets_S, chunk_tokens=chunk)
        return torch.cuda.max_memory_allocated() - before

    extra_bytes()  # compiles
    rows_bytes = tokens * hidden * (2 + 4 * 4)  # the stored vectors, and what a chunk's are made from
    assert 2 * chunk * vocab <= extra_bytes() <= 2 * chunk * vocab + rows_bytes


# --- the optimizer ---

PAGED_FROM = 100_000  # bitsandbytes pages the states of tensors of this many elements or more


@pytest.mark.skipif(bool(unpaged(DEVICE)), reason="no memory moves by itself between card and host here")
@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_states_are_paged_and_stay_so_over_a_checkpoint(name, tmp_path):
    recipe = load_recipe(
        {
            "model": {"path": "none"}, "data": {"train": "none"}, "output": "none",
            "train": {"optimizer": name, "learning_rate": 1e-2},
        }
    ).train  # fmt: skip

    def fresh():
        torch.manual_seed(0)
        large = torch.nn.Parameter(torch.randn(512, 512, device=DEVICE))
        small = torch.nn.Parameter(torch.randn(64, 16, device=DEVICE))
        return [large, small], make_optimizer([large, small], recipe)

    def step(parameters, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    def paged(parameter, optimizer):
        states = optimizer.state[parameter]
        return [getattr(states[key], "is_paged", False) for key in ("state1", "state2")]

    parameters, optimizer = fresh()
    step(parameters, optimizer, 1)
    assert parameters[0].numel() >= PAGED_FROM > parameters[1].numel()
    assert paged(parameters[0], optimizer) == [True, True]
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    halfway = [parameter.detach().clone() for parameter in parameters]
    step(parameters, optimizer, 2)

    resumed, resumed_optimizer = fresh()
    for parameter, value in zip(resumed, halfway, strict=True):
        parameter.data.copy_(value)
    load_optimizer_state(
        resumed_optimizer, torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True)
    )
    assert paged(resumed[0], resumed_optimizer) == [True, True]
    step(resumed, resumed_optimizer, 2)
    assert paged(resumed[0], resumed_optimizer) == [True, True]
    torch.cuda.synchronize()
    for straight, again in zip(parameters, resumed, strict=True):
        assert torch.equal(straight, again)


# --- memory ---

MIDDLING = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


def middling_trainer(tmp_path, liger=False, **memory):
    """A Trainer of a random model of 150 M parameters, on four pairs of 600, 700 and 700 tokens.

    Its modules are its own by default: those are what a plan counts.
    """
    from helpers.tiny import make_tokenizer

    from qorpo.data.counts import DataReport
    from qorpo.data.groups import TokenizedData
    from qorpo.training.loop import Trainer

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MIDDLING)).to(DEVICE, torch.bfloat16).requires_grad_(False)
    draw = torch.Generator().manual_seed(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 290, (count,), generator=draw).tolist())

    pairs = [Group(tokens(600), (tokens(700), tokens(700)), f"random:{line}") for line in range(4)]
    recipe = load_recipe(
        {
            "model": {"path": "random", "quantization": "none", "liger": liger}, "data": {"train": "random"},
            "train": {"pairs_per_step": 4, "max_steps": 3, "report_to": [], "save_every": 100},
            "memory": memory, "output": str(tmp_path / "run"),
        }
    )  # fmt: skip
    return Trainer(model, make_tokenizer(), recipe, TokenizedData(pairs, DataReport(kept=4)))


def fresh_card():
    gc.collect()  # a trainer is part of cycles, and holds its model
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def reserved_while_training(trainer) -> int:
    """The most that a run reserves once its kernels are compiled; a compiler may try some out on inputs of its own."""
    trainer._step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return torch.cuda.max_memory_reserved()


@pytest.mark.parametrize("checkpointing", [True, 6, False])
@pytest.mark.parametrize("microbatch_tokens", [2000, 8000])
def test_the_planned_memory_is_what_is_reserved(tmp_path, checkpointing, microbatch_tokens):
    from qorpo.planning.auto import planned_bytes

    fresh_card()
    memory = {"microbatch_tokens": microbatch_tokens, "activation_checkpointing": checkpointing}
    trainer = middling_trainer(tmp_path, **memory)
    reserved = reserved_while_training(trainer)
    planned = planned_bytes(trainer.recipe, trainer.model, (600, 700, 700))
    assert planned == pytest.approx(reserved, rel=0.1)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_with_liger_no_more_is_reserved_than_planned(tmp_path, checkpointing):
    from qorpo.planning.auto import planned_bytes

    pytest.importorskip("liger_kernel")
    fresh_card()
    memory = {"microbatch_tokens": 8000, "activation_checkpointing": checkpointing}
    trainer = middling_trainer(tmp_path, liger=True, **memory)
    reserved = reserved_while_training(trainer)
    planned = planned_bytes(trainer.recipe, trainer.model, (600, 700, 700))
    assert reserved <= 1.05 * planned


def test_no_step_waits_for_the_device_but_in_the_optimizer(tmp_path, monkeypatch):
    """What waits: bitsandbytes' paged optimizer, once for each tensor that trains and once at its end."""
    import bitsandbytes.optim.optimizer as bnb

    fresh_card()
    trainer = middling_trainer(tmp_path, liger="auto", microbatch_tokens=4000, activation_checkpointing=6)
    trainer.train()  # kernels are compiled, workspaces are there
    waits = []
    wait = bnb.sync_gpu
    monkeypatch.setattr(
        bnb, "sync_gpu", lambda tensor: (waits.append("bitsandbytes: sync_gpu"), wait(tensor))
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        means = trainer.session.backward(trainer.groups_of_step(0), trainer.objective, seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == []
    trainer.session.optimizer.step()
    assert len(waits) == len(trainer.session.trained) + 1
    assert torch.isfinite(means["loss"])
    assert torch.isfinite(means["grad_norm"])


def test_offload_changes_no_loss_and_no_gradient_and_takes_the_inputs_off_the_card(tmp_path):
    from qorpo.engine.step import run_step

    found, peaks = [], []
    for offload in (False, True):
        trainer = middling_trainer(
            tmp_path, activation_checkpointing=True, activation_offload=offload, microbatch_tokens=2000
        )
        fresh_card()
        trainer.model.train()
        with trainer.session.unwrapped.packed_attention():
            means = run_step(
                trainer.session.scorer, trainer.train_pairs, trainer.objective, backward=torch.Tensor.backward,
                microbatch_tokens=2000, device=DEVICE,
            )  # fmt: skip
        peaks.append(torch.cuda.max_memory_allocated())
        gradients = torch.cat([parameter.grad.flatten() for parameter in trainer.session.trained])
        found.append((means["loss"].item(), gradients))
    (kept_loss, kept), (moved_loss, moved) = found
    assert moved_loss == pytest.approx(kept_loss, rel=1e-6)
    # A layer whose input were lost or mixed up is off by its gradient's whole size.
    assert ((moved - kept).norm() / kept.norm()).item() < 1e-2
    inputs = MIDDLING["num_hidden_layers"] * 2000 * MIDDLING["hidden_size"] * 2
    assert peaks[0] - peaks[1] > 0.6 * inputs  # two are on the card at a time


def test_a_budget_caps_the_card_and_running_out_goes_on_in_smaller_micro_batches(tmp_path, caplog):
    fresh_card()
    trainer = middling_trainer(tmp_path, microbatch_tokens=8000, activation_checkpointing=False)
    fits = torch.cuda.memory_allocated() + 2 * 2**30
    torch.cuda.set_per_process_memory_fraction(fits / torch.cuda.get_device_properties(DEVICE).total_memory)
    try:
        trainer.train()
    finally:
        fresh_card()
    assert trainer.recipe.memory.microbatch_tokens < 8000
    assert "the step is done again in micro-batches of" in caplog.text


def test_auto_on_a_card_fits_its_budget(tmp_path):
    fresh_card()
    trainer = middling_trainer(tmp_path, budget_gib=3)
    given = trainer.recipe.memory.microbatch_tokens
    trainer.train()
    reserved = torch.cuda.max_memory_reserved()
    fresh_card()
    assert reserved <= 3 * 2**30
    assert trainer.recipe.memory.microbatch_tokens == given  # nothing ran out
