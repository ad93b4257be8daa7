import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.official import published, trajectories
from utils.optim import NarrowMomentumSGD

ROOT = Path(__file__).parent.parent


def official(folder, *flags):
    command = [sys.executable, ROOT / "bench" / "official.py", folder, *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_our_code_is_within_the_limits_of_googles_numbers():
    result = official(ROOT / "tests" / "oracle")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if line.endswith("| ok |")]
    assert len(rows) >= 66 and "0 broken" in result.stdout
    for case in ("forward plain |", "forward plain_prelogits |", "forward gap |", "position embedding", "learning rate",
                 "evaluation images", "training images", "training, float64 momentum", "training, bfloat16 momentum",
                 "published models | ViT-B_16 |", "published models | ViT-H_14 |", "published models | R26+ViT-S_32 |",
                 "published models | ViT-B_16-gap-norep |", "training crops"):
        assert any(case in row for row in rows), case


def test_a_folder_with_nothing_to_check_is_no_success(tmp_path):
    result = official(tmp_path)
    assert result.returncode == 2 and "Nothing to check" in result.stdout


def test_a_wrong_number_a_nan_and_an_unreadable_case_are_broken(tmp_path):
    for case in ("plain", "gap", "float16"):
        shutil.copytree(ROOT / "tests" / "oracle" / "forward" / "cases" / case, tmp_path / case)
    for case, damage in (("plain", np.nan), ("gap", 1e-3)):
        with np.load(tmp_path / case / "expected.npz") as file:
            arrays = dict(file)
        arrays["logits_native_f64"][0, 0] += damage
        np.savez(tmp_path / case / "expected.npz", **arrays)
    (tmp_path / "float16" / "checkpoint.npz").write_bytes(b"nothing")
    result = official(tmp_path, "--worst")
    broken = [line for line in result.stdout.splitlines() if "BROKEN" in line]
    assert result.returncode == 1 and len(broken) == 3
    assert "| forward plain | native | float64 | nan" in result.stdout and "3 broken" in result.stdout


@pytest.fixture
def training(tmp_path):
    """A copy of the oracle's trajectories."""
    for path in (ROOT / "tests" / "oracle" / "training").glob("trajectory_*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def listed(folder, runs=None):
    """The runs that the folder's file lists; with `runs`, it lists those instead."""
    path = folder / "trajectory_meta.json"
    meta = json.loads(path.read_text())
    if runs is not None:
        path.write_text(json.dumps({**meta, "runs": runs}))
    return meta["runs"]


@pytest.mark.parametrize("factor, product, step, holds", [
    (0.8984375, torch.float32, torch.float32, True),     # Google's rule
    (0.9, torch.float32, torch.float32, False),
    (0.8984375, torch.bfloat16, torch.float32, False),   # the product is rounded
    (0.8984375, torch.float32, torch.bfloat16, False)])  # the step is taken from the rounded momentum
def test_a_bfloat16_momentum_that_is_not_googles_breaks_the_trajectory(training, monkeypatch, factor, product, step,
                                                                       holds):
    def update(optimizer, parameters, group):
        for p in parameters:
            m = optimizer.state[p]["momentum_buffer"]
            v = p.grad + (factor * m.float()).to(product).float()
            p -= group["lr"] * v.to(step).float()
            m.copy_(v)

    name = "trajectory_vit_accum1_clip1_mom-bfloat16_float32.npz"
    (training / "trajectory_vit_accum4_clip3_mom-float64_float64.npz").unlink()
    listed(training, {name: listed(training)[name]})
    monkeypatch.setattr(NarrowMomentumSGD, "_update", update)
    (row,) = trajectories(training / name)
    assert (row.case, row.size, row.precision) == (
        "training, bfloat16 momentum (share of limit)", "vit, accumulation 1, clip 1", "float32")
    assert row.holds == holds and (row.error < 0.5 if holds else row.error > 1.5)


def test_a_trajectory_that_is_damaged_or_not_listed_is_broken_a_missing_one_is_named_and_the_others_run(training):
    exact, missing, unlisted = (f"trajectory_vit_accum{n}_mom-float64_float64.npz" for n in ("4_clip3", "7", "9"))
    narrow = "trajectory_vit_accum1_clip1_mom-bfloat16_float32.npz"
    shutil.copy(training / exact, training / unlisted)
    listed(training, {**listed(training), missing: listed(training)[exact]})
    (training / narrow).write_bytes(b"nothing")
    result = official(training)
    broken = [line for line in result.stdout.splitlines() if "BROKEN" in line]
    assert result.returncode == 1 and len(broken) == 2
    assert narrow in broken[0] and unlisted in broken[1] and "KeyError" in broken[1]
    assert "| vit, accumulation 4, clip 3 | float64 |" in result.stdout and "3 checks, 2 broken" in result.stdout
    assert f"Not there, though listed: {training.name}/{missing}." in result.stdout


def test_trajectories_without_their_list_are_broken_and_links_are_followed(training, tmp_path_factory):
    (training / "trajectory_meta.json").unlink()
    linked = tmp_path_factory.mktemp("linked")
    (linked / "training").symlink_to(training)
    result = official(linked)
    assert result.returncode == 1 and "2 checks, 2 broken" in result.stdout and "FileNotFoundError" in result.stdout


def test_images_that_are_larger_than_the_grid_s_run_as_google_runs_them(training):
    """Google drops the rest of a patch: the same run on images with an edge that no patch sees."""
    exact = "trajectory_vit_accum4_clip3_mom-float64_float64.npz"
    with np.load(training / "trajectory_vit_batches.npz") as file:
        arrays = dict(file)
    arrays["images"] = np.pad(arrays["images"], ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=9.0)
    np.savez(training / "trajectory_vit_batches.npz", **arrays)
    (row,) = trajectories(training / exact)
    assert row.holds and row.error < 0.1


def test_a_published_array_or_total_that_differs_is_counted(tmp_path):
    whole = json.loads((ROOT / "tests" / "oracle" / "forward" / "released.json").read_text())["variants"]
    base, gap = whole["ViT-B_16"], whole["ViT-B_16-gap-norep"]
    cls, total = {"cls": [1, 1, 768]}, base["parameter_count"]["head_10"]
    cases = {"ViT-B_16": ({**base, "parameter_count": {**base["parameter_count"], "head_10": total + 1}}, 1),
             "ViT-B_16-224": ({**base, "keys_21843": {**base["keys_21843"], "head/bias": [21842], "more": [1]}}, 2),
             "ViT-B_16-384": ({**base, "parameter_count": {**base["parameter_count"], "head_1000_at_384": None}}, 1),
             "ViT-B_16-gap-norep": ({**gap, "keys_21843": gap["keys_21843"] | cls}, 1),
             "ViT-L_16": (base, None), "ViT-X_16": (base, None), "R26+ViT-S_32": ({}, None),
             "ViT-H_14": (whole["ViT-H_14"], 0)}
    path = tmp_path / "released.json"
    path.write_text(json.dumps({"variants": {name: google for name, (google, _) in cases.items()}}))
    rows = list(published(path))
    for row, (name, (_, differ)) in zip(rows, cases.items(), strict=True):
        assert name in (row.size, row.case.removeprefix("published ")) and row.holds == (differ == 0)
        assert row.error == differ if differ is not None else np.isnan(row.error) or row.error > 100
