"""Files -> pixels. All images are written here."""

import os
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from utils.images import SUFFIXES, decode, decode_all, fingerprint, fingerprints, unreadable

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(path, image, **options):
    """What `decode` makes of an array or image after it was saved, as (H, W, 3)."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return decoded(path)


def decoded(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(path)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    return pixels.permute(1, 2, 0).numpy()


def grey(pixels):
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.bmp", "a.tif", "a.TIFF", "a.webp"])
def test_lossless_formats_keep_every_pixel(tmp_path, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    assert (saved(tmp_path / name, RGB, **options) == RGB).all()


def test_jpeg_pixels_are_pillows(tmp_path):
    pixels = saved(tmp_path / "a.jpg", RGB, quality=90)
    assert (pixels == np.array(Image.open(tmp_path / "a.jpg"))).all()


def test_a_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    pixels = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (pixels == (255, 0, 0)).all() and pixels.shape == (4, 4, 3)


def test_greyscale_and_bilevel_become_three_equal_channels(tmp_path):
    assert grey(saved(tmp_path / "grey.png", np.array([[0, 7, 255]], np.uint8))) == [[0, 7, 255]]
    assert grey(saved(tmp_path / "bits.png", Image.fromarray(np.array([[True, False]])))) == [[255, 0]]


def test_a_palette_gives_its_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    assert saved(tmp_path / "a.png", image).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparency_is_laid_on_white(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    pixels = saved(tmp_path / "p.png", palette, transparency=bytes([0, 255]))
    assert pixels.tolist() == [[[255, 255, 255], [200, 100, 50]]]
    rgba = np.array([[[0, 0, 0, 0], [9, 8, 7, 255], [0, 0, 0, 128]]], np.uint8)
    pixels = saved(tmp_path / "rgba.png", rgba)
    assert pixels.tolist() == [[[255, 255, 255], [9, 8, 7], [127, 127, 127]]]
    bands = [Image.fromarray(np.array([values], np.uint8)) for values in ([0, 9], [0, 255])]
    assert grey(saved(tmp_path / "la.png", Image.merge("LA", bands))) == [[255, 9]]
    assert grey(saved(tmp_path / "key.png", np.array([[0, 9]], np.uint8), transparency=0)) == [[255, 9]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_keeps_its_brightness(tmp_path, name):
    values = np.array([[0, 256, 257 * 7, 32768, 65535]], np.uint16)
    assert grey(saved(tmp_path / name, values)) == [[0, 1, 7, 128, 255]]


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path):
    assert grey(saved(tmp_path / "a.png", np.array([[0, 255]], np.uint16))) == [[0, 1]]


def test_big_endian_and_inverted_sixteen_bit_tiffs_keep_their_brightness(tmp_path):
    big = Image.frombytes("I;16B", (3, 1), np.array([0, 257, 65535], ">u2").tobytes())
    assert grey(saved(tmp_path / "big.tif", big)) == [[0, 1, 255]]
    inverted = np.array([[0, 257, 65535]], np.uint16)
    assert grey(saved(tmp_path / "inverted.tif", inverted, tiffinfo={262: 0})) == [[255, 254, 0]]


def test_whole_numbers_of_32_bits_are_read_as_16_bits_if_they_fit(tmp_path):
    assert grey(saved(tmp_path / "a.tif", np.array([[-5, 257, 65535]], np.int32))) == [[0, 1, 255]]
    assert grey(saved(tmp_path / "b.tif", np.array([[0, 65536, 131072]], np.int32))) == [[0, 128, 255]]


def test_floats_are_scaled_by_the_white_they_imply(tmp_path):
    for white in (1, 255, 65535):
        values = np.array([[0, 0.2, 1]], np.float32) * white
        assert grey(saved(tmp_path / f"{white}.tif", values)) == [[0, 51, 255]]
    odd = np.array([[np.nan, -1, np.inf, 1]], np.float32)
    assert grey(saved(tmp_path / "odd.tif", odd)) == [[0, 0, 0, 255]]


def test_cmyk_jpegs_keep_their_brightness(tmp_path):
    bright = Image.new("RGB", (8, 8), (200, 30, 90)).convert("CMYK")
    pixels = saved(tmp_path / "a.jpg", bright, quality=95)  # Pillow writes Adobe's inverted form
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert abs(pixels.astype(int) - (200, 30, 90)).max() <= 2


@pytest.mark.parametrize("orientation, turn", [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)), (8, np.rot90)])
def test_exif_orientation_is_honoured(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(saved(tmp_path / "a.png", RGB, exif=exif), turn(RGB))
    assert np.array_equal(saved(tmp_path / "a.tif", RGB, tiffinfo={274: orientation}), turn(RGB))
    plain = saved(tmp_path / "plain.jpg", RGB)
    assert np.array_equal(saved(tmp_path / "a.jpg", RGB, exif=exif), turn(plain))


def test_broken_exif_does_not_cost_a_sound_image(tmp_path):
    assert (saved(tmp_path / "a.png", RGB, exif=b"Exif\0\0garbage of a camera") == RGB).all()


def png(array):
    file = BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def refusal(path, content, channels=3):
    """The one sentence with which a file of this content is refused, without its name and the advice."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        decode(path, channels)
    sentence = str(error.value)
    assert sentence.startswith(f"{path} cannot be read as an image (") and "\n" not in sentence
    assert "): replace or remove it" in sentence and sentence.endswith(".")
    return sentence.split("(", 1)[1].rsplit("):", 1)[0]


def claiming(width, height):
    """A small PNG that says it is so large."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(9000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_claiming(width, height):
    file = BytesIO()
    Image.fromarray(RGB).save(file, "JPEG")
    content, sizes = file.getvalue(), struct.pack(">HH", *RGB.shape[:2])
    assert content.count(sizes) == 1
    return content.replace(sizes, struct.pack(">HH", height, width))


def npy(shape, content=b"", dtype="|u1"):
    """A .npy whose header says so, followed by `content`."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_a_file_of_no_bytes_is_called_empty(tmp_path, suffix):
    assert refusal(tmp_path / f"a{suffix}", b"") == "it is empty: 0 bytes"


@pytest.mark.parametrize("content", [b"not an image, " * 40, b"<html>404</html>", png(RGB)[:7],
                                     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"])
def test_what_is_no_image_whatever_its_name_is_called_so(tmp_path, content):
    """Among them a PostScript file, which Pillow would read with Ghostscript, a program that runs what it says."""
    assert refusal(tmp_path / "a.jpg", content) == "its content is no JPEG, PNG, WebP, BMP, TIFF or GIF"


@pytest.mark.parametrize("content", [png(RGB)[:60], png(RGB)[:20], npy((9, 9, 3), bytes(242)), npy((9, 9, 3))[:30]])
def test_a_part_of_a_file_is_an_error(tmp_path, content):
    assert refusal(tmp_path / ("a.npy" if content.startswith(b"\x93NUMPY") else "a.png"), content)


def test_a_truncated_jpeg_is_an_error_not_half_grey(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    assert "truncated" in refusal(path, path.read_bytes()[:2000])


@pytest.mark.parametrize("content, claim", [
    (claiming(20_000, 20_000), "too many pixels"), (claiming(2**31 - 1, 2**30), "too many pixels"),
    (claiming(10_000, 10_000), "10,000 x 10,000 pixels"), (claiming(100_000_000, 1), "100,000,000 x 1 pixels"),
    (jpeg_claiming(12_000, 9_000), "12,000 x 9,000 pixels"), (jpeg_claiming(65_000, 65_000), "too many pixels"),
    (b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2L\1\0;",
     "too many pixels"),
    (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 11_000, 11_000, 1, 24, 0, 0, 0, 0, 0, 0),
     "11,000 x 11,000 pixels")])
def test_more_than_a_hundred_megapixels_are_refused_before_one_is_decoded(tmp_path, monkeypatch, content, claim):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was about to be decoded"))
    assert len(content) < 1000
    assert refusal(tmp_path / "a.png", content) == f"it claims {claim}; images of 100 megapixels or more are not opened"


def test_just_below_a_hundred_megapixels_the_pixels_are_asked_for(tmp_path):
    assert "megapixels" not in refusal(tmp_path / "a.png", claiming(99_999_999, 1))


@pytest.mark.parametrize("shape, reason", [
    ((10**6, 10**6, 3), "it claims 1,000,000 x 1,000,000 pixels; images of 100 megapixels or more are not opened"),
    ((10_000, 10_000, 3), "it claims 10,000 x 10,000 pixels; images of 100 megapixels or more are not opened"),
    ((9_000, 9_000, 3), "it is cut off: 10 of 243,000,000 bytes of pixels are there")])
def test_an_array_s_header_is_not_believed(tmp_path, monkeypatch, shape, reason):
    monkeypatch.setattr(np, "fromfile", lambda *args, **kwargs: pytest.fail("room was about to be made for it"))
    assert refusal(tmp_path / "a.npy", npy(shape, bytes(10))) == reason


def test_an_array_of_negative_or_too_many_sides_is_refused(tmp_path):
    for shape in ((-1, 9, 3), (2, 2, 2, 3), (), (12,)):
        (tmp_path / "a.npy").write_bytes(npy(shape, bytes(24)))
        with pytest.raises(ValueError, match=r"a\.npy holds \("):
            decode(tmp_path / "a.npy")


def test_a_large_image_within_the_limit_is_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow warns above this, refuses twice this
    assert (saved(tmp_path / "a.png", RGB) == RGB).all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").mkdir()
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image .it is no file but a folder, a pipe"):
            decode(tmp_path / name)
    with pytest.raises(ValueError, match=r"c\.jpg cannot be read as an image .*No such file"):
        decode(tmp_path / "c.jpg")


# Many


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_unreadable_gives_positions_and_the_words_of_decode(tmp_path, workers):
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for path in paths:
        path.write_bytes(png(RGB))
    assert unreadable(paths, workers=workers) == {}
    paths[3].write_bytes(b"")
    paths[8].write_bytes(claiming(20_000, 20_000))
    found = unreadable(paths, workers=workers)
    assert list(found) == [3, 8] and found[3] == f"{paths[3]} cannot be read as an image (it is empty: 0 bytes): " \
                                                 "replace or remove it."
    assert "100 megapixels" in found[8]
    assert set(unreadable(paths, channels=4)) == set(range(12)) and unreadable([]) == {}


def test_a_fingerprint_is_of_pixels_and_shape_not_of_files(tmp_path):
    for name, array in {"a.png": RGB, "b.bmp": RGB, "c.tif": RGB[:, ::-1], "d.png": RGB.reshape(9, 6, 3)}.items():
        Image.fromarray(array).save(tmp_path / name)
    np.save(tmp_path / "e.npy", RGB)
    found = fingerprints([tmp_path / name for name in ("a.png", "b.bmp", "c.tif", "d.png", "e.npy")])
    assert found[0] == found[1] == found[4] == fingerprint(torch.from_numpy(RGB).permute(2, 0, 1))
    assert len({seen.digest for seen in found}) == 3 and [seen.size for seen in found[2:4]] == [(6, 9), (9, 6)]


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_decode_all_keeps_the_order_and_names_the_broken_file(tmp_path, workers):
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for i, path in enumerate(paths):
        Image.new("RGB", (i + 1, 2), (i, 0, 0)).save(path)
    found = decode_all(paths, workers)
    assert [(*image.shape, int(image[0].max())) for image in found] == [(3, 2, i + 1, i) for i in range(20)]
    paths[7].write_bytes(b"")
    with pytest.raises(ValueError, match=r"7\.png cannot be read"):
        decode_all(paths, workers)
    assert decode_all([], workers) == []
