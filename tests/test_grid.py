"""The runs of a table: order, choice, what is skipped, what fails, what a signal leaves; a script plays train.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils import grid
from utils.grid import Grid, price, run, shard
from utils.protocols import Option, Row

REAL = grid.ROOT

# Leaves what a run of train.py leaves: accuracy on the held-out part is best for the rate 0.02. `slow` in its output
# folder makes it wait for a signal, after which it "goes on"; a rate of 9 fails.
SCRIPT = '''
import json, signal, sys, time
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
words = sys.argv[1:]
flag = lambda name, default=None: words[words.index(name) + 1] if name in words else default
out = Path(flag("--output_dir"))
folder = out / flag("--name")
folder.mkdir(parents=True, exist_ok=True)
with open(out / "started.txt", "a") as file:
    print(flag("--name"), flag("--resume"), file=file)
rate, seed = float(flag("--learning_rate")), int(flag("--seed"))
if rate == 9:
    print("error: no such learning rate")
    sys.exit(2)
if (out / "slow").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (folder / "state.pt").write_text("half")
    time.sleep(60)
accuracy = {"test": 0.5 + rate + seed / 100, **({"val": 1 - abs(rate - 0.02)} if "--val_fraction" in words else {})}
about = {"accuracy": accuracy, "versions": {"torch": "2"}, "finetuned_from": {"name": "x", "sha256": "0"},
         "fingerprint": "f", "settings": {"resolved": {"device": "cpu"}}, "config": {}}
save_file({"head.bias": np.zeros(1, np.float32)}, folder / "last.safetensors", metadata={"vit": json.dumps(about)})
(folder / "settings.json").write_text(json.dumps({"num_steps": 4}))
lines = [{"step": k, "name": "test/accuracy", "value": value, "time": k} for k, value in
         ((2, accuracy["test"] + 0.25), (4, accuracy["test"]))]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
(folder / "state.pt").write_text("whole")
'''


def row(*rates, dataset="cifar10", **options):
    return Row("mini", "ViT-demo", "checkpoint/ViT-demo.npz", dataset, 32, tuple(Option(4, 1, rate) for rate in rates),
               held_out=0.1, **options)


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """whole(row, ... seeds=2) -> a grid whose runs are played."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(grid, "ROOT", tmp_path / "code")
    (tmp_path / "out").mkdir()
    return lambda *rows, seeds=2: Grid(list(rows), tmp_path / "out", seeds)


def started(whole):
    return [line.split()[0].split("/")[1] for line in (whole.folder / "started.txt").read_text().splitlines()]


def test_the_best_on_the_held_out_part_is_run_on_all_of_train_for_each_seed(whole):
    one = whole(row(0.01, 0.02, 0.1))
    assert run(one, [""]) == []
    assert started(one) == ["choose-4-0.01-seed0", "choose-4-0.02-seed0", "choose-4-0.1-seed0", "final-4-0.02-seed0",
                            "final-4-0.02-seed1"]
    assert one.chosen(one.rows[0]) == Option(4, 1, 0.02)
    results = one.finals(one.rows[0])
    assert [result["last"] for result in results] == [0.52, 0.53] and all(result["val"] is None for result in results)
    assert [result["best_on_test"] for result in results] == [0.77, 0.78]


def test_a_cell_keeps_what_one_needs_to_trust_it(whole):
    one = whole(row(0.5), seeds=1)
    run(one, [""])
    (result,) = one.finals(one.rows[0])
    assert result["commit"] is None or len(result["commit"]) >= 40
    assert {"command", "versions", "data", "checkpoint", "seed", "resolved", "hardware", "minutes"} <= result.keys()
    assert result["command"].startswith("python train.py --model_type ViT-demo") and "--seed 0" in result["command"]
    folder = one.path(one.rows[0].finals(one.rows[0].options[0], 1)[0])
    assert (folder / "metrics.jsonl").exists() and not (folder / "state.pt").exists()


def test_what_is_done_is_not_done_again(whole):
    one = whole(row(0.01, 0.02), row(0.3, dataset="digits"))
    run(one, [""])
    before = {path: path.stat().st_mtime_ns for path in one.folder.rglob("result.json")}
    assert run(one, [""]) == [] and len(started(one)) == 4 + 2
    assert {path: path.stat().st_mtime_ns for path in one.folder.rglob("result.json")} == before
    more = whole(*one.rows, seeds=3)
    run(more, [""])
    assert started(one)[6:] == ["final-4-0.02-seed2", "final-4-0.3-seed2"]


def test_a_failed_cell_is_reported_and_the_others_are_finished(whole, caplog):
    one = whole(row(0.01, 9.0), row(0.5, dataset="digits"))
    failed = run(one, [""])
    assert [cell.name for cell in failed] == ["cifar10-ViT-demo-32-4/choose-4-9-seed0"]
    assert "failed (exit code 2): error: no such learning rate" in caplog.text
    assert one.finals(one.rows[0]) == [] and len(one.finals(one.rows[1])) == 2


def test_devices_run_side_by_side(whole):
    one = whole(row(0.01, 0.02, 0.03))
    run(one, ["", "", ""])
    assert sorted(started(one)[:3]) == [f"choose-4-{rate}-seed0" for rate in ("0.01", "0.02", "0.03")]
    assert len(started(one)) == 5


def test_a_killed_grid_goes_on_and_repeats_no_finished_cell(whole, tmp_path):
    one = whole(row(0.01, 0.02))
    run(whole(row(0.01)), [""])  # two finished cells: `choose` is another folder, so they stay
    (one.folder / "slow").touch()
    code = (f"import sys; sys.path.insert(0, {str(REAL)!r})\\nfrom pathlib import Path\\nfrom utils import grid\\n"
            "from utils.protocols import Option, Row\\n"
            f"grid.ROOT = Path({str(grid.ROOT)!r})\\n"
            "row = Row('mini', 'ViT-demo', 'checkpoint/ViT-demo.npz', 'cifar10', 32, (Option(4, 1, 0.01), "
            f"Option(4, 1, 0.02)), held_out=0.1)\\ngrid.run(grid.Grid([row], Path({str(one.folder)!r}), 2), [''])\\n")
    process = subprocess.Popen([sys.executable, "-c", code.replace("\\n", "\n")])
    half = one.path(one.rows[0].choosing()[0]) / "state.pt"
    for _ in range(600):
        if half.exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 143 and half.exists()
    (one.folder / "slow").unlink()
    before = len(started(one))
    assert run(one, [""]) == []
    lines = (one.folder / "started.txt").read_text().splitlines()[before:]
    assert [line.split("/")[1] for line in lines] == [
        "choose-4-0.01-seed0 auto", "choose-4-0.02-seed0 auto", "final-4-0.02-seed0 auto", "final-4-0.02-seed1 auto"]


def test_a_folder_of_another_run_is_refused(whole):
    one = whole(row(0.5), seeds=1)
    run(one, [""])
    other = whole(row(0.5, batch=64), seeds=1)
    with pytest.raises(ValueError, match="holds another run than this table's: choose another --output_dir"):
        other.finals(other.rows[0])
    file = next(one.folder.rglob("result.json"))
    file.write_text("{")
    with pytest.raises(ValueError, match="result.json is damaged"):
        one.finals(one.rows[0])


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shards_cover_each_row_exactly_once(parts):
    rows = [row(0.01 * i, dataset=f"set{i}") for i in range(1, 6)]
    costs = [5.0, 1.0, 1.0, 1.0, 2.0]
    found = [shard(rows, costs, part, parts) for part in range(1, parts + 1)]
    assert sorted(r.dataset for part in found for r in part) == [r.dataset for r in rows]
    if parts == 2:
        assert [sum(costs[rows.index(r)] for r in part) for part in found] == [5.0, 5.0]


def test_the_price_follows_from_the_measured_speed():
    one = Row("paper", "ViT-B_16", "x", "cifar10", 384, tuple(Option(1_000, 50, rate) for rate in (0.01, 0.03)),
              held_out=0.1)
    found = price(one, seeds=3, images=(40_000, 10_000), rate=100.0, weights=1000)
    assert (found.cells, found.images) == (5, 5 * 1_000 * 512)
    scored = 2 * (4_000 + 10_000) + 3 * 10_000  # two candidates on the held-out part and at their end on test
    assert found.seconds == pytest.approx(5 * grid.START + found.images / 100 + scored / 300)
    twice = price(one, 3, (40_000, 10_000), 200.0, 1000)
    assert twice.seconds - 5 * grid.START == pytest.approx((found.seconds - 5 * grid.START) / 2)


def test_flags_become_words():
    one = row(0.5, flags=(("no_flip", True), ("momentum_dtype", "bfloat16")))
    words = Grid([one], Path("out"), 1, ("--device", "cpu")).command(one.finals(one.options[0], 1)[0])
    assert "--no_flip" in words and words[words.index("--no_flip") + 1].startswith("--")
    assert words[words.index("--device") + 1] == "cpu" and words[-3:] == ["--resume", "auto", "--no_report"]
    assert json.loads(json.dumps(one.finals(one.options[0], 1)[0].flags()))["learning_rate"] == 0.5
