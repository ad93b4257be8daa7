"""Where Google's published weights can be fetched: the bucket, then copies of the same weights on the Hugging Face hub.

Google's bucket answers 403 to anonymous callers since early 2026 (google-research/vision_transformer#321). A copy is
converted and kept as the `.npz` that was asked for. Names: [FOLDER/]NAME.npz as in the bucket, `imagenet21k` when no
folder is named.
"""

import contextlib
import difflib
import logging
import os
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from models import exchange
from models.npz import save_npz

log = logging.getLogger(__name__)

BUCKET = "https://storage.googleapis.com/vit_models"
HUB = None     # None: huggingface_hub's own endpoint, which HF_ENDPOINT changes
TIMEOUT = 30   # seconds that a server may stay silent

# MiB, as listed in the output of `vit_jax.ipynb` (google-research/vision_transformer); GiB there have two decimals.
SIZES = {
    "imagenet21k/ViT-B_8": 393.72, "imagenet21k/ViT-B_16": 393.69, "imagenet21k/ViT-B_32": 400.01,
    "imagenet21k/ViT-L_16": 1.22 * 1024, "imagenet21k/ViT-L_32": 1.23 * 1024, "imagenet21k/ViT-H_14": 2.46 * 1024,
    "imagenet21k/R26+ViT-B_32": 450.23, "imagenet21k/R50+ViT-B_16": 439.85, "imagenet21k/R50+ViT-L_32": 1.31 * 1024,
    "imagenet21k+imagenet2012/ViT-B_8": 334.78, "imagenet21k+imagenet2012/ViT-B_16": 331.4,
    "imagenet21k+imagenet2012/ViT-B_16-224": 330.29, "imagenet21k+imagenet2012/ViT-B_32": 336.89,
    "imagenet21k+imagenet2012/ViT-L_16": 1.14 * 1024, "imagenet21k+imagenet2012/ViT-L_16-224": 1.13 * 1024,
    "imagenet21k+imagenet2012/ViT-L_32": 1.14 * 1024, "imagenet21k+imagenet2012/R50+ViT-B_16": 377.57,
    "sam/ViT-S_16": 252.57, "sam/ViT-B_16": 330.3, "sam/ViT-B_32": 336.61,
    "sam/ViT-L_16": 1.13 * 1024, "sam/ViT-L_32": 1.14 * 1024,
}
FOLDERS = ("imagenet21k", "imagenet21k+imagenet2012", "augreg", "sam")

# More than 50,000 AugReg files follow this pattern (vit_jax/configs/augreg.py); the bucket knows which there are.
AUGREG = re.compile(r"(Ti_16|S_16|S_32|B_8|B_16|B_32|L_16|R_Ti_16|R26_S_32|R50_L_32)-i(?:1k|21k|21k_30)-\d+ep-lr_[\d.]+"
                    r"-aug_\w+-wd_[\d.]+-do_[\d.]+-sd_[\d.]+(?:--\w+-steps_\d+k-lr_[\d.]+-res_(\d+))?")

# Published file -> repositories on the hub with the same weights, in the order in which they are tried. Sources: timm
# 1.0 `default_cfgs` (for AugReg and SAM the address of the very file; for "orig" the converted file's name and the
# comment above it), and for google/vit-* their model cards and transformers' `convert_vit_timm_to_pytorch.py`: made
# in spring 2021 from timm, whose weights of these names were then the converted originals. timm's AugReg copies are
# partly other members of the sweep than those that Google's README recommends: only the same file is the same weights.
SAME_WEIGHTS = {
    "imagenet21k/ViT-B_16": ("timm/vit_base_patch16_224.orig_in21k", "google/vit-base-patch16-224-in21k"),
    "imagenet21k/ViT-B_32": ("timm/vit_base_patch32_224.orig_in21k", "google/vit-base-patch32-224-in21k"),
    "imagenet21k/ViT-L_16": ("timm/vit_large_patch16_224.orig_in21k", "google/vit-large-patch16-224-in21k"),
    "imagenet21k/ViT-L_32": ("timm/vit_large_patch32_224.orig_in21k", "google/vit-large-patch32-224-in21k"),
    "imagenet21k/ViT-H_14": ("timm/vit_huge_patch14_224.orig_in21k", "google/vit-huge-patch14-224-in21k"),
    "imagenet21k/R50+ViT-B_16": ("timm/vit_base_r50_s16_224.orig_in21k",),
    "imagenet21k+imagenet2012/ViT-B_16":
        ("timm/vit_base_patch16_384.orig_in21k_ft_in1k", "google/vit-base-patch16-384"),
    "imagenet21k+imagenet2012/ViT-B_16-224":
        ("timm/vit_base_patch16_224.orig_in21k_ft_in1k", "google/vit-base-patch16-224"),
    "imagenet21k+imagenet2012/ViT-B_32": ("google/vit-base-patch32-384",),
    "imagenet21k+imagenet2012/ViT-L_16": ("google/vit-large-patch16-384",),
    "imagenet21k+imagenet2012/ViT-L_16-224": ("google/vit-large-patch16-224",),
    "imagenet21k+imagenet2012/ViT-L_32":
        ("timm/vit_large_patch32_384.orig_in21k_ft_in1k", "google/vit-large-patch32-384"),
    "imagenet21k+imagenet2012/R50+ViT-B_16": ("timm/vit_base_r50_s16_384.orig_in21k_ft_in1k",),
    "augreg/B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224":
        ("timm/vit_base_patch16_224.augreg_in1k",),
    "augreg/B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384":
        ("timm/vit_base_patch16_384.augreg_in1k",),
    "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0":
        ("timm/vit_base_patch16_224.augreg_in21k",),
    "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224":
        ("timm/vit_base_patch16_224.augreg_in21k_ft_in1k",),
    "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384":
        ("timm/vit_base_patch16_384.augreg_in21k_ft_in1k",),
    "augreg/B_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224":
        ("timm/vit_base_patch32_224.augreg_in1k",),
    "augreg/B_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384":
        ("timm/vit_base_patch32_384.augreg_in1k",),
    "augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384":
        ("timm/vit_base_patch32_384.augreg_in21k_ft_in1k",),
    "augreg/B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0":
        ("timm/vit_base_patch32_224.augreg_in21k",),
    "augreg/B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224":
        ("timm/vit_base_patch32_224.augreg_in21k_ft_in1k",),
    "augreg/B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0":
        ("timm/vit_base_patch8_224.augreg_in21k",),
    "augreg/B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224":
        ("timm/vit_base_patch8_224.augreg_in21k_ft_in1k",),
    "augreg/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1":
        ("timm/vit_large_patch16_224.augreg_in21k",),
    "augreg/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224":
        ("timm/vit_large_patch16_224.augreg_in21k_ft_in1k",),
    "augreg/L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384":
        ("timm/vit_large_patch16_384.augreg_in21k_ft_in1k",),
    "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.03-res_224":
        ("timm/vit_small_r26_s32_224.augreg_in21k_ft_in1k",),
    "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0":
        ("timm/vit_small_r26_s32_224.augreg_in21k",),
    "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384":
        ("timm/vit_small_r26_s32_384.augreg_in21k_ft_in1k",),
    "augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224":
        ("timm/vit_large_r50_s32_224.augreg_in21k_ft_in1k",),
    "augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0":
        ("timm/vit_large_r50_s32_224.augreg_in21k",),
    "augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384":
        ("timm/vit_large_r50_s32_384.augreg_in21k_ft_in1k",),
    "augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0":
        ("timm/vit_tiny_r_s16_p8_224.augreg_in21k",),
    "augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224":
        ("timm/vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k",),
    "augreg/R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384":
        ("timm/vit_tiny_r_s16_p8_384.augreg_in21k_ft_in1k",),
    "augreg/S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224":
        ("timm/vit_small_patch16_224.augreg_in1k",),
    "augreg/S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384":
        ("timm/vit_small_patch16_384.augreg_in1k",),
    "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0":
        ("timm/vit_small_patch16_224.augreg_in21k",),
    "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224":
        ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k",),
    "augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384":
        ("timm/vit_small_patch16_384.augreg_in21k_ft_in1k",),
    "augreg/S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0":
        ("timm/vit_small_patch32_224.augreg_in21k",),
    "augreg/S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224":
        ("timm/vit_small_patch32_224.augreg_in21k_ft_in1k",),
    "augreg/S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384":
        ("timm/vit_small_patch32_384.augreg_in21k_ft_in1k",),
    "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0":
        ("timm/vit_tiny_patch16_224.augreg_in21k",),
    "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224":
        ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",),
    "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384":
        ("timm/vit_tiny_patch16_384.augreg_in21k_ft_in1k",),
    "sam/ViT-B_16":
        ("timm/vit_base_patch16_224.sam_in1k",),
    "sam/ViT-B_32":
        ("timm/vit_base_patch32_224.sam_in1k",),
}

# Recommended by Google's README and, as far as timm's tables tell, on no hub.
GOOGLE_ONLY = (
    "augreg/L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0",
    "augreg/L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
    "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384",
    "augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
    "augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
    "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0",
    "augreg/S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
    "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0",
    "augreg/R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384",
    "augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1",
    "augreg/R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384",
)


# --- Names -----------------------------------------------------------------------------------------------------------

def published_name(path: Path) -> str:
    """`checkpoint/ViT-B_16.npz` -> `imagenet21k/ViT-B_16`, the name in the bucket.

    ValueError: no published name; the nearest ones are listed, and for a model's bare name its AugReg files.
    """
    if path.suffix != ".npz":
        raise FileNotFoundError(f"There is no file {path}. Only Google's .npz files are fetched.")
    stem = path.stem.replace("-ViT-", "+ViT-")  # R50-ViT-B_16, ViT-pytorch's spelling
    if AUGREG.fullmatch(stem):
        return f"augreg/{stem}"
    folder = path.parent.name if path.parent.name in FOLDERS else "imagenet21k"
    name = f"{folder}/{stem}"
    if name in SIZES:
        return name
    known = sorted({*SIZES, *SAME_WEIGHTS, *GOOGLE_ONLY})
    model = stem.replace("+ViT-", "_").removeprefix("ViT-")
    names = [candidate for candidate in known if candidate.startswith(f"augreg/{model}-")]
    hint = "Files of one AugReg model differ in their training, so ask for one by its whole name, for example"
    if not names:
        near = difflib.get_close_matches(stem, sorted({candidate.split("/")[1] for candidate in known}), cutoff=0.5)
        names = [candidate for candidate in known if candidate.split("/")[1] in near] or list(SIZES)
        hint = "The nearest that exist are" if near else "Published are the AugReg files and"
    raise ValueError("\n  ".join([f"There is no file {path}, and Google published no {name}.npz. {hint}", *names]))


def model_name(name: str) -> str:
    """Name in the bucket -> name of the model: `augreg/R26_S_32-i21k-...` is a `R26+ViT-S_32`."""
    folder, stem = name.split("/")
    if folder != "augreg":
        return re.sub(r"-\d+$", "", stem)  # ViT-B_16-224
    stem = stem.split("-")[0]
    return re.sub(r"^(R\d*)_", r"\1+ViT-", stem) if stem.startswith("R") else f"ViT-{stem}"


def image_size(name: str) -> int:
    """Pixels of the images that the file was trained on last."""
    folder, stem = name.split("/")
    if folder == "augreg":
        return int(AUGREG.fullmatch(stem)[2] or 224)
    return 384 if folder == "imagenet21k+imagenet2012" and not stem.endswith("-224") else 224


# --- Fetch -----------------------------------------------------------------------------------------------------------

def fetch(path) -> Path:
    """`path`, which is there or is fetched: from the bucket, else converted from the same weights on the hub.

    What arrives has a temporary name beside `path` until it is complete and checked.
    ValueError: no such file and no published name. FileNotFoundError: no source gave it; each address is listed with
    what it answered, and where to put the file by hand.
    """
    path = Path(path)
    if path.exists():
        return path
    name = published_name(path)
    sources = [(f"{BUCKET}/{quote(name)}.npz", _from_bucket)]  # quote: '+' is %2B, some servers take it for a space
    sources += [(repository, _from_hub) for repository in SAME_WEIGHTS.get(name, ())]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
    answers = []
    try:
        for source, get in sources:
            log.info("%s is not here. Fetching %s ...", path.name, _address(source))
            try:
                get(source, temporary, name)
                _check_published(temporary, name)
            except Exception as error:  # each version of the hub's library has errors of its own: none may end the list
                answers.append(f"{_address(source)}: {_reason(error).replace(str(temporary), 'the file')}")
                log.info(answers[-1])
            else:
                os.replace(temporary, path)
                return path
    finally:
        temporary.unlink(missing_ok=True)
    raise FileNotFoundError("\n  ".join([f"{path} is not here, and no source gave it:", *answers]) + "\n"
                            f"Put it by hand at {path.absolute()}, or name a copy of it (a model.safetensors from "
                            "a hub) with --pretrained_dir. checkpoint/README.md lists the copies.")


def _from_bucket(address: str, target: Path, name: str) -> None:
    with urllib.request.urlopen(address, timeout=TIMEOUT) as answer, open(target, "wb") as file:
        length = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=length or None, desc=name, unit="B", unit_scale=True,
                  unit_divisor=1024, disable=None) as bar:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        size = file.tell()
    if length and size != length:
        raise OSError(f"cut off after {size:,} of {length:,} bytes")
    if name in SIZES and abs(size / 2**20 - SIZES[name]) > 0.01 * SIZES[name]:
        raise OSError(f"has {size / 2**20:,.2f} MiB, and the published file {SIZES[name]:,.2f} MiB")


def _from_hub(repository: str, target: Path, name: str) -> None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # slow to import, and rarely needed
    file = try_to_load_from_cache(repository, "model.safetensors")
    if not isinstance(file, str):
        _knock(_hub())
        file = hf_hub_download(repository, "model.safetensors", endpoint=HUB, etag_timeout=TIMEOUT)
    model = exchange.load(file, config=model_name(name), google=True)
    lacks = []
    if not model.num_classes:
        lacks.append("the head" + (" (all zero in Google's file)" if name.startswith("imagenet21k/") else ""))
    if name.startswith("imagenet21k/") and not model.config.representation_size:
        lacks.append("pre_logits (which fine-tuning drops)")
    save_npz(model, target)
    log.info("%s: the same weights, converted from %s%s.", name, repository,
             f", whose file lacks {' and '.join(lacks)}" if lacks else "")


def _check_published(path: Path, name: str) -> None:
    """ValueError: the file is not a whole `.npz`, or of another architecture or image size than its name says."""
    _, size = exchange.describe(path, model_name(name))
    if size != (image_size(name),) * 2:
        raise ValueError(f"{path} belongs to images of {size[0]} x {size[1]} px, and {name} to {image_size(name)}.")


def _address(source: str) -> str:
    if "://" in source:
        return source
    return f"{_hub()}/{source}"


def _hub() -> str:
    from huggingface_hub import constants
    return HUB or constants.ENDPOINT


def _knock(address: str) -> None:
    """OSError: nobody answers there. Said at once; the hub's library tries six times, about half a minute."""
    with contextlib.suppress(urllib.error.HTTPError):  # an answer, whatever it says
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()


def _reason(error: Exception) -> str:
    """One line on why a source failed."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the hub's "not in the local cache" hides what its server answered
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return f"answered {status}" + {401: " (no such repository, or not public)", 403: " (forbidden)",
                                       404: " (no such file)"}.get(status, "")
    error = getattr(error, "reason", error)  # urllib's wrapper around what went wrong
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT} s"
    if isinstance(error, socket.gaierror):
        return f"no network, or no such server ({error.strerror})"
    return (str(error) or type(error).__name__).splitlines()[0]
