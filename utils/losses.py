"""Logits and labels -> loss and accuracy: softmax cross-entropy for one class an image, sigmoid for several."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.data import Split
from utils.mixing import soft

Criterion = Callable[[Tensor, Tensor], Tensor]  # logits (B, C), labels -> loss, 0-dimensional


def make_criterion(train: Split, label_smoothing: float = 0.0, class_weights: str = "none") -> Criterion:
    """The loss for the labels of `train`, (N,) class numbers or (N, C) of 0 and 1: a mean over the batch's images.

    One class an image: cross-entropy, also of shares (B, C) of several, as mixed images have them. Several classes:
    binary cross-entropy, summed over the classes (big_vision's `sigmoid_xent`), so that a class learns as fast whatever
    their number. Smoothing s leaves 1 - s of a label and spreads s evenly: over the C classes, or over yes and no.
    class_weights balanced: `balanced_weights` times the loss of an image, or of a decision, by its unsmoothed label.
    The mean is over images, not over weights as PyTorch's weighted mean is: so the mean of equal micro-batches is the
    loss of the batch. Computed in float32, or float64 where the logits are. ValueError: another word or share.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing:g}: the share of a label to spread is 0 to below 1.")
    if class_weights not in ("none", "balanced"):
        raise ValueError(f"There are no class weights '{class_weights}': choose none or balanced.")
    kept = {} if class_weights == "none" else {torch.device("cpu"): balanced_weights(train)}

    def weights_on(device: torch.device) -> Tensor | None:
        if kept and device not in kept:  # copied once: a copy at each step would make the device wait
            kept[device] = kept[torch.device("cpu")].to(device)
        return kept.get(device)

    def one_class(logits: Tensor, labels: Tensor) -> Tensor:
        logits, weights = _wide(logits), weights_on(logits.device)
        if weights is None:
            return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        counted = soft(labels, logits.shape[1]) * weights                          # (B, C)
        smooth = torch.lerp(counted, counted.mean(dim=1, keepdim=True).expand_as(counted), label_smoothing)
        return -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean()

    def several_classes(logits: Tensor, labels: Tensor) -> Tensor:
        logits, weights = _wide(logits), weights_on(logits.device)
        labels = labels.to(logits.dtype)
        if weights is not None:
            weights = torch.lerp(torch.ones_like(labels), weights.to(labels.dtype).expand_as(labels), labels)  # (B, C)
        targets = labels * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum") / len(logits)

    criterion = several_classes if train.multi_label else one_class
    criterion.multi_label = train.multi_label
    return criterion


def balanced_weights(train: Split) -> Tensor:
    """(C,) float32: what makes rare classes count as much as frequent ones.

    One class an image: N / (K n_c) for the K classes that have images, scikit-learn's 'balanced': 1 on average over
    the images; 0 for a class without any. Several: negatives / positives, the weight of a yes where a no has 1, with
    neither counted as less than one: a class that all images have keeps a little, that of one without any is not used.
    """
    images = len(train)
    if train.multi_label:
        positives = train.labels.sum(dim=0)
        return (images - positives).clamp(min=1) / positives.clamp(min=1)
    counts = train.labels.bincount(minlength=len(train.classes))
    weights = images / (counts.count_nonzero() * counts.clamp(min=1))
    return weights.where(counts > 0, 0.0).float()


def accuracy_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, C), labels (B,) or (B, C) -> share of images that are right, 0-dimensional.

    With several classes an image is right where all its decisions are (logit above 0: yes), as in scikit-learn's
    `accuracy_score`.
    """
    if labels.ndim == 1:
        return (logits.argmax(dim=1) == labels).float().mean()
    return ((logits > 0) == (labels > 0.5)).all(dim=1).float().mean()


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
