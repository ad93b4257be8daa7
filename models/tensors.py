"""Files that hold tensors by name: `.safetensors`, and what torch.save wrote. Nothing but tensors is ever taken in.

Both kinds, once open, have `path`, `shapes` and `dtypes` by name (in the file's order), `read(name)`, `header` (our
record, or {}) and `repairs` (what had to be undone). Whose names these are is told in `models/exchange.py`.
"""

import argparse
import json
import os
import pickle
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.fill import Scratch
from models.modeling import VisionTransformer

SUFFIXES = {".npz": "npz", ".safetensors": "safetensors", ".bin": "torch", ".pt": "torch", ".pth": "torch",
            ".ckpt": "torch", ".tar": "torch"}

# Training checkpoints keep the weights beside other things; averaged ones are preferred, as timm prefers them.
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
WRAPPERS = ("_orig_mod.", "module.")  # put before each name by torch.compile and DistributedDataParallel

# safetensors' types -> ours; numpy has no bfloat16, whose bits are a float32's upper half
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def kind_of(path) -> str:
    """"folder", "npz", "safetensors" or "torch": told by the first bytes, where these are damaged by the name.

    FileNotFoundError: no such file. ValueError: it cannot be read, or is none of these.
    """
    path = Path(path)
    if path.is_dir():
        return "folder"
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no checkpoint at {path}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    if head[:4] == b"PK\3\4":  # a zip: numpy's and torch's differ in the name of their first member
        first = head[30:30 + int.from_bytes(head[26:28], "little")]
        if first.endswith(b".npy"):
            return "npz"
        if first.endswith(b"data.pkl"):
            return "torch"
    elif head[8:9] == b"{":    # the length of a JSON header, then the header
        return "safetensors"
    elif head[:1] == b"\x80":  # a pickle: torch.save before 1.6
        return "torch"
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: weights are read from .npz, .safetensors and PyTorch's .pt, .pth and .bin files and "
                         f"from Hugging Face folders, not from '{path.suffix or path.name}'.")
    return SUFFIXES[path.suffix]


def open_file(path):
    """The open file, a context. Errors: see `kind_of` and the two classes."""
    return {"safetensors": SafeTensors, "torch": TorchFile}[kind_of(path)](path)


class SafeTensors:
    """An open `.safetensors`. Opening reads the header only; then one tensor at a time.

    ValueError: not a `.safetensors`, or damaged.
    """

    repairs = ()

    def __init__(self, path):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt") as checked:  # refuses whatever is wrong with the header
                header = (checked.metadata() or {}).get("vit", "{}")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a complete .safetensors file ({error}). "
                             "Fetch or copy it again.") from error
        try:
            self.header = dict(json.loads(header))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}: the entry 'vit' of its header is not a JSON object.") from error
        # Read here and not by the library, which maps the file: its pages would count as memory beside the model.
        self._file = open(self.path, "rb")
        length = int.from_bytes(self._file.read(8), "little")
        entries = json.loads(self._file.read(length))
        entries.pop("__metadata__", None)
        self._entries = dict(sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"]))
        self._start = 8 + length
        self._scratch, self._reading = Scratch(), threading.Lock()
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}
        self.dtypes = {name: TYPES.get(entry["dtype"], entry["dtype"]) for name, entry in self._entries.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """The tensor, valid until this thread reads again; bfloat16 as float32. ValueError: cut off, or no floats."""
        dtype, (begin, end) = self.dtypes[name], self._entries[name]["data_offsets"]
        if dtype not in TYPES.values():
            raise ValueError(_no_floats(self.path, name, dtype))
        data = self._scratch.take(end - begin)
        with self._reading:  # all threads share the position in the file
            self._file.seek(self._start + begin)
            count = self._file.readinto(data)
        if count != end - begin:
            raise ValueError(f"{self.path} ends within '{name}'. Fetch or copy it again.")
        if dtype == "bfloat16":
            data = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            data = data.view(np.dtype(dtype).newbyteorder("<"))
        return data.reshape(self.shapes[name])


class TorchFile:
    """An open file of torch.save: a state dict, or a training checkpoint with one inside (`NESTED`).

    Read with `weights_only`, so that no object is made and no code of the file runs; mapped where the format allows.
    ValueError: not such a file, damaged, with other objects than tensors, or without a state dict.
    """

    def __init__(self, path):
        self.path, self.header, self.repairs = Path(path), {}, ()
        content = _torch_load(self.path)
        nested = next((key for key in NESTED if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
        if nested:
            content, self.repairs = content[nested], (f"nested under '{nested}'",)
        if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{self.path} holds no state dict: expected tensors by name, alone or under one of "
                             f"{', '.join(NESTED)}. Save it with torch.save(model.state_dict(), path).")
        for wrapper in WRAPPERS * 2:  # in either order
            if all(str(name).startswith(wrapper) for name in content):
                content = {name.removeprefix(wrapper): value for name, value in content.items()}
                self.repairs += (f"prefix {wrapper}",)
        for name, value in content.items():
            if not isinstance(name, str) or not _is_plain(value):
                kind = "sparse or quantised" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{self.path}: '{name}' is no plain tensor ({kind}), so this is no state dict.")
        self._tensors = content
        self.shapes = {name: tuple(tensor.shape) for name, tensor in content.items()}
        self.dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in content.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._tensors = {}  # the mapping ends with its last tensor

    def read(self, name: str) -> np.ndarray:
        """The tensor; bfloat16 as float32. ValueError: it holds no floating-point numbers."""
        if self.dtypes[name] not in TYPES.values():
            raise ValueError(_no_floats(self.path, name, self.dtypes[name]))
        tensor = self._tensors[name].detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _is_plain(value) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _no_floats(path, name, dtype) -> str:
    return f"{path}: '{name}' holds {dtype}; expected floating-point numbers ({', '.join(TYPES.values())})."


def _torch_load(path: Path):
    """The content of a file of torch.save. argparse's Namespace, plain data in many checkpoints, is let in."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings(), \
                torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what torch warns of in odd files is refused with a reason below
            mmap = file.read(2) == b"PK" and path.suffix != ".safetensors"  # by that name torch would not look inside
            file.seek(0)
            return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        other = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(f"{path} holds more than tensors ({other[1] if other else 'another kind of pickle'}), and "
                         "other objects are never unpickled, as that can run any code. Save the weights alone where "
                         "the file comes from: torch.save(model.state_dict(), path).") from error
    except Exception as error:  # on arbitrary bytes its reader raises anything: KeyError, EOFError, RuntimeError ...
        text = re.sub(r"^\[enforce.*?\] \. ", "", str(error).splitlines()[0] if str(error) else "").split(". ")[0]
        reason = f" ({text.rstrip('.')})" if isinstance(error, RuntimeError) else ""
        raise ValueError(f"{path} is not a complete file of torch.save{reason}. Fetch or copy it again.") from error


# --- Write -----------------------------------------------------------------------------------------------------------

def record(model: VisionTransformer, metadata: dict) -> dict:
    """What our files tell about themselves, for JSON: the model's config (GELU, normalisation ...), img_size, grid and
    num_classes, and all of `metadata`, such as `classes`, the names of the classes."""
    return {**metadata, "config": model.config.to_dict(), "img_size": model.img_size, "grid": model.grid,
            "num_classes": model.num_classes}


def write(tensors: dict[str, Tensor], path: Path, record: dict) -> None:
    """Writes a `.safetensors` with our record in its header (key `vit`). Atomic: the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as every file of the user's; the library's is readable for its owner alone
        try:
            save_file(tensors, temporary, metadata={"format": "pt", "vit": json.dumps(record)})
        except SafetensorError as error:  # its own class even for a full disk
            failure = OSError(f"{path} could not be written ({error}).")
            failure.errno = int((re.search(r"os error (\d+)", str(error)) or [0, 0])[1])
            raise failure from error
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the tensors do
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
