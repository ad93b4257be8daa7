from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from utils.data import Split
from utils.losses import make_criterion
from utils.mixing import Mix, cut, draw, mix, soft

SIZE = (24, 32)


def batch(count=8, classes=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *SIZE, generator=rng), torch.randint(0, classes, (count,), generator=rng)


def draws(count, **settings):
    return [draw(np.random.default_rng((0, 9, step)), SIZE, **settings) for step in range(count)]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_mixup_is_torchvisions_on_each_pair(weight):
    images, labels = batch()
    mixed, targets = mix(images, labels, Mix(weight), 5)
    theirs = v2.MixUp(num_classes=5)  # rolled by one, two images change places
    for j in range(0, 8, 2):
        x, y = images[j:j + 2], labels[j:j + 2]
        how = {"labels": y, "batch_size": 2, "lam": weight}
        assert torch.allclose(mixed[j:j + 2], theirs.transform(x, how), atol=1e-6)
        assert torch.allclose(targets[j:j + 2], theirs.transform(y, how), atol=1e-6)


@pytest.mark.parametrize("weight, row, column", [(0.5, 12, 16), (0.2, 0, 31), (0.7, 23, 0), (0.0, 3, 5), (1.0, 9, 9)])
def test_cutmix_is_torchvisions_on_each_pair(weight, row, column, monkeypatch):
    images, labels = batch()
    mixed, targets = mix(images, labels, cut(weight, row, column, SIZE), 5)
    theirs, places = v2.CutMix(num_classes=5), iter([column, row] * 4)  # they draw the column first
    theirs._dist = SimpleNamespace(sample=lambda shape: weight)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(places)]))
    for j in range(0, 8, 2):
        x, y = theirs(images[j:j + 2], labels[j:j + 2])
        assert torch.equal(mixed[j:j + 2], x) and torch.allclose(targets[j:j + 2], y, atol=1e-6)


def test_the_weight_is_the_area_that_is_left():
    ones = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, *SIZE)
    for how in draws(300, mixup=0):
        mixed, targets = mix(ones, torch.tensor([0, 1]), how, 2)
        assert mixed[0].mean().item() == pytest.approx(1 - how.weight, abs=1e-6)
        assert mixed.mean(dim=(1, 2, 3)).numpy() == pytest.approx(targets[:, 1].numpy(), abs=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_mixups_weight_has_betas_mean_and_variance(alpha):
    weights = [how.weight for how in draws(20_000, mixup=alpha, cutmix=0)]
    variance = 1 / (4 * (2 * alpha + 1))
    assert np.mean(weights) == pytest.approx(0.5, abs=4 * (variance / 20_000) ** 0.5)
    assert np.var(weights) == pytest.approx(variance, rel=0.03)


def test_boxes_are_distributed_as_torchvisions():
    theirs, image = v2.CutMix(num_classes=2), torch.zeros(2, 3, *SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        left, top, right, bottom = np.array([theirs.make_params([image])["box"] for _ in range(5000)]).T
    expected = np.stack([top, left, bottom, right])
    ours = np.array([how.box for how in draws(5000, mixup=0)]).T
    assert (ours[:2] >= 0).all() and (ours[2] <= 24).all() and (ours[3] <= 32).all()
    assert ours.mean(axis=1) == pytest.approx(expected.mean(axis=1), abs=0.5)  # 3 standard errors
    assert ours.std(axis=1) == pytest.approx(expected.std(axis=1), abs=0.35)
    assert np.corrcoef(ours) == pytest.approx(np.corrcoef(expected), abs=0.06)


def test_a_step_is_one_or_the_other_with_the_given_chance():
    for chance in (0.0, 0.3, 1.0):
        shares = np.mean([how.box is not None for how in draws(5000, cutmix_chance=chance)])
        assert shares == pytest.approx(chance, abs=0.03)
    assert all(how.box is None for how in draws(50, cutmix=0, cutmix_chance=1.0))
    assert all(how.box is not None for how in draws(50, mixup=0, cutmix_chance=0.0))
    assert draws(3, mixup=0, cutmix=0) == [Mix(1.0)] * 3


def test_without_either_images_and_labels_stay():
    images, labels = batch()
    mixed, targets = mix(images, labels, Mix(1.0), 5)
    assert torch.equal(mixed, images) and torch.equal(targets, F.one_hot(labels, 5).float())


def test_targets_of_one_class_an_image_sum_to_one():
    images, labels = batch(64)
    for how in draws(100):
        _, targets = mix(images, labels, how, 5)
        assert targets.shape == (64, 5) and targets.dtype == torch.float32
        assert (targets >= 0).all() and torch.allclose(targets.sum(dim=1), torch.ones(64), atol=1e-6)


def test_several_labels_an_image_are_mixed_class_by_class():
    images, _ = batch(2)
    labels = torch.tensor([[1, 1, 0], [0, 1, 0]])
    _, targets = mix(images, labels, Mix(0.75), 3)
    assert targets.tolist() == [[0.75, 1, 0], [0.25, 1, 0]]
    assert torch.equal(mix(images, labels.float(), Mix(0.75), 3)[1], targets)  # already soft
    assert soft(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("several", [False, True])
def test_the_smoothed_loss_of_a_mixed_batch_is_the_mix_of_the_losses(several):
    images, labels = batch()
    labels = F.one_hot(labels, 5) if several else labels
    criterion = make_criterion(Split(torch.zeros(8, 3, 2, 2, dtype=torch.uint8), labels, tuple("abcde")), 0.1)
    logits, other = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), labels[[1, 0, 3, 2, 5, 4, 7, 6]]
    _, targets = mix(images, labels, Mix(0.3), 5)
    assert criterion(logits, targets).item() == pytest.approx(
        (0.3 * criterion(logits, labels) + 0.7 * criterion(logits, other)).item(), rel=1e-5)


@pytest.mark.parametrize("shares", [2, 4])
def test_shares_mix_as_the_whole_batch_does(shares):
    images, labels = batch(16)
    for how in draws(6):
        whole = mix(images, labels, how, 5)
        parts = [mix(x, y, how, 5) for x, y in zip(images.chunk(shares), labels.chunk(shares))]
        assert all(torch.equal(torch.cat(part), all_of_it) for part, all_of_it in zip(zip(*parts), whole))


def test_seed_and_step_decide_and_no_other_generator_is_touched():
    images, labels = batch()
    before, state, numpys = images.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = ([mix(images, labels, how, 5) for how in draws(4)] for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(first, second) for a, b in zip(x, y))
    assert len(set(draws(50))) == 50
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpys)


def test_an_image_without_a_partner_is_refused():
    with pytest.raises(ValueError) as error:
        mix(*batch(7), Mix(0.5), 5)
    assert str(error.value) == ("Images are mixed in pairs, and 7 images are an odd number: choose a batch size that "
                                "gives each process an even number.")


@pytest.mark.parametrize("settings", [{"mixup": -1}, {"cutmix": -0.1}, {"cutmix_chance": 1.5}])
def test_numbers_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="an alpha is 0 or more, a chance 0 to 1"):
        draw(np.random.default_rng(0), SIZE, **settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mixing_never_waits_for_the_device():
    """With "error" PyTorch raises where the host would wait; and what comes out is what the CPU makes of it."""
    images, labels = batch()
    there = [tensor.cuda() for tensor in (images, labels)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [mix(*there, how, 5) for how in draws(8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for how, mixed in zip(draws(8), found):
        for ours, expected in zip(mixed, mix(images, labels, how, 5)):
            assert torch.allclose(ours.cpu(), expected, atol=1e-6)
