import numpy as np
import pytest
import torch

from utils.augment import _all_at_once, box_taps, random_boxes, shrink, singly, stack, view, whole_boxes

GOOGLE = (torch.tensor(127.5), torch.tensor(127.5))


def boxes(height, width, count=20_000, min_area=0.05, seed=0):
    rng = np.random.default_rng(seed)
    return random_boxes(lambda attempt: rng.random((4, count)), np.full(count, height), np.full(count, width), min_area)


def whole(count, size, out):
    """Taps that show `count` whole images of `size` at `out`."""
    boxes = whole_boxes(*(np.full(count, n) for n in size))
    return box_taps(torch.from_numpy(boxes), torch.zeros(count, dtype=torch.bool), out)


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


def test_the_box_of_an_image_depends_on_its_own_numbers_and_size_alone():
    """A neighbour that needs many attempts (a narrow strip) changes nothing for the others."""
    def draw(attempt):
        return np.random.default_rng((7, attempt)).random((4, 5))
    square = random_boxes(draw, np.full(5, 40), np.full(5, 40), 0.5)
    beside = random_boxes(draw, np.array([40, 40, 3, 40, 40]), np.array([40, 40, 400, 40, 40]), 0.5)
    assert np.array_equal(np.delete(square, 2, 0), np.delete(beside, 2, 0))


def test_resize_without_antialias_is_torchs_bilinear():
    images = torch.randint(0, 256, (3, 3, 37, 53), dtype=torch.uint8)
    rows, columns = whole(3, (37, 53), (24, 60))
    expected = torch.nn.functional.interpolate(images.float(), (24, 60), mode="bilinear", antialias=False)
    assert torch.allclose(view(images, rows, columns, *GOOGLE), (expected - 127.5) / 127.5, atol=1e-5)


def test_a_flip_mirrors_the_resized_box():
    image = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    box = torch.tensor([[3, 3, 11, 11]])
    plain, mirrored = (view(image, *box_taps(box, torch.tensor([flip]), (8, 8)), *GOOGLE) for flip in (False, True))
    assert torch.equal(mirrored, plain.flip(3))
    crop = torch.nn.functional.interpolate(image[..., 3:14, 3:14].float(), (8, 8), mode="bilinear")
    assert torch.allclose(plain, (crop - 127.5) / 127.5, atol=1e-5)


def test_cutting_an_image_down_to_its_tapped_pixels_changes_nothing():
    sizes = np.array([(300, 200), (20, 400), (17, 9), (64, 64)])
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    rng = np.random.default_rng(0)
    boxes = random_boxes(lambda attempt: rng.random((4, 4)), sizes[:, 0], sizes[:, 1], 0.3)
    rows, columns = box_taps(torch.from_numpy(boxes), torch.tensor([True, False, True, False]), (16, 12))
    one = [(rows.of(b), columns.of(b)) for b in range(4)]
    uncut = torch.cat([view(image[None], *t, *GOOGLE) for image, t in zip(images, one)])
    cut = [shrink(image, *t) for image, t in zip(images, one)]
    assert max(max(image.shape[1] / 16, image.shape[2] / 12) for image, *_ in cut) <= 2
    assert torch.equal(view(*stack(*map(list, zip(*cut))), *GOOGLE), uncut)


def test_views_carry_the_normalisation_they_are_given():
    image = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 1.0])
    out = view(image, *whole(1, (4, 4), (2, 2)), mean.view(3, 1, 1) * 255, std.view(3, 1, 1) * 255)
    assert torch.allclose(out[0, :, 0, 0], (200 / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_each_channel_is_looked_at_as_if_it_were_alone(channels):
    images = [torch.randint(0, 256, (channels, *size), dtype=torch.uint8) for size in ((40, 30), (9, 70))]
    boxes = torch.tensor([[3, 2, 30, 25], [0, 5, 9, 60]])
    rows, columns = box_taps(boxes, torch.tensor([True, False]), (12, 16))
    one = [(rows.of(b), columns.of(b)) for b in range(2)]
    mean, std = torch.linspace(90, 150, channels).view(-1, 1, 1), torch.linspace(50, 99, channels).view(-1, 1, 1)
    cut = [shrink(image, *t) for image, t in zip(images, one)]
    batch = view(*stack(*map(list, zip(*cut))), mean, std)
    assert batch.shape == (2, channels, 12, 16) and batch.is_contiguous()
    for b, c in np.ndindex(2, channels):
        colour = images[b][None, c:c + 1].expand(-1, 3, -1, -1)
        assert torch.allclose(batch[b, c], view(colour, *one[b], mean[c], std[c])[0, 1], atol=1e-5)


def test_views_stay_float32_inside_autocast():
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    taps = whole(1, (32, 32), (20, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = view(image, *taps, *GOOGLE)
    assert inside.dtype == torch.float32 and torch.equal(inside, view(image, *taps, *GOOGLE))


# Large views on a CPU: one image after the other

LARGE = (50, 60)
SIZES = np.array([(120, 90), (20, 400), (17, 9), (400, 30), (64, 64), (1, 1)])  # rows both fewer and more than 50


def looked_at(channels=3, seed=0):
    """Images of all these sizes, and a random box and a flip for each as taps."""
    rng = np.random.default_rng(seed)
    images = [torch.from_numpy(rng.integers(0, 256, (channels, *size), dtype=np.uint8)) for size in SIZES]
    boxes = random_boxes(lambda attempt: rng.random((4, len(SIZES))), SIZES[:, 0], SIZES[:, 1], 0.3)
    return images, *box_taps(torch.from_numpy(boxes), torch.tensor([True, False] * 3), LARGE)


def cut_down(images, rows, columns):
    """As images travel from where they are decoded: the pixels that are looked at, padded to one size."""
    return stack(*map(list, zip(*(shrink(image, rows.of(b), columns.of(b)) for b, image in enumerate(images)))))


def test_device_and_size_alone_decide_how_a_view_is_made():
    assert singly(torch.device("cpu"), LARGE) and not singly(torch.device("cpu"), (32, 32))
    assert not singly(torch.device("cuda"), LARGE)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_image_by_image_the_view_is_that_of_the_matrices(channels):
    images, rows, columns = looked_at(channels)
    mean, std = torch.linspace(90, 150, channels).view(-1, 1, 1), torch.linspace(50, 99, channels).view(-1, 1, 1)
    one_by_one = view(images, rows, columns, mean, std)
    at_once = _all_at_once(*cut_down(images, rows, columns), mean, std)
    assert one_by_one.shape == (6, channels, *LARGE) and one_by_one.is_contiguous()
    assert torch.allclose(one_by_one, at_once, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_large_view_is_the_same_bits_from_whole_images_and_from_the_pixels_that_are_looked_at(seed):
    images, rows, columns = looked_at(seed=seed)
    assert torch.equal(view(images, rows, columns, *GOOGLE), view(*cut_down(images, rows, columns), *GOOGLE))
    same = torch.stack([images[0]] * 6)
    assert torch.equal(view(same, *(whole(6, SIZES[0], LARGE)), *GOOGLE),
                       view(list(same), *(whole(6, SIZES[0], LARGE)), *GOOGLE))


def test_a_large_flip_mirrors_the_resized_box():
    image, box = torch.randint(0, 256, (1, 3, 90, 90), dtype=torch.uint8), torch.tensor([[3, 3, 61, 31]])
    plain, mirrored = (view(image, *box_taps(box, torch.tensor([flip]), LARGE), *GOOGLE) for flip in (False, True))
    assert torch.equal(mirrored, plain.flip(3))
    crop = torch.nn.functional.interpolate(image[..., 3:64, 3:34].float(), LARGE, mode="bilinear")
    assert torch.allclose(plain, (crop - 127.5) / 127.5, atol=3e-5)  # PyTorch rounds its coordinates another way
