"""What a model said of images, as aligned plain text and as rows."""

import csv

from utils.data import Split
from utils.evaluation import Outputs

WHOLE = 20  # classes up to which tables show each of them
WORST = 10  # rows of what is shown instead where there are more


def some(names, most: int = 5) -> str:
    """a, b, c and 7 more"""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def as_text(found: dict) -> str:
    """What `evaluate.py` shows of the report that it writes."""
    parts = [f"{found['model']}\n{found['data']}: {found['images']:,} images", summary(found)]
    classes = [c for c in found["classes"] if c["images"] or c["predicted"]]
    if len(classes) <= WHOLE:
        parts.append(class_table(classes))
    else:
        worst = sorted((c for c in classes if c["images"]), key=lambda c: c["f1"])[:WORST]
        parts.append(f"the {len(worst)} worst of {len(classes):,} classes\n{class_table(worst)}")
    if "confusion" in found:
        parts.append(matrix(found) if len(classes) <= WHOLE else confusions(found))
    return "\n\n".join(parts)


def summary(found: dict) -> str:
    """The numbers for all images, a line each."""
    scored = f"of the {found['real_images']:,} images that have labels" if "real_images" in found else ""
    absent = sum(not c["images"] for c in found["classes"] if c["in_data"])
    note = f"{absent} classes have no image here and count as 0" if absent else ""
    shares = {"top-1": ("top1", ""), "top-5": ("top5", ""), "ReaL": ("real_accuracy", scored),
              "all labels right": ("all_labels_right", ""), "mean average precision": ("mean_average_precision", ""),
              "micro F1": ("micro_f1", ""), "macro F1": ("macro_f1", note),
              "balanced accuracy": ("balanced_accuracy", ""),
              "calibration error": ("calibration_error", "expected, 15 bins")}
    lines = [f"{name:24}{100 * found[key]:7.2f} %  {remark}" for name, (key, remark) in shares.items()
             if found.get(key) is not None]
    lines.insert(2 if found.get("top5") is not None else 1, f"{'loss':24}{found['loss']:9.4f}")
    speed = f"{found['images_per_second']:,.0f}"
    return "\n".join(line.rstrip() for line in [*lines, f"{'speed':24}{speed:>7} images/s, {found['device']}"])


def class_table(classes: list[dict]) -> str:
    """Precision, recall and F1 of each class."""
    several = "average_precision" in classes[0]
    width = max(len(c["name"]) for c in [*classes, {"name": "class"}])
    keys = ["average_precision"] * several + ["precision", "recall", "f1"]
    heads = ["AP"] * several + ["precision", "recall", "F1"]
    lines = [f"{'class':{width}}" + "".join(f"{head:>11}" for head in [*heads, "images"])]
    for c in classes:
        cells = ["-" if c[key] is None else f"{100 * c[key]:.2f} %" for key in keys]
        lines.append(f"{c['name']:{width}}" + "".join(f"{cell:>11}" for cell in [*cells, f"{c['images']:,}"]))
    return "\n".join(lines)


def matrix(found: dict) -> str:
    """The confusion matrix of few classes: a row is what images are, a column what was predicted."""
    cells = {(label, predicted): n for label, predicted, n in found["confusion"]}
    shown = [i for i, c in enumerate(found["classes"]) if c["images"] or c["predicted"]]
    names = [f"{i:>3} {found['classes'][i]['name']}" for i in shown]
    width, cell = max(map(len, names)), 2 + max(len(str(n)) for n in [*shown, *cells.values()])
    lines = ["confusion: a row is what images are, a column what was predicted",
             " " * width + "".join(f"{i:>{cell}}" for i in shown)]
    return "\n".join(lines + [f"{name:{width}}" + "".join(f"{cells.get((i, j), '.'):>{cell}}" for j in shown)
                              for name, i in zip(names, shown)])


def confusions(found: dict) -> str:
    """The most frequent confusions of many classes."""
    names = [c["name"] for c in found["classes"]]
    wrong = sorted((cell for cell in found["confusion"] if cell[0] != cell[1]), key=lambda cell: -cell[2])[:WORST]
    if not wrong:
        return "nothing was confused"
    width = max(len(names[label]) for label, _, _ in wrong)
    return "\n".join(["most frequent confusions"] + [
        f"{names[label]:{width}}  taken for {names[predicted]}: {n} of {found['classes'][label]['images']}"
        for label, predicted, n in wrong])


# --- Rows ------------------------------------------------------------------------------------------------------------

def write_rows(file, split: Split, said: Outputs) -> None:
    """A line an image: its file (or number in the set), label, what was predicted, and how likely the model finds it;
    several labels are joined by |."""
    rows, classes = csv.writer(file, lineterminator="\n"), split.classes
    several = said.labels.ndim == 2
    rows.writerow(["image", "label", "predicted"] + ["confidence"] * (not several))
    for n, i in enumerate(said.indices.tolist()):
        if several:
            names = ["|".join(classes[c] for c in row[n].nonzero()[:, 0]) for row in (said.labels, said.predicted)]
            rows.writerow([split.name(i), *names])
        else:
            rows.writerow([split.name(i), classes[said.labels[n]], classes[said.predicted[n]],
                           f"{said.confidence[n]:.6f}"])
