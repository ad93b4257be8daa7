import subprocess
import sys
from pathlib import Path

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
