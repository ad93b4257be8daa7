"""Google's published arrays as other writers lay them out: `LAYOUTS[name] = (change, what a reader is told)`."""

import re

import numpy as np

from models.archive import POS_EMBEDDING

LINEN = {"LayerNorm_2": "LayerNorm_1", "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
         "MlpBlock_3": "MlpBlock_0"}


def linen(arrays):
    return {re.sub("|".join(LINEN), lambda match: LINEN[match[0]], key): array for key, array in arrays.items()}


def prefixed(arrays, prefix, **beside):
    """A training state: the model under a prefix, and other arrays beside it."""
    return {**{prefix + key: array for key, array in arrays.items()},
            **{key.replace("__", "/"): np.asarray(value) for key, value in beside.items()}}


def big_vision(arrays, prefix="params/", class_row=True):
    """New names under a prefix, the position embedding at the top level, its class row apart or nowhere."""
    arrays = linen(arrays)
    pos = arrays.pop(POS_EMBEDDING)
    arrays["pos_embedding"] = pos if class_row else pos[:, 1:]
    return prefixed(arrays, prefix, opt__0__count=7, chrono__accum_steps=np.arange(3))


def scanned(arrays):
    """All blocks in one array with the layer as its first axis."""
    block = re.compile(r"Transformer/encoderblock_(\d+)/(.*)")
    out = {key: array for key, array in arrays.items() if not block.match(key)}
    for key in arrays:
        if (match := block.match(key)) and match[1] == "0":
            layers = [arrays[f"Transformer/encoderblock_{i}/{match[2]}"] for i in range(2)]
            out[f"Transformer/encoderblock/{match[2]}"] = np.stack(layers)
    return out


def arrays_of(path):
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def bfloat16(arrays):
    """As numpy writes JAX's bfloat16: two bytes of no type."""
    return {key: (a.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view("V2") for key, a in arrays.items()}


LAYOUTS = {
    "backslashes": (lambda a: {key.replace("/", "\\"): v for key, v in a.items()}, "names with backslashes"),
    "linen": (linen, "flax linen names"),
    "optimizer state": (lambda a: prefixed(a, "opt/target/", opt__state__step=3,
                                           opt__state__param_states__cls__grad_ema=np.ones((1, 1, 32))),
                        "prefix opt/target/, 2 arrays of training state left out"),
    "big_vision": (big_vision, "prefix params/, 2 arrays of training state left out"),
    "big_vision image tower": (lambda a: big_vision(a, "params/img/"), "prefix params/img/"),
    "big_vision stacked": (lambda a: big_vision(scanned(a)), "stacked blocks"),
    "stacked": (scanned, "stacked blocks"),
    "flat norms": (lambda a: {k: v.reshape(-1) if "gn" in k else v for k, v in a.items()}, None),
    "columns first": (lambda a: {key: np.asfortranarray(v) for key, v in a.items()}, None),
    "big-endian": (lambda a: {key: v.astype(">f4") for key, v in a.items()}, None),
    "float64": (lambda a: {key: v.astype(np.float64) for key, v in a.items()}, None),
}
