"""Prepared data drawn for a person: tables, histograms and coloured pairs, on a terminal, as HTML or as PNG."""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from qorpo.data.inspect import ShownGroup, Span, Statistics, statistics
from qorpo.data.prepare import PreparedData
from qorpo.data.records import DataReport
from qorpo.errors import DataError
from qorpo.failed_write import FailedWrite, failed_write
from qorpo.printable import printable
from qorpo.storage import unfinished_of, write_bytes, write_text

COLOURS = {"prompt": "cyan", "chosen": "green", "rejected": "red", "response": "green"}
BAR_WIDTH = 18

# What each reason that records are dropped or noted for means.
REASONS = {
    "consecutive_assistant_turns": "the prompt ends in a turn of the assistant",
    "contradiction": "an answer chosen here and rejected elsewhere for the same prompt, or the other way round",
    "earlier_turns_rewritten": "with more turns the chat template writes earlier answers anew; data.train_turns: last learns the last alone",
    "different_prompts": "chosen and rejected answer different prompts",
    "duplicate": "the same prompt and answers came before",
    "empty": "an answer is blank",
    "empty_prompt": "nothing is asked",
    "further_vote": "another annotator's vote, counted with the first",
    "left_out_by_weight": "left out as its source's weight is below 1",
    "missing_column": "a column is missing",
    "no_rejected": "one answer and none to compare it with",
    "no_response": "a conversation does not end in the assistant's turn",
    "no_verdict": "nobody said which answer is better",
    "not_csv": "a line that is no row of the table",
    "not_json": "a line that is not JSON",
    "not_object": "a record that is no object",
    "not_text": "images or other parts that are no text",
    "not_utf8": "text that is not UTF-8",
    "nul_character": "U+0000 in a text",
    "one_answer": "fewer than two answers to rank",
    "prompt_too_long": "the prompt is over data.max_prompt_length",
    "record_too_long": "a line or row that is far longer than any text to learn from",
    "replacement_character": "U+FFFD in a text: characters were lost before",
    "response_too_long": "an answer is over data.max_length",
    "role_label_in_response": "'Human:' or 'Assistant:' in an answer: a turn of a transcript may have been missed",
    "same": "the answers are equal",
    "same_after_cut": "the answers are equal as far as data.max_length reaches",
    "scores_disagree": "the record's scores call the rejected answer better",
    "small_margin": "the difference of scores is below data.min_margin",
    "special_token_in_response": "an answer spells a special token that would end it",
    "template_mismatch": "the chat template does not write prompt and answer as they are",
    "template_refused": "the chat template refuses the conversation",
    "tie": "neither answer is better",
    "tools_left_out": "tool definitions beside the conversation, which are not shown to the model",
    "unknown_role": "a message of an unknown role",
    "unpaired": "one answer and a label",
    "wrong_length": "lists of different lengths",
    "wrong_type": "a value of the wrong type",
    "wrong_value": "a preference that is none",
}  # fmt: skip


def draw(data: PreparedData, shown: Sequence[ShownGroup] = ()) -> RenderableType:
    """All of it, for a console of rich's."""
    parts: list[RenderableType] = []
    if data.whole is not None:
        parts += [Rule("read"), *_counts(data.whole)]
    for name, side in (("train", data.train), ("eval", data.eval)):
        if side is not None:
            found = statistics(side.groups)  # type: ignore[arg-type]
            parts += [Rule(name), *_counts(side.report), *_numbers(found), _histogram(found)]
    if data.leaked_prompts:
        parts.append(
            Text(
                f"{data.leaked_prompts:,} evaluation prompts occur in training too; its figures will flatter",
                "bold red",
            )
        )
    if shown:
        parts += [Rule("pairs as the model sees them"), *_pairs(shown)]
    return Group(*parts)


def check_output(path: Path) -> None:
    """Raises DataError where `save` could not write: another ending, no matplotlib for PNG, or no file to be made."""
    if path.suffix not in (".html", ".png"):
        raise DataError(f"{path}: unknown extension {path.suffix!r}; expected .html or .png")
    if path.suffix == ".png":
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            raise DataError(
                f"{path}: PNG needs matplotlib; pip install 'qorpo[plots]', or give a .html"
            ) from None
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give the name of a file")
    try:
        unfinished_of(path).touch()
        unfinished_of(path).unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def save(path: Path, data: PreparedData, shown: Sequence[ShownGroup] = ()) -> None:
    """Write what `draw` draws as .html, or the histograms as .png. Raises DataError as `check_output` does."""
    check_output(path)
    try:
        if path.suffix == ".png":
            picture = io.BytesIO()
            _figure(data).savefig(picture, format="png")
            write_bytes(path, picture.getvalue())
        else:
            console = Console(record=True, file=io.StringIO(), width=120)
            console.print(draw(data, shown))
            write_text(path, console.export_html(inline_styles=True))
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    failed = failed_write(error) or FailedWrite(str(error), "fix that")
    return DataError(f"{path}: can't be written ({failed.reason}); {failed.remedy}, or give another --output")


def _counts(report: DataReport) -> Iterator[RenderableType]:
    yield Text(f"read {report.read:,}, kept {report.kept:,}")
    for title, counts in (("dropped", report.dropped), ("kept, but worth a look", report.noted)):
        if counts:
            yield _reasons(title, counts, report.examples)
    if cut := [f"{count:,} {side}" for side, count in report.cut.items() if count]:
        yield Text(f"cut to the length limits (no stop token is learned there): {', '.join(cut)}")


def _reasons(title: str, counts: Mapping[str, int], examples: Mapping[str, list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("reason", no_wrap=True)
    for name in ("count", "what it means", "such as"):
        table.add_column(name)
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        # As Text: in a plain string rich reads [brackets] as markup.
        places = Text(printable(", ".join(examples[reason])))
        table.add_row(reason, f"{count:,}", REASONS[reason], places)
    return table


def _numbers(found: Statistics) -> Iterator[RenderableType]:
    if found.chosen_longer is None or found.equally_long is None:
        yield Text(f"{found.row_tokens:,} tokens")
        return
    yield Text(
        f"{found.row_tokens:,} tokens with each prompt once; twice it would be {found.separate_tokens:,}: "
        f"{found.saved_by_sharing:.0%} saved"
    )
    biased = not 0.4 <= found.chosen_longer + found.equally_long / 2 <= 0.6
    yield Text(
        f"chosen is the longer one in {found.chosen_longer:.1%} of the pairs, as long in {found.equally_long:.1%}"
        + ("; the model may learn length from that" if biased else ""),
        "yellow" if biased else "",
    )


def _histogram(found: Statistics) -> Table:
    table = Table("tokens", title="lengths", title_justify="left")
    for side, lengths in found.lengths.items():
        table.add_column(Text(side, COLOURS[side]), footer=f"mean {lengths.mean}, max {lengths.max}")
    edges = found.lengths["prompt"].edges
    highest = max(max(lengths.counts) for lengths in found.lengths.values())
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        counts = {side: lengths.counts[place] for side, lengths in found.lengths.items()}
        bars = [
            Text("█" * round(BAR_WIDTH * count / highest), COLOURS[side]).append(f" {count:,}", "default")
            for side, count in counts.items()
        ]
        table.add_row(f"{low}-{high - 1}", *bars)
    for name in ("mean", "p50", "p90", "p99", "max"):
        figures = (f"{getattr(lengths, name):,}" for lengths in found.lengths.values())
        table.add_row(name, *figures, end_section=name == "max")
    return table


def _pairs(shown: Sequence[ShownGroup]) -> Iterator[RenderableType]:
    yield Text.assemble(
        *((f"{name}  ", COLOURS[name]) for name in shown[0].parts),
        ("special token", "reverse"), "  ", ("bold: the loss is over it", "bold"), "  ⏎ a line break",
    )  # fmt: skip
    for pair in shown:
        title = printable(pair.source) + (f" (cut: {', '.join(pair.cut)})" if pair.cut else "")
        yield Rule(Text(title), style="dim")
        for side, spans in pair.parts.items():
            yield Text.assemble((f"{side:>8} ", "dim"), *(_span(span, side) for span in spans))


def _span(span: Span, side: str) -> tuple[str, str]:
    style = COLOURS[side] + (" bold" if span.learned else "") + (" reverse" if span.special else "")
    return printable(span.text).replace("\n", "⏎\n"), style


def _figure(data: PreparedData) -> Any:
    from matplotlib.figure import Figure

    sides: list[tuple[str, Any]] = [("train", data.train), ("eval", data.eval)]
    sides = [(name, statistics(side.groups)) for name, side in sides if side is not None]
    figure = Figure(figsize=(9, 3.5 * len(sides)), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(len(sides), squeeze=False)[:, 0], sides, strict=True):
        for side, lengths in found.lengths.items():
            axes.stairs(lengths.counts, lengths.edges, label=side, color=COLOURS[side], linewidth=2)
        axes.set(xscale="log", xlabel="tokens", ylabel="pairs", title=f"{name}: {found.pairs:,} pairs")
        axes.set_xticks(found.lengths["prompt"].edges, [str(edge) for edge in found.lengths["prompt"].edges])
        axes.legend()
    return figure
