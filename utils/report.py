"""What came out of a run, as one HTML file that asks for nothing else: `python -m utils.report output/NAME`. Several
runs are compared: `python -m utils.report output/A output/B`.

train.py writes it at the end of a run. It is derived: it may be deleted, and made again.
"""

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import scorecard
from utils.charts import COLOURS, Curve, curves, palette
from utils.commands import check_free, run
from utils.curves import write as write_curves
from utils.history import History, read
from utils.mistakes import looks, worst
from utils.page import (
    Html,
    breakable,
    card,
    command,
    document,
    facts,
    grid,
    is_ours,
    note,
    notice,
    percent,
    picture,
    section,
    table,
    tag,
)
from utils.settings import Parser, Settings
from utils.state import replacing

log = logging.getLogger("report")

NAME = "report.html"
MISTAKES = 12  # that are shown
METRICS = {"macro_f1": "macro F1", "map": "mAP"}  # beside the accuracy, in its chart
NOT_SETTINGS = {"resolved", "where", "command", "continued"}  # in settings.json
NAMES = {"name", "output_dir", "overwrite", "resume", "dry_run", "no_report", "debug"}  # settings that decide no number


class Chart(NamedTuple):
    id: str
    title: str
    names: tuple[str, ...]  # of the series that it shows
    percent: bool = False


CHARTS = (
    Chart("loss", "Loss", ("train/loss", "val/loss", "test/loss")),
    Chart("accuracy", "Accuracy", (
        "train/accuracy", "val/accuracy", "test/accuracy",
        *(f"{part}/{name}" for name in ("macro_f1", "map") for part in ("val", "test"))), percent=True),
    Chart("rate", "Learning rate", ("train/lr",)),
    Chart("norm", "Gradient norm", ("train/grad_norm",)),
    Chart("speed", "Images a second", ("train/images_per_second",)),
)


# --- Files -----------------------------------------------------------------------------------------------------------

def write(folders: Sequence[Path], to: Path | None = None, overwrite: bool = False) -> Path:
    """The report of a run, or the comparison of several; returns its file.

    to: by default report.html in the run's folder, for several in the folder that all are in. A report there is
    replaced, any other file only if `overwrite`. ValueError, OSError: a sentence, and nothing was written.
    """
    folders = list(dict.fromkeys(map(Path, folders)))
    histories = [read(folder) for folder in folders]
    to = _place(folders) if to is None else Path(to)
    check_free(str(to), overwrite or (to.is_file() and is_ours(to)))
    for history in histories:
        for sentence in history.problems:
            log.warning("%s: %s", history.folder, sentence)
    page = document(histories[0].name, *one(histories[0])) if len(folders) == 1 else document(
        f"{len(folders)} runs compared", *several(histories))
    try:
        with replacing(to) as file:
            file.write(page)
    except OSError as error:
        raise ValueError(f"{to} cannot be written ({error.strerror}). Choose another --output.") from error
    return to


def _place(folders: list[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] / NAME
    parents = {folder.parent for folder in folders}
    return Path(os.path.commonpath([parent.absolute() for parent in parents]) if len(parents) > 1 else
                parents.pop()) / NAME


# --- One run ---------------------------------------------------------------------------------------------------------

def one(history: History) -> list[Html]:
    """The body of a run's report."""
    if history.predictions is None:
        tested = note("There are no predictions to look at; see above.")
    else:
        tested = grid(*scorecard.cards(history.predictions))
    parts = [heading(history), notice(history.problems),
             section("Course", grid(*(chart_card(chart, [history]) for chart in CHARTS), numbers_card(history))),
             section("Test set", tested)]
    if history.predictions is not None and history.predictions.confidence is not None:
        parts.append(section("Most confident mistakes", *mistakes(history)))
    return [*parts, section("Settings", *settings_cards(history)), section("Commands", commands_card(history))]


def heading(history: History) -> Html:
    """Name, result, and what the run was."""
    h, about = history, history.about
    origin = about.get("finetuned_from")
    started = "nothing: from scratch" if origin == {} else None
    if origin:
        started = f"{origin.get('name')} (sha256 {str(origin.get('sha256'))[:12]})"
    size = " x ".join(map(str, about.get("img_size") or h.resolved.get("img_size") or ()))
    model = (about.get("config") or {}).get("name") or h.resolved.get("model_type")
    batch = h.settings.get("train_batch_size")
    compiled = ", compiled" * (h.resolved.get("compile") == "on")
    known = {
        "model": model and f"{model}, {size} px",
        "fine-tuned from": started,
        "data": h.settings.get("labels") or h.settings.get("dataset"),
        "classes": f"{len(about['classes']):,}" if "classes" in about else None,
        "steps": steps_in_words(h) + (f", each of {batch:,} images" if batch else ""),
        "best evaluation": best_in_words(h),
        "computed on": h.resolved.get("device") and f"{h.resolved['device']}, {h.resolved.get('precision')}{compiled}",
        "speed": h.throughput and f"{h.throughput:,.0f} images/s",
        "took": h.seconds and duration(h.seconds),
        "ended" if h.ended_as_planned else "last value": h.ended and time.strftime("%Y-%m-%d %H:%M",
                                                                                   time.localtime(h.ended)),
    }
    return tag("header", tag("div", "Fine-tuning run", class_="soft"), tag("h1", h.name),
               tag("div", tag("b", result(h)), tag("span", result_in_words(h)), class_="result"),
               card("", facts(known)))


def result(history: History) -> str:
    return percent(history.score[1]) if history.score else "No result yet"


def result_in_words(history: History) -> str:
    """What the number is of."""
    if history.score is None:
        return "there has been no evaluation whose weights were kept"
    metric, _, part = history.score
    known = history.predictions
    what = "mean average precision (mAP)" if metric == "map" else metric
    count = f" of {len(known.images):,} images" if known and part == "test" else ""
    chosen = ", chosen on it" if history.weights.stem == "best" and part != "test" else ""
    return (f"{part} {what}{count}, {history.weights.name} of step {history.about.get('step', 0):,}{chosen}"
            + " (the run has not ended)" * (not history.ended_as_planned))


def steps_in_words(history: History) -> str:
    planned = history.settings.get("num_steps")
    whole = planned is None or history.step >= planned
    return f"{history.step:,}" if whole else f"{history.step:,} of {planned:,}"


def best_in_words(history: History) -> str | None:
    """Of the evaluations on the way, the one with the best value of what is the result."""
    metric, part = "map" if history.multi_label else "accuracy", history.part
    found = history.series.get(f"{part}/{metric}")
    if found is None or not np.isfinite(found.values).any():
        return None
    place = np.nanargmax(found.values)
    return f"{percent(found.values[place])} on {part}, at step {found.steps[place]:,}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def chart_card(chart: Chart, histories: Sequence[History]) -> Html:
    """One chart: the series of a run each in a colour; of several runs each run in one, and of the train part only the
    loss, as the rest would be in one another's way."""
    together = len(histories) > 1
    colours, lines, legend = palette(len(histories)), [], []
    for r, history in enumerate(histories):
        for name in chart.names:
            series = history.series.get(name)
            if series is None or not np.isfinite(series.values).any() or (together and name == "train/accuracy"):
                continue
            colour = colours[r] if together else COLOURS[len(legend) % len(COLOURS)]
            lines.append(Curve(f"{name}.{r}", series, colour, faint=name.startswith("train/")))
            legend.append((_line(name), colour))
    if not lines:
        return card(chart.title, note("metrics.jsonl has no value of this."))
    return card(chart.title, curves(chart.id, f"{chart.title} over steps", lines, chart.percent),
                legend=legend if len(legend) > 1 and not together else ())


def numbers_card(history: History) -> Html:
    """The end and the extremes of each curve."""
    rows = []
    for chart in CHARTS:
        for name in chart.names:
            values = history.series[name].values if name in history.series else np.zeros(0)
            known = values[np.isfinite(values)]
            if len(known):
                what = f"{chart.title}, {_line(name)}" if len(chart.names) > 1 else chart.title
                rows.append([what, *(f"{value:.4g}" for value in (known[-1], known.min(), known.max()))])
    return card("Values", table(["", "last", "least", "largest"], rows, numbers=range(1, 4), class_="values"))


def _line(name: str) -> str:
    """What a series is called beside others in its chart: test/map -> test mAP."""
    part, _, what = name.partition("/")
    return f"{part} {METRICS[what]}" if what in METRICS else part


def mistakes(history: History) -> list[Html]:
    """The wrong predictions of which the model was surest, as pictures where the images can be found."""
    said = history.predictions
    places = worst(said, MISTAKES)
    if not places:
        return [note(f"All {len(said.images):,} images are right.")]
    count = int((~said.right).sum())
    introduction = note(f"The {len(places)} of {count:,} wrong predictions in which the model was surest. Left the "
                        "image as the model saw it; right from where its attention arrives at the head (rollout: "
                        "bright is much).")
    try:
        found = looks(history, places)
    except (ValueError, OSError) as error:
        found = [""] * len(places)
        introduction = note(f"The images cannot be shown. {error}")
    cards = []
    for i, look in zip(places, found):
        label, predicted = (said.classes[column[i]] for column in (said.labels, said.predicted))
        seen = (look and note(look)) if isinstance(look, str) else tag(
            "div", picture(look.image, f"{label}, taken for {predicted}"), picture(look.attention, "attention"),
            class_="pair")
        words = tag("div", tag("b", label), " taken for ", tag("b", predicted))
        caption = f"{percent(said.confidence[i].item())} sure, image {Path(said.images[i]).name}"
        cards.append(tag("figure", seen, tag("figcaption", words, caption), class_="card"))
    return [introduction, tag("div", *cards, class_="pairs")]


def settings_cards(history: History) -> list[Html]:
    """What is not as by default, everything as resolved, and what it was computed with."""
    if not history.settings:
        return [note("They are not known; see above.")]
    rows = settings_rows(history)
    changed = [i for i, row in enumerate(rows) if row.given != row.default]
    cells = [(breakable(row.name), f"{row.given} → {row.resolved}" if row.resolved != row.given else row.given,
              row.default) for row in rows]
    heads = ["setting", "value", "default"]
    versions = history.about.get("versions") or {}
    computed = {name: history.resolved.get(name) for name in ("device", "precision", "compile", "processes", "threads")}
    everything = table(heads, cells, changed=changed, class_="settings")
    others = table(heads, [cells[i] for i in changed], class_="settings")
    return [card("Not the default", others if changed else note("Nothing.")),
            tag("details", tag("summary", f"All {len(rows)} settings"), everything, class_="card"),
            tag("h2", "Environment"), card("", facts({**versions, **computed}))]


class Setting(NamedTuple):
    name: str
    given: str
    resolved: str  # what an automatic choice came to
    default: str


def settings_rows(history: History) -> list[Setting]:
    """All that settings.json has, in the order of the flags."""
    defaults = {f.name: f.default for f in fields(Settings)}
    rows = []
    for name in [*defaults, *(name for name in history.settings if name not in defaults.keys() | NOT_SETTINGS)]:
        if name in history.settings:
            given = history.settings[name]
            rows.append(Setting(name, *map(_word, (given, history.resolved.get(name, given), defaults.get(name)))))
    return rows


def _word(value) -> str:
    return "–" if value is None else ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def commands_card(history: History) -> Html:
    """Commands to copy."""
    folder, settings = shlex.quote(str(history.folder)), history.settings
    first = settings.get("command") or history.about.get("command")
    continued = "; ".join(f"step {at.get('step')}" + "".join(f", {name} {value}" for name, value in at.items()
                                                             if name not in ("step", "time"))
                          for at in settings.get("continued") or ())
    more = history.ended_as_planned and settings.get("num_steps")
    further = f"--num_steps {2 * settings['num_steps']}" if more else ""
    wanted = {"The same run": first, "Go on with it": f"python train.py --resume {folder} {further}".strip(),
              "Evaluate it": f"python evaluate.py {folder}", "Use it": f"python predict.py {folder} photo.jpg",
              "This page": f"python -m utils.report {folder}"}
    return card("", *(tag("div", tag("h3", what), command(words), class_="again")
                      for what, words in wanted.items() if words),
                note(f"The run was continued at {continued}.") if continued else "")


# --- Several runs ----------------------------------------------------------------------------------------------------

def several(histories: Sequence[History]) -> list[Html]:
    """The body of a comparison."""
    short = [history.name for history in histories]
    names = short if len(set(short)) == len(short) else [str(history.folder) for history in histories]
    colours = palette(len(histories))
    problems = [f"{name}: {sentence}" for name, history in zip(names, histories) for sentence in history.problems]
    head = tag("header", tag("div", "Fine-tuning runs", class_="soft"), tag("h1", f"{len(names)} runs compared"))
    heads = [tag("span", tag("i", style=f"background: {colour}"), name) for name, colour in zip(names, colours)]
    legend = card("Runs", note("Light: single training steps. With marks: evaluations."),
                  legend=list(zip(names, colours)), class_="left")
    return [head, notice(problems), section("Results", card("", results_table(histories, heads))),
            section("Course", grid(legend, *(chart_card(chart, histories) for chart in CHARTS)))]


def results_table(histories: Sequence[History], heads: Sequence[Html]) -> Html:
    """A column a run: what came out, at what cost, and the settings in which the runs differ."""
    told = {
        "result": [result(h) for h in histories],
        "of": [result_in_words(h) for h in histories],
        "best evaluation": [best_in_words(h) for h in histories],
        "steps": [steps_in_words(h) for h in histories],
        "took": [duration(h.seconds) if h.seconds else None for h in histories],
        "images/s": [f"{h.throughput:,.0f}" if h.throughput else None for h in histories],
    }
    effective = [{**h.settings, **h.resolved} for h in histories]
    names = dict.fromkeys(name for settings in effective for name in settings if name not in NOT_SETTINGS | NAMES)
    for name in names:
        values = [_word(settings.get(name)) for settings in effective]
        if len(set(values)) > 1:
            told[name] = values
    return table(["", *heads], [[tag("b", breakable(name)), *values] for name, values in told.items()],
                 numbers=range(1, len(heads) + 1), class_="compared")


# --- Command line ----------------------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(prog="python -m utils.report", allow_abbrev=False, description=__doc__.split("\n\n")[0])
    p.add_argument("folders", metavar="RUN", nargs="+", help="the folder of a run; several are compared")
    p.add_argument("--output", metavar="FILE.html", help=f"(default: {NAME} in the run's folder, for several runs in "
                   "the folder that they are in)")
    p.add_argument("--overwrite", action="store_true", help="replace a file that is no report")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def main(argv: list[str] | None = None) -> None:
    """The command line: prints where the report is; exit code 2 for an error of one sentence."""
    def make(args) -> int:
        print(write(args.folders, args.output, args.overwrite))
        if len(args.folders) == 1 and args.output is None:
            try:
                write_curves(Path(args.folders[0]))
            except (ValueError, OSError) as error:
                log.warning("No curves: %s", error)
        return 0
    run(make, parser().parse_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
