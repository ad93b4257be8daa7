import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from utils.padding import draw, padded_crop


@pytest.mark.parametrize("channels, size, padding", [(3, (32, 32), 4), (1, (9, 14), 4), (5, (6, 6), 2), (3, (8, 8), 0)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_it_is_torchvisions_random_crop_and_flip_pixel_by_pixel(channels, size, padding, dtype, monkeypatch):
    images = torch.randint(1, 256, (40, channels, *size), generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets, flips = draw(np.random.default_rng(0), 40, padding), np.arange(40) % 3 == 0
    ours = padded_crop(images, torch.from_numpy(offsets), torch.from_numpy(flips), padding)
    places = iter(offsets.ravel().tolist())  # they draw top, then left, and nothing where there is no choice
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(places)]))
    for image, crop, flip in zip(images, ours, flips):
        expected = v2.RandomCrop(size, padding=padding)(image)
        assert torch.equal(crop, expected.flip(2) if flip else expected)
    assert ours.dtype == dtype and ours.is_contiguous()


def test_offsets_are_uniform_and_independent():
    offsets = draw(np.random.default_rng(1), 81_000)
    assert offsets.min() == 0 and offsets.max() == 8
    counts = np.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert ((counts - 1000) ** 2 / 1000).sum() < 124.8  # chi-square with 80 degrees: 99.9 %


@pytest.mark.parametrize("shares", [2, 4])
def test_shares_are_cropped_as_the_whole_batch_is(shares):
    images = torch.randint(0, 256, (16, 3, 10, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    offsets, flips = torch.from_numpy(draw(np.random.default_rng(2), 16)), torch.arange(16) % 2 == 0
    parts = [padded_crop(*part) for part in zip(*(tensor.chunk(shares) for tensor in (images, offsets, flips)))]
    assert torch.equal(torch.cat(parts), padded_crop(images, offsets, flips))


def test_the_generator_decides_and_no_other_is_touched():
    state, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert np.array_equal(draw(np.random.default_rng((0, 5, 7)), 64), draw(np.random.default_rng((0, 5, 7)), 64))
    assert not np.array_equal(draw(np.random.default_rng((0, 5, 8)), 64), draw(np.random.default_rng((0, 5, 7)), 64))
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpys)


def test_offsets_in_the_middle_change_nothing():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    middle, no = torch.full((4, 2), 4), torch.zeros(4, dtype=torch.bool)
    assert torch.equal(padded_crop(images, middle, no), images)
    assert torch.equal(padded_crop(images, middle, ~no), images.flip(3))
