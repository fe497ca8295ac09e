"""What the README and its pages tell people to type works, and what they say of the code is so."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import qorpo
from qorpo.recipe import FIELDS, load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / ".github" / "docs").glob("*.md"))]
README, *_ = TEXTS = [page.read_text(encoding="utf-8") for page in PAGES]
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
QUICK = [
    "model.path=demo",
    "train.max_steps=2",
    "train.pairs_per_step=2",
    "data.max_length=256",
    "data.max_prompt_length=128",
]


def blocks(language):
    return [block for text in TEXTS for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands(start):
    """The commands that begin so, each once, without their comments."""
    lines = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith(start)))


def run(command, folder):
    return subprocess.run(
        command,
        cwd=folder,
        input="Hello?\n",  # what `qorpo chat` is asked
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def workplace(tmp_path):
    """A folder as the README's commands expect it: configs/ and preference pairs of one's own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = (ROOT / "qorpo" / "demo" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    (tmp_path / "my-prompts.jsonl").write_text('{"prompt": "Name a colour."}\n', encoding="utf-8")
    for name in ("my-pairs.jsonl", "pairs.jsonl", "held-out.jsonl"):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "my-model").symlink_to(ROOT / "qorpo" / "demo" / "base")
    return tmp_path


def test_the_recipe_shown_loads_and_shows_only_defaults():
    whole, *fragments = sorted(map(yaml.safe_load, blocks("yaml")), key=lambda recipe: len(str(recipe)))[::-1]
    for fragment in fragments:
        load_recipe({"model": {"path": "x"}, "output": "x", **fragment})
    shown = load_recipe(whole)
    settings = {
        key: value
        for key, value in shown.values()
        if key not in ("model.path", "data.train", "data.eval", "output")
    }
    assert settings == {key: value for key, value in load_recipe(
        {"model": {"path": "x"}, "data": {"train": "x"}, "output": "x"}
    ).values() if key in settings}  # fmt: skip
    assert set(settings) < set(FIELDS)


def test_the_data_commands_run(workplace, command, monkeypatch):
    monkeypatch.chdir(workplace)
    for line in commands("qorpo data"):
        code, _, err = command(*shlex.split(line)[1:], QUICK[0])
        assert code == 0, err
    assert (workplace / "data.html").exists()


@pytest.mark.slow
def test_the_commands_run(workplace):
    trainings = commands("qorpo train")
    assert "--resume" in trainings[1]
    for line in trainings:
        done = run([sys.executable, "-m", "qorpo", *shlex.split(line)[1:], *QUICK], workplace)
        assert done.returncode == 0, done.stderr
    assert (workplace / "runs/mine/adapter/adapter_model.safetensors").exists()
    files = next(found[1] for text in TEXTS if (found := re.search(r"runs/NAME/\n(.*?)```", text, re.DOTALL)))
    promised = [
        line.split()[0].rstrip("/") for line in files.splitlines() if "where the objective needs" not in line
    ]
    assert sorted(promised) == sorted(path.name for path in (workplace / "runs/mine").iterdir())

    shutil.copytree(workplace / "runs/mine", workplace / "runs/other")
    sweeps = [f"{line} {' '.join(QUICK)}" for line in commands("qorpo sweep")]
    for line in (*commands("qorpo report"), *sweeps):
        done = run([sys.executable, "-m", "qorpo", *shlex.split(line)[1:]], workplace)
        assert done.returncode == 0, done.stderr
    assert (workplace / "comparison.html").exists()
    assert (workplace / "runs/lambdas/report.html").exists()

    for line in commands("qorpo merge"):
        done = run([sys.executable, "-m", "qorpo", *shlex.split(line)[1:]], workplace)
        assert done.returncode == 0, done.stderr
    assert (workplace / "models/mine/model.safetensors").exists()

    for line in (*commands("qorpo chat"), *commands("qorpo generate")):
        done = run(
            [sys.executable, "-m", "qorpo", *shlex.split(line)[1:], "--max-new-tokens", "4"], workplace
        )
        assert done.returncode == 0, done.stderr
    assert len((workplace / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    asking = next(block for block in blocks("python") if "qorpo.load(" in block)
    done = run([sys.executable, "-c", asking], workplace)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_evaluation_commands_run(workplace, command, monkeypatch):
    monkeypatch.chdir(workplace)
    (workplace / "runs").mkdir()
    (workplace / "runs" / "mine").symlink_to(ROOT / "qorpo" / "demo" / "base")
    instruction = {
        "key": 1,
        "prompt": "Say yes.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    (workplace / "input_data.jsonl").write_text(json.dumps(instruction))
    (workplace / "prompts.jsonl").write_text('{"prompt": "Say yes."}')
    (workplace / "annotations.json").write_text('[{"preference": 2}]')
    ran = 0
    for line in [*commands("qorpo evaluate"), *commands("qorpo judge")]:
        needs_hub = "lm-eval" in line or "diversity" in line  # which no test may wait for
        if needs_hub or "ifeval" in line:
            pytest.importorskip("lm_eval", reason="the extra eval is not installed")
        short = ["--max-new-tokens", 4] if "evaluate" in line else []
        code, _, err = command(*shlex.split(line)[1:], *short)
        assert code == (2 if needs_hub else 0), err
        assert not needs_hub or "can't be loaded" in err
        ran += 1
    assert ran == 5
    assert (workplace / "results.json").is_file()


@pytest.mark.slow
def test_the_plan_commands_run(workplace, command, monkeypatch):
    monkeypatch.chdir(workplace)
    for line in commands("qorpo plan"):
        code, out, err = command(*shlex.split(line)[1:], *QUICK[:1], *QUICK[3:])
        assert code == 0, err
        assert out.startswith("{" if "--json" in line else "model " if "--budgets" in line else "demo: fits")


@pytest.mark.slow
def test_the_python_examples_run(workplace):
    from_recipe, from_parts = (block for block in blocks("python") if "qorpo.load(" not in block)
    from_recipe = from_recipe.replace('["output=', json.dumps(QUICK)[:-1] + ', "output=')
    from_parts = from_parts.replace(
        '"output": "runs/parts"', '"output": "runs/parts", "train": {"max_steps": 2, "pairs_per_step": 2}'
    )
    for code in (from_recipe, from_parts):
        done = run([sys.executable, "-c", code], workplace)
        assert done.returncode == 0, done.stderr
    assert (workplace / "runs/parts/adapter/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_quickstart_runs(workplace):
    done = run([sys.executable, str(ROOT / "scripts" / "examples" / "quickstart.py")], workplace)
    assert done.returncode == 0, done.stderr
    assert "merged into" in done.stdout


def test_the_scripts_named_are_there():
    for block in blocks("bash"):
        for program, script in re.findall(r"(bash|python) (scripts/\S+)", block):
            assert os.access(ROOT / script, os.X_OK if program == "bash" else os.R_OK), script


def test_the_tree_is_the_tree():
    tree = CONTRIBUTING.split("## The tree")[1].split("```")[1].strip()
    for line in tree.splitlines():
        name, indent = line.split()[0], len(line) - len(line.lstrip())
        assert (ROOT / ("qorpo" if indent and name != "qorpo/" else "") / name).exists(), name
    rooms = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    there = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "qorpo").iterdir()}
    assert there - rooms <= {"__init__.py", "__main__.py", "__pycache__/", "py.typed"}


def test_the_public_names_are_there():
    for name in re.findall(r"`?qorpo\.(\w+)\b", "".join(TEXTS)):
        modules = (ROOT / "qorpo" / f"{name}.py", ROOT / "qorpo" / name / "__init__.py")
        assert name in qorpo.__all__ or any(map(Path.exists, modules)) or name == "yaml", name


def test_links_lead_somewhere():
    for page, text in zip(PAGES, TEXTS, strict=True):
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert len(README.split()) <= 1100


def test_the_keys_that_migrating_names_are_there():
    table = (ROOT / ".github" / "docs" / "migrating.md").read_text(encoding="utf-8").split("## Keys")[1]
    ours = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = [key for cell in ours for key in re.findall(r"`([a-z_.]+)", cell)]
    assert len(named) > 30
    for key in named:
        assert key in FIELDS or key in ("full", "keep_end"), key
