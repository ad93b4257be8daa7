"""A file -> pixels: decode it, or say in one sentence why not."""

import hashlib
import math
import os
import stat
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

ARRAY = ".npy"  # an image as it is, of any number of channels
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ARRAY}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # only these: an EPS, by any name, would start Ghostscript
MAX_PIXELS = 100_000_000  # of an image; as many are refused before one is decoded
TOO_LARGE = f"images of {MAX_PIXELS // 10**6} megapixels or more are not opened"
STORED = {2: "LA", 4: "RGBA"}  # channels that are no colour: the modes of Pillow that hold so many, taken as they are


def decode(path, channels: int = 3) -> Tensor:
    """File -> (channels, H, W) uint8, turned upright. ValueError: not a readable image, or of other channels.

    3 channels are RGB, 1 is its luminance (ITU-R 601). Others are never made, only read: 4 from RGBA with its
    fourth channel as it is (it may be near infrared), 2 from LA. A .npy has its channels whatever their number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode(path, channels)


def decode_all(paths, workers: int | None = None, channels: int = 3) -> list[Tensor]:
    """Files -> (channels, H, W) uint8 each, in their order. ValueError: names the first unreadable file."""
    return _each(partial(_decode, channels=channels), paths, workers, "decoding")


def pixels_in(path) -> int:
    """H times W from the file's header; 0 where decoding will say what is wrong."""
    try:
        _check_file(os.stat(path))
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            if suffix_of(path) == ARRAY:
                return math.prod(_array_header(file)[0][:2])
            with Image.open(file, formats=FORMATS) as image:
                return image.width * image.height
    except Exception:  # as in `_decode`
        return 0


class Fingerprint(NamedTuple):
    """What tells two images apart: equal for equal pixels, whatever the format they were stored in."""
    size: tuple[int, int]  # (H, W)
    digest: bytes          # of shape and pixels


def fingerprint(image: Tensor) -> Fingerprint:
    """(channels, H, W) uint8 -> its fingerprint."""
    shape = tuple(image.shape)
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    digest.update(image.contiguous().numpy())
    return Fingerprint(shape[1:], digest.digest())


def fingerprints(paths, channels: int = 3, workers: int | None = None) -> list[Fingerprint | str]:
    """Decodes each file and forgets the pixels: its fingerprint, or the sentence that says why it is unreadable."""
    def look(path):
        try:
            return fingerprint(_decode(path, channels))
        except ValueError as error:
            return str(error)
    return _each(look, paths, workers, "checking")


def unreadable(paths, channels: int = 3, workers: int | None = None) -> dict[int, str]:
    """Positions of the files that `decode` refuses -> the sentence with which it does; every file is decoded."""
    found = fingerprints(paths, channels, workers)
    return {i: seen for i, seen in enumerate(found) if isinstance(seen, str)}


def _each(work: Callable, paths, workers: int | None, verb: str) -> list:
    """work(path) of each, in their order, by so many threads (None: as many as help), with a bar."""
    paths = list(paths)
    if workers is None:
        # Pillow decodes outside of Python's lock but opens inside it: threads slow thumbnails down
        sizes = [os.path.getsize(path) for path in paths[::len(paths) // 100 + 1] if os.path.exists(path)]
        workers = (os.cpu_count() or 1) if sum(sizes) > 6000 * len(sizes) else 1
    bar = {"total": len(paths), "desc": verb, "unit": " images", "delay": 2, "disable": None}
    with warnings.catch_warnings():  # here and not in the threads, which share one list of filters
        warnings.simplefilter("ignore")
        if workers <= 1:
            return [work(path) for path in tqdm(paths, **bar)]
        with ThreadPoolExecutor(workers) as pool:
            return list(tqdm(pool.map(work, paths), **bar))


def _decode(path, channels: int) -> Tensor:
    is_array = suffix_of(path) == ARRAY
    try:
        _check_file(os.stat(path))
        # Pillow (to 13.0 at least) scrambles turned TIFFs that it opens by name, not those from an open file.
        with open(path, "rb") as file:
            pixels = _array(file, channels) if is_array else _picture(file, channels)  # (H, W, channels)
    except OtherChannels as error:
        raise ValueError(f"{path} {error}, and --in_chans is {channels}: give the number that your images have, or "
                         f"store them as .npy, (H, W, {channels}) uint8.") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its content is no JPEG, PNG, WebP, BMP, TIFF or GIF"
        elif isinstance(error, Image.DecompressionBombError):  # Pillow's limit is above ours but comes first
            reason = f"it claims too many pixels; {TOO_LARGE}"
        advice = "replace or remove it"
        if is_array or channels not in (1, 3):  # also what helps with a TIFF of many bands, which Pillow cannot read
            advice += f", or store it as .npy, (H, W, {channels}) uint8"
        raise ValueError(f"{path} cannot be read as an image ({reason}): {advice}.") from error
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))  # the one copy, as Pillow's is read-only


def suffix_of(name: str | Path) -> str:
    """The suffix in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


class OtherChannels(ValueError):
    """A sound image whose channels are not those of the model."""


def _check_file(status: os.stat_result) -> None:
    """ValueError: nothing to decode. A pipe or a device, by whatever name, would be waited for without end."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file but a folder, a pipe or a device")
    if not status.st_size:
        raise ValueError("it is empty: 0 bytes")


def _check_size(height: int, width: int) -> None:
    """ValueError: the header promises more pixels than are worth decoding, be it a bomb or a scan."""
    if height * width >= MAX_PIXELS:
        raise ValueError(f"it claims {width:,} x {height:,} pixels; {TOO_LARGE}")


def _array(file, channels: int) -> np.ndarray:
    """An open .npy of (H, W, channels) uint8, or (H, W) for one channel. ValueError: it holds anything else."""
    shape, dtype = _array_header(file)
    H, W, C = (*shape, 1) if len(shape) == 2 else shape if len(shape) == 3 else (0, 0, 0)
    if dtype != np.uint8 or channels != C or H < 1 or W < 1:
        raise OtherChannels(f"holds {shape} {dtype}")
    _check_size(H, W)
    there = os.fstat(file.fileno()).st_size - file.tell()
    if there < H * W * C:  # before numpy makes room for what is not there
        raise ValueError(f"it is cut off: {there:,} of {H * W * C:,} bytes of pixels are there")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False).reshape(H, W, C)  # np.load would also open archives


def _array_header(file) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    return shape, dtype


def _picture(file, channels: int) -> np.ndarray:
    """An open image of a format that Pillow knows -> (H, W, channels) uint8, turned upright."""
    with Image.open(file, formats=FORMATS) as image:  # reads the header
        _check_size(image.height, image.width)
        image.load()
        with suppress(Exception):  # broken EXIF in a sound image: it stays as it lies
            ImageOps.exif_transpose(image, in_place=True)
        if channels == 3:
            return np.asarray(_rgb(image))
        if channels == 1:
            return np.asarray(_rgb(image).convert("L"))[..., None]  # grey comes back as it was
        if image.mode == "P" and image.has_transparency_data:
            image = image.convert("RGBA")
        mode = STORED.get(channels)
        if image.mode != mode:
            raise OtherChannels(f"has the channels {', '.join(image.getbands())}")
        return np.asarray(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow -> RGB of the same brightness."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        # on white, as a page shows it: the colours under transparent pixels are arbitrary, often black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey (modes I;16*, I, F) -> L, scaled by its white; `Image.convert` would clip at 255 instead.

    White is 2^bits - 1 for up to 16 bits. Wider files do not say what theirs is: 65535 for integers, for
    floats the first of 1, 255, 65535 that no value exceeds; beyond 65535 the largest value.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    whites = (1, 255, 65535) if image.mode == "F" else (2**min(bits, 16) - 1,)
    white = next((white for white in whites if values.max() <= white), values.max())
    values = (values / white).clip(0, 1)
    if tags.get(262) == 0:  # TIFF's WhiteIsZero, which Pillow honours for 8 bits only
        values = 1 - values
    return Image.fromarray((values * 255).round().astype(np.uint8))
