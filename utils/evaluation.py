"""Model + split -> what the model says about each image, and the metrics of it. Each image counts once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.batches import EvalBatches
from utils.data import Split
from utils.distributed import ALONE, World

BINS = 15  # of the calibration error, as in Guo et al. 2017


class Outputs(NamedTuple):
    """What a model says about N images. With several labels an image: labels and predicted are (N, C)."""

    indices: Tensor            # (N,) int64, positions in the split
    labels: Tensor             # (N,) int64, or (N, C) float32 of 0 and 1
    loss: Tensor               # (N,) float64: cross-entropy, or binary cross-entropy summed over the classes
    predicted: Tensor          # (N,) int64: the largest logit; or (N, C) bool: a logit above 0
    confidence: Tensor | None  # (N,) float32, the largest probability; None with several labels
    rank: Tensor | None        # (N,) int64, how many logits are larger than the true class's; None with several labels
    scores: Tensor | None      # (N, C) float32 probabilities, softmax or sigmoid; None where nobody asked for them

    @classmethod
    def cat(cls, parts: Iterable["Outputs"]) -> "Outputs":
        """Parts of any order and device -> one, on the CPU and by position, without images that could not be read."""
        joined = cls(*(None if column[0] is None else torch.cat(column).cpu() for column in zip(*parts)))
        order = joined.indices.argsort()
        read = joined.labels if joined.labels.ndim == 1 else joined.labels[:, 0]
        order = order[read[order] >= 0]
        return cls(*(None if column is None else column[order] for column in joined))


def stream(model, batches: EvalBatches, precision: torch.dtype = torch.float32, *, numbers: range | None = None,
           scores: bool = False, stop: Callable[[], None] | None = None) -> Iterator[Outputs]:
    """`Outputs` batch after batch, still on the device, so that nothing waits for it: `Outputs.cat` brings them home.

    numbers: which batches (default: all). stop: called before each batch, and may raise. The model comes back in the
    mode, training or evaluation, in which it came.
    """
    training = model.training
    numbers = range(len(batches)) if numbers is None else numbers
    model.eval()
    try:
        for k, (images, labels) in zip(numbers, batches.stream(numbers)):
            if stop is not None:
                stop()
            yield _said(model, torch.from_numpy(batches.indices(k)), images, labels, precision, scores)
    finally:
        model.train(training)


@torch.inference_mode()
def _said(model, indices: Tensor, images: Tensor, labels: Tensor, precision: torch.dtype, scores: bool) -> Outputs:
    """One batch. A label of -1, that of a broken image, is as good as any here: the row is left out later."""
    half = precision in (torch.bfloat16, torch.float16)
    with torch.autocast(images.device.type, dtype=precision, enabled=half):
        logits = model(images)                                                     # (B, C)
    logits = logits.float() if half else logits
    if labels.ndim == 2:
        loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").sum(dim=1)
        return Outputs(indices, labels, loss.double(), logits > 0, None, None, logits.sigmoid() if scores else None)
    loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    probabilities = logits.softmax(dim=1)
    true = logits.gather(1, labels.clamp(min=0)[:, None])                          # (B, 1)
    return Outputs(indices, labels, loss.double(), logits.argmax(dim=1), probabilities.amax(dim=1),
                   (logits > true).sum(dim=1), probabilities if scores else None)


def outputs(model, batches: EvalBatches, precision: torch.dtype = torch.float32, *, numbers: range | None = None,
            scores: bool = False, stop: Callable[[], None] | None = None) -> Outputs:
    """All of `stream`, with the same arguments, as one."""
    return Outputs.cat([_nothing(batches.split, scores),
                        *stream(model, batches, precision, numbers=numbers, scores=scores, stop=stop)])


def _nothing(split: Split, scores: bool) -> Outputs:
    """No image at all, so that a process without a batch has an answer, too."""
    several = split.labels.ndim == 2
    none, table = torch.zeros(0, dtype=torch.int64), torch.zeros(0, len(split.classes))
    return Outputs(none, split.labels[:0], none.double(), table.bool() if several else none,
                   None if several else none.float(), None if several else none, table if scores else None)


# --- Metrics ---------------------------------------------------------------------------------------------------------

class Metrics(NamedTuple):
    accuracy: float    # share of images whose largest logit is their class, or that have all their labels right
    loss: float        # mean over the images, see `Outputs`
    images: int
    macro_f1: float    # mean of F1 over all classes; 0 for one that has no image and is never predicted
    map: float | None  # mean of the average precision over the classes that have an image; None without scores


def evaluate(model, batches: EvalBatches, precision: torch.dtype = torch.float32, *, scores: bool = False,
             stop: Callable[[], None] | None = None, world: World = ALONE) -> Metrics:
    """The metrics of `shared_outputs`, with the same arguments."""
    return measure(shared_outputs(model, batches, precision, scores=scores, stop=stop, world=world),
                   len(batches.split.classes))


def shared_outputs(model, batches: EvalBatches, precision: torch.dtype = torch.float32, *, scores: bool = False,
                   stop: Callable[[], None] | None = None, world: World = ALONE) -> Outputs:
    """What the model says about all images of a split, of which each process of the world asks about its share of the
    batches.

    Google drops the last partial batch; here it counts. scores: whether they are needed (for `map`); with several
    labels an image they always are. stop: as in `stream`.
    """
    mine = range(world.rank, len(batches), world.size)
    said = outputs(model, batches, precision, numbers=mine, scores=scores or batches.split.multi_label, stop=stop)
    return Outputs.cat(world.gather(said))


def measure(said: Outputs, num_classes: int) -> Metrics:
    """The few numbers that a run follows."""
    from sklearn.metrics import f1_score  # slow to import

    macro = f1_score(said.labels.numpy(), said.predicted.numpy(), labels=range(num_classes), average="macro",
                     zero_division=0)
    precisions = [] if said.scores is None else list(average_precisions(said).values())
    return Metrics(_right(said).double().mean().item(), said.loss.mean().item(), len(said.indices), float(macro),
                   float(np.mean(precisions)) if precisions else None)


def _right(said: Outputs) -> Tensor:
    """(N,) bool: the class, or each of the labels, is right."""
    right = said.predicted == said.labels
    return right.all(dim=1) if right.ndim == 2 else right


def average_precisions(said: Outputs) -> dict[int, float]:
    """{class: area under precision over recall, step-wise} of the classes that have an image; needs the scores.

    A score that is not finite ranks last.
    """
    from sklearn.metrics import average_precision_score

    labels, scores = said.labels, said.scores.nan_to_num(nan=0.0).numpy()
    labels = (labels if labels.ndim == 2 else F.one_hot(labels, scores.shape[1])).numpy()
    return {c: float(average_precision_score(labels[:, c], scores[:, c])) for c in labels.any(axis=0).nonzero()[0]}


def report(said: Outputs, classes: Sequence[str], known: Sequence[int] | None = None) -> dict:
    """All that can be said about N > 0 images, as JSON can hold it. A share is 0 to 1, a class its place in `classes`.

    known: the classes that the data set has, over which macro averages go (default: all), as in `measure`; balanced
    accuracy is over those that have an image. With several labels an image there is no top-5, confusion or calibration.
    """
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    labels, predicted, C = said.labels.numpy(), said.predicted.numpy(), len(classes)
    known = sorted(range(C) if known is None else known)
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=range(C),
                                                                     zero_division=0)
    inside = set(known)
    times = predicted.sum(axis=0) if labels.ndim == 2 else np.bincount(predicted, minlength=C)
    table = [{"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "images": int(n),
              "predicted": int(t), "in_data": i in inside}
             for i, (name, p, r, f, n, t) in enumerate(zip(classes, precision, recall, f1, support, times))]
    shared = {"images": len(labels), "loss": said.loss.mean().item(), "macro_precision": float(precision[known].mean()),
              "macro_recall": float(recall[known].mean()), "macro_f1": float(f1[known].mean())}
    if labels.ndim == 2:
        found = average_precisions(said)
        return {"all_labels_right": _right(said).double().mean().item(),
                "mean_average_precision": float(np.mean(list(found.values()))) if found else None,
                "micro_f1": float(f1_score(labels, predicted, average="micro", zero_division=0)), **shared,
                "classes": [{**row, "average_precision": found.get(c)} for c, row in enumerate(table)]}
    return {"top1": _right(said).double().mean().item(),
            "top5": (said.rank < 5).double().mean().item() if C > 5 else None, **shared,
            "balanced_accuracy": float(recall[support > 0].mean()),
            "calibration_error": calibration_error(said.confidence, _right(said)),
            "classes": table, "confusion": confusion(said.labels, said.predicted)}


def confusion(labels: Tensor, predicted: Tensor) -> list[list[int]]:
    """The cells of the confusion matrix that are not zero, as [label, predicted, images], in order."""
    pairs, counts = torch.stack([labels, predicted], dim=1).unique(dim=0, return_counts=True)
    return torch.cat([pairs, counts[:, None]], dim=1).tolist()


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Expected calibration error, Guo et al. 2017, equation 3: |accuracy - mean confidence| of the images in each of
    the bins of `reliability`, weighted by their number."""
    images, sure, accuracy = reliability(confidence, right, bins)
    return float(np.nansum(images * np.abs(accuracy - sure))) / len(confidence)


class Reliability(NamedTuple):
    """Of the images in each of so many equal bins of confidence."""
    images: np.ndarray      # (bins,) how many
    confidence: np.ndarray  # (bins,) mean; NaN in an empty bin
    accuracy: np.ndarray    # (bins,) share that is right; NaN in an empty bin


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> Reliability:
    """(N,) and (N,) bool -> what is in the bins (0, 1/15], (1/15, 2/15], ... of confidence."""
    confidence = confidence.double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1                   # (N,)
    images = place.bincount(minlength=bins)
    sums = (torch.zeros(bins, dtype=torch.float64).index_add_(0, place, values) for values in
            (confidence, right.double()))
    return Reliability(images.numpy(), *((total / images).numpy() for total in sums))
