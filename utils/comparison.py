"""Ours beside theirs, as Markdown, CSV and HTML: a row a cell of a published table.

Which cells there are, how they were run and how they are judged (`utils/reference.py`) is not decided here.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from utils.page import Html, breakable, card, document, grid, note, section, table, tag
from utils.state import replacing, replacing_text

NAMES = ("table.md", "table.csv", "table.html")
BETWEEN = "; "  # several causes in a cell of the CSV
TITLE = "Ours beside the published numbers"
RULE = ("pass: as near as repeated published runs are to each other, or higher; fail: lower than that; unknown: no "
        "such runs, or no number to compare with. Accuracies are top-1 in percent, differences in points.")


@dataclass(frozen=True)
class Row:
    """A cell of a table. Accuracies in percent, differences in points; None: not there, or not known."""

    protocol: str
    model: str
    upstream: str
    dataset: str
    resolution: int | None = None        # pixels
    steps: int | None = None
    learning_rate: float | None = None
    ours: float | None = None            # mean of the seeds
    spread: float | None = None          # their standard deviation
    n: int = 0                           # seeds
    theirs: float | None = None
    difference: float | None = None      # ours - theirs
    tolerance: float | None = None
    word: str = "unknown"                # pass, fail, unknown, or what became of a cell that did not end
    source: str = ""
    minutes: float | None = None         # of a run
    hardware: str = ""
    note: str = ""
    best_on_test: bool = False           # both numbers are the best of many evaluations on the test set
    causes: tuple[str, ...] = ()         # of a fail, most likely first


# --- Cells -----------------------------------------------------------------------------------------------------------

HEADS = ("protocol", "model", "start", "data", "px", "steps", "LR", "ours", "n", "theirs", "difference", "tolerance",
         "verdict", "time", "hardware")
RIGHT = frozenset(range(4, 12)) | {13}  # columns of numbers
NEVER = "-"


def cells(row: Row) -> tuple[str, ...]:
    """A row in words, in the order of HEADS."""
    ours = _number(row.ours) + (f" ± {row.spread:.2f}" if row.spread is not None and row.ours is not None else "")
    return (row.protocol, row.model, row.upstream, row.dataset, _number(row.resolution, "d"), _number(row.steps, ",d"),
            _number(row.learning_rate, "g"), ours, str(row.n), _number(row.theirs) + (
                " (best on test)" if row.best_on_test and row.theirs is not None else ""),
            _number(row.difference, "+.2f"), _number(row.tolerance), row.word, _duration(row.minutes),
            row.hardware or NEVER)


def summary(rows: Sequence[Row]) -> str:
    """'3 cells: 1 fail, 2 pass'"""
    counts = ", ".join(f"{count} {word}" for word, count in sorted(Counter(row.word for row in rows).items()))
    return f"{len(rows)} cell{'s' * (len(rows) != 1)}" + (f": {counts}" if rows else "")


def _number(value: float | None, form: str = ".2f") -> str:
    return NEVER if value is None else format(value, form)


def _duration(minutes: float | None) -> str:
    if minutes is None:
        return NEVER
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    whole = round(minutes)
    return f"{whole} min" if whole < 60 else f"{whole // 60} h {whole % 60:02} min"


# --- Markdown and CSV ------------------------------------------------------------------------------------------------

def markdown(rows: Sequence[Row]) -> str:
    """An aligned table, then what is to be said of its rows and where the published numbers are from."""
    lines = [[_plain(cell) for cell in line] for line in (HEADS, *map(cells, rows))]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(HEADS))]
    rule = ["-" * (width - 1) + ":" if i in RIGHT else "-" * width for i, width in enumerate(widths)]
    aligned = [[cell.rjust(width) if i in RIGHT else cell.ljust(width) for i, (cell, width) in
                enumerate(zip(line, widths))] for line in (lines[0], rule, *lines[1:])]
    parts = [f"{summary(rows)}. {RULE}", "\n".join(f"| {' | '.join(line)} |" for line in aligned)]
    for row in rows:
        if row.note or row.causes:
            said = [f"**{_plain(_name(row))}** ({_plain(row.word)}): {_plain(row.note)}".rstrip(": ")]
            parts.append("\n".join(said + [f"{i}. {_plain(cause)}" for i, cause in enumerate(row.causes, start=1)]))
    if sources := _sources(rows):
        parts.append("\n".join(["Sources:", *(f"- {_plain(source)}" for source in sources)]))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that a table's row and a Markdown page take for nothing else."""
    text = " ".join(text.split())
    for mark, instead in (("\\", "\\\\"), ("|", "\\|"), ("&", "&amp;"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(mark, instead)
    return text


def _name(row: Row) -> str:
    size = f", {row.resolution} px" if row.resolution else ""
    return f"{row.protocol}: {row.model} from {row.upstream}, {row.dataset}{size}"


def _sources(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.source for row in rows if row.source))


def write_csv(file, rows: Iterable[Row]) -> None:
    """A line a row with all of its fields, numbers in full; what is not there is empty."""
    writer, names = csv.writer(file, lineterminator="\n"), [field.name for field in fields(Row)]
    writer.writerow(names)
    for row in rows:
        values = [getattr(row, name) for name in names]
        writer.writerow([BETWEEN.join(value) if isinstance(value, tuple) else value for value in values])


# --- HTML ------------------------------------------------------------------------------------------------------------

SHOWN = ("model", "verdict", "ours", "theirs", "difference", "tolerance", "run", "time")  # on a page, narrow or wide


def html(rows: Sequence[Row], title: str = TITLE, about: Sequence[tuple[str, str]] = ()) -> bytes:
    """One page that asks for nothing else: a table a protocol, fails marked, their causes, the sources.

    about: (protocol, what it did).
    """
    known, body = dict(about), [tag("h1", title), tag("div", tag("b", summary(rows).partition(":")[0]),
                                    tag("span", summary(rows).partition(": ")[2]), class_="result"), note(RULE)]
    for protocol in dict.fromkeys(row.protocol for row in rows):
        mine = [row for row in rows if row.protocol == protocol]
        told = [note(known[protocol])] if protocol in known else []
        body.append(section(protocol, *told, card("", table(
            SHOWN, map(_line, mine), numbers=(2, 3, 4, 5), class_="compared",
            changed=[i for i, row in enumerate(mine) if row.word == "fail"]))))
    said = [card(_name(row), tag("p", tag("strong", row.word), f": {row.note}" if row.note else ""),
                 tag("ol", *(tag("li", cause) for cause in row.causes)) if row.causes else "", class_="wide")
            for row in rows if row.note or row.causes]
    if said:
        body.append(section("What is to be said", grid(*said)))
    if sources := _sources(rows):
        body.append(section("Sources", card("", tag("ul", *(tag("li", source) for source in sources)))))
    return document(title, *body)


def _line(row: Row) -> list:
    _, _, _, dataset, px, steps, rate, ours, n, _, difference, tolerance, word, time, hardware = cells(row)
    below = tag("div", breakable(dataset), " from ", breakable(row.upstream), class_="soft")
    return [tag("div", breakable(row.model), below), word, _two(ours, f"n = {n}"),
            _two(_number(row.theirs), "best on test" if row.best_on_test else ""), difference, tolerance,
            f"{px} px, {steps} steps, LR {rate}", _two(time, hardware)]


def _two(first: str, second: str = "") -> Html:
    return tag("div", first, tag("div", second, class_="soft") if second not in ("", NEVER) else "")


# --- Files -----------------------------------------------------------------------------------------------------------

def write(rows: Sequence[Row], folder: Path, title: str = TITLE, about: Sequence[tuple[str, str]] = ()) -> list[Path]:
    """table.md, table.csv and table.html in `folder`, each whole or not at all; returns them. OSError: it cannot be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text, page = io.StringIO(), html(rows, title, about)
    write_csv(text, rows)
    for name, content in zip(NAMES, (markdown(rows), text.getvalue())):
        with replacing_text(folder / name) as file:
            file.write(content)
    with replacing(folder / NAMES[2]) as file:
        file.write(page)
    return [folder / name for name in NAMES]
