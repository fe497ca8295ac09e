"""Prepared data drawn for a person: tables, histograms and coloured pairs, on a terminal, as HTML or as PNG."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from qorpo.data.counts import DataReport
from qorpo.data.inspect import ShownGroup, Span, Statistics, statistics
from qorpo.data.prepare import PreparedData
from qorpo.printable import printable
from qorpo.reports.charts import Bars, Chart, png
from qorpo.reports.page import Page, Part, Section, check_output, write_output
from qorpo.reports.page import Table as PageTable

COLOURS = {"prompt": "cyan", "chosen": "green", "rejected": "red", "response": "green"}
BAR_WIDTH = 10  # columns; three bars with their counts fit a terminal of 80
ENDINGS = (".html", ".png")

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
    "template_out_of_bounds": "the chat template takes far too much for the record, or writes far more than it says",
    "template_refused": "the chat template refuses the conversation",
    "tie": "neither answer is better",
    "tools_left_out": "tool definitions beside the conversation, which are not shown to the model",
    "unknown_role": "a message of an unknown role",
    "unpaired": "one answer and a label",
    "wrong_length": "lists of different lengths",
    "wrong_type": "a value of the wrong type",
    "wrong_value": "a preference or a label that is none",
}  # fmt: skip


def draw(data: PreparedData, shown: Sequence[ShownGroup] = ()) -> RenderableType:
    """All of it, for a console of rich's."""
    parts: list[RenderableType] = []
    if data.whole is not None:
        parts += [Rule("read"), *_counts(data.whole)]
    for name, side in (("train", data.train), ("eval", data.eval)):
        if side is not None:
            found = statistics(side.groups)  # type: ignore[arg-type]
            parts += [Rule(name), *_counts(side.report)]
            parts += [Text(*each) for each in _numbers(found)]
            parts.append(_histogram(found))
    if data.leaked_prompts:
        parts.append(Text(_leaked(data.leaked_prompts), "bold red"))
    if shown:
        parts += [Rule("pairs as the model sees them"), *_pairs(shown)]
    return Group(*parts)


def save(path: Path, data: PreparedData, shown: Sequence[ShownGroup] = ()) -> None:
    """Write what `draw` draws as .html, or the histograms as .png. Raises RunError as `check_output` does."""
    page = data_page(data, shown)
    check_output(path, ENDINGS)
    write_output(
        path, png(page.charts, page.title, columns=1) if path.suffix == ".png" else page.html().encode()
    )


def data_page(data: PreparedData, shown: Sequence[ShownGroup] = ()) -> Page:
    sections = []
    if data.whole is not None:
        sections.append(
            Section("Before the split", list(_counts_text(data.whole)), reason_tables(data.whole))
        )
    for name, side in (("train", data.train), ("eval", data.eval)):
        if side is not None:
            found = statistics(side.groups)  # type: ignore[arg-type]
            text = [*_counts_text(side.report), *(line for line, _ in _numbers(found))]
            tables = [*reason_tables(side.report), _lengths_table(found)]
            sections.append(Section(name.capitalize(), text, tables, [_lengths_chart(name, found)]))
    if shown:
        pairs = [
            (
                _title_of(pair),
                [(side, [_part(span, side) for span in spans]) for side, spans in pair.parts.items()],
            )
            for pair in shown
        ]
        legend = "Special tokens have a ground of their own; bold: the loss is over it; ⏎ a line break."
        sections.append(Section("Pairs as the model sees them", [legend], pairs=pairs))
    warnings = [_leaked(data.leaked_prompts)] if data.leaked_prompts else []
    return Page("Preference data", warnings=warnings, sections=sections)


def reason_tables(report: DataReport) -> list[PageTable]:
    """Why records were dropped, or are worth a look, with the first few places of each reason."""
    return [
        PageTable(
            ["reason", "count", "what it means", "such as"],
            [
                [reason, f"{count:,}", REASONS.get(reason, ""), ", ".join(report.examples.get(reason, []))]
                for reason, count in sorted(counts.items(), key=lambda item: -item[1])
            ],
            title=title,
            figures=False,
        )
        for title, counts in (("dropped", report.dropped), ("kept, but worth a look", report.noted))
        if counts
    ]


def _counts_text(report: DataReport) -> Iterator[str]:
    yield f"read {report.read:,}, kept {report.kept:,}"
    if cut := [f"{count:,} {side}" for side, count in report.cut.items() if count]:
        yield f"cut to the length limits (no stop token is learned there): {', '.join(cut)}"


def _leaked(count: int) -> str:
    return f"{count:,} evaluation prompts occur in training too; its figures will flatter"


def _lengths_table(found: Statistics) -> PageTable:
    rows = [
        [name, *(f"{getattr(lengths, name):,}" for lengths in found.lengths.values())]
        for name in ("mean", "p50", "p90", "p99", "max")
    ]
    return PageTable(["tokens", *found.lengths], rows)


def _lengths_chart(name: str, found: Statistics) -> Chart:
    bars = [
        Bars(side, lengths.edges, lengths.counts, colour)
        for colour, (side, lengths) in enumerate(found.lengths.items())
    ]
    title = f"{name}: lengths of {found.pairs:,} pairs"
    return Chart(title, bars, x_label="tokens", y_label="pairs", doubles=True)


def _title_of(pair: ShownGroup) -> str:
    return printable(pair.source) + (f" (cut: {', '.join(pair.cut)})" if pair.cut else "")


def _part(span: Span, side: str) -> Part:
    style = side + (" learned" if span.learned else "") + (" special" if span.special else "")
    return Part(span.text.replace("\n", "⏎\n"), style)


# --- on a terminal ---


def _counts(report: DataReport) -> Iterator[RenderableType]:
    read, *cut = _counts_text(report)
    yield Text(read)
    for found in reason_tables(report):
        yield _reasons(found)
        for reason, _, _, places in found.rows:
            yield _whole_line(f"  {reason}: {printable(places)}")
    yield from map(Text, cut)


def _reasons(found: PageTable) -> Table:
    table = Table(title=found.title, title_justify="left")
    for name in found.head[:3]:
        table.add_column(name, no_wrap=name == "reason", justify="right" if name == "count" else "left")
    for reason, count, meaning, _ in found.rows:
        table.add_row(reason, count, meaning)
    return table


def _whole_line(text: str, style: str = "") -> Text:
    """A line that is longer than the console is neither cut nor broken: a place stays one that can be copied.

    Printed by `Console.print(…, crop=False)`.
    """
    return Text(text, style, no_wrap=True, overflow="ignore")


def _numbers(found: Statistics) -> Iterator[tuple[str, str]]:
    """Sentences, each with a colour where it is a warning."""
    if found.chosen_longer is None or found.equally_long is None:
        yield f"{found.row_tokens:,} tokens", ""
        return
    yield (
        (
            f"{found.row_tokens:,} tokens with each prompt once; twice it would be {found.separate_tokens:,}: "
            f"{found.saved_by_sharing:.0%} saved"
        ),
        "",
    )
    biased = not 0.4 <= found.chosen_longer + found.equally_long / 2 <= 0.6
    yield (
        (
            f"chosen is the longer one in {found.chosen_longer:.1%} of the pairs, as long in {found.equally_long:.1%}"
            + ("; the model may learn length from that" if biased else "")
        ),
        "yellow" if biased else "",
    )


def _histogram(found: Statistics) -> Table:
    table = Table("tokens", title="lengths", title_justify="left")
    for side, lengths in found.lengths.items():
        table.add_column(Text(side, COLOURS[side]), footer=f"mean {lengths.mean:,}, max {lengths.max:,}")
    edges = found.lengths["prompt"].edges
    highest = max(max(lengths.counts) for lengths in found.lengths.values())
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        counts = {side: lengths.counts[place] for side, lengths in found.lengths.items()}
        bars = [
            Text("█" * round(BAR_WIDTH * count / highest), COLOURS[side]).append(f" {count:,}", "default")
            for side, count in counts.items()
        ]
        table.add_row(f"{low:,}-{high - 1:,}", *bars)
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
        yield _whole_line(f"── {_title_of(pair)}", "dim")
        for side, spans in pair.parts.items():
            yield Text.assemble((f"{side:>8} ", "dim"), *(_span(span, side) for span in spans))


def _span(span: Span, side: str) -> tuple[str, str]:
    style = COLOURS[side] + (" bold" if span.learned else "") + (" reverse" if span.special else "")
    return printable(span.text).replace("\n", "⏎\n"), style
