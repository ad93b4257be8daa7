import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


def official(folder, *flags):
    command = [sys.executable, ROOT / "bench" / "official.py", folder, *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_our_code_is_within_the_limits_of_googles_numbers():
    result = official(ROOT / "tests" / "oracle")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if line.endswith("| ok |")]
    assert len(rows) >= 60 and "0 broken" in result.stdout
    for case in ("forward plain |", "forward plain_prelogits |", "forward gap |", "position embedding", "learning rate",
                 "evaluation images", "training images", "training (share", "training crops"):
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
