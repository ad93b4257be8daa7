"""Losses against PyTorch's, scikit-learn's and the formulas they are named after; all are linear over micro-batches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from sklearn.utils.class_weight import compute_class_weight

from utils.data import Split
from utils.losses import accuracy_of, balanced_weights, make_criterion

CLASSES = ("a", "b", "c", "d", "e")


def split(labels, classes=CLASSES):
    return Split(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), torch.as_tensor(labels), classes)


def sample(several, count=24, dtype=torch.float64):
    """A batch and a training set: logits (24, 5), its labels, and 100 labels in which class 4 is rare."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 5, generator=generator, dtype=dtype) * 3
    shares = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    if several:
        return logits, *((torch.rand(n, 5, generator=generator) < shares).float() for n in (count, 100))
    return logits, *(torch.multinomial(shares, n, replacement=True, generator=generator) for n in (count, 100))


def smoothed(y, s):
    return y * (1 - s) + s / 2


def test_one_class_unweighted_is_pytorchs_cross_entropy():
    logits, labels, train = sample(several=False)
    for s in (0.0, 0.1):
        assert torch.equal(make_criterion(split(train), s)(logits, labels),
                           F.cross_entropy(logits, labels, label_smoothing=s))


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_shares_of_two_classes_have_the_mean_of_their_losses(weights):
    """Linear in the label, with smoothing and weights."""
    train = Split(torch.zeros(9, 3, 2, 2), torch.tensor([0] * 5 + [1] * 3 + [2]), ("a", "b", "c"))
    criterion = make_criterion(train, 0.1, weights)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    one, other = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 2, 0, 2])
    mixed = 0.3 * torch.eye(3)[one] + 0.7 * torch.eye(3)[other]
    assert criterion(logits, mixed).item() == pytest.approx(
        0.3 * criterion(logits, one).item() + 0.7 * criterion(logits, other).item(), rel=1e-6)


def test_balanced_weights_are_scikit_learns_and_1_on_average():
    _, _, train = sample(several=False)
    theirs = compute_class_weight("balanced", classes=np.arange(5), y=train.numpy())
    ours = balanced_weights(split(train))
    assert ours.numpy() == pytest.approx(theirs, rel=1e-6) and ours[train].mean().item() == pytest.approx(1, rel=1e-6)
    assert ours[4] > 5 * ours[0]


def test_a_class_without_images_weighs_nothing_and_the_others_as_if_it_were_not_there():
    weights = balanced_weights(split([0, 0, 0, 2, 2, 4]))
    assert weights.tolist() == pytest.approx([6 / 9, 0, 1, 0, 2])
    loss = make_criterion(split([0, 0, 0, 2, 2, 4]), class_weights="balanced")
    assert loss(torch.zeros(2, 5), torch.tensor([0, 1])).item() == pytest.approx(np.log(5) * 6 / 9 / 2)


def test_several_classes_is_the_sum_over_classes_of_big_visions_sigmoid_xent():
    logits, labels, train = sample(several=True)
    p = 1 / (1 + np.exp(-logits.numpy()))
    for s in (0.0, 0.2):
        y = smoothed(labels.numpy(), s)
        theirs = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(axis=1).mean()
        assert make_criterion(split(train), s)(logits, labels).item() == pytest.approx(theirs, rel=1e-7)


def test_balanced_decisions_are_pytorchs_pos_weight():
    logits, labels, train = sample(several=True)
    positives = train.sum(0)
    theirs = F.binary_cross_entropy_with_logits(logits, labels.double(), pos_weight=((100 - positives) / positives))
    ours = make_criterion(split(train), class_weights="balanced")(logits, labels)
    assert ours.item() == pytest.approx(5 * theirs.item(), rel=1e-6)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_the_loss_is_least_where_the_smoothed_label_says_whatever_the_weights(several, weights):
    """A no of a rare class must not be drawn to yes by the rare class's weight on the smoothed part."""
    _, labels, train = sample(several)
    s = 0.1
    if several:
        best = torch.logit(smoothed(labels.double(), s))
    else:
        best = (F.one_hot(labels, 5) * (1 - s) + s / 5).double().log()
    best.requires_grad_()
    make_criterion(split(train), s, weights)(best, labels).backward()
    assert best.grad.abs().max() < 1e-7


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("s", [0.0, 0.1])
def test_the_mean_over_micro_batches_is_the_loss_of_the_batch(several, weights, s):
    logits, labels, train = sample(several)
    criterion = make_criterion(split(train), s, weights)
    whole = criterion(logits, labels).item()
    for parts in (2, 4, 24):
        pieces = [criterion(x, y).item() for x, y in zip(logits.chunk(parts), labels.chunk(parts))]
        assert np.mean(pieces) == pytest.approx(whole, rel=1e-13)


def test_weights_without_bounds_are_finite():
    """A class that all images have, one that none has: neither 0 nor infinite, and a yes never seen is not used."""
    train = torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    assert balanced_weights(split(train, ("a", "b", "c"))).tolist() == [0.25, 4, 3]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_sixteen_bit_logits_give_a_float32_loss_of_the_same_value(several, weights):
    logits, labels, train = sample(several, dtype=torch.float32)
    criterion = make_criterion(split(train), 0.1, weights)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = logits.to(dtype).requires_grad_()
        loss = criterion(narrow, labels)
        assert loss.dtype == torch.float32 and torch.equal(loss, criterion(narrow.float(), labels))
        loss.backward()
        assert narrow.grad.dtype == dtype and narrow.grad.isfinite().all()


def test_logits_far_from_zero_stay_finite():
    labels = torch.tensor([[1.0, 0], [0, 1]])
    criterion = make_criterion(split(labels, ("a", "b")), 0.1, "balanced")
    assert criterion(torch.tensor([[1e4, -1e4], [1e4, -1e4]]), labels).isfinite()


@pytest.mark.parametrize("several", [False, True])
def test_the_weights_follow_the_logits_to_their_device_once(several, monkeypatch):
    logits, labels, train = sample(several)
    criterion = make_criterion(split(train), 0.1, "balanced")
    there = logits.to("meta"), labels.to("meta")
    assert criterion(*there).device.type == "meta" and criterion(logits, labels).device.type == "cpu"
    moved, to = [], torch.Tensor.to

    def watched(tensor, *args, **kwargs):
        moved.extend(arg for arg in args if isinstance(arg, (str, torch.device)))
        return to(tensor, *args, **kwargs)
    monkeypatch.setattr(torch.Tensor, "to", watched)
    criterion(*there)
    assert not moved


def test_accuracy_is_the_share_of_images_that_are_right():
    for several in (False, True):
        logits, labels, _ = sample(several)
        logits += 8 * ((labels if several else F.one_hot(labels, 5)) - 0.5)
        predicted = (logits > 0).int() if several else logits.argmax(1)
        accuracy = accuracy_of(logits, labels)
        assert accuracy.shape == () and 0 < accuracy < 1
        assert accuracy.item() == pytest.approx(accuracy_score(labels.int().numpy(), predicted.numpy()))


@pytest.mark.parametrize("options, words", [
    ({"label_smoothing": 1.0}, "label_smoothing is 1: the share"), ({"label_smoothing": -0.1}, "is -0.1"),
    ({"label_smoothing": float("nan")}, "is nan"), ({"class_weights": "sqrt"}, "no class weights 'sqrt': choose none")])
def test_other_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_criterion(split([0, 1]), **options)
