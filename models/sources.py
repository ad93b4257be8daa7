"""Where Google's published weights can be fetched: the bucket, then copies of the same weights on the Hugging Face hub.

Google's bucket answers 403 to anonymous callers since early 2026 (google-research/vision_transformer#321). A copy is
converted and kept as the `.npz` that was asked for.
"""

import contextlib
import logging
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from models import exchange
from models.npz import save_npz
from models.published import SAME_WEIGHTS, SIZES, image_size, model_name, published_name

log = logging.getLogger(__name__)

BUCKET = "https://storage.googleapis.com/vit_models"
HUB = None     # None: huggingface_hub's own endpoint, which HF_ENDPOINT changes
TIMEOUT = 30   # seconds that a server may stay silent


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
    missing = [folder for folder in path.parents if not folder.exists()]  # the innermost first
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
    for folder in missing:
        folder.rmdir()
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
