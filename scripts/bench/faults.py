"""What a kill, a full disk or a flipped bit does to qorpo's commands: nothing may be lost, left over or passed in silence.

    python scripts/bench/faults.py kills     killed at every call that changes a file, then started again
    python scripts/bench/faults.py writes    every such call fails once (ENOSPC, EIO), or all from it on: a full disk
    python scripts/bench/faults.py flips     single bits flipped in what was written, then read by the next command
    python scripts/bench/faults.py memory    memory runs out at each place of each command, in each library's words
    python scripts/bench/faults.py kills writes flips --every 97     a sample of all

Each prints a JSON line a command with counts, and every problem to stderr. Linux only, no root needed. Not covered:
writes into mapped files (none was seen; `mapped` would count them), changes of times and extended attributes.
"""

import argparse
import errno
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from _fault_cases import CASES, FLIPS, Case, Flip, Reference, make_templates
from _faults import Lab, Ran
from _memory_faults import PLACES, Place, shortages
from _record import add_output_option, count, emit
from _syscalls import TAKE_SPACE, Fault, is_possible

MODES = {
    "ENOSPC": {"error": errno.ENOSPC},
    "EIO": {"error": errno.EIO},
    "full disk": {"error": errno.ENOSPC, "stays": True},
}
REMEDIES = {errno.ENOSPC: "make room", errno.EIO: "have the disk checked"}
REMOVES = ("unlink", "unlinkat", "rmdir")  # what can't be removed is left until the next start


class Tally:
    """Counts of trials by how they ended, and what went wrong."""

    def __init__(self, title: str):
        self.title = title
        self.ends: Counter[str] = Counter()
        self.problems = 0
        self.started = time.perf_counter()

    def add(self, what: str, end: str, problems: list[str], *runs: Ran) -> None:
        self.ends[end] += 1
        if not problems:
            return
        self.problems += 1
        print(f"\n--- {self.title}, {what}: {'; '.join(problems)}", file=sys.stderr)
        for ran in runs:
            print(f"  exit {ran.code}: {ran.printed.strip()[-1500:]}", file=sys.stderr, flush=True)

    def figures(self) -> dict[str, object]:
        seconds = round(time.perf_counter() - self.started, 1)
        return {
            "trials": self.ends.total(),
            "ends": dict(self.ends.most_common()),
            "problems": self.problems,
            "seconds": seconds,
        }


def _places(reference: Reference, every: int, first: int) -> range:
    """Numbers of calls to put faults at; a short command has one of these too."""
    calls = len(reference.calls)
    return range(1 + (first - 1) % calls, calls + 1, every)


def kills(lab: Lab, case: Case, every: int, first: int) -> dict[str, object]:
    """Kill at every `every`-th call, go on, and hold what is there to an undisturbed run's."""
    reference = Reference.of(lab, case)
    tally = Tally(f"kills, {case.name}")
    for at in _places(reference, every, first):
        lab.start(case.template)
        killed = lab.run(case.argv, Fault(at, kill=True))
        if killed.code != -9:  # it made fewer calls this time
            tally.add(f"call {at}", "not reached", reference.differences(lab), killed)
            continue
        lost, expected = case.lost(lab), case.survives(lab)
        again = case.go_on(lab)
        problems = [*lost, *expected(again[-1]), *case.ended_well(again), *reference.differences(lab)]
        tally.add(f"call {at} ({killed.last})", f"then exit {again[-1].code}", problems, *again)
    return {**tally.figures(), "calls": len(reference.calls), **reference.notes()}


def writes(lab: Lab, case: Case, every: int, first: int, mode: str) -> dict[str, object]:
    """Fail every `every`-th call; the command says so once, or ends well, and its remedy works."""
    reference = Reference.of(lab, case)
    tally = Tally(f"{mode}, {case.name}")
    for at in _places(reference, every, first):
        name = reference.calls[at - 1][0]
        if MODES[mode].get("stays") and name not in TAKE_SPACE:
            continue  # the same as at the next call that takes space
        lab.start(case.template)
        failed = lab.run(case.argv, Fault(at, **MODES[mode]))
        hit = failed.calls[at - 1] if len(failed.calls) >= at else ("not reached", "")
        problems = case.failed_well(failed) + case.says(failed, REMEDIES[MODES[mode]["error"]])
        again = []
        if failed.code == 2 or hit[0] in REMOVES:
            if hit[0] not in REMOVES:
                problems += reference.leftovers(lab)
            again = case.go_on(lab)
            problems += case.ended_well(again)
        problems += reference.differences(lab)
        tally.add(f"call {at} ({' '.join(hit)})", f"exit {failed.code}", problems, failed, *again)
    return {**tally.figures(), "calls": len(reference.calls), **reference.notes()}


def flips(lab: Lab, flip: Flip, every: int, seed: int) -> dict[str, object]:
    """Flip a random bit of a random file, run the next command that reads it, and see whether it says which."""
    make_templates(lab)
    tally = Tally(f"flips, {flip.name}")
    draw = random.Random(f"{flip.name} {seed}")
    for number in range(0, flip.trials, every):
        lab.start(flip.case.template)
        path = draw.choice(flip.files(lab.trial))
        bit = draw.randrange(path.stat().st_size * 8)
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        ran = lab.run(flip.case.argv)
        problems = flip.noticed(ran, path, lab)
        place = f"bit {bit} of {path.relative_to(lab.trial)}, trial {number}"
        tally.add(place, f"exit {ran.code}", problems, ran)
    return tally.figures()


def memory(lab: Lab, place: Place, every: int) -> dict[str, object]:
    """Run out of memory at a place, by every `every`-th kind of error: done again, or one message with advice."""
    tally = Tally(f"memory, {place.name}")
    shortages(lab, place, every, tally.add)
    return tally.figures()


def results(lab: Lab, options: argparse.Namespace) -> Iterator[tuple[dict[str, object], dict[str, object]]]:
    """(settings, figures) of each command."""

    def is_asked_for(name: str) -> bool:
        return options.commands is None or name in options.commands

    for case in filter(lambda case: is_asked_for(case.name), CASES):
        settings = {"name": case.name, "command": " ".join(["qorpo", *case.argv]), "every": options.every}
        if "kills" in options.what:
            yield {"what": "kills", **settings}, kills(lab, case, options.every, options.first)
        for mode in options.modes if "writes" in options.what else ():
            figures = writes(lab, case, options.every, options.first, mode)
            yield {"what": "writes", **settings, "mode": mode}, figures
    for flip in filter(lambda flip: is_asked_for(flip.name), FLIPS):
        if "flips" in options.what:
            settings = {
                "name": flip.name,
                "command": " ".join(["qorpo", *flip.case.argv]),
                "seed": options.seed,
            }
            yield {"what": "flips", **settings}, flips(lab, flip, options.every, options.seed)
    for place in filter(lambda place: is_asked_for(place.name), PLACES):
        if "memory" in options.what:
            command = " ".join(["qorpo", *place.case.argv])
            settings = {"name": place.name, "command": command, "every": options.every}
            yield {"what": "memory", **settings, "place": place.target}, memory(lab, place, options.every)


def main() -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=["kills", "writes", "flips", "memory"])
    parser.add_argument("--commands", metavar="NAME,…", type=lambda text: re.split(",(?! )", text),
                        help=f"of {', '.join(names)}; of flips: {', '.join(flip.name for flip in FLIPS)}; "
                        f"of memory: {'; '.join(place.name for place in PLACES)}")  # fmt: skip
    parser.add_argument("--every", type=count, default=1, help="only every N-th call, or flip")
    parser.add_argument("--first", type=count, default=1, help="and not those before this one")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES), help="of writes")
    parser.add_argument("--seed", type=int, default=0, help="of flips")
    add_output_option(parser)
    options = parser.parse_args()
    if not is_possible():
        parser.error("needs Linux 5.5 or newer with seccomp, on x86_64 or aarch64; nothing was measured")
    problems = 0
    with Lab.open() as lab:
        for settings, figures in results(lab, options):
            emit("faults.py", settings, figures, "cpu", options.output)
            problems += int(figures["problems"])  # type: ignore[call-overload]
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
