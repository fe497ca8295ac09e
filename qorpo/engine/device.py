"""What a card can't do that qorpo would otherwise ask of it: bfloat16 before sm_80, paged memory under WSL2 and Windows."""

import ctypes
import logging
import platform
import sys
from functools import cache

import torch

from qorpo.errors import ModelError
from qorpo.recipe import Recipe, resolve

logger = logging.getLogger(__name__)

CONCURRENT_MANAGED_ACCESS = 89
"""CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS: pages move between card and host while both work on them."""


def resolve_on(recipe: Recipe, device: torch.device | str) -> Recipe:
    """`resolve` for a device here: `auto` pages optimizer states only where the card can.

    Raises:
        RecipeError: as `resolve` does.
    """
    device = torch.device(device)
    lacks_paging = unpaged(device)
    resolved = resolve(recipe, device_type=device.type, can_page=lacks_paging is None)
    if lacks_paging and resolved.train.optimizer.startswith("paged"):
        _say_once(f"optimizer: {resolved.train.optimizer} may fail, {lacks_paging}; set it to auto")
    elif lacks_paging and recipe.train.optimizer == "auto":
        _say_once(f"optimizer: {resolved.train.optimizer}, {lacks_paging}")
    return resolved


@cache
def _say_once(text: str) -> None:
    logger.warning(text)


def check_bfloat16(device: torch.device) -> None:
    """Raises ModelError for a CUDA card that would emulate bfloat16, slowly and without a word."""
    if not computes_bfloat16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ModelError(
            f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no bfloat16, in which qorpo computes; take a card "
            "from sm_80 on (A100, RTX 30 series or newer), or the CPU (CUDA_VISIBLE_DEVICES= before the command)"
        )


def computes_bfloat16(device: torch.device) -> bool:
    """Whether it does so by itself; any device but a CUDA card is taken to."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def computing_device() -> torch.device:
    """A card where one computes bfloat16, as training does; else the CPU."""
    card = torch.device("cuda")
    return card if torch.cuda.is_available() and computes_bfloat16(card) else torch.device("cpu")


def unpaged(device: torch.device) -> str | None:
    """Why bitsandbytes' paged optimizers, which live in managed memory, can't be counted on; None where they can."""
    if device.type != "cuda" or torch.version.hip:
        return None
    can_page = _concurrent_managed_access(device.index or 0)
    if can_page is None:  # no driver to ask
        can_page = not (sys.platform == "win32" or _is_wsl())
    if can_page:
        return None
    where = "WSL2" if _is_wsl() else "Windows" if sys.platform == "win32" else "this driver"
    return (
        f"since under {where} no memory moves by itself between card and host (concurrentManagedAccess is 0)"
    )


def _is_wsl() -> bool:
    return "microsoft" in platform.release().lower()


def _concurrent_managed_access(index: int) -> bool | None:
    """The driver's answer; None where it has none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        card, value = ctypes.c_int(), ctypes.c_int()
        calls = (
            lambda: driver.cuInit(0),
            lambda: driver.cuDeviceGet(ctypes.byref(card), index),
            lambda: driver.cuDeviceGetAttribute(ctypes.byref(value), CONCURRENT_MANAGED_ACCESS, card),
        )
        return bool(value.value) if all(call() == 0 for call in calls) else None
    except (OSError, AttributeError):
        return None
