"""What is this file, and the same weights in another format: `python convert.py IN [OUT]`.

`OUT` by its ending: .npz (Google's layout), .safetensors (timm's names, with our metadata), .onnx, or a folder (OUT/)
for Hugging Face. Nothing takes OUT's place before its logits have been compared with those of IN.
"""

import argparse
import importlib.util
import logging
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from models import exchange, huggingface, npz, onnx_export
from models.fill import native_size
from models.modeling import VisionTransformer
from utils.runs import weights_of
from utils.settings import Parser, image_size

log = logging.getLogger("convert")

FILES = (".npz", ".safetensors", ".onnx")
DTYPES = ("float32", "float16", "bfloat16")
TYPES = {".npz": ("float32", "float16"), ".onnx": ("float32",)}  # that a format has, where it has not all
TOLERANCE = 1e-4  # relative; two float32 computations of the same weights differ by about 1e-6


# --- What a file is --------------------------------------------------------------------------------------------------

def describe(args) -> str:
    """A few lines on what the file is. All of it is read: ValueError where it is damaged or does not fit together."""
    what, record = exchange.identify(args.file, args.model_type), exchange.read_metadata(args.file)
    model = exchange.load(args.file, config=args.model_type, img_size=args.img_size)
    config, classes = what.config, record.get("classes") or []
    like = f"nothing proves one; like files of {' and '.join(what.candidates)}" if what.candidates else ""
    shown = ", ".join(classes[:5]) + (", ..." if classes[5:] else "")
    numbers = " or ".join(dict.fromkeys(f"(x / 255 - {m:g}) / {s:g}" for m, s in zip(config.mean, config.std)))
    lines = {
        "file": f"{what.path}, {what.size / 2**20:,.1f} MiB",
        "layout": ", ".join([what.layout, *what.repairs]),
        "family": what.family or like or "none of Google's",
        "model": f"{config.name}: patch {config.patch_size[0]} x {config.patch_size[1]}{stem_of(config)}, width "
                 f"{config.hidden_size}, {config.num_layers} layers, {config.num_heads} heads, MLP {config.mlp_dim}",
        "image": "{} x {} px, {} x {} patches".format(*(what.img_size or model.img_size), *(what.grid or model.grid)),
        "channels": f"{config.in_chans}, normalised as {numbers}",
        "head": head_of(what, model),
        "numbers": f"{what.parameters / 1e6:,.2f} M parameters, {what.dtype}; GELU {config.gelu}, norm epsilon "
                   f"{config.norm_eps:.0e}",
        "assumed": f"{', '.join(what.assumed)}: not recorded, taken to be Google's" if what.assumed else "",
        "classes": f"{len(classes):,}: {shown}" if classes else "",
        "trained": training_of(record),
        "command": record.get("command", ""),
    }
    return "\n".join(f"{name:9}{text}" for name, text in lines.items() if text)


def stem_of(config) -> str:
    if config.resnet is None:
        return ""
    units = "+".join(map(str, config.resnet.num_layers)) or "no"
    return f" on a ResNet stem ({units} units, width {64 * config.resnet.width_factor:g})"


def training_of(record: dict) -> str:
    origin = (record.get("finetuned_from") or {}).get("name")
    return ", ".join([f"from {origin}"] * bool(origin) + [f"{part} accuracy {share:.2%}" for part, share in
                                                          (record.get("accuracy") or {}).items()])


def head_of(what: npz.Identity, model: VisionTransformer) -> str:
    pooled = {"token": "the class token", "gap": "the mean of the tokens"}[what.config.classifier]
    before = f"pre_logits of width {what.config.representation_size}, " if what.config.representation_size else ""
    if not what.num_classes:
        return f"{before}none (on {pooled})"
    zero = ", all zero" if not model.head.weight.any() and not model.head.bias.any() else ""
    return f"{before}{what.num_classes:,} classes on {pooled}{zero}"


# --- Conversion ------------------------------------------------------------------------------------------------------

def convert(args) -> None:
    """IN -> OUT, compared; see the module. ValueError: what the format cannot hold."""
    kind, out = kind_of(args.out), Path(args.out).absolute()
    check_free(out, kind, args.overwrite)
    what = exchange.identify(args.file, args.model_type)
    model = load(args, kind, what)
    metadata = about(what, args.file, model)
    dtype = args.dtype or (what.dtype if what.dtype in TYPES.get(kind, DTYPES) else "float32")
    check_holds(model, kind, metadata, dtype)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f"{out.name}.part.", dir=out.parent)
    except OSError as error:
        raise ValueError(f"{args.out} cannot be written ({error.strerror}).") from error
    with temporary as folder:
        target = Path(folder) / out.name  # its own name: a large .onnx names the file of weights beside it
        write(model, target, kind, metadata, dtype)
        compare(model, target, kind, dtype, args)
        if kind == "folder":
            huggingface.put(target, out)
        else:
            for file in (target.with_name(f"{out.name}.data"), target):  # the weights of a large .onnx before itself
                if file.exists():
                    os.replace(file, out.with_name(file.name))
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
    from_type = "" if what.dtype == dtype else f" ({what.dtype} in {args.file.name})"
    log.info("%s: %.1f MiB, %s%s.", args.out, size / 2**20, dtype, from_type)


def kind_of(out: str) -> str:
    suffix = Path(out).suffix
    if out.endswith(("/", os.sep)) or not suffix or (suffix not in FILES and Path(out).is_dir()):
        return "folder"
    if suffix not in FILES:
        raise ValueError(f"{out}: '{suffix}' is not written here. Choose .npz, .safetensors, .onnx, or a folder "
                         f"({Path(out).stem}/) for Hugging Face.")
    return suffix


def check_free(out: Path, kind: str, overwrite: bool) -> None:
    """ValueError: OUT is there already, or is something else."""
    if kind == "folder":
        huggingface.check_free(out, overwrite)
    elif out.is_dir():
        raise ValueError(f"{out} is a folder; a file would go there. Choose another name.")
    elif out.exists() and not overwrite:
        raise ValueError(f"{out} exists. Choose another name, or --overwrite it.")


def load(args, kind: str, what: npz.Identity) -> VisionTransformer:
    """The model of IN, whole, or without its pre_logits (and then without the head that reads them)."""
    options = dict(img_size=args.img_size, config=args.model_type)
    if what.config.representation_size and args.drop_pre_logits:
        return exchange.load(args.file, num_classes=0, **options).eval()
    if what.config.representation_size and kind in (".safetensors", "folder") and not args.keep_pre_logits:
        other, keep = ("timm", ", --keep_pre_logits writes a file for this toolkit only") if kind != "folder" else (
                       "Hugging Face's ViT", "")
        raise ValueError(f"{args.file} has pre_logits, for which {other} has no place: --drop_pre_logits leaves them "
                         f"out (and the head that reads them; fine-tuning needs neither){keep}.")
    return exchange.load(args.file, **options).eval()


def about(what: npz.Identity, file: Path, model: VisionTransformer) -> dict:
    """What IN tells about itself and OUT may tell too."""
    metadata = {key: value for key, value in exchange.read_metadata(file).items()
                if key not in ("config", "img_size", "grid", "num_classes")}
    if not model.num_classes:
        metadata.pop("classes", None)
    elif what.family and metadata.get("classes"):
        log.info("Its 1,000 classes are ImageNet's: their names go with it.")
    return {**metadata, **({"assumed": what.assumed} if what.assumed else {})}


def check_holds(model: VisionTransformer, kind: str, metadata: dict, dtype: str) -> None:
    """ValueError: the format cannot hold the model, or the type its values. Before anything is made on the disk."""
    if dtype not in TYPES.get(kind, DTYPES):
        raise ValueError(f"An {kind} is not written in {dtype}: choose another --dtype, or .safetensors.")
    if kind == "folder":
        huggingface.card_of(model, metadata)
    if kind == ".onnx":
        onnx_export.require()
    largest = max(p.abs().max().item() for p in model.parameters())
    if largest > torch.finfo(getattr(torch, dtype)).max:
        raise ValueError(f"A weight of {largest:.3g} is beyond what {dtype} can hold: choose another --dtype.")


def write(model: VisionTransformer, path: Path, kind: str, metadata: dict, dtype: str) -> None:
    if kind == ".npz":
        if metadata.get("classes"):
            log.info("An .npz has no place for the names of the %d classes.", len(metadata["classes"]))
        if (pixels := native_size(model.config, model.grid)) != model.img_size:
            log.info("An .npz records the grid and not %d x %d px: it will be read as for %d x %d.", *model.img_size,
                     *pixels)
        npz.save_npz(model, path, dtype=dtype)
    elif kind == ".onnx":
        onnx_export.export(model, path, metadata)
    elif kind == "folder":
        huggingface.save_folder(model, path, metadata, dtype=getattr(torch, dtype))
        log.info("From images of another size transformers makes other pixels than Google and this toolkit, as it "
                 "resizes with antialiasing: it can predict otherwise." if model.config.in_chans == 3 else
                 "transformers' own preprocessing reads 3 channels: give the model its pixel_values.")
    else:
        exchange.save(model, path, metadata, dtype=getattr(torch, dtype))


@torch.no_grad()
def compare(model: VisionTransformer, path: Path, kind: str, dtype: str, args) -> None:
    """Logits of both sides on two fixed images; ValueError: they differ by more than rounding explains."""
    shape = (2, model.config.in_chans, *model.img_size)
    images = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32))
    ours = model(images)
    what, reader = "Logits" if model.num_classes else "Features (there is no head)", "this toolkit"
    if kind == ".onnx":
        if not ours.any():
            log.info("All logits are zero, as the head is: comparing them tells nothing.")
        theirs, reader = torch.from_numpy(onnx_export.check(path, images.numpy())), "onnxruntime"
    elif not ours.any():
        what, ours = "Features (the head is all zero)", model.forward_features(images)
        theirs = exchange.load(path, img_size=model.img_size).eval().forward_features(images)
    elif kind == "folder" and model.num_classes and importlib.util.find_spec("transformers"):
        theirs, reader = huggingface.logits(path, images), "transformers"
    else:
        theirs = exchange.load(path, img_size=model.img_size).eval()(images)
    error, scale = (ours - theirs).abs().max().item(), ours.abs().max().item() or 1.0
    log.info("%s of %s and of %s (read by %s) %s.", what, args.file.name, args.out, reader, "are equal to the bit"
             if error == 0 else f"differ by at most {error:.1e}, {error / scale:.1e} of the largest")
    if not error <= (TOLERANCE if dtype == "float32" else 1.0) * scale:  # nor may it be NaN
        raise ValueError(f"{args.out} was not written: its logits would differ from those of {args.file}.")


# --- Command line ----------------------------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    p = Parser(prog="convert.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    p.add_argument("file", metavar="IN", type=Path, help=".npz, .safetensors, .pth, .bin, a Hugging Face or a "
                   "run's folder")
    p.add_argument("out", metavar="OUT", nargs="?", help=".npz, .safetensors, .onnx, or a folder: OUT/")
    p.add_argument("--img_size", type=image_size, metavar="N|H,W", help="resize the position embedding to this size; "
                   "where the file's grid is not square and not recorded: the file's own size")
    p.add_argument("--model_type", metavar="NAME", help="what IN must be; tells the number of heads where IN does not")
    p.add_argument("--dtype", choices=DTYPES, help="of what is written (default: that of IN, where OUT has it)")
    p.add_argument("--drop_pre_logits", action="store_true", help="leave out pre_logits and the head that reads them")
    p.add_argument("--keep_pre_logits", action="store_true", help="write them to a .safetensors that timm cannot read")
    p.add_argument("--overwrite", action="store_true", help="replace OUT")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def main(argv: list[str] | None = None) -> None:
    """The command line. An error is one sentence and exit code 2; --debug shows its traceback."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING, force=True)
    for ours in (log, logging.getLogger("models")):  # onnxscript tells each of its steps
        ours.setLevel(logging.INFO)
    try:
        args.file = weights_of(args.file)
        if args.out is None:
            print(describe(args))
        else:
            convert(args)
        return
    except KeyboardInterrupt:
        print("\nInterrupted: nothing was written.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
