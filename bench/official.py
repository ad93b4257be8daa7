"""Our code against Google's own numbers: `python bench/official.py DIR [--worst]`.

Runs what it finds in a folder of the oracle's form (`forward/`, `training/`, as their READMEs describe) through the
functions that users run, prints a row a check (case, size, precision, error, limit) and exits 1 if a limit is broken.
Errors of forward passes are max|ours - Google's| / max|Google's|, of published models the number of arrays and totals
that differ; the limits are those that the READMEs suggest.
"""

import argparse
import fnmatch
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.attention import attention_maps
from models.configs import get_config, replace
from models.fill import google_zeroes_edge, resize_pos_embed
from models.modeling import VisionTransformer
from models.npz import google_arrays, google_shapes, load_npz
from utils.augment import box_taps, random_boxes, view
from utils.batches import EvalBatches
from utils.data import Split
from utils.optim import lr_at, make_optimizer
from utils.step import make_scaler, train_step


class Check(NamedTuple):
    case: str
    size: str
    precision: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # false for NaN


def relative(ours, google) -> float:
    ours, google = np.asarray(ours), np.asarray(google)
    if ours.shape != google.shape:
        return float("nan")
    return float(np.abs(ours - google).max() / np.abs(google).max())


def worst(errors: list[float]) -> float:
    """The largest; NaN where there is none or one is NaN (Python's max would pass over it)."""
    return float(np.max(errors)) if errors else float("nan")


# --- forward/ ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def forward_case(folder: Path):
    """Logits at every size, and at the native one tokens, head input, stem and attention, in both precisions."""
    config = json.loads((folder / "config.json").read_text())
    expected = np.load(folder / "expected.npz")
    stages = bool(config["resnet"] and config["resnet"]["num_layers"])
    for size, about in config["sizes"].items():
        for precision, dtype in (("float32", torch.float32), ("float64", torch.float64)):
            bits = f"f{precision[-2:]}"
            limit = 1e-12 if bits == "f64" else 3e-5 if stages else 5e-6
            model = load_npz(folder / "checkpoint.npz", img_size=tuple(about["image"]), dtype=dtype).eval()
            label = size
            if edges := zeroed_edges(config["sizes"]["native"]["grid"], model.grid):
                put_zeros(model, edges)
                label += ", Google's zero edge put in"
            images = torch.from_numpy(expected[f"image_{size}"]).permute(0, 3, 1, 2).to(dtype)
            tokens = model.forward_features(images)
            pooled = tokens[:, 0] if model.config.classifier == "token" else tokens.mean(dim=1)
            ours = {f"logits_{size}_{bits}": model(images), f"tokens_{size}_{bits}": tokens,
                    f"features_{size}_{bits}": model.pre_logits(pooled), f"posemb_{size}_{bits}": model.pos_embed}
            if f"attn_{size}_layer0_{bits}" in expected.files:
                maps = attention_maps(model, images)
                ours |= {f"attn_{size}_layer{i}_{bits}": found for i, found in enumerate(maps)}
            if stages:
                ours[f"stem_{size}_{bits}"] = model.patch_embed.backbone(images).permute(0, 2, 3, 1)
            errors = [relative(value, expected[name]) for name, value in ours.items() if name in expected.files]
            yield Check(f"forward {folder.name}", label, precision, worst(errors), limit)


def zeroed_edges(old, new) -> list[int]:
    """The axes of the grid whose last line Google's resize leaves at zero (a rounding of scipy's); ours does not."""
    return [axis for axis in (0, 1) if google_zeroes_edge(old[axis], new[axis])]


def put_zeros(model, edges: list[int]) -> None:
    """Makes Google's zero edge in our position embedding, so that the rest of the pass can be compared."""
    first = model.pos_embed.shape[1] - model.grid[0] * model.grid[1]
    grid = model.pos_embed.data[:, first:].view(*model.grid, -1)
    for axis in edges:
        grid.select(axis, -1).zero_()


def zooms(folder: Path):
    """Every position-embedding resize; on flagged pairs Google's values off the zero edge, plain bilinear on it."""
    arrays = np.load(folder / "posemb_zoom.npz")
    found = {}
    for pair in json.loads((folder / "posemb_zoom.json").read_text())["pairs"]:
        old, new = pair["old"], pair["new"]
        grid, google = arrays[f"in_{pair['id']}"], arrays[f"out_{pair['id']}"]
        rows = int(pair["has_class_row"])
        ours = resize_pos_embed(torch.from_numpy(grid), tuple(old), tuple(new)).numpy()
        kind = "sound"
        if pair["last_row_zero"] or pair["last_col_zero"]:
            kind = "zero edge (there: plain bilinear)"
            plain = bilinear(grid[0, rows:].reshape(*old, -1).astype(np.float64), new)
            theirs = google[0, rows:].reshape(*new, -1)
            inside = np.ones(new, dtype=bool)
            inside[new[0] - pair["last_row_zero"]:] = inside[:, new[1] - pair["last_col_zero"]:] = False
            mixed = np.where(inside[..., None], theirs, plain).reshape(new[0] * new[1], -1)
            google = np.concatenate([google[0, :rows], mixed])[None]
        for precision, kept in (("float64", np.float64), ("float32", np.float32)):
            found.setdefault((kind, precision), []).append(relative(ours.astype(kept), google.astype(kept)))
    for (kind, precision), errors in found.items():
        limit = 1e-12 if precision == "float64" else 5e-6
        yield Check(f"position embedding, {kind}", f"{len(errors)} pairs", precision, worst(errors), limit)


def bilinear(grid: np.ndarray, new) -> np.ndarray:
    """Aligned-corners bilinear in plain numpy, one axis after the other; for the edge that Google's resize loses."""
    for axis in (0, 1):
        at = np.linspace(0, grid.shape[axis] - 1, new[axis])
        grid = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, grid)
    return grid


def published(path: Path):
    """Every published variant on the meta device: names and shapes of its arrays, and the totals of its parameters."""
    for name, google in json.loads(path.read_text())["variants"].items():
        yield from guarded(f"published {name}", variant, name, google)


def variant(name: str, google: dict):
    """Totals have no value (null) where the images are no multiple of the patch: 384 pixels for ViT-H_14."""
    config, width = get_config(name), google["hidden_size"]
    asked = {"head_21843": (224, 21843), "head_1000": (224, 1000), "head_10": (224, 10), "no_head": (224, 0),
             "head_21843_with_pre_logits_hidden": (224, 21843), "head_1000_at_384": (384, 1000)}
    with torch.device("meta"):
        models = {key: VisionTransformer(replace(config, representation_size=width if "pre_logits" in key else None),
                                         size, classes)
                  for key, (size, classes) in asked.items() if size % config.patch_size[0] == 0}
    old, small = shapes(models["head_21843_with_pre_logits_hidden"]), shapes(models["head_1000"])
    pairs = ((shapes(models["head_21843"]), google["keys_21843"]),
             ({key: shape for key, shape in old.items() if key[:4] == "pre_"}, google["pre_logits_shapes_if_present"]),
             ({key: shape for key, shape in small.items() if key[:5] == "head/"}, google["head_1000"]),
             ({key: sum(p.numel() for p in m.parameters()) for key, m in models.items()}, google["parameter_count"]))
    differ = sum(ours.get(key) != theirs.get(key) for ours, theirs in pairs for key in ours | theirs)
    yield Check("arrays and totals of published models", name, "-", float(differ), 0.0)


def shapes(model: VisionTransformer) -> dict[str, list[int]]:
    """Google's, with group norms as flax has them, (C,), and not (1, 1, 1, C) as the files."""
    return {key: list(shape[3:] if shape[:3] == (1, 1, 1) else shape) for key, shape in google_shapes(model).items()}


# --- training/ --------------------------------------------------------------------------------------------------------

def schedules(path: Path):
    arrays = np.load(path)
    for name in sorted({key.split("/")[0] for key in arrays.files}):
        base, total, warmup, end = arrays[f"{name}/config"].tolist()
        plan = dict(base=base, total=int(total), warmup=int(warmup), linear_end=end,
                    decay="linear" if name.startswith("lin") else "cosine")
        ours = np.array([lr_at(step, **plan) for step in range(int(total) + 1)])
        for key, precision, limit in (("lr", "float32", 3e-7), ("lr_x64", "float64", 2e-7)):
            if f"{name}/{key}" in arrays.files:
                yield Check("learning rate (error / base)", name, precision,
                            float(np.abs(ours - arrays[f"{name}/{key}"]).max() / base), limit)


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).expand(3, -1, -1)


def evaluation_views(path: Path):
    arrays = np.load(path)
    for size in sorted({key.split("/")[0] for key in arrays.files if key.startswith("out")}, key=lambda s: int(s[3:])):
        names = [key.split("/")[1] for key in arrays.files if key.startswith(size + "/")]
        images = [as_tensor(arrays[f"image/{name}"]) for name in names]
        split = Split(images, torch.zeros(len(names), dtype=torch.long), ("",))
        batches = EvalBatches(split, size=(int(size[3:]),) * 2, batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3,
                              device="cpu")
        ours = torch.cat([batches[k][0] for k in range(len(batches))]).permute(0, 2, 3, 1).numpy()
        outs = [arrays[f"{size}/{name}"] for name in names]
        errors = [np.abs(image[..., :out.shape[2]] - out).max() for image, out in zip(ours, outs)]
        yield Check("evaluation images", f"{len(names)} to {size[3:]} px", "float32", worst(errors), 1e-5)


def training_views(path: Path):
    arrays = np.load(path)
    names = sorted({key.split("/")[0] for key in arrays.files})
    errors = []
    for name in names:
        image, out = arrays[f"{name}/image"], arrays[f"{name}/out"]
        box, flip = arrays[f"{name}/box_yxhw"].astype(np.int64), bool(arrays[f"{name}/flip"])
        rows, columns = box_taps(torch.from_numpy(box)[None], torch.tensor([flip]), out.shape[:2])
        half = torch.tensor(127.5)
        ours = view(as_tensor(image)[None], rows, columns, half, half)[0].permute(1, 2, 0).numpy()
        errors.append(np.abs(ours[..., :out.shape[2]] - out).max())
    yield Check("training images, box and flip given", f"{len(names)} examples", "float32", worst(errors), 1e-5)


def crop_boxes(path: Path, facts: Path):
    """Kolmogorov-Smirnov distances of 20,000 of our boxes to Google's, the worst of six quantities."""
    arrays = np.load(path)
    least = json.loads(facts.read_text())["call"]["area_range"][0] if facts.exists() else 0.05
    for size in arrays.files:
        height, width = (int(n[1:]) for n in size.split("_"))
        rng = np.random.default_rng(0)
        ours = random_boxes(lambda attempt, rng=rng: rng.random((4, 20_000)), np.full(20_000, height),
                            np.full(20_000, width), least)
        distances = [ks_distance(a, b) for a, b in zip(quantities(ours), quantities(arrays[size]))]
        yield Check("training crops (KS distance)", size, "-", worst(distances), 0.02)


def quantities(boxes: np.ndarray) -> list[np.ndarray]:
    top, left, height, width = boxes.astype(np.float64).T
    return [height * width, width / height, height, width, top, left]


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    return float(np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max())


# The limits of training/README.md by (compute type, momentum type): (loss, grad_norm, final, relative delta, logits
# after), the first, third and fifth absolute. A tiny difference in float32 can change how a bfloat16 is rounded.
EXACT = (1e-12, 1e-12, 1e-12, 1e-12, 1e-11)
TRAJECTORY_LIMITS = {("float64", "float64"): EXACT, ("float64", "float32"): EXACT, ("float64", "bfloat16"): EXACT,
                     ("float32", "float32"): (1e-5, 2e-5, 3e-6, 2e-5, 2e-4),
                     ("float32", "bfloat16"): (1.5e-4, 7e-4, 6e-4, 6e-4, 3e-3)}


def trajectories(path: Path):
    """Google's training runs that lie in a folder, step by step through `train_step`."""
    meta = json.loads((path.parent / "trajectory_meta.json").read_text())
    yield from guarded(path.name, trajectory_case, path.parent, path.name, meta)


def not_there(root: Path) -> list[str]:
    """Runs that a list in the folder names and that are not beside it."""
    return sorted(f"{path.parent.name}/{name}" for path in files(root, "trajectory_meta.json")
                  for name in json.loads(path.read_text())["runs"] if not path.with_name(name).exists())


def trajectory_case(folder: Path, name: str, meta: dict):
    """Losses, gradient norms, final weights and logits after: the worst as a share of its limit."""
    about = meta["runs"][name]
    compute, momentum = about["compute_dtype"], about["momentum_dtype"]
    limits = TRAJECTORY_LIMITS[compute, momentum]
    error = worst([e / limit for e, limit in zip(trajectory(folder, name, about, meta["models"]), limits)])
    yield Check(f"training, {momentum} momentum (share of limit)",
                f"{about['model']}, accumulation {about['accum_steps']}, clip {about['grad_norm_clip']:g}", compute,
                error, 1.0)


def trajectory(folder: Path, name: str, about: dict, models: dict) -> tuple[float, ...]:
    recipe, dtype, google = models[about["model"]], getattr(torch, about["compute_dtype"]), np.load(folder / name)
    batches = np.load(folder / f"trajectory_{about['model']}_batches.npz")
    model = load_npz(folder / f"trajectory_{about['model']}_checkpoint.npz", num_classes=recipe["classes"], dtype=dtype,
                     img_size=batches["images"].shape[2:4])
    images = torch.from_numpy(batches["images"]).permute(0, 1, 4, 2, 3).to(dtype)   # (updates, B, 3, S, S)
    labels = torch.from_numpy(batches["labels"]).argmax(dim=2)
    optimizer = make_optimizer(model, "sgd", momentum_dtype=getattr(torch, about["momentum_dtype"]))
    scaler, results = make_scaler("cpu", dtype), []
    for k in range(about["updates"]):
        lr = lr_at(k, base=recipe["base_lr"], total=recipe["total_steps"], warmup=recipe["warmup_steps"],
                   decay=recipe["decay_type"])
        results.append(train_step(model.train(), optimizer, scaler, images[k], labels[k], lr=lr, precision=dtype,
                                  micro_batches=about["accum_steps"], max_grad_norm=about["grad_norm_clip"]))
    losses, norms = (np.array([getattr(r, what).item() for r in results]) for what in ("loss", "grad_norm"))
    final = {key: array.reshape(google[f"final/{key}"].shape) - google[f"final/{key}"]
             for key, array in google_arrays(model).items()}
    with torch.no_grad():
        logits = model.eval()(images[0]).numpy()
    moved = np.sqrt(sum((d.astype(np.float64)**2).sum() for d in final.values())) / google["param_delta_norm"][-1]
    return (np.abs(losses - google["loss"]).max(), np.abs(norms / google["grad_norm"] - 1).max(),
            max(np.abs(d).max() for d in final.values()), moved, np.abs(logits - google["logits_after"]).max())


# --- the table --------------------------------------------------------------------------------------------------------

def checks(root: Path):
    for found, run in (("expected.npz", lambda p: forward_case(p.parent)),
                       ("posemb_zoom.npz", lambda p: zooms(p.parent)), ("released.json", published),
                       ("schedule.npz", schedules),
                       ("preprocess_eval.npz", evaluation_views), ("preprocess_train_examples.npz", training_views),
                       ("trajectory_*_accum*.npz", trajectories),
                       ("preprocess_train_boxes.npz", lambda p: crop_boxes(p, p.with_name("preprocess_train.json")))):
        for path in files(root, found):
            yield from guarded(f"{path.parent.name}/{path.name}", run, path)


def files(root: Path, pattern: str) -> list[Path]:
    """Those of this name under the folder, also behind links (which Python's glob does not follow)."""
    return sorted(Path(folder) / name for folder, _, names in os.walk(root, followlinks=True)
                  for name in fnmatch.filter(names, pattern))


def guarded(name: str, run, *args):
    """The checks of a case. One that cannot be run is a broken case, and the others are still checked."""
    try:
        yield from run(*args)
    except Exception as error:
        yield Check(name, f"{type(error).__name__}: {error}".splitlines()[0], "-", float("nan"), 0.0)


def worst_of_each(rows: list[Check]) -> list[Check]:
    """One row a case and precision: the size whose error is nearest to its limit."""
    groups = {}
    for row in rows:
        groups.setdefault((row.case, row.precision), []).append(row)
    return [max(group, key=lambda row: (not row.holds, row.error / (row.limit or 1))) for group in groups.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--worst", action="store_true", help="one row a case and precision: its worst size")
    args = parser.parse_args()
    rows = list(checks(args.folder))
    if not rows:
        print(f"Nothing to check in {args.folder}: expected forward/cases/*, training/schedule.npz and the like.")
        return 2
    broken = [row for row in rows if not row.holds]
    print("| case | size | precision | error | limit | |\n|---|---|---|---|---|---|")
    for row in worst_of_each(rows) if args.worst else rows:
        verdict = "ok" if row.holds else "BROKEN"
        print(f"| {row.case} | {row.size} | {row.precision} | {row.error:.1e} | {row.limit:.0e} | {verdict} |")
    print(f"\n{len(rows)} checks, {len(broken)} broken.")
    if absent := not_there(args.folder):
        print(f"Not there, though listed: {', '.join(absent)}.")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
