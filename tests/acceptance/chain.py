"""qorpo as people use it: its commands in processes of their own, and what their folders say afterwards."""

import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FILES = Path(__file__).parent / "files"
SHARED = Path(__file__).parents[3] / "shared"  # data and a model beside the clone

STEPS = 10
SHORT_RUN = {
    "pairs_per_step": 8,
    "max_steps": STEPS,
    "learning_rate": 0.002,
    "eval_every": 5,
    "save_every": 3,
    "log_every": 1,
    "report_to": [],
}


@dataclass(frozen=True)
class Row:
    """Data, what the recipe says of it, and what is to become of its records.

    `dropped`, `noted` and `cut` are all the counts of data.json, over its parts.
    """

    name: str
    train: Any
    eval: Any = 0.2
    data: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=lambda: {"path": "demo"})
    changes: dict[str, Any] = field(default_factory=dict)  # to SHORT_RUN
    lora: dict[str, Any] = field(default_factory=dict)  # beside rank and alpha
    full_learning_rate: float = SHORT_RUN["learning_rate"]
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    merge_dtype: str | None = None  # that the merged model is written and verified in; None: the base's
    leaked: int = 0  # evaluation prompts that are in train as well

    def write_recipe(self, folder: Path) -> Path:
        """A recipe whose run goes to `folder / "run"`; JSON is YAML."""
        recipe = {
            "model": self.model,
            "data": {
                "train": self.train, "eval": self.eval, "max_length": 128, "max_prompt_length": 64, **self.data
            },
            "objective": self.objective,
            "lora": {"rank": 4, "alpha": 8, **self.lora},
            "train": SHORT_RUN | self.changes,
            "output": str(folder / "run"),
        }  # fmt: skip
        path = folder / "recipe.yaml"
        path.write_text(json.dumps(recipe, default=str), encoding="utf-8")
        return path


# --- the main job ---


def adapters(row: Row, folder: Path) -> None:
    """data, plan, train, merge with its verification; then transformers alone."""
    recipe, run, merged = row.write_recipe(folder), folder / "run", folder / "merged"
    data = json.loads(qorpo("data", recipe, "--json").stdout)
    check_counts(row, data)
    assert json.loads(qorpo("plan", recipe, "--json").stdout)["fits"]
    train_killed_and_resumed(recipe, run)
    check_run(row, run, data)
    check_report(run, data)
    qorpo("merge", run, "--output", merged, *(["--dtype", row.merge_dtype] if row.merge_dtype else []))
    verification = read_json(merged / "verification.json")
    assert verification["verdict"] == "pass"
    assert verification["pairs"] == data["eval"]["kept"]
    if row.merge_dtype == "float32":
        check_same_as_adapter(Path(row.model["path"]), run / "adapter", merged)
    check_opens(merged)


def after_sft(row: Row, folder: Path) -> None:
    """SFT on the chosen answers, then the main job from its adapter, which gives the rank."""
    sft = replace(row, objective={"name": "sft"}, data={**row.data, "on_bad_record": "skip"})
    first = folder / "sft"
    first.mkdir()
    qorpo("train", sft.write_recipe(first))
    adapters(replace(row, model={**row.model, "adapter": first / "run"}), folder)
    start, end = metrics(folder / "run")[0], metrics(first / "run")[-1]
    assert start["step"] == 0
    assert math.isclose(start["eval_chosen_logps"], end["eval_chosen_logps"], rel_tol=1e-3)
    if (
        row.objective.get("name") == "dpo"
    ):  # the reference is the model as it starts, the adapter of SFT with it
        assert math.isclose(start["eval_loss"], math.log(2), abs_tol=1e-6)


def all_parameters(row: Row, folder: Path) -> None:
    """The same with --full, and the last checkpoint exported."""
    row = replace(row, changes={**row.changes, "learning_rate": row.full_learning_rate})
    recipe, run, exported = row.write_recipe(folder), folder / "run", folder / "exported"
    data = json.loads(qorpo("data", recipe, "--json").stdout)
    assert json.loads(qorpo("plan", recipe, "--full", "--json").stdout)["fits"]
    train_killed_and_resumed(recipe, run, "--full")
    check_run(row, run, data)
    qorpo("export", run, "--output", exported)
    for model in (run / "model", exported):
        check_opens(model)


# --- commands ---


def qorpo(*arguments: object, code: int = 0, said: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which has to be by `code`, and never in a traceback; `said` comes through a pipe."""
    command = [sys.executable, "-m", "qorpo", *map(str, arguments)]
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=1800)
    said = f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == code, f"exit {done.returncode}, expected {code}: {said}"
    assert "Traceback" not in done.stderr, said
    return done


def train_killed_and_resumed(recipe: Path, run: Path, *options: str) -> None:
    """Train, killed as soon as a checkpoint of trained weights is there, and again to the end."""
    command = [sys.executable, "-m", "qorpo", "train", str(recipe), *options]
    with (run.parent / "killed.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 900
    while process.poll() is None and not (run / "checkpoints" / f"step-{SHORT_RUN['save_every']}").exists():
        assert time.monotonic() < deadline, "no checkpoint after a quarter of an hour"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    said = (run.parent / "killed.log").read_text()
    assert process.wait() == -signal.SIGKILL, f"ended by itself before it could be killed: {said}"
    assert last_step(run) < STEPS, "killed too late to be resumed"
    qorpo("train", recipe, *options, "--resume")


# --- what they leave ---


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def last_step(run: Path) -> int:
    """Of a run that may have been killed in the middle of a line."""
    whole = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return max(json.loads(line)["step"] for line in whole)


def check_counts(row: Row, data: dict[str, Any]) -> None:
    """Every record read is kept or dropped, and by the reasons that the row expects."""
    whole, *sides = (data[name] for name in ("split_from", "train", "eval"))
    parts = [report for report in (whole, *sides) if report]
    for report in parts:
        assert report["read"] == report["kept"] + sum(report["dropped"].values()) > 0
    if whole:
        assert whole["kept"] == sum(report["read"] for report in sides)
    for kind in ("dropped", "noted", "cut"):
        found = +sum((Counter(report[kind]) for report in parts), Counter())
        assert found == getattr(row, kind), f"{row.name}: {kind}"
    assert data["eval_prompts_in_train"] == row.leaked


def check_run(row: Row, run: Path, data: dict[str, Any]) -> None:
    """The run's files agree with `qorpo data`; each step is there once; the loss is finite and falls."""
    written = read_json(run / "data.json")
    for side in ("split_from", "train", "eval"):
        shown = data[side] and {name: data[side][name] for name in written[side]}
        assert written[side] == shown
    check_counts(row, written)
    lines = metrics(run)
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in held_out] == [0, STEPS // 2, STEPS]
    assert all(math.isfinite(line["loss"]) for line in steps)
    # On the same pairs, which those of two steps are not.
    before, *_, after = (line["eval_loss"] for line in held_out)
    assert after < before - 0.005, f"{row.name}: held-out loss {before} to {after}"
    assert read_json(run / "environment.json")


def check_report(run: Path, data: dict[str, Any]) -> None:
    """The page that the run ended in is there; `qorpo report` says what the data was and what came of it."""
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "</html>" in page
    for side in ("split_from", "train", "eval"):
        for reason in (data[side] or {"dropped": {}})["dropped"]:
            assert f"<td>{reason}</td>" in page
    said = qorpo("report", run, "--output", run.parent / "report.json").stdout
    report = read_json(run.parent / "report.json")
    assert report["verdict"] in said
    assert report["is_finished"]
    assert f"{data['eval']['kept']:,} pairs" in report["verdict"]
    loss = report["changes"]["loss"]
    assert loss["after"] < loss["before"]
    low, high = loss["difference_95"]
    assert low <= loss["after"] - loss["before"] <= high


def check_opens(folder: Path) -> None:
    """transformers alone opens the folder, computes finite logits and answers a question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "Name the opposite of warm."}]
    asked = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        assert model(**asked).logits.isfinite().all()
        answer = model.generate(**asked, max_new_tokens=8, do_sample=False)
    asked_tokens = asked["input_ids"].shape[1]
    assert asked_tokens < answer.shape[1] <= asked_tokens + 8


def check_same_as_adapter(base: Path, adapter: Path, merged: Path) -> None:
    """PEFT's adapter on the base and the merged model compute the same logits, all in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    ids = AutoTokenizer.from_pretrained(base)("The opposite of warm is cold.", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        plain = load(base)(ids).logits
        trained = PeftModel.from_pretrained(load(base), adapter)(ids).logits
        found = load(merged)(ids).logits
    assert (trained - plain).abs().max() > 0.01
    assert (trained - found).abs().max() < 1e-3
