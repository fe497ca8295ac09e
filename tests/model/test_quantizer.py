"""A base in 4 bits: which parameters are, what they unpack to, and that training on them is training on those values."""

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

bitsandbytes = pytest.importorskip("bitsandbytes")

from helpers.architectures import SMALL  # noqa: E402

from qorpo.data.groups import Group  # noqa: E402
from qorpo.data.pack import pack_groups  # noqa: E402
from qorpo.model.adapters import attach_lora  # noqa: E402
from qorpo.model.checkpointing import checkpoint_layers  # noqa: E402
from qorpo.model.load import load_model  # noqa: E402
from qorpo.model.quantizer import four_bit_parameters  # noqa: E402
from qorpo.model.selfcheck import make_scorer  # noqa: E402
from qorpo.model.targets import shares  # noqa: E402

QWEN3_MOE = SMALL | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0], "head_dim": 8,
}  # fmt: skip
PACKED = pack_groups([Group((5, 6, 7), ((8, 9), (10, 11, 12)), "a:1"), Group((3,), ((4, 5), (7,)), "a:2")])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"](**QWEN3_MOE, initializer_range=0.2))
    folder = tmp_path_factory.mktemp("mixture")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_experts_are_in_4_bits_and_routers_are_not(mixture):
    model = load_model(str(mixture))
    packed = four_bit_parameters(model)
    experts = [name for name in packed if ".experts." in name]
    assert len(experts) == 2 * 2  # of two layers; the first is dense
    assert not [name for name in packed if ".gate." in name or "lm_head" in name]
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16
    plain = load_model(str(mixture), quantization="none")
    for layer in (1, 2):
        own, unpacked = (each.model.layers[layer].mlp.experts.gate_up_proj for each in (plain, model))
        codes, state = bitsandbytes.functional.quantize_4bit(own, quant_type="nf4", compress_statistics=True)
        assert torch.equal(unpacked, bitsandbytes.functional.dequantize_4bit(codes, state))
        assert 0 < (unpacked - own).norm() < 0.15 * own.norm()


@pytest.mark.parametrize("targets", ["all-linear", "all-linear+experts"])
def test_training_on_packed_experts_is_training_on_what_they_unpack_to(mixture, targets):
    """Also where layers are recomputed, and over and over: nothing piles up on the experts."""

    def gradients(model):
        torch.manual_seed(0)
        peft_model = attach_lora(model, rank=2, targets=targets)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        peft_model.train()
        checkpoint_layers(peft_model)
        scorer = make_scorer(peft_model)
        for _ in range(3):
            peft_model.zero_grad()
            with scorer.packed_attention():
                logps = scorer(PACKED)
                logps.sum().backward()
        return peft_model, [
            logps.detach(),
            *(each.grad for each in peft_model.parameters() if each.requires_grad),
        ]

    packed, found = gradients(load_model(str(mixture)))
    plain = load_model(str(mixture), quantization="none")
    for layer in (1, 2):
        for stack in ("gate_up_proj", "down_proj"):
            values = getattr(load_model(str(mixture)).model.layers[layer].mlp.experts, stack)
            getattr(plain.model.layers[layer].mlp.experts, stack).data.copy_(values)
    for name, shape in four_bit_parameters(load_model(str(mixture))).items():
        if name.endswith(".weight"):
            layer = load_model(str(mixture)).get_submodule(name.removesuffix(".weight"))
            values = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
            assert tuple(values.shape) == shape
            plain.get_parameter(name).data.copy_(values)
    for mine, theirs in zip(found, gradients(plain)[1], strict=True):
        assert (mine - theirs).float().norm() <= 0.05 * theirs.float().norm()
    for module in packed.modules():
        if isinstance(module, parametrize.ParametrizationList):
            assert len(module) == 1
    assert not parametrize._cache
    in_4_bits, adapted = shares(packed)
    assert in_4_bits > 0.6
    assert adapted == pytest.approx(in_4_bits, abs=1e-6) if "experts" in targets else adapted < in_4_bits
