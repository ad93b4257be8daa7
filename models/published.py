"""What Google published: file -> family, model, image size, bytes, copies. A table, and what its names mean.

Names: FOLDER/NAME as in the bucket, `imagenet21k` when no folder is named. Sources: google-research/vision_transformer
(README.md, `vit_jax.ipynb`, `configs/augreg.py`) and timm's tables of the copies.
"""

import difflib
import re
from pathlib import Path

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
FOLDERS = ("imagenet21k", "imagenet21k+imagenet2012", "augreg", "sam", "gsam")

# More than 50,000 AugReg files follow this pattern (vit_jax/configs/augreg.py); the bucket knows which there are.
AUGREG = re.compile(r"(Ti_16|S_16|S_32|B_8|B_16|B_32|L_16|R_Ti_16|R26_S_32|R50_L_32)-i(?:1k|21k|21k_30)-\d+ep-lr_[\d.]+"
                    r"-aug_\w+-wd_[\d.]+-do_[\d.]+-sd_[\d.]+(?:--\w+-steps_\d+k-lr_[\d.]+-res_(\d+))?")

AUGREG_MODELS = ("ViT-Ti_16", "ViT-S_16", "ViT-S_32", "ViT-B_8", "ViT-B_16", "ViT-B_32", "ViT-L_16", "R+ViT-Ti_16",
                 "R26+ViT-S_32", "R50+ViT-L_32")
AUGREG_CLASSES = (21_843, 1000, 100, 45, 37, 4)  # and those of cifar100, resisc45, oxford_iiit_pet, kitti

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

# Recommended by Google's README and, as far as timm's tables tell, on no hub. No list shows the gsam files: their names
# are those of the configurations that were added for them (vit_jax/configs/models.py).
GOOGLE_ONLY = (
    "gsam/ViT-S_16-gap-norep", "gsam/ViT-S_32-gap-norep", "gsam/ViT-B_16-gap-norep", "gsam/ViT-B_32-gap-norep",
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
    FileNotFoundError: nor that, but a file that lies beside has nearly this name.
    """
    if path.suffix != ".npz":
        raise FileNotFoundError(f"There is no file {path}. Only Google's .npz files are fetched.")
    stem = path.stem.replace("-ViT-", "+ViT-")  # R50-ViT-B_16, ViT-pytorch's spelling
    if AUGREG.fullmatch(stem):
        return f"augreg/{stem}"
    folder = path.parent.name if path.parent.name in FOLDERS else "imagenet21k"
    name = f"{folder}/{stem}"
    if name in SIZES or name in GOOGLE_ONLY:
        return name
    beside = {file.name.lower(): file for file in path.parent.glob("*.npz")}
    if near := difflib.get_close_matches(path.name.lower(), beside, n=1, cutoff=0.85):
        raise FileNotFoundError(f"There is no file {path}. Did you mean {beside[near[0]]}?")
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


def families(path: Path, *, model: str, img_size: tuple[int, int], classes: int, pre_logits: bool,
             repairs: tuple[str, ...] = ()) -> tuple[str | None, tuple[str, ...]]:
    """(the folder of the bucket that such a file is from, or None without proof; those that have such files).

    Proof is a published name, the 21,843 classes that only Google's files have, or `sam/ViT-S_16`'s optimizer state.
    """
    at = [name for name in (*SIZES, *GOOGLE_ONLY) if not name.startswith("augreg/") and model_name(name) == model
          and (image_size(name),) * 2 == img_size]
    if classes == 21_843:
        at = [name for name in at if name.startswith("imagenet21k/")] if pre_logits or model == "R50+ViT-L_32" else []
    else:
        at = [name for name in at if classes == 1000 and not pre_logits and not name.startswith("imagenet21k/")]
    found = {name.split("/")[0] for name in at}
    if model in AUGREG_MODELS and classes in AUGREG_CLASSES and img_size in ((224, 224), (384, 384)) and not (
            classes == 21_843 and pre_logits):
        found.add("augreg")
    owners = {"augreg"} if AUGREG.fullmatch(path.stem) else {
        name.split("/")[0] for name in (*SIZES, *GOOGLE_ONLY) if name.split("/")[1] == path.stem}
    if len(owners) > 1:
        owners &= {path.parent.name}
    # By its size, `sam/ViT-S_16.npz` is the one published file that has the optimizer's state with it.
    if "sam" in found and any("opt/target/" in repair for repair in repairs):
        owners = {"sam"}
    if found & owners:
        return min(found & owners), (min(found & owners),)
    candidates = tuple(folder for folder in FOLDERS if folder in found)
    return candidates[0] if len(candidates) == 1 and classes == 21_843 else None, candidates


def imagenet_classes() -> list[str]:
    """The 1,000 classes of ImageNet in the order of Google's fine-tuned heads (that of the sorted WordNet ids)."""
    from torchvision.models import ViT_B_16_Weights  # slow to import, and rarely needed
    return list(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
