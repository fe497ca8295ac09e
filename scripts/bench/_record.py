"""What the benchmarks share: one JSON line a result, and the memory that a stretch of code takes."""

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "flash-attn", "trl", "liger-kernel", "unsloth", "qorpo",
)  # fmt: skip
MIB, GIB = 2**20, 2**30

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the checkout's own qorpo, installed or not


def emit(
    bench: str, settings: dict[str, Any], figures: dict[str, Any], device: str, output: Path | None
) -> dict[str, Any]:
    """Print a result as one JSON line, append it to `output`, and return it."""
    line = {
        "bench": bench,
        "settings": settings,
        "figures": figures,
        "device": {"name": device_name(device), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "command": shlex.join(_short(argument) for argument in ["python", *sys.argv]),
    }
    text = json.dumps(line)
    print(text, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    return line


def add_output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the JSON lines to this file")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--threads", type=count, default=2, help="of the processors")


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device; nothing was measured")


def count(text: str) -> int:
    """An option's whole number of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def gib(text: str) -> float:
    """An option's size in GiB."""
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError
    return value


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package != "qorpo":
            return None
    # A checkout that is not installed.
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]


def commit() -> str | None:
    """The checkout's commit; a + behind it where tracked files differ from it."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


class ExtraMemory:
    """The most memory taken above what was held when this was made.

    On CUDA by the allocator's count; elsewhere by the process's resident set, whose high-water mark Linux lets a
    process reset. Where it can't be, it is the process's peak so far that counts, and the figures say so.
    """

    def __init__(self, device: str):
        self.device = device
        self.is_reset = True
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        _trim()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.before = _status_bytes("VmRSS")
        except OSError:
            self.is_reset = False
            self.before = _peak_of_process()

    def figures(self) -> dict[str, Any]:
        """On CUDA also the most that PyTorch reserved, what was held before included: what a card has to have."""
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _status_bytes("VmHWM") if self.is_reset else _peak_of_process()
        figures = {
            "extra_memory_mib": round((peak - self.before) / MIB, 1),
            "memory_peak_was_reset": self.is_reset,
        }
        if self.device == "cuda":
            figures["peak_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
        return figures


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _peak_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _trim() -> None:
    """Give freed memory back to the system, so that using it again counts."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _short(argument: str) -> str:
    """A path outside the checkout means nothing elsewhere: its last part does."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
