"""The table of results in .github/docs/measured.md, from the JSON lines in results/: never by hand.

    python scripts/bench/table.py            # write it between the page's two markers
    python scripts/bench/table.py --check    # exit with 1 where it would change

Of lines with the same bench, settings and device the last counts. Benches without a row here are told in words.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from _record import ROOT

PAGE, RESULTS = ROOT / ".github" / "docs" / "measured.md", ROOT / "scripts" / "bench" / "results"
BEGIN, END = "<!-- made by scripts/bench/table.py -->", "<!-- end of the table -->"
Line = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = with_table(before, table(read(RESULTS)))
    if not options.check:
        PAGE.write_text(after, encoding="utf-8")
    return int(options.check and before != after)


def read(folder: Path) -> list[Line]:
    """Of all files: a bench's lines may be in one of its own, or with others', as gpu_check.sh has them."""
    files = sorted(folder.glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted(
        (line for line in lines if line["bench"] in ROWS), key=lambda line: list(ROWS).index(line["bench"])
    )


def with_table(text: str, rows: str) -> str:
    """The text with what is between its markers replaced."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{rows}\n{END}{tail}"


def table(lines: Iterable[Line]) -> str:
    rows: dict[tuple[str, ...], str] = {}
    for line in lines:
        if cells := ROWS[line["bench"]](line["settings"], line["figures"]):
            what, result, memory = cells
            key = (f"`{line['bench']}.py`", what, line["device"]["name"])
            rows.pop(key, None)  # in the order of the newest
            rows[key] = " | ".join((*key, result, memory))
    head = ["bench | what | device | result | memory", "--- | --- | --- | --- | ---"]
    return "\n".join(f"| {row} |" for row in (*head, *rows.values()))


# --- a line's cells: what was measured, the result, the memory; None where it makes no row ---


def step_cells(settings: Line, figures: Line) -> tuple[str, str, str] | None:
    what = [settings["shape"], settings["mix"], *capped(settings)]
    if settings["attention"] != "auto":
        what.append(f"{settings['attention']} attention")
    if "error" in figures:
        return ", ".join(what), figures["error"], ""
    result = (
        f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['pairs_per_second']:.2f} pairs/s, "
        f"{figures['flops_share']:.0%} of the matmul rate"
    )
    is_cuda = "peak_gib" in figures
    memory = f"{figures['peak_gib']:.1f} GiB" if is_cuda else f"{figures['extra_memory_mib']:.0f} MiB"
    return ", ".join(what), result, memory


def training_cells(settings: Line, figures: Line) -> tuple[str, str, str] | None:
    if settings["side"] != "ratios":
        return None
    what = [
        settings["shape"] if "shape" in settings else settings["base"],
        settings["mix"],
        *capped(settings),
    ]
    if "mean_tokens" in settings:
        what.append("+".join(f"{tokens:.0f}" for tokens in settings["mean_tokens"].values()) + " tokens")
    recomputed = settings.get("activation_checkpointing", True)
    if recomputed is True:  # 1 is one layer, and equal to True
        what.append("every layer recomputed")
    elif recomputed != "auto":
        what.append(f"{recomputed or 'no'} layers recomputed")
    peer = {"trl": "TRL", "unsloth": "Unsloth"}[figures.get("peer", {"side": "trl"})["side"]]
    result = f"{figures['speed']:.2f} × {peer}'s pairs/s"
    if "padding" in figures:
        result += f" (fewer tokens alone: {figures['padding']:.2f} ×)"
    return ", ".join(what), result, f"{figures.get('peak', figures['memory']):.0%} of {peer}'s"


def head_cells(settings: Line, figures: Line) -> tuple[str, str, str] | None:
    if settings["side"] != "ratios":
        return None
    sizes = " × ".join(f"{settings[name]:,}" for name in ("tokens", "hidden", "vocab"))
    whom = {"plain": "plain autograd's", "liger": "Liger's", "products": "two bare products'"}
    shares: Mapping[str, float] = figures["ratios"]
    time, memory = (
        ", ".join(
            form.format(shares[f"{kind}_of_{name}"]) + f" of {whose}"
            for name, whose in whom.items()
            if f"{kind}_of_{name}" in shares
        )
        for kind, form in (("time", "{:.2f}"), ("memory", "{:.0%}"))
    )
    return f"{sizes}, {settings['dtype']}", f"time: {time}", memory


def capped(settings: Line) -> list[str]:
    return [f"{settings['cap_gib']:g} GiB card"] if settings.get("cap_gib") else []


ROWS: dict[str, Callable[[Line, Line], tuple[str, str, str] | None]] = {
    "step": step_cells,
    "train_vs_peers": training_cells,
    "train_vs_trl": training_cells,
    "head": head_cells,
}

if __name__ == "__main__":
    sys.exit(main())
