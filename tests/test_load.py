import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from models.npz import save_npz

ROOT = Path(__file__).parent.parent


def load(*arguments):
    command = [sys.executable, ROOT / "bench" / "load.py", *map(str, arguments), "--runs", "1"]
    return subprocess.run(command, capture_output=True, text=True)


def rows_of(output: str) -> dict:
    lines = [line for line in output.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "ViT-Ti_16.npz"
    torch.manual_seed(0)
    save_npz(VisionTransformer(CONFIGS["ViT-Ti_16"], 224, 7), path)
    return path


@pytest.mark.skipif(not find_spec("timm"), reason="timm is not installed")
def test_ours_beside_timm(tiny):
    done = load(tiny, "--heads", "new")
    assert done.returncode == 0, done.stderr
    table = rows_of(done.stdout)
    assert list(table) == ["ours", "timm"] and table["ours"]["ours : whole"] == "1.00"
    for row in table.values():  # 5,543,716 parameters of 4 bytes; whoever holds the model has taken its memory
        factor, _, model, _ = row["of its model"].split()
        assert model == "21" and 0.9 < float(factor) < 20
        assert float(row["whole, s (least to most)"].split()[0]) > 0
    assert float(table["timm"]["load call, s"]) <= float(table["timm"]["whole, s (least to most)"].split()[0])
    assert "ViT-pytorch is left out" in done.stdout and "Medians of 1." in done.stdout


def test_a_model_that_only_ours_knows_and_its_own_head():
    done = load(ROOT / "checkpoint" / "ViT-demo.npz", "--heads", "own")
    assert done.returncode == 0, done.stderr
    assert list(rows_of(done.stdout)) == ["ours"] and "timm is left out" in done.stdout


def test_no_file_is_one_line(tmp_path):
    done = load(tmp_path / "none.npz")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "none.npz" in done.stderr
