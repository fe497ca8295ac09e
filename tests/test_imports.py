"""Imports point one way, and what is to answer at once imports no torch.

cli → evaluation → generation → training, merging → planning → engine, build → model → objectives, data → ops → errors. The imports are read from the source,
those inside functions too, so nothing is missed that only runs where a GPU is.
"""

import ast
import graphlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import qorpo

PACKAGE = Path(qorpo.__file__).parent

# Each part of qorpo by height: it imports parts below it, and nothing beside or above it.
HEIGHTS = {
    "errors": 0,
    "printable": 0,
    "version": 0,
    "failed_write": 0,
    "intervals": 0,
    "out_of_memory": 1,
    "storage": 1,
    "recipe": 1,
    "ops": 2,
    "manifest": 2,
    "data": 3,
    "demo": 3,
    "objectives": 3,
    "model": 4,
    "build": 5,
    "identity": 5,
    "engine": 5,
    "card": 5,
    "planning": 6,
    "reports": 6,
    "training": 7,
    "merging": 7,
    "console": 1,
    "generation": 8,
    "evaluation": 9,
    "cli": 10,
    "__main__": 11,
    "__init__": 11,  # the public names, resolved on first use
}
# A recipe belongs to who runs it; what computes takes tensors, floats and pairs.
READERS_OF_RECIPES = {
    "recipe",
    "build",
    "card",
    "identity",
    "engine",
    "planning",
    "reports",
    "training",
    "merging",
    "generation",
    "evaluation",
    "cli",
    "__init__",
}

MODEL_LIBRARIES = {
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "trl",
    "liger_kernel", "flash_attn", "numpy", "datasets", "huggingface_hub",
}  # fmt: skip


class Import(NamedTuple):
    module: str  # the file, relative to the package: data/pack.py
    line: int
    target: str  # the dotted name: torch.nn.functional
    is_delayed: bool  # inside a function, so that it runs when that is called

    def __str__(self) -> str:
        return f"qorpo/{self.module}:{self.line} imports {self.target}"

    @property
    def part(self) -> str:
        return Path(self.module).parts[0].removesuffix(".py")

    @property
    def library(self) -> str:
        return self.target.split(".")[0]

    @property
    def target_part(self) -> str | None:
        """The part of qorpo that is imported, None for a library's; `import qorpo` alone is the public names."""
        if self.library != "qorpo":
            return None
        return [*self.target.split("."), "__init__"][1]


def imports_in(source: str, module: str) -> list[Import]:
    """Every import of a file, wherever it stands; `import_module("name")` with a literal name is one too."""
    return list(_imports(ast.parse(source), module, is_delayed=False))


def _imports(node: ast.AST, module: str, is_delayed: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for target in _targets(child, module):
            yield Import(module, child.lineno, target, is_delayed)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, module, is_delayed or is_function)


def _targets(node: ast.AST, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = ["qorpo", *Path(module).parts[:-1]]
        above = package[: len(package) - node.level + 1] if node.level else []
        home = [*above, *([node.module] if node.module else [])]
        # `from qorpo import ops` may name a module, `from qorpo.ops import token_logps` never a part.
        return [".".join([*home, alias.name] if home == ["qorpo"] else home) for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [
    found
    for path in FILES
    for found in imports_in(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix())
]


def listed(imports) -> list[str]:
    return sorted({str(found) for found in imports})


# --- the reader itself ---


def test_the_reader_finds_imports_wherever_they_stand():
    source = """
import os, torch.nn as nn
from qorpo.ops import log_probs
from . import records
from ..model.load import load_model
from qorpo import orpo_loss
if True:
    import a
def function():
    import b
    class Inner:
        from c.d import e
late = lambda: __import__("f")
importlib.import_module("g.h")
"""
    found = {(entry.target, entry.is_delayed) for entry in imports_in(source, "data/pack.py")}
    assert found == {
        ("os", False),
        ("torch.nn", False),
        ("qorpo.ops", False),
        ("qorpo.data", False),
        ("qorpo.model.load", False),
        ("qorpo.orpo_loss", False),
        ("a", False),
        ("b", True),
        ("c.d", True),
        ("f", True),
        ("g.h", False),
    }
    assert {entry.target_part for entry in imports_in(source, "data/pack.py")} == {
        None, "ops", "data", "model", "orpo_loss",
    }  # fmt: skip


def test_the_whole_package_was_read():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert {"cli", "training", "model", "objectives", "ops", "data", "recipe", "errors"} <= parts
    assert parts <= HEIGHTS.keys(), f"new in qorpo/: give {parts - HEIGHTS.keys()} a place in HEIGHTS"
    assert any(found.target_part == "ops" and found.part == "model" for found in IMPORTS)


# --- the direction ---


def test_imports_point_down():
    wrong = [
        found
        for found in IMPORTS
        if found.target_part not in (None, found.part)
        and HEIGHTS.get(found.target_part, 99) >= HEIGHTS[found.part]
    ]
    assert not wrong, listed(wrong)


def test_parts_and_modules_form_no_circle():
    parts: dict[str, set[str]] = {}
    modules: dict[str, set[str]] = {}
    names = {
        ".".join(["qorpo", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        for path in FILES
    }
    for found in IMPORTS:
        if found.target_part not in (None, found.part):
            parts.setdefault(found.part, set()).add(found.target_part)
        if found.target in names and not found.is_delayed:
            name = ".".join(["qorpo", *Path(found.module).with_suffix("").parts]).removesuffix(".__init__")
            modules.setdefault(name, set()).add(found.target)
    # Raise CycleError, naming the circle.
    graphlib.TopologicalSorter(parts).prepare()
    graphlib.TopologicalSorter(modules).prepare()


@pytest.mark.parametrize("part", ["ops", "objectives"])
def test_mathematics_needs_torch_alone(part):
    allowed = {*sys.stdlib_module_names, "torch", "qorpo"}
    wrong = [found for found in IMPORTS if found.part == part and found.library not in allowed]
    own = (None, "ops", part, "out_of_memory")  # the last imports nothing
    wrong += [found for found in IMPORTS if found.part == part and found.target_part not in own]
    assert not wrong, listed(wrong)


# Packing makes tensors; preparing writes Arrow files through datasets, and reads its hub.
DATA_MAY = {
    ("data/pack.py", "torch"),
    ("data/inspect.py", "numpy"),
    ("data/prepare.py", "numpy"),
    ("data/token_table.py", "numpy"),
    ("data/prepare.py", "datasets"),
    ("data/locate.py", "datasets"),
    ("data/locate.py", "huggingface_hub"),
}


def test_data_needs_no_model_library_and_torch_only_to_pack():
    wrong = [
        found
        for found in IMPORTS
        if found.part == "data"
        and found.library in MODEL_LIBRARIES
        and (found.module, found.library) not in DATA_MAY
    ]
    assert not wrong, listed(wrong)


def test_recipe_and_errors_need_no_model_library():
    wrong = [
        found for found in IMPORTS if found.part in ("recipe", "errors") and found.library in MODEL_LIBRARIES
    ]
    assert not wrong, listed(wrong)


def test_only_who_runs_a_recipe_reads_one():
    wrong = [
        found for found in IMPORTS if found.target_part == "recipe" and found.part not in READERS_OF_RECIPES
    ]
    assert not wrong, listed(wrong)


def test_the_command_line_delays_whatever_is_slow():
    fast = {"errors", "out_of_memory", "printable", "recipe", "console", "cli"}
    wrong = [
        found
        for found in IMPORTS
        if found.part in ("cli", "__main__")
        and not found.is_delayed
        and (found.library in MODEL_LIBRARIES or found.target_part not in (None, *fast))
    ]
    assert not wrong, listed(wrong)


# --- what is imported when it runs ---


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, env=environment
    )


def loaded_by(statement: str) -> set[str]:
    """Libraries in memory after a statement in a process of its own."""
    script = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(run_python("-c", script).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import qorpo",
        "import qorpo.errors, qorpo.recipe",
        "import qorpo.cli",
        "import qorpo.data.records, qorpo.data.sources, qorpo.data.filters, qorpo.data.tokenize",
    ],
)
def test_no_model_library_is_loaded_by(statement):
    loaded = loaded_by(statement)
    assert "qorpo" in loaded
    assert not loaded & MODEL_LIBRARIES


def test_mathematics_loads_torch_and_no_other_model_library():
    loaded = loaded_by("import qorpo.ops.log_probs, qorpo.ops.numerics, qorpo.objectives.orpo")
    assert "torch" in loaded
    assert loaded & MODEL_LIBRARIES <= {"torch", "numpy"}  # torch itself takes numpy, where it is


def test_help_answers_at_once():
    # It waits for nothing, so on a machine that is busy with other things the processor's time says as much.
    seconds = []
    for _ in range(3):
        started, spent_before = time.perf_counter(), processor_seconds_of_children()
        answer = run_python("-m", "qorpo", "--help")
        elapsed, spent = time.perf_counter() - started, processor_seconds_of_children() - spent_before
        seconds.append(min(elapsed, spent or elapsed))
    assert "Usage" in answer.stdout
    assert "train" in answer.stdout
    assert min(seconds) < 0.5, seconds


def processor_seconds_of_children() -> float:
    """Of processes that have ended; 0 where the system doesn't tell (Windows)."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_loads_no_model_library():
    # The imports as Python itself reports them, one a line: "import time: self | cumulative | name".
    report = run_python("-X", "importtime", "-m", "qorpo", "--help").stderr
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in report.splitlines() if "|" in line}
    assert "typer" in loaded
    assert not loaded & MODEL_LIBRARIES


# --- the public names ---


def test_every_public_name_is_there():
    assert set(qorpo.__all__) >= {"Trainer", "load_pairs", "orpo_loss", "plan", "token_logps", "train"}
    for name in qorpo.__all__:
        assert getattr(qorpo, name).__name__ == name
    # Type checkers are told of the same modules.
    homes = {found.target for found in IMPORTS if found.part == "__init__" and found.target_part}
    assert homes - {"qorpo.version"} == {getattr(qorpo, name).__module__ for name in qorpo.__all__}


def test_dir_lists_the_public_names_and_the_version_is_known():
    assert dir(qorpo) == sorted([*qorpo.__all__, "__version__"])
    assert qorpo.__version__[0].isdigit()
    assert run_python("-m", "qorpo", "--version").stdout == f"qorpo {qorpo.__version__}\n"
    for arguments in (["-h"], ["train", "-h"]):
        assert "Usage" in run_python("-m", "qorpo", *arguments).stdout


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'qorpo' has no attribute 'orpo_los'"):
        _ = qorpo.orpo_los
