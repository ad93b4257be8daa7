"""An open `.npz` of any of Google's layouts, seen as the published one: what differs in a file is repaired here.

Opening reads headers only (milliseconds, whatever the size). Arrays are then read one at a time, and once.
"""

import functools
import io
import math
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.fill import Scratch

POS_EMBEDDING = "Transformer/posembed_input/pos_embedding"

# What zipfile and numpy raise on a file that is damaged, encrypted or compressed in a way they do not know.
DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError)


class Stored(NamedTuple):
    """One array as it lies in the zip."""
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool   # columns first: numpy writes transposed arrays so
    header: bytes   # all that comes before the data
    start: int      # position of the data in the file; -1: compressed


class Source(NamedTuple):
    """Where a key of the published layout comes from."""
    name: str                  # in the zip
    block: int | None = None   # a slice of the first axis
    zero_row: bool = False     # a row of zeros in front of the second axis


class Archive:
    """`shapes` and `dtypes` by published key; `read(key)` gives the array; `repairs` tells what differed.

    ValueError: not an `.npz`, damaged, or with pickled objects inside (never loaded). FileNotFoundError: no such file.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"There is no checkpoint at {self.path}.")
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder, not an .npz file.")
        with ExitStack() as stack:  # whatever is wrong with the file, it is closed again
            self._file = stack.enter_context(open(self.path, "rb"))
            try:
                self._zip = stack.enter_context(zipfile.ZipFile(self._file))
                self._stored = {info.filename: self._header(info) for info in self._zip.infolist()}
                if len(self._stored) < len(self._zip.infolist()):
                    raise ValueError("two arrays have one name")
                self._sources, self.repairs = published(self._stored)
            except DAMAGE as error:
                raise ValueError(f"{self.path} is not a complete .npz file ({_reason(error)}{self._beginning()}). "
                                 "Fetch or copy it again.") from error
            self.shapes = {key: self._shape(source) for key, source in self._sources.items()}
            self.dtypes = {key: self._dtype(key) for key in self._sources}
            self._close = stack.pop_all().close
        self._scratch, self._reading = Scratch(), threading.Lock()
        self._whole = (None, None)  # the last array that was read in slices

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._close()

    @property
    def threads(self) -> int:
        """How many may read at a time: one where arrays come in slices, so that each is read once."""
        return 1 if any(source.block is not None for source in self._sources.values()) else 4

    def read(self, key: str) -> np.ndarray:
        """The array, valid until this thread reads again. ValueError: the file is damaged there."""
        source = self._sources[key]
        try:
            array = (self._read(self._stored[source.name], self._scratch.take) if source.block is None else
                     self._slice(source))
        except DAMAGE as error:
            raise ValueError(f"{self.path} is damaged at '{key}' ({_reason(error)}). "
                             "Fetch or copy it again.") from error
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype.kind == "V":  # numpy has no bfloat16 and shows its bits as void: a float32's upper half
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        if source.zero_row:
            array = np.pad(array, ((0, 0), (1, 0), (0, 0)))
        return array

    def _beginning(self) -> str:
        """What a text in place of an array file says: a server's answer, or what git keeps for a large file."""
        self._file.seek(0)
        text = self._file.read(40).decode("ascii", errors="replace").strip()
        return f"; it begins with {text!r}" if text.isprintable() and text else ""

    def _slice(self, source: Source) -> np.ndarray:
        """One block of a stack, which is kept until another is asked for; `threads` sees to it that one thread asks."""
        if self._whole[0] != source.name:
            self._whole = None, None  # its memory first
            whole = self._read(self._stored[source.name], lambda size: np.empty(size, np.uint8))
            self._whole = source.name, whole
        return self._whole[1][source.block]

    def _read(self, stored: Stored, take: Callable[[int], np.ndarray]) -> np.ndarray:
        data = take(stored.dtype.itemsize * math.prod(stored.shape))
        with self._reading:  # all threads share the position in the file
            if stored.start < 0:
                with self._zip.open(stored.name) as file:
                    file.read(len(stored.header))
                    count = sum(file.readinto(data[at:at + 2**20]) for at in range(0, len(data), 2**20))
                    file.read(1)  # the end: here zipfile compares the checksum
            else:
                self._file.seek(stored.start)
                count = self._file.readinto(data)
        if stored.start >= 0 and zlib.crc32(data[:count], zlib.crc32(stored.header)) != \
                self._zip.getinfo(stored.name).CRC:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file '{stored.name}'")
        if count != len(data):
            raise EOFError(f"{count:,} of {len(data):,} bytes")
        return data.view(stored.dtype).reshape(stored.shape, order="F" if stored.fortran else "C")

    def _header(self, info: zipfile.ZipInfo) -> Stored:
        """Name, shape and type of an array. An array that is not compressed is found without opening it as a file."""
        stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        if stored:
            self._file.seek(info.header_offset)
            top = self._file.read(4096)
            if top[:4] != b"PK\3\4":
                raise zipfile.BadZipFile(f"no file header where '{info.filename}' should begin")
            skip = 30 + sum(struct.unpack("<HH", top[26:30]))  # the name and an extra field follow
            head = top[skip:]
        else:
            with self._zip.open(info) as file:
                head = file.read(4096)
        shape, fortran, dtype, length = _npy_header(head[:_npy_length(head)])
        if dtype.kind != "O" and length + dtype.itemsize * math.prod(shape) != info.file_size:
            raise EOFError(f"'{info.filename}' has {info.file_size:,} bytes, which is not what its shape {shape} needs")
        return Stored(info.filename, shape, dtype, fortran, head[:length], info.header_offset + skip + length
                      if stored else -1)

    def _dtype(self, key: str) -> np.dtype:
        stored = self._stored[self._sources[key].name]
        if (stored.dtype.kind in ("iu" if key == "grid" else "f") and stored.dtype.itemsize <= 8) or \
                stored.dtype == np.dtype("V2"):
            return stored.dtype
        raise ValueError(f"{self.path}: '{stored.name}' holds {stored.dtype}; expected floating-point numbers.")

    def _shape(self, source: Source) -> tuple[int, ...]:
        shape = self._stored[source.name].shape
        if source.block is not None:
            shape = shape[1:]
        return (shape[0], shape[1] + 1, *shape[2:]) if source.zero_row else shape


def _npy_length(head: bytes) -> int:
    """Bytes of the `.npy` header, magic included. ValueError: there is none."""
    if head[:6] != b"\x93NUMPY" or len(head) < 12:
        raise ValueError("it holds something that is no .npy array")
    return 10 + int.from_bytes(head[8:10], "little") if head[6] == 1 else 12 + int.from_bytes(head[8:12], "little")


@functools.lru_cache(maxsize=256)  # a checkpoint repeats a dozen headers hundreds of times
def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    file = io.BytesIO(head)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file)
    except Exception as error:  # the header is a Python literal: on damaged ones its parser raises anything
        raise ValueError(f"an array's header is no .npy header: {_reason(error)}") from error
    return shape, fortran, dtype, file.tell()


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


# --- Layouts ---------------------------------------------------------------------------------------------------------

def published(stored: dict[str, Stored]) -> tuple[dict[str, Source], tuple[str, ...]]:
    """(published key -> where it lies, what was repaired). Each way in which files differ has its own paragraph."""
    sources = {name.removesuffix(".npy"): Source(name) for name in stored}
    repairs = []

    # Written on Windows by tools that join keys with os.path.join.
    if any("\\" in key for key in sources):
        sources = {key.replace("\\", "/"): source for key, source in sources.items()}
        repairs.append("names with backslashes")

    # The model is one branch of a training state (flax's old `Optimizer`; big_vision; big_vision's image tower).
    for prefix in ("opt/target/", "params/img/", "params/"):
        if f"{prefix}embedding/kernel" in sources:
            inside = {key.removeprefix(prefix): source for key, source in sources.items() if key.startswith(prefix)}
            repairs.append(f"prefix {prefix}" + (f", {len(sources) - len(inside)} arrays of training state left out"
                                                 if len(inside) < len(sources) else ""))
            sources = inside
            break

    # big_vision's scan: all blocks in one array, the layer as its first axis.
    stacked = re.compile(r"Transformer/encoderblock/(?=.)")
    if any(stacked.match(key) for key in sources):
        layers = max(sum(stored[source.name].shape[:1]) for key, source in sources.items() if stacked.match(key))
        if layers > 1000:
            raise ValueError(f"a stack of {layers:,} blocks")
        sources = {new: Source(source.name, block) for key, source in sources.items()
                   for new, block in ([(stacked.sub(f"Transformer/encoderblock_{i}/", key), i)
                                       for i in range(stored[source.name].shape[0])]
                                      if stacked.match(key) and stored[source.name].shape else [(key, None)])}
        repairs.append("stacked blocks")

    # flax linen numbers the submodules of a block by class; the published files number them together.
    if any("/MlpBlock_0/" in key for key in sources):
        linen = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
                 "MlpBlock_0": "MlpBlock_3"}
        pattern = re.compile(rf"(?<=/)({'|'.join(linen)})(?=/)")
        sources = {pattern.sub(lambda match: linen[match[1]], key): source for key, source in sources.items()}
        repairs.append("flax linen names")

    # big_vision keeps the position embedding at the top level, and adds it before the class token comes in front:
    # where all positions make up a square, none is the token's, and to the token itself nothing is added.
    if "pos_embedding" in sources and POS_EMBEDDING not in sources:
        source = sources.pop("pos_embedding")
        repairs.append("pos_embedding at the top level")
        shape = stored[source.name].shape
        if "cls" in sources and "grid" not in sources and len(shape) == 3 and math.isqrt(shape[1]) ** 2 == shape[1]:
            source = source._replace(zero_row=True)
            repairs.append("no position row for the class token")
        sources[POS_EMBEDDING] = source
    return sources, tuple(repairs)
