"""liger's kernels by Triton's interpreter, which runs them on the CPU: how far scores and gradients are from the model's own.

A process of its own, since Triton reads TRITON_INTERPRET as it is imported. Prints a JSON line an architecture: the
largest relative difference of log-probs and of any gradient, in float32.
"""

import json
import os
import sys
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # a script: it has no conftest

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from helpers.architectures import SHARED, build
from qorpo.data.groups import Group
from qorpo.data.pack import pack_groups
from qorpo.model.adapters import attach_lora
from qorpo.model.liger import apply_liger, own_modules
from qorpo.model.scoring import Scorer
from qorpo.model.selfcheck import resolve_mode


@triton.jit
def rsqrt(x):
    return 1 / tl.sqrt(x)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


def fix_interpreter() -> None:
    """What kernels take for granted on a GPU: libdevice's functions, scalars that are tensors, a count of processors."""
    liger_kernel.ops.rms_norm.rsqrt, liger_kernel.ops.geglu.tanh = rsqrt, tanh
    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = with_floats
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=2)


def main() -> None:
    fix_interpreter()
    packed = pack_groups(
        [Group((5, 6, 7), ((8, 9), (10, 11, 12)), "a:1"), Group((3,), ((4, 5), (7,)), "a:2")]
    )
    for name in SHARED:
        model = build(name).float()
        if not apply_liger(model, "auto"):
            continue
        peft_model = attach_lora(model, rank=2)
        for weight_name, weight in peft_model.named_parameters():
            weight.requires_grad_(True)
            if "lora_B" in weight_name:
                torch.nn.init.normal_(weight, std=0.1)
        scorer = Scorer(peft_model)
        resolve_mode(scorer, scorer, liger=True)
        upstream_S = torch.randn(len(packed.targets))

        def logps_and_gradients(scorer=scorer, upstream_S=upstream_S):
            scorer.zero_grad()
            with scorer.packed_attention():
                logps_S = scorer(packed)
                (logps_S * upstream_S).sum().backward()
            return [
                logps_S.detach(),
                *(weight.grad for weight in scorer.parameters() if weight.grad is not None),
            ]

        fused = logps_and_gradients()
        with own_modules(peft_model):
            own = logps_and_gradients()
        apart = max(((a - b).norm() / (b.norm() + 1e-9)).item() for a, b in zip(fused, own, strict=True))
        print(json.dumps({"architecture": name, "apart": apart, "mode": scorer.mode}), flush=True)


if __name__ == "__main__":
    main()
