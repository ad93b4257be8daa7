"""Inputs that are no good checkpoint, by name: `CASES[name](folder, good)` returns the path to try.

good: {key: array} of a whole tiny file of Google's layout.
"""

import gzip
import json
import pickle
import warnings
import zipfile

import numpy as np
import torch
from safetensors.torch import save_file

BLOCK = "Transformer/encoderblock_0"
QUERY = f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel"
DENSE = f"{BLOCK}/MlpBlock_3/Dense_0/kernel"
POSITIONS = "Transformer/posembed_input/pos_embedding"


def arrays(change):
    """A case from what is done to the arrays."""
    def make(folder, good):
        good = dict(good)
        changed = change(good)
        np.savez(folder / "x.npz", **(good if changed is None else changed))
        return folder / "x.npz"
    return make


def content(change, name="x.npz"):
    """A case from what is done to the bytes of a good file."""
    def make(folder, good):
        np.savez(folder / "good.npz", **good)
        (folder / name).write_bytes(change((folder / "good.npz").read_bytes()))
        return folder / name
    return make


def put(key, value):
    return arrays(lambda a: a.__setitem__(key, value(a[key]) if callable(value) else value))


def drop(*keys):
    return arrays(lambda a: {k: v for k, v in a.items() if not k.startswith(keys)})


def spoiled(array, value):
    array = array.copy()
    array.flat[array.size // 2] = value
    return array


def flipped(data, key, away=300):
    """One bit changed after the beginning of an array's entry."""
    at = data.index(key.encode() + b".npy") + away
    return data[:at] + bytes([data[at] ^ 8]) + data[at + 1:]


def folder_of(**files):
    def make(folder, good):
        (folder / "model").mkdir()
        for name, text in files.items():
            (folder / "model" / name.replace("__", ".")).write_text(text)
        return folder / "model"
    return make


def file_of(name, write):
    def make(folder, good):
        write(folder / name)
        return folder / name
    return make


def zip_of(name="x.npz", **members):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in members.items():
                archive.writestr(member.replace("__", "."), data)
    return file_of(name, write)


def twice(path):
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            with archive.open("cls.npy", "w") as file:
                np.save(file, np.zeros((1, 1, 32), np.float32))


class Evil:
    def __reduce__(self):
        return print, ("this code must never run",)


def tensors_of(**tensors):
    return lambda path: save_file({key.replace("__", "."): value for key, value in tensors.items()}, path)


CASES = {
    # no .npz at all
    "missing file": lambda folder, good: folder / "nothing.npz",
    "empty file": content(lambda data: b""),
    "folder named .npz": lambda folder, good: (folder / "x.npz").mkdir() or folder / "x.npz",
    "text file": content(lambda data: b"Not yet downloaded.\n"),
    "page of an error": content(lambda data: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
    "git lfs pointer": content(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    "zeros": content(lambda data: bytes(len(data))),
    "gzip": content(gzip.compress),
    "wrong magic": content(lambda data: b"QQ" + data[2:]),
    "half of it": content(lambda data: data[:len(data) // 2]),
    "last bytes missing": content(lambda data: data[:-10]),
    "first bytes missing": content(lambda data: data[1000:]),
    "middle missing": content(lambda data: data[:2000] + data[3000:]),
    "a .npy": content(lambda data: b"\x93NUMPY" + data[data.index(b"\x93NUMPY") + 6:][:300]),
    "a zip of texts": zip_of(a__txt="one", b__txt="two"),
    "a zip of nothing": zip_of(),
    "an array cut short": zip_of(cls__npy=b"\x93NUMPY\x01\x00v\x00{'descr'"),
    "a header of nonsense": content(lambda data: data.replace(b"{'descr': '<f4'", b"{'descr': 'hey'", 1)),
    "a header of other size": content(lambda data: data.replace(b"(1, 1, 32)", b"(1, 1, 33)", 1)),
    "two arrays of one name": file_of("x.npz", twice),
    "a bit flipped in a kernel": content(lambda data: flipped(data, DENSE)),
    "a bit flipped in the last array": content(lambda data: flipped(data, "head/bias", 174)),
    # arrays that no model has
    "pickled object": put("cls", np.array([Evil()], dtype=object)),
    "all of it pickled": file_of("x.npz", lambda path: path.write_bytes(pickle.dumps({"cls": Evil()}))),
    "text in an array": put("cls", np.array(["a", "b"])),
    "complex numbers": put("cls", lambda a: a.astype(np.complex64)),
    "booleans": put("cls", lambda a: a > 0),
    "16-bit patterns as integers": arrays(lambda a: {k: v.view(np.uint32).astype(np.uint16) for k, v in a.items()}),
    "one kernel of integers": put(DENSE, lambda a: (a * 100).astype(np.int8)),
    "a stack without end": arrays(lambda a: a.__setitem__("Transformer/encoderblock/LayerNorm_0/scale",
                                                          np.zeros((2_000_000, 0), np.float32))),
    "bytes": put("cls", np.array([b"abc"])),
    # arrays missing, added, renamed
    "missing kernel": drop("embedding/kernel"),
    "missing norm": drop("Transformer/encoder_norm/scale"),
    "missing block": drop("Transformer/encoderblock_0/"),
    "missing last block's half": drop("Transformer/encoderblock_1/LayerNorm"),
    "missing positions": drop(POSITIONS),
    "missing bias of the head": drop("head/bias"),
    "missing kernel of the head": drop("head/kernel"),
    "extra array": arrays(lambda a: a.__setitem__("Transformer/ghost", np.zeros(3, np.float32))),
    "extra block": arrays(lambda a: a.__setitem__("Transformer/encoderblock_99999999/LayerNorm_0/scale",
                                                  np.ones(32, np.float32))),
    "renamed array": arrays(lambda a: a.__setitem__("Transformer/encoder_norm/scael",
                                                    a.pop("Transformer/encoder_norm/scale"))),
    "renamed everything": arrays(lambda a: {f"model/{key}": value for key, value in a.items()}),
    # shapes
    "transposed dense": put(DENSE, lambda a: a.T),
    "transposed head": put("head/kernel", lambda a: a.T),
    "transposed query": put(QUERY, lambda a: a.transpose(2, 1, 0)),
    "transposed patches": put("embedding/kernel", lambda a: a.transpose(3, 2, 0, 1)),
    "flat query": put(QUERY, lambda a: a.reshape(32, 32)),
    "heads that do not divide": put(QUERY, lambda a: np.zeros((32, 3, 10), np.float32)),
    "flat positions": put(POSITIONS, lambda a: a[0]),
    "a position too few": put(POSITIONS, lambda a: a[:, :-1]),
    "no positions": put(POSITIONS, lambda a: a[:, :1]),
    "flat patches": put("embedding/kernel", lambda a: a.reshape(48, 32)),
    "empty kernel": put(DENSE, lambda a: a[:, :0]),
    "scalar bias": put("head/bias", np.float32(0)),
    "head of two sizes": put("head/bias", lambda a: a[:-1]),
    "wide class token": put("cls", lambda a: np.zeros((1, 1, 64), np.float32)),
    "a wrong grid": arrays(lambda a: a.__setitem__("grid", np.array([3, 3]))),
    "an empty grid": arrays(lambda a: a.__setitem__("grid", np.array([]))),
    # values
    "NaN": put(DENSE, lambda a: spoiled(a, np.nan)),
    "infinity": put("head/kernel", lambda a: spoiled(a, np.inf)),
    "NaN in positions": put(POSITIONS, lambda a: spoiled(a, np.nan)),
    # other people's
    "arrays without names": arrays(lambda a: {"arr_0": np.zeros((3, 3)), "arr_1": np.zeros(3)}),
    "a Mixer": arrays(lambda a: {"stem/kernel": np.zeros((16, 16, 3, 768), np.float16),
                                 "MixerBlock_0/LayerNorm_0/scale": np.ones(768, np.float32)}),
    "a ResNet (BiT)": arrays(lambda a: {"resnet/root_block/standardized_conv2d/kernel": np.zeros((7, 7, 3, 64)),
                                        "resnet/head/conv2d/bias": np.zeros(1000)}),
    "a text tower": arrays(lambda a: {f"params/txt/{key}": value for key, value in a.items()}),
    # other formats
    "unknown ending": file_of("x.h5", lambda path: path.write_bytes(b"\x89HDF\r\n")),
    "cut .safetensors": file_of("x.safetensors", lambda path: path.write_bytes(b"\xff\0\0\0\0\0\0\0{")),
    "other .safetensors": file_of("x.safetensors", tensors_of(conv1__weight=torch.zeros(64, 3, 7, 7))),
    "half a .safetensors": file_of("x.safetensors", tensors_of(patch_embed__proj__weight=torch.zeros(32, 3, 4, 4))),
    ".safetensors of integers": file_of("x.safetensors", tensors_of(cls_token=torch.zeros(1, 1, 32, dtype=torch.int8))),
    "pickled model": file_of("x.pth", lambda path: torch.save(torch.nn.Linear(2, 2), path)),
    "pickled code": file_of("x.bin", lambda path: path.write_bytes(pickle.dumps({"weight": Evil()}))),
    "text named .pth": file_of("x.pth", lambda path: path.write_text("404")),
    "numbers in a .pth": file_of("x.pth", lambda path: torch.save({"epoch": 3, "accuracy": 0.5}, path)),
    "folder without weights": folder_of(config__json="{}"),
    "folder with half a card": folder_of(config__json="{", model__safetensors=""),
    "folder with a damaged file": folder_of(config__json=json.dumps({"model_type": "vit"}), model__safetensors="abc"),
}
