"""qorpo: ORPO fine-tuning of language models on one GPU. `train` a recipe, or build from the parts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qorpo.data.sources import load_pairs
    from qorpo.objectives.orpo import orpo_loss
    from qorpo.ops.log_probs import token_logps
    from qorpo.training.loop import Trainer
    from qorpo.training.run import train

# Resolved on first use, so that `import qorpo` and `qorpo --help` don't wait for torch.
_HOMES = {
    "Trainer": "qorpo.training.loop",
    "load_pairs": "qorpo.data.sources",
    "orpo_loss": "qorpo.objectives.orpo",
    "token_logps": "qorpo.ops.log_probs",
    "train": "qorpo.training.run",
}

__all__ = ["Trainer", "load_pairs", "orpo_loss", "token_logps", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qorpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
