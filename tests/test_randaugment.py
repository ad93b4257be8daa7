from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from utils.mixing import Mix, cut, mix
from utils.padding import padded_crop
from utils.randaugment import BINS, GEOMETRIC, OPS, Draws, _numbers, draw, randaugment

UNSIGNED = {"Identity", "Posterize", "Solarize", "AutoContrast", "Equalize"}


def pictures(channels=3, size=(32, 32), seed=0):
    """Four images: noise, two smooth ones of low contrast, and one with a channel of a single value."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8, generator=rng)
    noise[1, 0] = 77
    coarse = torch.rand(2, channels, 5, 5, generator=rng) * 180 + 30
    smooth = F.interpolate(coarse, size, mode="bicubic").clamp(0, 255).byte()
    return torch.cat([noise[:1], smooth, noise[1:]])


def torchvisions(image, name, magnitude, negative):
    """One op on one image (C, H, W)."""
    theirs = v2.RandAugment(magnitude=magnitude)
    magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
    values = magnitudes(BINS, *image.shape[1:])
    value = 0.0 if values is None else float(values[magnitude]) * (-1 if signed and negative else 1)
    return theirs._apply_image_or_video_transform(image, name, value, theirs.interpolation, theirs._fill)


def all_get(name, negative, count=4):
    return Draws(np.full((count, 1), OPS.index(name)), np.full((count, 1), negative))


def half_way(name, size, magnitude, negative):
    """(H, W): whether a pixel comes from within 1e-4 pixels of half-way between two, in float64."""
    a, b, c, d, e, f = _numbers(*size, magnitude)[OPS.index(name), int(negative)].astype(np.float64)
    y, x = np.mgrid[:size[0], :size[1]]
    parts = np.stack([a * x + b * y + c, d * x + e * y + f]) % 1
    return torch.from_numpy((abs(parts - 0.5) < 1e-4).any(axis=0))


def test_the_operations_are_torchvisions():
    theirs = v2.RandAugment._AUGMENTATION_SPACE
    assert len(OPS) == len(set(OPS)) == 14 and set(OPS) == set(theirs)
    assert {name for name, (_, signed) in theirs.items() if not signed} == UNSIGNED
    ours = v2.RandAugment()
    assert (ours.num_ops, ours.magnitude, ours.num_magnitude_bins) == (2, 9, BINS)


@pytest.mark.parametrize("name", OPS)
def test_each_operation_is_torchvisions_on_each_image(name):
    magnitudes = 0, 4, 9, 14, 20, 30
    for size, channels, magnitude, negative in product(((32, 32), (24, 37)), (1, 3), magnitudes, (False, True)):
        images = pictures(channels, size)
        ours = randaugment(images, all_get(name, negative), magnitude)
        expected = torch.stack([torchvisions(image, name, magnitude, negative) for image in images])
        if name == "Color":                          # their multiply-add rounds once, ours twice
            assert (ours.int() - expected.int()).abs().max() <= 1
            assert (ours != expected).float().mean() < 0.05
        elif name in GEOMETRIC:
            edge = half_way(name, size, magnitude, negative)
            assert torch.equal(ours[..., ~edge], expected[..., ~edge])
            assert magnitude != 9 or edge.sum() <= 2  # at the default hardly a pixel is half-way
        else:
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_at_224_pixels_the_default_moves_each_pixel_as_torchvision_does(name):
    images = pictures(size=(224, 224))[:2]
    for negative in (False, True):
        expected = torch.stack([torchvisions(image, name, 9, negative) for image in images])
        edge = half_way(name, (224, 224), 9, negative)
        assert torch.equal(randaugment(images, all_get(name, negative, 2))[..., ~edge], expected[..., ~edge])
        assert edge.float().mean() < 0.001


def test_images_with_different_operations_in_one_batch_get_their_own_in_order():
    draws = draw(np.random.default_rng(0), 120, num_ops=3)
    images = torch.cat([pictures(seed=seed) for seed in range(30)])
    ours = randaugment(images, draws)
    for image, result, ops, negative in zip(images, ours, *draws):
        for op, sign in zip(ops, negative):
            image = torchvisions(image, OPS[op], 9, sign)
        different = (result != image).float().mean()
        assert different < (0.02 if OPS.index("Color") in ops else 1e-9)  # its 1 of 255 may be more after Equalize


def test_operations_and_signs_are_drawn_uniformly_and_independently():
    draws = draw(np.random.default_rng(1), 28_000)
    pairs = np.bincount(draws.ops[:, 0] * 28 + draws.ops[:, 1] * 2 + draws.negative[:, 1], minlength=392)
    assert ((pairs - 28_000 / 392) ** 2 / (28_000 / 392)).sum() < 483  # chi-square with 391 degrees: 99.9 %
    counts = np.bincount(draws.ops.ravel(), minlength=14)
    assert ((counts - 4000) ** 2 / 4000).sum() < 34.5                  # 13 degrees


@pytest.mark.parametrize("shares", [2, 4, 24])
def test_shares_make_the_same_images_as_the_whole_batch(shares):
    images = torch.cat([pictures(size=(19, 23), seed=seed) for seed in range(6)])
    draws, mine = draw(np.random.default_rng(2), 24), 24 // shares
    parts = [slice(start, start + mine) for start in range(0, 24, mine)]
    assert torch.equal(torch.cat([randaugment(images[part], draws.share(part)) for part in parts]),
                       randaugment(images, draws))


def test_the_draws_decide_and_nothing_else_is_touched():
    images = pictures()
    before, state, numpys = images.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (randaugment(images, draw(np.random.default_rng((5, 3)), 4)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, images)
    assert not np.array_equal(draw(np.random.default_rng((5, 4)), 4).ops, draw(np.random.default_rng((5, 3)), 4).ops)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpys)
    assert torch.equal(randaugment(images, draw(np.random.default_rng(0), 4, num_ops=0)), images)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (3, 3)])
def test_tiny_images_are_torchvisions_too(size):
    images = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in OPS:
        expected = torch.stack([torchvisions(image, name, 9, False) for image in images])
        difference = (randaugment(images, all_get(name, False)).int() - expected.int()).abs().max()
        assert difference <= (name == "Color")


@pytest.mark.parametrize("images, magnitude, said", [
    (torch.zeros(4, 3, 8, 8), 9, "RandAugment works on pixels of type uint8, before the normalisation, not on "
                                 "torch.float32."),
    (torch.zeros(4, 5, 8, 8, dtype=torch.uint8), 9, "RandAugment is defined for images of 1 or 3 channels, not of 5."),
    (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 31, "RandAugment's magnitude is 31: it is 0 to 30."),
    (torch.zeros(6, 3, 8, 8, dtype=torch.uint8), 9, "RandAugment was drawn for 4 images, but the batch has 6.")])
def test_what_cannot_be_augmented_is_one_sentence(images, magnitude, said):
    with pytest.raises(ValueError) as error:
        randaugment(images, draw(np.random.default_rng(0), 4), magnitude)
    assert str(error.value) == said


class Unasked(TorchDispatchMode):
    """Fails at what a GPU could answer only when it has done all before: a number, a truth, a shape that depends."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        asking = "_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal"
        assert function.overloadpacket.__name__ not in asking
        return function(*args, **(kwargs or {}))


def test_nothing_in_the_augmentation_asks_the_device():
    images, labels = pictures(), torch.tensor([0, 1, 2, 1])
    offsets, flips, draws = torch.full((4, 2), 3), labels == 1, draw(np.random.default_rng(0), 4, num_ops=40)
    with Unasked():
        pixels = randaugment(padded_crop(images, offsets, flips), draws)
        for how in (Mix(0.3), cut(0.4, 5, 6, (32, 32))):
            mix(pixels.float(), labels, how, 3)
    with pytest.raises(AssertionError), Unasked():
        labels[0].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_bits_and_nothing_waits_for_it():
    images = torch.cat([pictures(size=(48, 40), seed=seed) for seed in range(30)])
    draws = draw(np.random.default_rng(0), 120)
    there = images.cuda()
    randaugment(there, draws)  # the first call may set things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = randaugment(there, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(made.cpu(), randaugment(images, draws))
