"""qorpo: ORPO fine-tuning of language models on one GPU. `train` a recipe, or build from the parts."""

import importlib
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qorpo.data.sources import load_pairs
    from qorpo.evaluation.evaluate import evaluate
    from qorpo.generation.generate import generate
    from qorpo.generation.load import load
    from qorpo.merging.merge import merge
    from qorpo.objectives.orpo import orpo_loss
    from qorpo.ops.log_probs import token_logps
    from qorpo.planning.plan import plan
    from qorpo.training.loop import Trainer
    from qorpo.training.run import train

# What the libraries underneath have to hear before they are imported:
# bitsandbytes warns of a kernel for inference that has no autograd; qorpo keeps it out of training.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# PEFT asks transformers by a name that is being renamed; nothing for qorpo's user to fix.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
# As the head's kernel is compiled, PyTorch advises coarser products in float32 and Triton tells of its next version.
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
# On the CPU oneDNN keeps up to 1,024 matrix products it was asked for, most of a megabyte each; packed rows differ in
# length, so they would all be new. 48 hold what one row asks for again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")

# Rows differ in length, so blocks of fixed size would not fit the next ones; read as CUDA starts.
if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# Resolved on first use, so that `import qorpo` and `qorpo --help` don't wait for torch.
_HOMES = {
    "Trainer": "qorpo.training.loop",
    "evaluate": "qorpo.evaluation.evaluate",
    "generate": "qorpo.generation.generate",
    "load": "qorpo.generation.load",
    "load_pairs": "qorpo.data.sources",
    "merge": "qorpo.merging.merge",
    "orpo_loss": "qorpo.objectives.orpo",
    "plan": "qorpo.planning.plan",
    "token_logps": "qorpo.ops.log_probs",
    "train": "qorpo.training.run",
}

__all__ = [
    "Trainer",
    "evaluate",
    "generate",
    "load",
    "load_pairs",
    "merge",
    "orpo_loss",
    "plan",
    "token_logps",
    "train",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from qorpo.version import installed_version

        return installed_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'qorpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
