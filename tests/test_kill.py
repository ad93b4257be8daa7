"""Real processes, really killed: `bench/kill.py` with few kills."""

import json
from pathlib import Path

import pytest
import torch

from bench import kill

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


@pytest.mark.parametrize("kills, processes", [(5, 1), pytest.param(2, 3, marks=needs_proc)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(kills, processes, tmp_path):
    said = []
    # No process lives for more than about 12 updates.
    flags = {"--num_steps": 20 * (kills + 1), "--eval_every": 25, "--train_batch_size": 12}
    assert kill.ordeal(tmp_path, kills, terms=1, processes=processes, flags=flags, say=said.append) == []
    assert len(said) == kills + 1 and all("SIGKILL" in line for line in said[:-1]) and "SIGTERM" in said[-1]
    if processes == 1:
        assert "exit code 143" in said[-1] and all("exit code -9" in line for line in said[:-1])
        assert all(sum(f"while {moment}" in line for line in said) for moment in kill.MOMENTS)


def test_the_comparison_sees_a_bit_and_a_line(tmp_path):
    for name, weight, step in (("a", 1.0, 1), ("b", 1.0, 1), ("c", 1.0 + 2**-23, 1), ("d", 1.0, 2)):
        (tmp_path / name).mkdir()
        state = {key: {"x": [1, None]} for key in ("optimizer", "scaler", "split", "last", "best", "best_weights",
                                                   "finished")}
        torch.save({**state, "step": 1, "weights": {"w": torch.tensor(weight)}}, tmp_path / name / "state.pt")
        lines = [{"step": step, "name": "train/loss", "value": 1.5, "time": 0.0},
                 {"step": 1, "name": "train/images_per_second", "value": weight, "time": 0.0}]
        (tmp_path / name / "predictions.csv").write_text("image,label\n" + "x" * (name == "c"))
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert kill.differences(tmp_path / "a", tmp_path / "b") == []
    assert kill.differences(tmp_path / "a", tmp_path / "c") == ["weights", "predictions.csv"]
    assert kill.differences(tmp_path / "a", tmp_path / "d") == ["metrics.jsonl (2 and 2 lines)"]


def test_a_run_that_does_not_even_start_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 2"):
        kill.ordeal(tmp_path, 1, 0, flags={"--num_steps": 0})
