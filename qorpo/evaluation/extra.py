"""Libraries of the extra `eval`, imported where an evaluation needs them."""

import importlib
from typing import Any

from qorpo.errors import RunError


def needed(module: str, evaluation: str, package: str | None = None) -> Any:
    """A library's module. Raises RunError where it is not installed, and says how to have it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = package or error.name or module
        raise RunError(f"{evaluation}: needs {missing}; pip install 'qorpo[eval]'") from error
