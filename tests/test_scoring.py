"""What a run says, chooses, averages and stops by, through `main(argv)` on tiny images."""

import csv
import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from models.exchange import read_metadata
from utils.averaging import Average, decay_at
from utils.evaluation import Metrics
from utils.scoring import over, remember
from utils.state import State
from utils.trained import open_trained


@pytest.fixture
def start(small_run):
    return partial(small_run, "--learning_rate", 0.1)


def values(folder, name):
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {event["step"]: event["value"] for event in events if event["name"] == name}


def test_an_epoch_is_said_with_the_means_of_its_training_batches(start, capsys):
    folder = start("--num_epochs", 3)["folder"]  # of 36 images, 12 an update
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[:2] for line in said] == [
        [f"step {3 * e}/9", f"epoch {e:.2f}"] for e in (1, 2, 3)]
    loss, accuracy = values(folder, "train/loss"), values(folder, "train/accuracy")
    for e, line in enumerate(said):
        mean = [sum(column[3 * e + k] for k in (1, 2, 3)) / 3 for column in (accuracy, loss)]
        assert f"train accuracy {100 * mean[0]:.2f} %, loss {mean[1]:.4f}" in line
        found = values(folder, "test/accuracy")[3 * e + 3], values(folder, "test/loss")[3 * e + 3]
        assert f"test accuracy {100 * found[0]:.2f} %, loss {found[1]:.4f}" in line


def test_curves_are_left_as_a_picture_and_a_table(start, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    folder = start("--num_epochs", 2)["folder"]
    train.add_report(folder)
    rows = list(csv.DictReader((folder / "curves.csv").read_text().splitlines()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1.0", "3"), ("2.0", "6")]
    assert [float(row["test_loss"]) for row in rows] == list(values(folder, "test/loss").values())
    losses = values(folder, "train/loss")
    assert float(rows[1]["train_loss"]) == pytest.approx(sum(losses[k] for k in (4, 5, 6)) / 3)
    with Image.open(folder / "curves.png") as picture:
        assert picture.size == (1200, 480) and (folder / "report.html").exists()


def test_more_epochs_go_on_and_fewer_are_refused(start, capsys):
    folder = start("--num_epochs", 2)["folder"]
    train.main(["--resume", str(folder), "--num_epochs", "4", "--no_report"])
    assert sorted(values(folder, "test/loss")) == [3, 6, 9, 12]
    assert "--num_steps 6 -> 12" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main(["--resume", str(folder), "--num_epochs", "1"])
    assert "--num_epochs 4.0 -> 1.0" in capsys.readouterr().err


def test_a_run_of_updates_goes_on_by_epochs_only_if_it_grows(start, capsys):
    folder = start("--num_steps", 9)["folder"]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for flags, words in ((["--num_epochs", "2"], "--num_epochs 2 are 6 updates, and"),
                         (["--num_epochs", "4", "--num_steps", "20"], "both say how long")):
        with pytest.raises(SystemExit):
            train.main(["--resume", str(folder), *flags])
        assert words in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    train.main(["--resume", str(folder), "--num_epochs", "4", "--no_report"])
    assert len(values(folder, "train/loss")) == 12


@pytest.mark.parametrize("flags", [["--ema", 0.8], ["--swa", 0.5]])
def test_averaged_weights_follow_their_formula_and_are_scored_and_saved_beside_the_raw_ones(flags, start, monkeypatch):
    seen, real = [], Average.update

    def update(self, model, step):
        seen.append({name: value.double().clone() for name, value in model.state_dict().items()})
        return real(self, model, step)
    monkeypatch.setattr(Average, "update", update)
    result = start(*flags, "--val_fraction", 0.25)
    expected = dict(seen[0]) if "--ema" in flags else {
        name: sum(weights[name] for weights in seen[6:]) / 6 for name in seen[0]}
    for t, weights in enumerate(seen[1:], 1) if "--ema" in flags else ():
        d = min(0.8, (1 + t) / (10 + t))
        assert d == decay_at(t, 0.8)
        expected = {name: d * expected[name] + (1 - d) * value for name, value in weights.items()}
    folder = result["folder"]
    found, raw = load_file(folder / "averaged.safetensors"), load_file(folder / "last.safetensors")
    assert all(torch.allclose(found[name].double(), value, atol=1e-6) for name, value in expected.items())
    assert not torch.equal(found["head.weight"], raw["head.weight"])
    assert result["averaged"].images == 12 and result["averaged"].loss != result["last"].loss
    assert values(folder, "average/val_loss").keys() == ({4, 8, 12} if "--ema" in flags else {8, 12})
    assert values(folder, "average/test_loss") == {12: result["averaged"].loss}
    assert read_metadata(folder / "averaged.safetensors")["accuracy"]["test"] == result["averaged"].accuracy
    trained = open_trained(str(folder), torch.device("cpu"), weights="averaged")
    assert all(torch.equal(value, found[name]) for name, value in trained.model.state_dict().items())


def test_averaging_changes_nothing_of_the_run_itself(start):
    plain, averaged = start(name="plain"), start("--ema", 0.9, name="averaged")
    one, other = (load_file(run["folder"] / "last.safetensors") for run in (plain, averaged))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert plain["last"] == averaged["last"] and "averaged" not in plain


def test_lora_s_product_is_averaged_and_not_its_factors(start, monkeypatch):
    merged, real = [], Average.update

    def update(self, model, step):
        merged.append(model.blocks[0].attn.qkv.weight.detach().double().clone())
        return real(self, model, step)
    monkeypatch.setattr(Average, "update", update)
    folder = start("--ema", 0.9, "--train", "lora:2")["folder"]
    averaged, last = load_file(folder / "averaged.safetensors"), load_file(folder / "last.safetensors")
    assert averaged.keys() == last.keys() and not any(".A" in name for name in averaged)
    expected = merged[0]
    for t, weight in enumerate(merged[1:], 1):
        expected = decay_at(t, 0.9) * expected + (1 - decay_at(t, 0.9)) * weight
    assert torch.allclose(averaged["blocks.0.attn.qkv.weight"].double(), expected, atol=1e-7)
    assert torch.equal(averaged["blocks.0.mlp.fc1.weight"], last["blocks.0.mlp.fc1.weight"])


def test_there_are_no_averaged_weights_where_none_were_asked_for(start):
    with pytest.raises(ValueError, match="was trained without --ema or --swa"):
        open_trained(str(start()["folder"]), torch.device("cpu"), weights="averaged")


def test_the_end_of_a_run_that_stops_early_is_scored_in_float32(start, tmp_path, capsys):
    folder = start("--eval_every", 2, "--num_steps", 40, "--early_stopping", 1, "--precision", "bf16",
                   "--learning_rate", 0.003, "--metric", "accuracy")["folder"]
    step = max(values(folder, "train/loss"))
    trained = open_trained(str(folder), torch.device("cpu"), weights="last")
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    with torch.no_grad():
        logits = trained.model(trained.images([row["image"] for row in rows]))
    labels = torch.tensor([trained.classes.index(row["label"]) for row in rows])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert step < 40 and values(folder, "test/loss")[step] == pytest.approx(loss, abs=2e-6)  # bfloat16 is 1e-3 off


def test_a_run_that_stopped_early_goes_on_with_new_patience(start, capsys):
    result = start("--eval_every", 1, "--num_steps", 20, "--early_stopping", 2, "--learning_rate", 0, "--ema", 0.9)
    folder = result["folder"]
    assert max(values(folder, "train/loss")) == 3
    train.main(["--resume", str(folder), "--num_steps", "30", "--no_report"])
    assert max(values(folder, "train/loss")) == 5 and (folder / "averaged.safetensors").exists()


def test_averages_have_the_metric_that_best_is_chosen_by(start):
    folder = start("--ema", 0.9, "--metric", "macro_f1")["folder"]
    assert values(folder, "average/test_macro_f1").keys() == values(folder, "test/macro_f1").keys() == {4, 8, 12}


def test_what_an_interrupted_epoch_says_is_what_an_unbroken_one_says(start, capsys, monkeypatch):
    def lines(text):
        return [line.split("images/s")[0].rsplit("  ", 1)[0] for line in text.splitlines() if line.startswith("step ")]
    start("--num_epochs", 2, name="whole")
    whole, real = lines(capsys.readouterr().out), train.train_step

    def stop(*args, **kwargs):
        if kwargs["dropout_seed"][1] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", stop)
        start("--num_epochs", 2, name="cut")
    out = capsys.readouterr().out
    folder = Path(out.split("--resume ")[1].split()[0])
    train.main(["--resume", str(folder), "--no_report"])
    assert lines(out) + lines(capsys.readouterr().out) == whole and len(whole) == 2


def test_a_run_stops_when_so_many_evaluations_brought_nothing_better(start, capsys):
    result = start("--eval_every", 1, "--num_steps", 40, "--early_stopping", 3, "--learning_rate", 0)
    assert "Stopped early: 3 evaluations in a row brought no new best." in capsys.readouterr().out
    accuracies = values(result["folder"], "test/accuracy")
    assert sorted(accuracies) == [1, 2, 3, 4] and len(set(accuracies.values())) == 1  # nothing moves
    assert len(values(result["folder"], "train/loss")) == 4 and result["last"].images == 12
    again = train.main(["--resume", str(result["folder"])])
    assert again["last"] == result["last"]
    assert "finished already: more --num_steps or --early_stopping would go on" in capsys.readouterr().out
    train.main(["--resume", str(result["folder"]), "--early_stopping", "6", "--no_report"])
    assert sorted(values(result["folder"], "test/accuracy")) == [1, 2, 3, 4, 5, 6, 7]


def test_patience_counts_evaluations_since_the_best(tiny_model):
    class Nowhere:
        def log(self, step, **values):
            pass
    now = State(tiny_model, None, None)
    counts = []
    for step, accuracy in enumerate([0.1, 0.3, 0.3, 0.2, 0.4, 0.4], 1):
        now.step = step
        remember(now, Nowhere(), "test", Metrics(accuracy, 1.0, 10, 0.0, None), "accuracy")
        counts.append(now.best["since"])
    assert counts == [0, 0, 1, 2, 0, 1]
    assert over(now, 1) and not over(now, 2) and not over(now, 0)


def test_a_summary_needs_no_data_and_no_weights_and_starts_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--summary"]) == {}
    said = capsys.readouterr().out
    assert "[1, 196, 768]" in said and "[1, 197, 768]" in said and "85,806,346" in said
    assert list(tmp_path.iterdir()) == []


def test_a_state_from_before_there_was_patience_is_gone_on_with(start):
    folder = start()["folder"]
    content = torch.load(folder / "state.pt", weights_only=True)
    for name in ("since", "sums"):
        content["best"].pop(name, None), content["progress"].pop(name, None)
    for name in ("num_epochs", "ema", "swa", "early_stopping", "drop_path", "recipe"):
        content["about"]["settings"].pop(name)
    torch.save(content, folder / "state.pt")
    assert train.main(["--resume", str(folder), "--no_report"])["last"].images == 12
    result = train.main(["--resume", str(folder), "--num_steps", "16", "--no_report"])
    assert sorted(values(result["folder"], "test/loss")) == [4, 8, 12, 16]
