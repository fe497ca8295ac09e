"""LoRA on 4-bit layers: what is computed is PEFT's, each weight is unpacked once a pass, and nothing wide is copied."""

import copy
from collections import Counter

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from qorpo.data.groups import Group
from qorpo.data.pack import pack_groups
from qorpo.errors import ModelError
from qorpo.model.adapters import attach_lora
from qorpo.model.checkpointing import checkpoint_layers
from qorpo.model.load import load_model
from qorpo.model.scoring import Scorer

PACKED = pack_groups(
    [
        Group((5, 6, 7) * 5, ((8, 9) * 7, (10, 11, 12, 13)), "a:1"),
        Group((3,), ((4, 5, 6), (7, 8)), "a:2"),
    ]
)
NUM_TOKENS = PACKED.input_ids.shape[1]
NUM_LINEARS = 2 * 7  # of the tiny base
LAYERS = "layers."


def adapted(base, quantization="nf4", **lora):
    torch.manual_seed(0)
    model = attach_lora(load_model(str(base), quantization=quantization), **lora).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def loss_and_gradients(model, dropout_seed=0):
    model.zero_grad()
    torch.manual_seed(dropout_seed)
    scorer = Scorer(model)
    with scorer.packed_attention():
        logps = scorer(PACKED)
        logps.square().mean().backward()
    return [logps.detach(), *(weight.grad for weight in model.parameters() if weight.requires_grad)]


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts, self.outputs = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.counts[str(func.overloadpacket)] += 1
        if isinstance(result, torch.Tensor):
            self.outputs.append((str(func.overloadpacket), tuple(result.shape), result.dtype))
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sums_are_pefts(base, dtype, dropout):
    ours = adapted(base, "none", dropout=dropout).to(dtype)
    pefts = copy.deepcopy(ours)
    for module in pefts.modules():
        if isinstance(module, LoraLayer):
            del module.forward
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    for mine, theirs in zip(loss_and_gradients(ours), loss_and_gradients(pefts), strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2"]
)  # the other keeps its matrices transposed, with biases
def test_dora_is_pefts(base, dropout, architecture):
    """Value and gradients in float64, of rows whose lengths have been trained."""
    model = load_model(str(base), quantization="none") if architecture == "llama" else tiny_gpt2()
    torch.manual_seed(0)
    ours = attach_lora(model.double(), use_dora=True, dropout=dropout).train()
    untrained = loss_and_gradients(ours)[0]
    with ours.disable_adapter():
        torch.testing.assert_close(loss_and_logps(ours), untrained, rtol=1e-12, atol=1e-12)
    for name, weight in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
        if "magnitude" in name:
            weight.data *= 1 + 0.3 * torch.randn_like(weight)
    pefts = copy.deepcopy(ours)
    for module in pefts.modules():
        if isinstance(module, LoraLayer):
            del module.forward
    for mine, theirs in zip(loss_and_gradients(ours), loss_and_gradients(pefts), strict=True):
        assert (mine - theirs).norm() <= 1e-12 * theirs.norm()


def tiny_gpt2():
    config = GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


def loss_and_logps(model):
    scorer = Scorer(model)
    with scorer.packed_attention():
        return scorer(PACKED).detach()


def test_dora_on_4_bits_begins_as_the_base_and_unpacks_no_weight_for_its_row_lengths(base):
    torch.manual_seed(0)
    model = attach_lora(load_model(str(base)), use_dora=True).train()
    with Calls() as calls:
        adapted_logps = loss_and_gradients(model)[0]
    with model.disable_adapter():
        assert torch.equal(loss_and_logps(model), adapted_logps)
    assert calls.counts["bitsandbytes.dequantize_4bit"] == NUM_LINEARS - 3  # in backward, as without DoRA
    for module in model.modules():
        if isinstance(module, LoraLayer):
            exact = dequantize_bnb_weight(module.base_layer.weight).float().norm(dim=1)
            torch.testing.assert_close(module.lora_magnitude_vector["default"].weight.detach(), exact)


def test_rows_of_zeros_have_a_gradient_under_dora():
    model = tiny_gpt2()
    model.transformer.h[0].attn.c_attn.weight.data[:, :5] = 0
    model = attach_lora(model, use_dora=True)
    assert all(each.isfinite().all() for each in loss_and_gradients(model.train()))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_an_orthogonal_beginning_is_the_base_with_both_matrices_there(base, quantization):
    """PEFT's own makes bytes of them on 4 bits, and rounds them to the base's type in 16."""
    torch.manual_seed(0)
    model = attach_lora(load_model(str(base), quantization=quantization), init="orthogonal")
    assert model.peft_config["default"].init_lora_weights is True  # or PEFT can't open it on 4 bits
    for module in model.modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            assert a.dtype == b.dtype == torch.float32
            assert a.std() > 0.02
            assert b.std() > 0.02
            assert (b @ a).abs().max() < 1e-6


def test_an_orthogonal_beginning_needs_an_even_rank(base):
    with pytest.raises(ModelError, match=r"lora\.init: orthogonal needs an even rank"):
        attach_lora(load_model(str(base)), init="orthogonal", rank=5)


def test_a_gaussian_beginning_and_rslora_are_pefts(base):
    model = attach_lora(load_model(str(base)), init="gaussian", use_rslora=True, rank=16, alpha=32)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    assert layer.scaling["default"] == 8  # 32 / √16
    assert layer.lora_A["default"].weight.std().item() == pytest.approx(1 / 16, rel=0.2)
    assert not layer.lora_B["default"].weight.any()


def test_what_is_beyond_one_plain_adapter_is_pefts_own(base):
    model = adapted(base, "none")
    ids = torch.arange(9)[None]
    with_one = model(ids).logits
    with model.disable_adapter():
        without = model(ids).logits
    assert not torch.equal(without, with_one)
    model.merge_adapter()
    merged = model(ids).logits
    model.unmerge_adapter()
    assert (merged - with_one).abs().max() < 0.2 * (without - with_one).abs().max()
    copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_each_4_bit_weight_is_unpacked_once_a_pass(base, recomputed, monkeypatch):
    """Once in forward, inside the product, once more where a layer is recomputed, and once in backward: the first
    layer's query, key and value need no gradient of their input there."""
    model = adapted(base)
    if recomputed:
        checkpoint_layers(model, recomputed)
    with Calls() as calls:
        loss_and_gradients(model)
    per_layer = NUM_LINEARS // 2
    assert calls.counts["bitsandbytes.gemm_4bit"] == NUM_LINEARS + recomputed * per_layer
    assert calls.counts["bitsandbytes.dequantize_4bit"] == NUM_LINEARS - 3


def test_no_activation_is_copied_in_float32_by_a_linear_layer(base):
    """On a bfloat16 model: the norms' own arithmetic, attention on the CPU and the loss are float32, and nothing else."""
    model = adapted(base)
    wide = []

    def saved(tensor):
        wide.append(tensor)
        return tensor

    layer = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    hidden = torch.randn(1, NUM_TOKENS, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with Calls() as calls, torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        out = layer(hidden)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    of_tokens = [entry for entry in calls.outputs if NUM_TOKENS in entry[1]]
    assert {dtype for _, _, dtype in of_tokens} == {torch.bfloat16}
    assert all(tensor.dtype == torch.bfloat16 for tensor in wide if NUM_TOKENS in tensor.shape)
    # Of the wide side only the product that all else is added to, and what it makes of its gradient: nothing is scaled.
    widths = Counter(name for name, shape, _ in of_tokens if shape == (NUM_TOKENS, layer.out_features))
    assert widths["aten.mul"] == widths["aten.add"] == widths["aten.clone"] == 0
    assert widths["bitsandbytes.gemm_4bit"] == widths["aten.addmm_"] == 1
    # What backward keeps: the input and the narrow product.
    kept = {tuple(tensor.shape) for tensor in wide if NUM_TOKENS in tensor.shape}
    assert kept == {(NUM_TOKENS, layer.in_features), (NUM_TOKENS, 16)}
