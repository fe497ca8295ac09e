"""The commands that faults are put into, how one goes on after a fault, and what has to be there in the end."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from _faults import TIMES, Lab, Ran
from _syscalls import Fault

TRACES = ("Traceback (most recent call last)", "Exception in thread", "Exception ignored", "Error in sys")
LEFT_BEHIND = re.compile(r"qorpo-unfinished|qorpo-replaced|partial|\btmp|\.tmp")


@dataclass(frozen=True)
class Case:
    """One command in a folder made for it."""

    name: str
    argv: tuple[str, ...]
    template: str | None = None

    def go_on(self, lab: Lab) -> list[Ran]:
        """What a person does next: `--resume` for a run, else the same again; if that can't be, what it says to do."""
        if self.argv[0] != "train" or "--resume" in self.argv:
            return [lab.run(self.argv)]
        resumed = lab.run([*self.argv, "--resume"])
        if resumed.code == 2 and "leave out --resume" in resumed.printed:
            return [resumed, lab.run(self.argv)]
        return [resumed]

    def lost(self, lab: Lab) -> list[str]:
        """Finished results of before that a kill left neither in their place nor aside, where the next start looks."""
        problems = []
        for name in ("adapter", "model"):
            before = lab.templates / (self.template or "") / "run" / name
            places = [lab.trial / "run" / name, lab.trial / "run" / f".{name}.qorpo-replaced"]
            if before.is_dir() and _contents(before) not in map(_contents, places):
                problems.append(f"the finished {name} is gone")
        return problems

    def survives(self, lab: Lab) -> Callable[[Ran], list[str]]:
        """Looks at what a kill left; returns a check that the next command made use of it."""
        steps = [int(path.name[5:]) for path in lab.trial.glob("run/checkpoints/step-*")]
        if self.argv[0] != "train" or not steps:
            return lambda ran: []
        line = f"resumed from run/checkpoints/step-{max(steps)}\n"
        return lambda ran: [] if line in ran.printed else [f"did not go on from step {max(steps)}"]

    def ended_well(self, runs: list[Ran]) -> list[str]:
        """The last of these succeeded, or said in one message why it had nothing to do."""
        problems = [problem for ran in runs for problem in self.failed_well(ran)]
        ran = runs[-1]
        if ran.code == 2 and "is there already" not in ran.printed:
            problems.append("could not go on")
        return problems

    def failed_well(self, ran: Ran) -> list[str]:
        """Exit 0, or exit 2 with one message; never a traceback, of a thread's neither."""
        problems = [f"printed {trace!r}" for trace in TRACES if trace in ran.printed]
        messages = len(re.findall("^qorpo: ", ran.printed, re.M))
        if ran.code not in (0, 2):
            problems.append(f"exit {ran.code}")
        elif messages != (ran.code == 2):
            problems.append(f"exit {ran.code} with {messages} messages")
        return problems

    def says(self, ran: Ran, remedy: str) -> list[str]:
        """What a person is to do about a failed write, after the message."""
        message = ran.printed[ran.printed.find("qorpo: ") :]
        return [] if ran.code != 2 or remedy in message else [f"does not say {remedy!r}"]


CASES = (
    Case("train", ("train", "../lora.yaml")),
    Case("resume", ("train", "../lora.yaml", "--resume"), "stopped"),
    Case("train again", ("train", "../lora.yaml", "--resume"), "run"),
    Case(
        "trackers", ("train", "../lora.yaml", "train.report_to=[tensorboard]", "train.max_steps=1"), "tokens"
    ),
    Case("reference", ("train", "../lora.yaml", "objective.name=dpo", "train.max_steps=1"), "tokens"),
    Case("full train", ("train", "../full.yaml", "train.max_steps=1"), "tokens"),
    Case("full resume", ("train", "../full.yaml", "--resume"), "full stopped"),
    Case("merge", ("merge", "run", "--output", "merged"), "run"),
    Case("verify", ("merge", "run", "--output", "merged", "--verify-only"), "merged"),
    Case("export", ("export", "run", "--output", "exported"), "full run"),
    Case("data", ("data", "../lora.yaml", "--output", "data.html", "--show", "2")),
)


@cache
def make_templates(lab: Lab) -> None:
    """Tokens alone, finished runs, runs stopped after their first checkpoint, and a merged model."""
    lab.start()
    _check(lab.run(("data", "../lora.yaml")))
    lab.keep("tokens")
    for name, recipe in (("run", "lora"), ("full run", "full")):
        argv = ["train", f"../{recipe}.yaml"]
        lab.start()
        ran = lab.run(argv)
        _check(ran)
        lab.keep(name)
        lab.start()
        first = next(at for at, (_, path) in enumerate(ran.calls, 1) if path == "run/checkpoints/step-1")
        lab.run(argv, Fault(first + 12, kill=True))
        if not (lab.trial / "run/checkpoints/step-1").exists():
            raise SystemExit("faults: no checkpoint to stop after")
        lab.keep("stopped" if name == "run" else "full stopped")
    lab.start("run")
    _check(lab.run(("merge", "run", "--output", "merged", "--no-verify")))
    lab.keep("merged")


def _check(ran: Ran) -> None:
    if ran.code:
        raise SystemExit(f"faults: an undisturbed command failed ({ran.code}):\n{ran.printed}")


@dataclass(frozen=True)
class Reference:
    """What an undisturbed command leaves, from two of them: what differs between these can't be compared."""

    contents: dict[str, bytes | None]
    calls: list[tuple[str, str]]
    mapped: set[str]
    outside: set[str]

    @staticmethod
    @cache
    def of(lab: Lab, case: Case) -> "Reference":
        make_templates(lab)
        found = []
        for _ in range(2):
            lab.start(case.template)
            ran = lab.run(case.argv)
            _check(ran)
            found.append(_contents(lab.trial))
        first, second = found
        same = {name: content if second.get(name) == content else None for name, content in first.items()}
        return Reference(same, ran.calls, ran.mapped, ran.outside)

    def differences(self, lab: Lab) -> list[str]:
        """What is there and should not be, what is missing, and what has other bytes."""
        now = _contents(lab.trial)
        changed = [
            name for name in now.keys() & self.contents.keys()
            if self.contents[name] is not None and now[name] != self.contents[name]
        ]  # fmt: skip
        return [
            f"{what}: {', '.join(sorted(names)[:4])}"
            for what, names in (
                ("left over", now.keys() - self.contents.keys()),
                ("lost", self.contents.keys() - now.keys()),
                ("not the same", changed),
            )
            if names
        ]

    def leftovers(self, lab: Lab) -> list[str]:
        """Unfinished files right after a failure, which the next start has no need to sweep."""
        found = [
            name for name in _contents(lab.trial) if name not in self.contents and LEFT_BEHIND.search(name)
        ]
        return [f"left behind at once: {', '.join(sorted(found)[:4])}"] if found else []

    def notes(self) -> dict[str, object]:
        """What the comparison does not reach."""
        return {
            "compared_by_name_only": sorted(
                name for name, content in self.contents.items() if content is None
            ),
            "mapped": sorted(self.mapped),
            "outside": sorted(self.outside),
        }


def _contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's and folder's name and bytes; of metrics without what the clock decides, of trackers nothing."""
    found: dict[str, bytes | None] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if "trackers/" in name or path.name == ".lock":
            continue
        content = path.read_bytes() if path.is_file() else b""
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            content = repr([[item for item in row.items() if item[0] not in TIMES] for row in rows]).encode()
        found[name] = content
    return found


@dataclass(frozen=True)
class Flip:
    """A kind of files, and the next command that reads them."""

    name: str
    trials: int
    pattern: str  # of their paths in the trial's folder
    case: Case
    is_remade: bool = False  # damage is fixed, and said

    def files(self, folder: Path) -> list[Path]:
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
        return [path for path in found if re.fullmatch(self.pattern, path.relative_to(folder).as_posix())]

    def noticed(self, ran: Ran, path: Path, lab: Lab) -> list[str]:
        """Named by exit 2 with a remedy; a text for people, which they may have edited, by a warning."""
        problems = self.case.failed_well(ran)
        lines = [line for line in ran.printed.splitlines() if path.name in line]
        if not lines:
            problems.append("does not name the file")
        if self.is_remade:
            return problems + (
                Reference.of(lab, self.case).differences(lab) if ran.code == 0 else ["refused"]
            )
        if ran.code == 0 and path.name != "README.md":
            problems.append("silent")
        elif ran.code == 2 and not any(line.startswith("qorpo: ") and ";" in line for line in lines):
            problems.append("has no remedy")
        return problems


MANIFEST = r"qorpo-manifest\.json"


def _flip(name: str, trials: int, folder: str, command: str, template: str, **options: bool) -> list[Flip]:
    """Of a folder's files, and of its manifest alone."""
    case = Case(name, tuple(command.split()), template)
    return [
        Flip(name, trials, rf"{folder}/(?!.*{MANIFEST}).*", case, **options),
        Flip(f"manifest of {name}", trials // 3, rf"{folder}/(.*/)?{MANIFEST}", case, **options),
    ]


FLIPS = (
    *_flip("checkpoint", 150, "run/checkpoints/step-1", "train ../lora.yaml --resume", "stopped"),
    *_flip("full checkpoint", 60, "run/checkpoints/step-1", "train ../full.yaml --resume", "full stopped"),
    *_flip("exported checkpoint", 60, "run/checkpoints/step-2", "export run --output exported", "full run"),
    *_flip("adapter", 210, "run/adapter", "merge run --output m --no-verify", "run"),
    *_flip("merged", 210, "merged", "merge run --output merged --verify-only", "merged"),
    *_flip("cache", 210, "cache", "data ../lora.yaml --json", "run", is_remade=True),
)
