"""Predictions -> cards of a report: each class, what is taken for what, how far confidence can be trusted."""

from typing import NamedTuple

from utils import charts
from utils.evaluation import calibration_error, confusion, reliability
from utils.history import Predictions
from utils.page import Bar, Html, card, facts, note, percent, table, tag

WHOLE = 30  # classes up to which each is shown
WORST = 15  # rows of what is shown instead where there are more
SMALL = 12  # classes up to which a confusion matrix fits into a column of the page, and on a phone
BLUE = "0 114 178"


class Score(NamedTuple):
    """Of one class. Shares are 0 where there is nothing to share."""
    name: str
    precision: float
    recall: float
    f1: float
    images: int     # that are of it
    predicted: int  # that are taken for it


def by_class(said: Predictions) -> list[Score]:
    from sklearn.metrics import precision_recall_fscore_support  # slow to import

    labels, predicted, C = said.labels.numpy(), said.predicted.numpy(), len(said.classes)
    columns = precision_recall_fscore_support(labels, predicted, labels=range(C), zero_division=0)
    times = predicted.sum(axis=0) if predicted.ndim == 2 else said.predicted.bincount(minlength=C).numpy()
    return [Score(name, float(p), float(r), float(f), int(n), int(t))
            for name, p, r, f, n, t in zip(said.classes, *columns, times)]


def cards(said: Predictions) -> list[Html]:
    """All cards; with several labels an image there is no confusion and no confidence."""
    scores = by_class(said)
    if said.confidence is None:
        return [summary(said, scores), class_card(scores, several=True)]
    cells = {(label, predicted): n for label, predicted, n in confusion(said.labels, said.predicted)}
    shown = [c for c, score in enumerate(scores) if score.images or score.predicted]
    confused = matrix(scores, cells, shown) if len(shown) <= WHOLE else confusions(scores, cells)
    return [summary(said, scores), class_card(scores), calibration_card(said), confused]


def summary(said: Predictions, scores: list[Score]) -> Html:
    """The numbers for all images; macro F1 is over all classes, balanced accuracy over those that have an image."""
    N, right = len(said.images), int(said.right.sum())
    found = {"images": f"{N:,}", ("all labels right" if said.confidence is None else "accuracy"):
             f"{percent(right / N)} ({N - right:,} wrong)",
             "macro F1": percent(sum(score.f1 for score in scores) / len(scores))}
    if said.confidence is not None:
        recalls = [score.recall for score in scores if score.images]
        found |= {"balanced accuracy": percent(sum(recalls) / len(recalls)),
                  "calibration error": percent(calibration_error(said.confidence, said.right))}
    return card("", facts(found), class_="wide")


def class_card(scores: list[Score], several: bool = False) -> Html:
    known = [score for score in scores if score.images or score.predicted]
    remark: Html | str = ""
    if len(known) > WHOLE:
        count = len(known)
        known = sorted((score for score in known if score.images), key=lambda score: score.f1)[:WORST]
        remark = note(f"The {len(known)} of the lowest F1, of {count:,} classes.")
    heads = ["class", *["precision"] * several, "recall", "F1", "images"]
    rows = [[score.name, *[Bar(score.precision)] * several, Bar(score.recall), Bar(score.f1), f"{score.images:,}"]
            for score in known]
    return card("Classes", remark, table(heads, rows, numbers=range(1, len(heads)), class_="classes"),
                class_="wide" if several else "broad" if len(rows) > WORST else "")


def matrix(scores: list[Score], cells: dict[tuple[int, int], int], shown: list[int]) -> Html:
    """The confusion matrix: a row is what images are, a column what they are taken for, colour its share of the row."""
    def cell(row: int, column: int) -> Html:
        n = cells.get((row, column), 0)
        if not n:
            return tag("td")
        share = n / max(scores[row].images, 1)  # a class may have no image, and be predicted
        said = f"{scores[row].name} taken for {scores[column].name}: {n:,} of {scores[row].images:,}"
        return tag("td", f"{n:,}", class_="dark" if share > 0.5 else None, title=said,
                   style=f"background: rgb({BLUE} / {0.08 + 0.92 * share:.2f})")
    upright = "upright" if any(len(scores[c].name) > 3 for c in shown) else None
    head = tag("tr", tag("th"), *(tag("th", tag("span", scores[c].name), title=scores[c].name) for c in shown),
               class_=upright)
    rows = [tag("tr", tag("th", scores[row].name, title=scores[row].name), *(cell(row, column) for column in shown))
            for row in shown]
    whole = tag("table", tag("thead", head), tag("tbody", *rows), class_="matrix")
    return card("Confusion matrix", tag("div", whole, class_="scroll"),
                note("A row is what images are, a column what they are taken for."),
                class_="wide" if len(shown) > SMALL else "")


def confusions(scores: list[Score], cells: dict[tuple[int, int], int]) -> Html:
    """The most frequent confusions of many classes."""
    wrong = sorted((cell for cell in cells.items() if cell[0][0] != cell[0][1]), key=lambda cell: -cell[1])[:WORST]
    rows = [[scores[label].name, scores[predicted].name, f"{n:,} of {scores[label].images:,}"]
            for (label, predicted), n in wrong]
    body = table(["class", "taken for", "images"], rows, [2], class_="confusions") if rows else note("There are none.")
    return card("Most frequent confusions", body)


def calibration_card(said: Predictions) -> Html:
    found = reliability(said.confidence, said.right)
    error, sure = calibration_error(said.confidence, said.right), said.confidence.mean().item()
    right = said.right.double().mean().item()
    chart = charts.calibration("calibration", "Accuracy over confidence, and images in each bin", found)
    return card("Calibration", chart, note(
        f"Expected calibration error {percent(error)} ({len(found.images)} bins): the model is right in "
        f"{percent(right)} of the images and sure of {percent(sure)} on average. On the dashed line confidence could "
        "be taken at its word."))
