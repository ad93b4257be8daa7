"""Numbers -> charts as inline SVG: drawn by matplotlib without a window; text stays text, and the bytes the same."""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from utils.evaluation import Reliability
from utils.history import Series
from utils.page import Html

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito 2008: told apart by all
GREY, INK = "#8a929c", "#4b535d"
BUCKETS = 400  # of a long curve, each drawn by its extremes: more than a chart has pixels
SMOOTH = 100   # points of the mean that is drawn over a long curve
FEW = 40       # points up to which each has a mark
SIZE = 4.3     # inches across, of which a phone makes about 340 px: 1 pt of text is 1.1 px there
STYLE = {
    "svg.fonttype": "none", "path.simplify": False, "text.parse_math": False, "text.usetex": False, "font.size": 9,
    "figure.facecolor": "none", "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.grid": True, "axes.axisbelow": True, "axes.xmargin": 0.02,
    "axes.formatter.limits": (-3, 5), "grid.color": "#e7eaee", "grid.linewidth": 0.8, "xtick.color": GREY,
    "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "lines.linewidth": 1.5,
    "lines.markersize": 3.5}


def palette(count: int) -> Sequence[str]:
    """Colours for so many runs; beyond those that all can tell apart, of the rainbow."""
    if count <= len(COLOURS):
        return COLOURS[:count]
    from matplotlib import colormaps, colors  # slow to import
    return [colors.to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, count))]


class Curve(NamedTuple):
    id: str          # of its group in the SVG
    series: Series
    colour: str
    faint: bool = False  # values of single steps, which are noisy: light, and under the others


# --- Long curves -----------------------------------------------------------------------------------------------------

def thin(values: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """(N,), NaN where there is a gap -> the positions, ascending, of those that are drawn.

    The first, the last, and of each of so many equal buckets the least, the largest and a gap: nothing stands out in
    the whole that is not seen in what is left. A short curve is left whole.
    """
    if len(values) <= 3 * buckets:
        return np.arange(len(values))
    kept = [0, len(values) - 1]
    for part in np.array_split(np.arange(len(values)), buckets):
        gap = np.isnan(values[part])
        kept += part[gap][:1].tolist()
        if not gap.all():
            kept += [part[np.nanargmin(values[part])], part[np.nanargmax(values[part])]]
    return np.unique(kept)


def smooth(series: Series, points: int = SMOOTH) -> Series:
    """The mean of the steps and values in each of so many equal parts; a part without a value is left out."""
    known = np.isfinite(series.values)
    parts = np.array_split(np.arange(known.sum()), points)
    return Series(*(np.array([column[known][part].mean() for part in parts if len(part)]) for column in series))


def is_long(series: Series) -> bool:
    return np.isfinite(series.values).sum() >= 3 * SMOOTH


def _marked(values: np.ndarray) -> list[int]:
    """Which points have a mark: all of a few, else those that no line reaches."""
    known = np.isfinite(values)
    beside = np.pad(known, 1)
    return np.flatnonzero(known if len(values) <= FEW else known & ~beside[:-2] & ~beside[2:]).tolist()


# --- Charts ----------------------------------------------------------------------------------------------------------

def curves(name: str, label: str, lines: Sequence[Curve], percent: bool = False) -> Html:
    """Values over steps. The group of each curve has its id, its path exactly the points of `thin`; over a long faint
    one lies its mean. percent: 0.5 is written as 50 %."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    def draw(figure) -> None:
        axes = figure.subplots()
        for curve in lines:
            steps, values = curve.series
            drawn, noisy = thin(values), curve.faint and is_long(curve.series)
            axes.plot(steps[drawn], values[drawn], color=curve.colour, gid=curve.id, zorder=2 if curve.faint else 4,
                      marker="o", markevery=_marked(values[drawn]), linewidth=0.7 if noisy else 1.4,
                      alpha=0.35 if noisy else 0.7 if curve.faint else 1)
            if noisy:
                axes.plot(*smooth(curve.series), color=curve.colour, gid=f"{curve.id}.mean", zorder=3)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("step")
    return svg(name, label, draw, 2.5)


def calibration(name: str, label: str, found: Reliability) -> Html:
    """Accuracy over confidence (Guo et al. 2017, figure 1), and below it how many images are how confident."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    def draw(figure) -> None:
        bins = len(found.images)
        middle, known = (np.arange(bins) + 0.5) / bins, found.images > 0
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        upper.bar(middle[known], found.accuracy[known], 0.94 / bins, color=COLOURS[0], alpha=0.3)
        upper.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), linewidth=1)
        upper.plot(found.confidence[known], found.accuracy[known], color=COLOURS[0], marker="o", gid="calibration")
        lower.bar(middle, found.images, 0.94 / bins, color=GREY)
        upper.set(ylim=(0, 1.02), ylabel="accuracy")
        lower.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
        lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        for axis in (upper.yaxis, lower.xaxis):
            axis.set_major_formatter(PercentFormatter(1))
    return svg(name, label, draw, 3.6)


def svg(name: str, label: str, draw: Callable, height: float) -> Html:
    """What `draw(figure)` draws, `height` inches high, as an element for an HTML page.

    name: of the chart on its page; each id in it begins with it, so that no two charts have one in common. label: what
    is said to those who cannot see it.
    """
    import matplotlib  # slow to import
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure, file = Figure((SIZE, height), layout="constrained"), io.StringIO()
        draw(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Html(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
