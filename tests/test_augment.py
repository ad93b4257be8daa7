from pathlib import Path

import numpy as np
import pytest
import torch

from utils.augment import evaluation_taps, gather, random_boxes, stack, taps, training_taps, view

ORACLE = Path(__file__).parent / "oracle" / "training"


def boxes(height, width, count=20_000, min_area=0.05, seed=0):
    rng = np.random.default_rng(seed)
    return random_boxes(rng, np.full(count, height), np.full(count, width), min_area)


@pytest.mark.parametrize("size, area, height, top", [
    # Google's quantiles at 5, 25, 50, 75, 95 %: area and height as shares of the image, top as a share of its height
    ((500, 500), (0.0665, 0.1603, 0.3300, 0.5643, 0.8056), (0.254, 0.392, 0.566, 0.740, 0.926),
     (0.010, 0.068, 0.172, 0.322, 0.558)),
    ((375, 500), (0.0644, 0.1474, 0.3002, 0.5031, 0.7576), (0.2907, 0.440, 0.6293, 0.8133, 0.9627),
     (0.0053, 0.048, 0.1387, 0.2827, 0.520))])
def test_crop_boxes_have_googles_quantiles_and_not_torchvisions(size, area, height, top):
    drawn = boxes(*size)
    at = (0.05, 0.25, 0.5, 0.75, 0.95)
    assert np.quantile(drawn[:, 2] * drawn[:, 3] / (size[0] * size[1]), at) == pytest.approx(area, abs=0.012)
    assert np.quantile(drawn[:, 2] / size[0], at) == pytest.approx(height, abs=0.012)
    assert np.quantile(drawn[:, 0] / size[0], at) == pytest.approx(top, abs=0.012)


def test_boxes_lie_inside_and_touch_the_far_edges_only_when_full():
    drawn = boxes(37, 52)
    top, left, height, width = drawn.T
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert ((top + height < 37) | (height == 37)).all() and ((left + width < 52) | (width == 52)).all()
    assert (height * width >= 0.05 * 37 * 52).all()


def test_a_box_that_never_fits_becomes_the_whole_image():
    assert np.array_equal(boxes(2, 500, 3, min_area=0.5), [[0, 0, 2, 500]] * 3)


def test_min_area_one_is_nearly_the_whole_image():
    drawn = boxes(64, 64, min_area=1.0)
    assert np.array_equal(drawn, np.tile([0, 0, 64, 64], (20_000, 1)))


def test_half_of_the_views_are_mirrored_and_none_when_asked():
    sizes = np.full((4000, 2), 9)
    _, columns = training_taps(np.random.default_rng(0), sizes, (4, 4), 0.05, flip=True)
    assert 0.47 < (columns.low[:, 0] > columns.low[:, -1]).mean() < 0.53
    _, columns = training_taps(np.random.default_rng(0), sizes, (4, 4), 0.05, flip=False)
    assert (columns.low[:, 0] <= columns.low[:, -1]).all()


def test_resize_without_antialias_is_torchs_bilinear():
    images = torch.randint(0, 256, (3, 3, 37, 53), dtype=torch.uint8)
    rows, columns = evaluation_taps(np.array([[37, 53]] * 3), (24, 60))
    expected = torch.nn.functional.interpolate(images.float(), (24, 60), mode="bilinear", antialias=False)
    assert torch.allclose(view(images, rows, columns), (expected - 127.5) / 127.5, atol=1e-5)


def test_a_flip_mirrors_the_resized_box():
    image = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    start, length = np.array([3]), np.array([11])
    rows = taps(start, length, 8)
    plain = view(image, rows, taps(start, length, 8, np.array([False])))
    mirrored = view(image, rows, taps(start, length, 8, np.array([True])))
    assert torch.equal(mirrored, plain.flip(3))
    crop = torch.nn.functional.interpolate(image[..., 3:14, 3:14].float(), (8, 8), mode="bilinear")
    assert torch.allclose(plain, (crop - 127.5) / 127.5, atol=1e-5)


def test_cutting_an_image_down_to_its_tapped_pixels_changes_nothing():
    rng = np.random.default_rng(0)
    shapes = ((300, 200), (20, 400), (17, 9), (64, 64))
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in shapes]
    sizes = np.array([image.shape[1:] for image in images])
    rows, columns = training_taps(rng, sizes, (16, 12), 0.3, True)
    one = [(rows.of(b), columns.of(b)) for b in range(4)]
    whole = torch.cat([view(image[None], *t) for image, t in zip(images, one)])
    cut = [gather(image, *t) for image, t in zip(images, one)]
    assert max(max(image.shape[1] / 16, image.shape[2] / 12) for image, *_ in cut) <= 2
    assert torch.equal(view(*stack(*map(list, zip(*cut)))), whole)


def test_views_carry_the_normalisation_they_are_given():
    image = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    rows, columns = evaluation_taps(np.array([[4, 4]]), (2, 2))
    out = view(image, rows, columns, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    expected = (200 / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.25, 1.0])
    assert torch.allclose(out[0, :, 0, 0], expected, atol=1e-6)


def test_views_stay_float32_inside_autocast():
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    rows, columns = evaluation_taps(np.array([[32, 32]]), (20, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = view(image, rows, columns)
    assert inside.dtype == torch.float32 and torch.equal(inside, view(image, rows, columns))
