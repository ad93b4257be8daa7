"""How good are frozen features? The few-shot linear probe: ridge regression in closed form, nothing is trained.

The paper (Dosovitskiy et al. 2021, section 4.1) gives the idea, Google's big_vision the numbers (`fewshot_lsr.py`,
`common_fewshot.py`). Letters: N images, F features, C classes, K images a class.
"""

import logging
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.modeling import VisionTransformer
from utils.batches import EvalBatches
from utils.data import Data, Split

log = logging.getLogger(__name__)

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)  # a draw each
L2 = 2.0**10
BIAS = 100.0       # the constant feature: so large that the penalty hardly holds its weight back
EPSILON = 1e-5     # added to the deviation

DEFINITION = (
    "Few-shot accuracy: ridge regression in closed form (l2 = 2^10) from the frozen features that the head would see "
    "to targets -1 and 1. Features are whitened with mean and deviation (+ 1e-5) of the drawn images; a constant 100 "
    "is the bias's. K images a class are drawn from train, and the whole test part is scored: mean and standard "
    "deviation (n - 1) over the draws. As big_vision's fewshot_lsr, but for the images: squashed to the model's size, "
    "where that squashes to 256 px and cuts out the central 224.")


class FewShot(NamedTuple):
    """What a probe has found."""
    accuracies: dict[int, tuple[float, ...]]  # K -> share of the test images that are right, after each draw
    images: int                               # of the test part

    def mean(self, shots: int) -> float:
        return statistics.fmean(self.accuracies[shots])

    def spread(self, shots: int) -> float:
        """Standard deviation over the draws (n - 1); nan of one alone."""
        found = self.accuracies[shots]
        return statistics.stdev(found) if len(found) > 1 else float("nan")

    def __str__(self) -> str:
        draws = len(next(iter(self.accuracies.values())))
        numbers = ", ".join(f"{K}-shot {100 * self.mean(K):.2f}" + f" ± {100 * self.spread(K):.2f}" * (draws > 1) + " %"
                            for K in self.accuracies)
        return f"{numbers} of {self.images:,} test images ({draws} draw{'s' * (draws > 1)})"


def few_shot(model: VisionTransformer, train: Split, test: Split, batches: Callable[[Split], EvalBatches], *,
             shots: Sequence[int] = SHOTS, seeds: Sequence[int] = SEEDS) -> FewShot:
    """The probe on the features of a model, whose head plays no part. Only images that are drawn are looked at.

    batches: how images reach the model. ValueError: `check`, or an image that was drawn cannot be read.
    """
    check(train, max(shots))
    classes = len(train.classes)
    drawn = {seed: draw(train.labels.numpy(), classes, max(shots), seed) for seed in seeds}
    needed = np.unique(np.stack([*drawn.values()]))
    x, y = features(model, batches(train.subset(needed)))
    if len(x) < len(needed):
        raise ValueError(f"{len(needed) - len(x)} of the training images that were drawn cannot be read: replace them, "
                         "or leave them out with --skip_unreadable.")
    test_x, test_y = features(model, batches(test))
    test_x, accuracies = test_x.double(), {}
    for K in shots:
        places = [np.searchsorted(needed, drawn[seed][:, :K].flatten()) for seed in seeds]
        accuracies[K] = tuple(accuracy(*solve(x[at], y[at], classes), test_x, test_y) for at in places)
    return FewShot(accuracies, len(test_y))


def said(model: VisionTransformer, dataset: Data, settings, pretrained: bool, processes: int) -> str:
    """What the probe of `few_shot` says of a data set's features, and what was computed; random weights are warned of.
    ValueError: `few_shot`, or a run is to be continued, or several processes are there."""
    if processes > 1 or settings.resume:
        raise ValueError("--few_shot looks at the features of a checkpoint, in one process: leave out torchrun and "
                         "--resume.")

    def batches(split: Split) -> EvalBatches:
        return EvalBatches(split, size=model.img_size, mean=model.config.mean, std=model.config.std,
                           device=model.pos_embed.device, batch_size=settings.eval_batch_size)
    if not pretrained:
        log.warning("The weights are random, and so are the features that are scored: --pretrained_dir says whose.")
    return f"{few_shot(model, dataset.train, dataset.test, batches, shots=(settings.few_shot,))}\n{DEFINITION}"


def check(train: Split, shots: int) -> None:
    """ValueError: an image may have several classes, or a class has fewer images than are to be drawn."""
    if train.multi_label:
        raise ValueError("--few_shot needs images of one class each, and here an image may have several.")
    counts = train.labels.bincount(minlength=len(train.classes))
    if shots > (fewest := int(counts.min())):
        raise ValueError(f"--few_shot {shots} draws {shots} training images of each class, and "
                         f"{train.classes[int(counts.argmin())]} has {fewest}: " +
                         (f"ask for {fewest} at most." if fewest else "add some, or remove the class."))


def draw(labels: np.ndarray, classes: int, shots: int, seed: int) -> np.ndarray:
    """Labels (N,) -> positions (C, K) of images that differ, row c of class c; each class has K at least.

    The first columns are the draw of fewer shots with the same seed. big_vision draws the same of images in the same
    order.
    """
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(classes)])


def features(model: VisionTransformer, batches: EvalBatches) -> tuple[Tensor, Tensor]:
    """What the head would see of each image (N, F), float32, and the labels (N,), on the CPU; without images that
    cannot be read.

    The model comes back as it came. ValueError: a feature is not finite.
    """
    found, labels, training, head = [], [], model.training, model.head
    model.head = nn.Identity()
    model.eval()
    bar = tqdm(total=len(batches.split), desc="features", unit=" images", disable=None, leave=False, dynamic_ncols=True)
    try:
        with bar:
            for images, y in batches.stream(range(len(batches))):
                with torch.inference_mode():
                    found.append(model(images))                                    # (B, F)
                labels.append(y)
                bar.update(len(y))
    finally:
        model.head = head
        model.train(training)
    x, y = torch.cat(found).cpu(), torch.cat(labels).cpu()
    if not x.isfinite().all():
        raise ValueError("The model's features are not finite: its weights are damaged, or it has diverged.")
    return x[y >= 0], y[y >= 0]


def solve(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Features (N, F) and labels (N,) -> weight (C, F) and bias (C,) of the probe as a linear layer, float64.

    Whitening and the constant feature are in them: the layer takes features as they are.
    """
    x = x.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0) + EPSILON
    x = F.pad((x - mean) / deviation, (0, 1), value=BIAS)                          # (N, F + 1)
    solution = ridge(x, 2 * F.one_hot(y, classes).double() - 1)                    # (F + 1, C)
    weight = (solution[:-1] / deviation[:, None]).T                                # (C, F)
    return weight, BIAS * solution[-1] - weight @ mean


def ridge(x: Tensor, targets: Tensor, l2: float = L2) -> Tensor:
    """The w (F, C) of least |x w - targets|^2 + l2 |w|^2, for x (N, F) and targets (N, C).

    (x' x + l2)^-1 x' targets, where there are fewer images than features as x' (x x' + l2)^-1 targets.
    """
    tall = len(x) >= x.shape[1]
    gram = x.T @ x if tall else x @ x.T
    factor = torch.linalg.cholesky(gram + l2 * torch.eye(len(gram), dtype=x.dtype))
    return torch.cholesky_solve(x.T @ targets, factor) if tall else x.T @ torch.cholesky_solve(targets, factor)


def accuracy(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> float:
    """The share of images whose largest output is their class."""
    return ((x.double() @ weight.T + bias).argmax(dim=1) == y).double().mean().item()
