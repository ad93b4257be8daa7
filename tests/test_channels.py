"""Images of 1, 2, 4 or more channels: what is read, what is converted, what is refused, and what a batch holds."""

import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from utils import data
from utils.batches import EvalBatches, TrainBatches, decoded_bytes, resident
from utils.images import decode

RNG = np.random.default_rng(0)
RGB, RGBA, FIVE = (RNG.integers(0, 256, (12, 14, n), dtype=np.uint8) for n in (3, 4, 5))
RGBA[0, :, 3] = 0  # where a page would show nothing of the colours
LOOK = dict(size=(12, 14), batch_size=4, device="cpu")


def saved(path, image, channels, **options):
    """What `decode` makes of an array or image after it was saved, as (H, W, channels)."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    pixels = decode(path, channels)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    return pixels.permute(1, 2, 0).numpy()


def folder(root, make):
    """ROOT/train and ROOT/test with classes a and b of three and two files each, by make(path without suffix)."""
    for part, count in (("train", 3), ("test", 2)):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                make(root / part / name / str(i))
    return str(root)


def luminance(rgb):
    """ITU-R 601 as Pillow rounds it: to the nearest, in whole numbers of 1 / 65536."""
    exact = rgb @ np.array([0.299, 0.587, 0.114])
    rounded = (rgb.astype(int) @ [19595, 38470, 7471] + 0x8000) >> 16
    assert abs(rounded - exact).max() < 0.51
    return rounded


# One channel


def test_colour_becomes_its_luminance(tmp_path):
    assert (saved(tmp_path / "a.png", RGB, 1)[..., 0] == luminance(RGB)).all()
    palette = Image.fromarray(np.arange(12 * 14, dtype=np.uint8).reshape(12, 14)).convert("P")
    palette.putpalette(RGB.flatten().tolist())
    assert (saved(tmp_path / "p.png", palette, 1)[..., 0] == luminance(RGB)).all()
    white = saved(tmp_path / "rgba.png", RGBA, 3)  # what is transparent lies on white, as in colour
    assert (saved(tmp_path / "rgba.png", RGBA, 1)[..., 0] == luminance(white)).all() and (white[0] == 255).all()


def test_grey_stays_as_it_is(tmp_path):
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (saved(tmp_path / "a.png", every, 1)[..., 0] == every).all()
    assert (saved(tmp_path / "deep.png", every.astype(np.uint16) * 257, 1)[..., 0] == every).all()
    assert (saved(tmp_path / "bits.png", Image.fromarray(every > 99), 1)[..., 0] == 255 * (every > 99)).all()


@pytest.mark.parametrize("name, channels", [("digits", 4), ("cifar10", 2)])
def test_named_sets_have_three_channels_or_one(name, channels, tmp_path):
    with pytest.raises(ValueError) as error:  # before anything is downloaded
        data.load(name, data_dir=str(tmp_path / "absent"), in_chans=channels)
    assert str(error.value) == f"--in_chans is {channels}; {name} comes with 3 channels, or with 1 as grey images."


def test_named_sets_become_grey_by_the_rule_of_files(monkeypatch):
    images = torch.from_numpy(np.stack([RGB, RGB[::-1]])).permute(0, 3, 1, 2)
    split = data.Split(images, torch.tensor([0, 1]), ("a", "b"))
    monkeypatch.setitem(data.NAMED, "tiny", data.NamedSet(lambda data_dir: (split, split.subset([1])), data.View(), ""))
    tiny, digits = data.load("tiny", in_chans=1), data.load("digits", in_chans=1)
    assert tiny.train.images.shape == (2, 1, 12, 14) and tiny.test.images.dtype == torch.uint8
    assert (tiny.train.images[0, 0].numpy() == luminance(RGB)).all() and tiny.test.channels == 1
    assert (tiny.test.images[0, 0].numpy() == luminance(RGB)[::-1]).all()
    assert torch.equal(digits.train.images, data.load("digits").train.images[:, :1])


# Channels as they are stored


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_the_fourth_channel_is_read_as_it_is(tmp_path, name):
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    assert (saved(tmp_path / name, RGBA, 4, **options) == RGBA).all()


def test_palettes_with_transparency_and_grey_with_a_second_channel_are_read_as_they_are(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    pixels = saved(tmp_path / "p.png", palette, 4, transparency=bytes([7, 255]))
    assert pixels.tolist() == [[[10, 20, 30, 7], [200, 100, 50, 255]]]
    assert (saved(tmp_path / "la.png", RGBA[..., 2:].copy(), 2) == RGBA[..., 2:]).all()


@pytest.mark.parametrize("array, channels", [
    (FIVE, 5), (RGBA, 4), (RGB, 3), (RGB[..., 1], 1), (RGB[..., :1], 1), (np.asfortranarray(FIVE), 5)])
def test_an_array_is_an_image_as_it_is(tmp_path, array, channels):
    np.save(tmp_path / "a.NPY.npy", array)
    pixels = decode(tmp_path / "a.NPY.npy", channels)
    assert pixels.is_contiguous() and np.array_equal(pixels.permute(1, 2, 0), array.reshape(12, 14, channels))


def npy(array):
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def picture(array, kind="PNG"):
    file = BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("name, content, channels, what", [
    ("a.png", picture(RGB), 4, "has the channels R, G, B"), ("a.png", picture(RGB[..., 0]), 4, "has the channels L"),
    ("a.png", picture(RGBA), 2, "has the channels R, G, B, A"),
    ("a.tif", picture(RGBA, "TIFF"), 5, "has the channels R, G, B, A"),
    ("a.npy", npy(FIVE), 3, r"holds \(12, 14, 5\) uint8"), ("a.npy", npy(RGB), 1, r"holds \(12, 14, 3\) uint8"),
    ("a.npy", npy(RGB[..., 0]), 3, r"holds \(12, 14\) uint8"),
    ("a.npy", npy(FIVE.transpose(2, 0, 1)), 5, r"holds \(5, 12, 14\) uint8"),
    ("a.npy", npy(FIVE.astype(np.float32)), 5, r"holds \(12, 14, 5\) float32"),
    ("a.npy", npy(FIVE[:0]), 5, r"holds \(0, 14, 5\) uint8"),
    ("a.npy", npy(np.array([{}])), 5, r"holds \(1,\) object")])  # a pickle, which is never opened
def test_other_channels_than_asked_for_are_named_beside_the_flag(tmp_path, name, content, channels, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {what}, and --in_chans is {channels}: give the number that your "
                                         rf"images have, or store them as \.npy, \(H, W, {channels}\) uint8\.$"):
        decode(tmp_path / name, channels)


@pytest.mark.parametrize("name, content, channels, reason", [
    ("a.tif", b"bands", 13, "its content is no JPEG, PNG, WebP, BMP, TIFF or GIF"),
    ("a.npy", npy(FIVE)[:200], 5, "it is cut off: 72 of 840 bytes of pixels are there"),
    ("a.npy", npy(FIVE)[:50], 5, ".+"),  # NumPy's words for a part of a header
    ("a.npy", pickle.dumps(FIVE), 5, "the magic string is not correct.*")])
def test_what_is_no_image_is_refused_in_one_sentence(tmp_path, name, content, channels, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as an image \({reason}\): replace or remove it, "
                                         rf"or store it as \.npy, \(H, W, {channels}\) uint8\.$") as error:
        decode(tmp_path / name, channels)
    assert "\n" not in str(error.value)


# Into a batch


def test_a_folder_of_rgba_reaches_the_batch_untouched_also_through_a_worker(tmp_path):
    root = folder(tmp_path, lambda path: Image.fromarray(RGBA).save(f"{path}.png"))
    loaded = data.load(root, in_chans=4, val_fraction=0.4)
    assert loaded.train.channels == loaded.val.channels == loaded.test.channels == 4
    look = LOOK | dict(mean=(0.0,) * 4, std=(1 / 255,) * 4)
    for batches in (EvalBatches(loaded.test, workers=1, **look),
                    EvalBatches(resident(loaded.test, (12, 14), "cpu"), **look)):
        (images, labels), = batches.stream(range(0, 1))
        assert labels.tolist() == [0, 0, 1, 1]
        assert torch.allclose(images, torch.from_numpy(RGBA).permute(2, 0, 1).float().expand(4, -1, -1, -1), atol=1e-4)


class Cropped(TrainBatches):
    """Every image is cropped to 8 rows and 9 columns; every other one is mirrored."""

    def boxes(self, k, part, sizes):
        return np.tile([2, 3, 8, 9], (len(sizes), 1)), np.arange(self.batch_size)[part] % 2 == 1


def test_a_folder_of_arrays_of_five_channels_is_trained_on_and_scored(tmp_path):
    root = folder(tmp_path, lambda path: np.save(f"{path}.npy", FIVE))
    (tmp_path / "train" / "a" / "notes.txt").touch()
    loaded = data.load(root, in_chans=5)
    look = dict(LOOK, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(1.0, 0.5, 0.25, 0.2, 2.0), workers=1)
    expected = (FIVE / 255 - look["mean"]) / look["std"]  # (12, 14, 5)
    crop = torch.from_numpy(expected[2:10, 3:12]).permute(2, 0, 1).float()  # its pixels, as no resize is due
    for split in (loaded.train, resident(loaded.train, (8, 9), "cpu")):
        batches = Cropped(split, seed=0, training_view=data.View(), **{**look, "size": (8, 9)})
        for images, _ in batches.stream(range(0, 2)):
            assert torch.allclose(images, torch.stack([crop, crop.flip(2)] * 2), atol=1e-5)
    images, _ = EvalBatches(loaded.test, **look)[0]
    assert torch.allclose(images[3], torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-5)
    plain = TrainBatches(loaded.train, seed=0, training_view=data.View(), **look)[0][0]
    assert plain.shape == (4, 5, 12, 14) and plain.isfinite().all()


def test_arrays_and_pictures_of_several_sizes_share_a_folder(tmp_path):
    def make(path):
        Image.fromarray(RGB).save(f"{path}.png")
        np.save(f"{path}.npy", RGB[:5, ::-1])
    test = data.load(folder(tmp_path, make)).test
    assert [path.name for path in test.images[:4]] == ["0.npy", "0.png", "1.npy", "1.png"]
    assert [tuple(image.shape) for image in resident(test, (12, 14), "cpu").images[:2]] == [(3, 5, 14), (3, 12, 14)]


def test_the_memory_that_is_estimated_follows_the_channels(tmp_path):
    Image.fromarray(RGBA).save(tmp_path / "a.png")
    assert decoded_bytes([tmp_path / "a.png"], 4) == RGBA.nbytes and decoded_bytes([tmp_path / "a.png"]) == RGB.nbytes
    np.save(tmp_path / "a.npy", FIVE)
    assert decoded_bytes([tmp_path / "a.npy"], 5) == FIVE.nbytes
    split = data.Split([tmp_path / "a.png"] * 2, torch.tensor([0, 1]), ("a", "b"), channels=4)
    assert resident(split, (12, 14), "cpu", budget=2 * RGBA.nbytes - 1) is split
    assert resident(split, (12, 14), "cpu", budget=2 * RGBA.nbytes).images.shape == (2, 4, 12, 14)
    assert split.subset([1]).channels == resident(split, (12, 14), "cpu").channels == 4
