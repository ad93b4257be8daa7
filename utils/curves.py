"""The course of a run as a picture and as a table that any program reads: `curves.png`, `curves.csv`.

Both are derived from metrics.jsonl: they may be deleted, and made again.
"""

import csv
import math
import warnings
from pathlib import Path

import numpy as np

from utils.charts import COLOURS, FEW, SMOOTH, STYLE, smooth, thin
from utils.history import History, Series, read
from utils.state import replacing, replacing_text

PICTURE, TABLE = "curves.png", "curves.csv"
PIXELS = (1200, 480)
DPI = 100
NO_EVALUATION = {"train", "run", "best"}  # what the names of other series begin with
NAMES = {"map": "mAP", "macro_f1": "macro F1"}


def write(folder: Path, images: int | None = None) -> tuple[Path, Path]:
    """Writes curves.csv and curves.png into the folder of a run, finished or not; returns both.

    images: of the training part, which make an epoch; by default the settings' `train_images`. Where neither is known
    there are no epochs, and the picture counts updates. The table has a row for each evaluation (none: its head alone);
    an empty cell is a value that was not finite or is not there. ValueError: no run, or one without any update.
    """
    history = read(Path(folder))
    batch, images = history.settings.get("train_batch_size"), images or history.resolved.get("train_images")
    epoch = batch / images if batch and images else None  # epochs of an update
    if not history.step:
        raise ValueError(f"{folder}/metrics.jsonl has no update yet: there are no curves.")
    table, picture = history.folder / TABLE, history.folder / PICTURE
    with replacing_text(table) as file:
        csv.writer(file, lineterminator="\n").writerows(_rows(history, epoch))
    with replacing(picture) as file:
        _draw(history, epoch, file)
    return table, picture


# --- Table -----------------------------------------------------------------------------------------------------------

def _evaluations(history: History) -> list[str]:
    """The series of evaluations, losses first."""
    names = [name for name in history.series if name.split("/")[0] not in NO_EVALUATION]
    return sorted(names, key=lambda name: not name.endswith("loss"))


def _rows(history: History, epoch: float | None) -> list[list]:
    """The head, then an evaluation each: epochs, updates, the learning rate of the last of them, the means of training
    over those since the evaluation before, and what was found."""
    names = _evaluations(history)
    found = [dict(zip(*(column.tolist() for column in history.series[name]))) for name in names]
    rates = history.series.get("train/lr")
    rates = dict(zip(rates.steps.tolist(), rates.values.tolist())) if rates else {}
    rows = [["epoch", "step", "learning_rate", "train_loss", "train_accuracy", *(n.replace("/", "_") for n in names)]]
    before = 0
    for step in sorted(set().union(*found)):
        means = [_mean(history.series.get(f"train/{name}"), before, step) for name in ("loss", "accuracy")]
        numbers = [rates.get(step, math.nan), *means, *(values.get(step, math.nan) for values in found)]
        rows.append([round(step * epoch, 6) if epoch else "", step, *("" if math.isnan(n) else n for n in numbers)])
        before = step
    return rows


def _mean(series: Series | None, after: int, to: int) -> float:
    """Of the finite values of the steps after + 1 ... to; NaN if there is none."""
    if series is None:
        return math.nan
    values = series.values[(series.steps > after) & (series.steps <= to)]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


# --- Picture ---------------------------------------------------------------------------------------------------------

def _draw(history: History, epoch: float | None, file) -> None:
    """PNG: loss and accuracy over epochs. epoch: those of an update; None: over updates."""
    import matplotlib  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    found = [name for name in ("train/loss", "train/accuracy") if name in history.series] + _evaluations(history)
    unit, length = ("epoch", epoch) if epoch else ("update", 1)
    labels = list(dict.fromkeys(map(_label, found)))
    style = {**STYLE, "figure.facecolor": "white", "axes.facecolor": "white", "font.size": 11, "lines.linewidth": 2,
             "axes.titlesize": 12, "figure.titlesize": 14}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in a script that the font lacks
        figure = Figure([pixels / DPI for pixels in PIXELS], dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.03)
        figure.suptitle(history.name.encode(errors="replace").decode())
        for axes, title in zip(figure.subplots(1, 2), ("Loss", "Accuracy")):
            for name in found:
                if name.endswith("loss") == (title == "Loss"):
                    colour = COLOURS[labels.index(_label(name)) % len(COLOURS)]
                    _line(axes, name, history.series[name], length, colour)
            axes.set(title=title, xlabel=unit, xlim=(0, history.step * length * 1.02))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(6, min_n_ticks=2, steps=[1, 2, 2.5, 5, 10]))
            if axes.lines:
                axes.legend(frameon=False)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
        figure.savefig(file, format="png", metadata={"Software": None})


def _label(name: str) -> str:
    """test/loss -> test, val/map -> val mAP, average/test_accuracy -> average test."""
    part, *metric = name.replace("/", "_").removesuffix("_loss").removesuffix("_accuracy").split("_", 1)
    return " ".join([part, *(NAMES.get(word, word.replace("_", " ")) for word in metric)])


def _line(axes, name: str, series: Series, length: float, colour: str) -> None:
    """Evaluations with marks. Updates, which are noisy: many of them faint under their mean, of ten or more each.
    length: of an update on the axis."""
    kept = thin(series.values)
    steps, values, few = series.steps[kept] * length, series.values[kept], len(kept) <= FEW
    label, size = _label(name), 5 if few else 2.5
    if not name.startswith("train/"):
        axes.plot(steps, values, color=colour, label=label, zorder=4, marker="o", markersize=size)
    elif few:
        axes.plot(steps, values, color=colour, label=label, zorder=3, marker="o", markersize=size / 2)
    else:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3, zorder=2)
        mean = smooth(series, min(SMOOTH, len(series.values) // 10))
        axes.plot(mean.steps * length, mean.values, color=colour, label=label, zorder=3)
