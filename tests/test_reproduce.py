"""`reproduce.py` as a user starts it: plans, prices, a small table for real, and the question of a finished run."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import reproduce
from models.npz import save_npz
from utils import data, grid, pace
from utils.device import training_flops
from utils.opening import bare_model
from utils.prices import START
from utils.protocols import Option, Row


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        reproduce.main([str(word) for word in argv])
    _, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def measured(monkeypatch):
    """Every model is measured to train on 100 images a second; which were, is returned."""
    asked = []

    def images_per_second(config, size, settings, computing):
        asked.append((config.name, size))
        return 100.0
    monkeypatch.setattr(pace, "images_per_second", images_per_second)
    return asked


def test_the_papers_table_is_planned_with_steps_rates_splits_and_a_price(measured, capsys, tmp_path):
    reproduce.main(["--table", "paper", "--models", "ViT-B_16,ViT-B_32", "--datasets", "cifar10,pets", "--dry_run",
                    "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert measured == [("ViT-B_32", (384, 384))]  # the smallest; the other's speed follows
    assert "28 runs" in said  # 2 models x 2 sets x (4 learning rates + 3 seeds)
    assert said.count("choose  10,000 steps, 500 of warm-up, LR 0.03   train 49,000, held out 1,000") == 2
    assert said.count("choose     500 steps, 100 of warm-up, LR 0.001  train 3,312, held out 368") == 2
    assert said.count("final   10,000 steps, the chosen LR, seed 2, train 50,000, test 10,000") == 2
    assert "ViT-B_32 at 384 px trains on 100 images/s" in said and not (tmp_path / "out").exists()


def test_the_price_of_a_larger_model_follows_from_its_operations(measured, tmp_path):
    args = reproduce.parser().parse_args(["--table", "paper", "--device", "cpu"])
    found = reproduce.rows("paper", ["ViT-B_32", "ViT-L_16"], ["cifar10"])
    (small, large), _ = reproduce.priced(grid.Grid(found, tmp_path, 3), args)
    flops = [training_flops(bare_model({"model_type": name, "pretrained_dir": "none", "img_size": (384, 384)}))
             for name in ("ViT-B_32", "ViT-L_16")]
    work = [price.seconds - price.cells * START for price in (small, large)]
    assert work[1] / work[0] == pytest.approx(flops[1] / flops[0])
    assert small.seconds == reproduce.price(found[0], 3, (50_000, 10_000), 100.0, 0).seconds


@pytest.mark.parametrize("name", ["paper", "vit_jax", "augreg", "short", "ViT-pytorch"])
def test_every_table_can_be_planned_without_a_file(name, measured, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reproduce.main(["--table", name, "--dry_run", "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    found = reproduce.rows(name)
    assert all(f"{row.name}: {row.size} px" in said for row in found) and said.count("  final   ") >= len(found)
    assert list(tmp_path.iterdir()) == []


def test_shards_share_a_table_out(measured, capsys, tmp_path):
    said = []
    for part in ("1/3", "2/3", "3/3"):
        reproduce.main(["--table", "vit_jax", "--dry_run", "--shard", part, "--output_dir", str(tmp_path / "out")])
        said += [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " px, batch" in line]
    assert sorted(said) == sorted(row.name for row in reproduce.rows("vit_jax"))


def test_of_a_folder_a_few_images_of_each_class_are_taken(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "MINI", (8, 3))
    (row,) = reproduce.rows("mini", [], [str(image_folder)])
    row = reproduce.of_folder(row, tmp_path / "out")
    assert row.images == (6, 3) and row.dataset == str(image_folder)
    lines = list(csv.DictReader((tmp_path / "out" / "images.csv").read_text().splitlines()))
    assert [line["label"] for line in lines if line["split"] == "train"] == 2 * ["blue"] + 2 * ["green"] + 2 * ["red"]
    found = data.load(row.dataset, labels=dict(row.flags)["labels"])
    assert (len(found.train), len(found.test), found.train.classes) == (6, 3, ("blue", "green", "red"))


def test_folders_that_a_small_table_cannot_take_are_refused_and_a_dry_run_writes_nothing(image_folder, tmp_path, capsys,
                                                                                         measured):
    reproduce.main(["--table", "mini", "--datasets", str(image_folder), "--dry_run", "--output_dir",
                    str(tmp_path / "out")])
    assert "train 32, held out 4" in capsys.readouterr().out and not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    for part in ("train", "test"):
        (image_folder / part / "red").rename(image_folder / part / "a|b")
    both = f"{image_folder},{image_folder}/../other/../images"
    assert "Two of --datasets are called images" in error_of(capsys, "--table", "mini", "--datasets", both)
    argv = ["--table", "mini", "--datasets", image_folder, "--output_dir", tmp_path / "out"]
    assert "The class folder 'a|b'" in error_of(capsys, *argv)


def test_a_small_table_runs_for_real_and_twice_gives_the_same(image_folder, tiny_model, tiny_config, tmp_path,
                                                              measured, monkeypatch, capsys):
    save_npz(tiny_model, tmp_path / "tiny.npz")
    row = Row("mini", "auto", str(tmp_path / "tiny.npz"), str(image_folder), 16,
              (Option(6, 1, 0.001), Option(6, 1, 0.1)), held_out=0.25, batch=12)
    monkeypatch.setattr(reproduce, "rows", lambda *_: [row])
    argv = ["--table", "mini", "--datasets", str(image_folder), "--seeds", "1", "--output_dir", str(tmp_path / "out"),
            "--device", "cpu", "--precision", "fp32"]
    reproduce.main(argv)
    table = (tmp_path / "out" / "table.csv").read_bytes()
    (line,) = csv.DictReader(table.decode().splitlines())
    assert line["word"] == "unknown" and line["note"] == "Nobody has published a number of this protocol."
    chosen = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("result.json")}
    assert len(chosen) == 3
    val = {name: result["val"] for name, result in chosen.items() if result["choosing"]}
    best = max(val, key=val.get)
    assert f"choose-6-{float(line['learning_rate']):g}-seed0" == best
    (final,) = (result for result in chosen.values() if not result["choosing"])
    assert float(line["ours"]) == 100 * final["last"] and final["val"] is None
    assert "2 of 36" not in capsys.readouterr().out
    reproduce.main(argv)
    assert (tmp_path / "out" / "table.csv").read_bytes() == table
    assert (tmp_path / "out" / "table.html").read_text().startswith("<!DOCTYPE html>")


def finished(folder, test, *, settings=(), evaluations=()):
    """A run of ViT-B_16 on CIFAR-10 as train.py leaves it, with this accuracy at its end."""
    flags = {"dataset": "cifar10", "model_type": "ViT-B_16", "pretrained_dir": "checkpoint/ViT-B_16.npz",
             "num_steps": 10_000, "warmup_steps": 500, "learning_rate": 0.01, "train_batch_size": 512,
             "optimizer": "sgd", "val_fraction": 0.0, "img_size": [384, 384], "train": "all", **dict(settings)}
    config = {"name": "ViT-B_16", **{}}
    folder.mkdir()
    about = {"accuracy": {"test": test}, "config": config, "img_size": flags["img_size"], "versions": {}}
    save_file({"head.bias": np.zeros(1, np.float32)}, folder / "last.safetensors", metadata={"vit": json.dumps(about)})
    (folder / "settings.json").write_text(json.dumps({**flags, "resolved": {}}))
    lines = [{"step": step, "name": "test/accuracy", "value": value, "time": step} for step, value in
             [*evaluations, (10_000, test)]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def check(capsys, folder):
    try:
        reproduce.main(["--check", str(folder)])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def test_a_run_like_the_papers_passes_and_a_worse_one_fails_with_causes(tmp_path, capsys):
    code, said = check(capsys, finished(tmp_path / "good", 0.9890))
    assert code == 0 and "| paper " in said and "98.95" in said and "pass" in said
    code, said = check(capsys, finished(tmp_path / "bad", 0.97, settings={"img_size": [224, 224]}))
    assert code == 1 and "fail" in said and "--img_size 384" in said


def test_the_best_on_test_is_compared_with_such_numbers_alone(tmp_path, capsys):
    folder = finished(tmp_path / "run", 0.9800, evaluations=[(5_000, 0.9906)])
    _, said = check(capsys, folder)
    lines = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("|")}
    assert "99.06" in lines["ViT-pytorch"] and "(best on test)" in lines["ViT-pytorch"]
    assert "98.00" in lines["paper"] and "fail" in lines["paper"]


def test_what_cannot_be_had_is_said_before_the_first_run(measured, capsys, tmp_path, monkeypatch):
    def fetch(path):
        raise FileNotFoundError(f"{path.name} is on no server.")
    monkeypatch.setattr(reproduce.sources, "fetch", fetch)
    argv = ["--output_dir", tmp_path / "out", "--data_dir", tmp_path / "data"]
    said = error_of(capsys, "--table", "paper", "--models", "ViT-B_16", "--datasets", "imagenet", *argv)
    assert "imagenet" in said and "train" in said
    said = error_of(capsys, "--table", "mini", "--datasets", "digits", *argv)
    assert said == "error: ViT-demo.npz is on no server.\n" and not list((tmp_path / "out").glob("*"))


def test_what_cannot_be_asked_is_one_sentence(tmp_path, capsys, measured):
    assert "Give --table NAME to run a table, or --check" in error_of(capsys)
    assert "--shard is '3/2'" in error_of(capsys, "--table", "short", "--shard", "3/2")
    assert "has no model 'ViT-X'" in error_of(capsys, "--table", "short", "--models", "ViT-X")
    assert "--seeds is 0" in error_of(capsys, "--table", "short", "--seeds", "0")
    assert "There is no run at" in error_of(capsys, "--check", tmp_path / "nothing")
    other = finished(tmp_path / "digits", 0.9, settings={"dataset": "digits"})
    assert "Nobody published a number for the model and data" in error_of(capsys, "--check", other)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert "error: " in error_of(capsys, "--table", "mini", "--datasets", tmp_path / "a.png")
