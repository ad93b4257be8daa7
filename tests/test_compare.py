"""`bench/compare.py`: that its ratios are right, that a contestant which fails is a cell, that all do the same work."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.compare import Row, chosen, cpu_rows, gpu_rows, summary, table
from bench.gpu import timeline
from bench.hardware import forward_flops
from bench.pictures import make, part_of, spread
from bench.turns import Outcome, race, ratios
from bench.vit2020 import ViT2020, weights_of
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from tests.conftest import randomise

ROOT = Path(__file__).parent.parent
FAKE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from bench.turns import serve
nap, fails = float(sys.argv[1]), sys.argv[2]
rounds = 0

def do_round():
    global rounds
    rounds += 1
    if fails == "dies" and rounds == 3:
        sys.exit("it fell over")
    if fails == "raises" and rounds == 3:
        raise ValueError("no more")
    start = time.monotonic()
    time.sleep(3600 if fails == "hangs" else nap)
    return {{"seconds": time.monotonic() - start, "images": 2, "peak": 1 << 20, "start": start,
             "end": time.monotonic()}}

def prepare():
    print("chatter that is no answer")
    if fails == "absent":
        import no_such_package_at_all
    return {{"forward_flops": 10.0, "threads": 1}}, do_round
serve(prepare)
"""


def fakes(**contestants) -> dict[str, list[str]]:
    """name = (seconds of a round, how it fails)."""
    return {name: [sys.executable, "-c", FAKE, str(nap), fails] for name, (nap, fails) in contestants.items()}


def test_ratios_are_of_the_times_and_nobody_works_in_anothers_turn():
    outcomes = race(fakes(ours=(0.05, ""), slow=(0.15, ""), same=(0.05, "")), rounds=4)
    results = summary(outcomes, work=10.0, rate=1000.0)
    assert results["slow"]["ratio"] == pytest.approx(3, rel=0.15)
    assert results["same"]["ratio"] == pytest.approx(1, rel=0.15)
    assert results["slow"]["least"] <= results["slow"]["ratio"] <= results["slow"]["largest"]
    assert results["ours"]["images_per_second"] == pytest.approx(2 / 0.05, rel=0.15)
    assert results["ours"]["share_of_matrix_rate"] == pytest.approx(2 / 0.05 * 10 / 1000, rel=0.15)
    turns = sorted((done["start"], done["end"], name) for name, outcome in outcomes.items() for done in outcome.rounds)
    assert all(before[1] <= after[0] for before, after in pairwise(turns))
    order = [name for _, _, name in turns]
    assert order == [*["ours", "slow", "same"], *["same", "slow", "ours"]] * 2


def test_who_fails_is_a_cell_and_the_others_go_on():
    outcomes = race(fakes(ours=(0.01, ""), timm=(0.01, "dies"), torchvision=(0.01, "absent"), transformers=(0, "hangs"),
                          **{"2020": (0.02, "raises")}), rounds=3, timeout=2)
    row = {"row": "a row", **Row("step", "ViT-demo", 32, "float32", 4)._asdict(), "results": summary(outcomes)}
    found = row["results"]
    assert found["ours"]["n"] == 3 and found["ours"]["failure"] is None
    assert found["timm"]["n"] == 1 and found["timm"]["failure"] == ("died", "exit code 1: it fell over")
    assert found["torchvision"]["failure"][0] == "absent" and "no_such_package" in found["torchvision"]["failure"][1]
    assert found["transformers"]["failure"] == ("timeout", "no answer in 2 s")
    assert found["2020"]["n"] == 1 and found["2020"]["failure"] == ("failed", "ValueError: no more")
    cells = [cell.strip() for cell in table([row]).splitlines()[2].split("|")[1:-1]]
    assert cells[0] == "a row, batch 4" and cells[1].endswith(" images/s")
    assert cells[3:5] == ["timeout", "absent"] and cells[6] == "1 (timm 1.00, 2020 1.00)"
    assert float(cells[5].split("**")[1]) == pytest.approx(2, rel=0.2)


def test_what_was_done_in_time_counts():
    outcomes = race(fakes(ours=(0.2, ""), slow=(0.2, "")), rounds=100, until=time.monotonic() + 2)
    assert all(1 <= len(outcome.rounds) < 10 and outcome.failure is None for outcome in outcomes.values())
    late = race(fakes(ours=(0.2, "")), rounds=1, until=time.monotonic())
    assert late["ours"].failure.kind == "late"


def test_a_ratio_needs_both_in_the_same_round():
    ours, peer = (Outcome(rounds=[{"round": k, "seconds": s, "images": n} for k, s, n in rounds]) for rounds in
                  ([(0, 1.0, 10), (2, 2.0, 10)], [(0, 3.0, 10), (1, 5.0, 10), (2, 2.0, 5)]))
    assert ratios(peer, ours) == pytest.approx([3.0, 2.0])


def test_the_model_of_2020_computes_what_ours_computes():
    config = replace(CONFIGS["ViT-demo"], hidden_size=48, mlp_dim=96, num_layers=3, gelu="erf")
    ours = randomise(VisionTransformer(config, 32, 7)).double()
    theirs = ViT2020(config, 32, 7, dropout=0.0).double()
    theirs.load_state_dict(weights_of(ours))
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
    assert torch.allclose(theirs(images), ours(images), rtol=1e-12)
    dropping = ViT2020(config, 32, 7).double()  # as it takes part: in training its masks differ from call to call
    dropping.load_state_dict(weights_of(ours))
    assert not torch.equal(dropping(images), dropping(images))
    assert torch.allclose(dropping.eval()(images), ours(images), rtol=1e-12)


def test_flops():
    assert 3 * forward_flops("ViT-B_16", 224) == pytest.approx(105e9, rel=0.01)
    with torch.device("meta"):
        for name, size in (("ViT-demo", 32), ("ViT-B_16", 384)):
            with FlopCounterMode(display=False) as counter:
                ViT2020(CONFIGS[name], size, 10)(torch.empty(1, 3, size, size))
            assert forward_flops(name, size) == counter.get_total_flops()
    stems = []
    for name in ("R50+ViT-B_16", "ViT-B_16"):  # both have 14 x 14 patches, and differ in what makes them
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            VisionTransformer(CONFIGS[name], 224, 10).patch_embed(torch.empty(1, 3, 224, 224))
        stems.append(counter.get_total_flops())
    assert forward_flops("R50+ViT-B_16", 224) - forward_flops("ViT-B_16", 224) == stems[0] - stems[1] > 5e9


def test_the_parts_of_a_run_by_its_own_notes():
    events = [{"name": "train/loss", "step": k, "value": 1.0, "time": 110.0 + 0.1 * k} for k in range(1, 501)]
    events += [{"name": "train/images_per_second", "value": 5120.0, "time": 120.0},
               {"name": "test/loss", "value": 1.0, "time": 167.0}]
    found = timeline(events, start=100.0)
    assert found["steps"] == 500 and found["steps, seconds"] == pytest.approx(50)
    assert found["until the first step, seconds"] == pytest.approx(10)
    assert found["evaluation, seconds"] == pytest.approx(7)
    assert found["steps and evaluation, seconds"] == pytest.approx(57) and found["images/s"] == 5120
    assert timeline(events[:1], 0.0) == {}


def test_images_are_made_and_found(tmp_path):
    make(tmp_path, 32, train=12, test=10)
    assert len(list(part_of(tmp_path, "train").glob("class*/*.jpg"))) == 12
    assert part_of(tmp_path, "test") == tmp_path / "test" and part_of(tmp_path / "test", "test") == tmp_path / "test"
    assert spread(3, 9) == [0, 3, 6] and spread(5, 2) == [0, 1, 0, 1, 0]


def test_the_command_writes_its_results(tmp_path):
    file = tmp_path / "results" / "a.json"
    command = [sys.executable, ROOT / "bench" / "compare.py", "--rows", "ViT-demo float32 loop", "--batch", "4",
               "--count", "2", "--rounds", "2", "--device", "cpu", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert {"date", "command", "machine", "device", "versions", "rows", "seconds"} <= report.keys()
    assert report["machine"]["processor"] in done.stdout and report["versions"]["torch"] in done.stdout
    row, = report["rows"]
    assert row["row"] == "ViT-demo 32 float32 loop" and list(row["results"]) == ["ours", "timm loop", "2020"]
    for name, entry in row["results"].items():
        if name == "timm loop" and entry["failure"] and entry["failure"][0] == "absent":
            continue
        assert entry["failure"] is None and entry["n"] == 2 and entry["images"] == 8 and len(entry["seconds"]) == 2
        assert entry["precision"] == "float32" and entry["classes"] == 10 and entry["loss"] > 0 and entry["threads"] > 0
        assert entry["forward_flops"] == forward_flops("ViT-demo", 32) and entry["peak"] >= 0
        if name != "ours":
            assert entry["least"] <= entry["ratio"] <= entry["largest"] and len(entry["ratios"]) == 2
    assert "| ViT-demo 32 float32 loop, batch 4 |" in done.stdout


def test_rows_are_chosen_by_words():
    rows = cpu_rows(bfloat16=True)
    assert len({row.name for row in rows}) == len(rows) and len({row.name for row in gpu_rows()}) == len(gpu_rows())
    assert [row.name for row in chosen(rows, ["step ViT-B_16"])] == [f"ViT-B_16 224 {t} step" for t in
                                                                    ("float32", "bfloat16")]
    assert {row.task for row in chosen(rows, ["load", "augmentation"])} == {"load", "augmentation"}
    assert chosen(rows, None) == rows and all(row.rounds >= 5 for row in rows + gpu_rows())
    with pytest.raises(SystemExit, match="no such row(.|\n)*ViT-B_16 224 float32 step"):
        chosen(rows, ["ViT-Z"])
