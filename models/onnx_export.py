"""Our models as `.onnx`, for runtimes without PyTorch: one file, any batch size, and the record that our files carry.

Needs onnx and onnxscript to write and onnxruntime to run; they are an extra, imported only here and only when used.
"""

import copy
import importlib
import json
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from models.modeling import VisionTransformer
from models.tensors import record

log = logging.getLogger(__name__)

OPSET = 20           # the first with a GELU that knows the tanh form; onnx 1.15 and onnxruntime 1.17 read it
LIMIT = 2**31 - 2**20  # bytes of weights in one file: protobuf ends at 2 GiB, and the graph needs some


def export(model: VisionTransformer, path, metadata: dict) -> None:
    """Writes `path` in float32: input "images" (B, in_chans, H, W), output "logits" (B, C), for every B.

    Images are normalised as the record in the file says (entry `vit` of the model's metadata, JSON: `tensors.record`).
    Weights above 2 GiB, more than the format can hold, go to a second file `NAME.onnx.data` beside it.
    ValueError: a library is missing.
    """
    for name in ("onnx", "onnxscript"):
        _library(name)
    path = Path(path)
    size = sum(4 * p.numel() for p in model.parameters())
    copied = copy.deepcopy(model).to("cpu", torch.float32).eval()
    images = torch.zeros(2, model.config.in_chans, *model.img_size)  # not 1: an example of 1 would mean 1 for ever
    batch = torch.export.Dim("batch", max=2**31 - 1)  # torch 2.6 wants an end
    with torch.no_grad():
        # strict: what depends on the batch must stay open, or this fails; it never writes the example's 2 down.
        program = torch.export.export(copied, (images,), dynamic_shapes={"images": {0: batch}}, strict=True)
        program = torch.onnx.export(program, dynamo=True, opset_version=OPSET, input_names=["images"],
                                    output_names=["logits"], dynamic_shapes={"images": {0: "batch"}}, verbose=False)
    program.model.metadata_props["vit"] = json.dumps(record(model, metadata))

    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, as the name of the second file is written in the first.
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.part.", dir=path.parent) as temporary:
        program.save(Path(temporary) / path.name, external_data=size > LIMIT)
        for file in sorted(Path(temporary).iterdir(), reverse=True):  # NAME.onnx.data before NAME.onnx, which needs it
            with open(file, "rb+") as written:
                os.fsync(written.fileno())  # the rename must not reach the disk before the weights do
            os.replace(file, path.with_name(file.name))
    if size > LIMIT:
        log.info("%s: an .onnx file ends at 2 GiB, so the weights are in %s.data beside it. Keep the two together.",
                 path, path.name)


def check(path, images) -> np.ndarray:
    """The logits (B, C) that onnxruntime computes on the CPU for normalised images (B, in_chans, H, W), float32.

    ValueError: onnxruntime is missing.
    """
    session = _library("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": np.asarray(images, np.float32)})[0]


def require() -> None:
    """ValueError: a library is missing that writing or running such a file needs."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _library(name)


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"An .onnx file needs {name}, which is not installed: pip install onnx onnxscript "
                         "onnxruntime.") from error
