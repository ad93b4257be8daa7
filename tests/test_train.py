"""Whole runs through `main(argv)`, as a user starts them, on tiny images that the tests write."""

import ast
import csv
import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train
from models import exchange, huggingface
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from models.npz import load_npz, save_npz
from tests.conftest import randomise
from tests.layouts import LAYOUTS, arrays_of, bfloat16, big_vision, linen
from tests.test_exchange import vit_pytorch_names
from utils import data, feeds
from utils.images import decode_all
from utils.trained import open_trained


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config, 16, 7)
    save_npz(model, tmp_path / "tiny.npz")
    return tmp_path / "tiny.npz"


@pytest.fixture
def start(image_folder, checkpoint, tmp_path):
    """start("--flag", value ...) -> main's result, for a run of ten updates of twelve images."""
    def run(*argv, name="run", report=False):
        flags = {"--dataset": image_folder, "--pretrained_dir": checkpoint, "--img_size": 16, "--num_steps": 10,
                 "--warmup_steps": 2, "--train_batch_size": 12, "--eval_every": 4, "--output_dir": tmp_path / "output",
                 "--name": name, "--learning_rate": 0.1, "--precision": "fp32", "--device": "cpu"}
        words = [*(word for pair in flags.items() for word in pair), *argv, *["--no_report"] * (not report)]
        return train.main([str(word) for word in words])
    return run


def metrics(result):
    return [json.loads(line) for line in (result["folder"] / "metrics.jsonl").read_text().splitlines()]


def values(result, name):
    return {event["step"]: event["value"] for event in metrics(result) if event["name"] == name}


def error_of(capsys, call, *argv):
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


KINDS = {  # changes of the configuration, what is done to its arrays
    **{name: ({}, change) for name, (change, _) in LAYOUTS.items()},
    "published": ({}, dict), "not square": ({}, dict), "gap": ({"classifier": "gap"}, dict),
    "pre_logits": ({"representation_size": 20}, dict),
    "float16": ({}, lambda arrays: {key: a.astype(np.float16) for key, a in arrays.items()}),
    "bfloat16": ({}, bfloat16), "no class row": ({}, lambda arrays: big_vision(arrays, class_row=False)),
    "hybrid, root alone": ({"resnet": {"num_layers": (), "width_factor": 0.5}, "patch_size": (1, 1)}, dict),
    "hybrid, three stages": ({"resnet": {"num_layers": (1, 2, 1), "width_factor": 0.5}, "patch_size": (1, 1)}, linen),
}


def few_steps(folder, path, out):
    """A short run from a checkpoint, with nothing said about the checkpoint but where it is."""
    return train.main(["--pretrained_dir", str(path), "--dataset", str(folder), "--output_dir", str(out),
                       "--num_steps", "3", "--warmup_steps", "1", "--train_batch_size", "12"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_npz_starts_a_run_with_no_other_flag(kind, image_folder, tiny_config, tmp_path):
    changes, change = KINDS[kind]
    size = (16, 40) if kind == "not square" else 32
    save_npz(randomise(VisionTransformer(replace(tiny_config, **changes), size, 5)), tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", **change(arrays_of(tmp_path / "a.npz")))
    result = few_steps(image_folder, tmp_path / "b.npz", tmp_path / "output")
    losses = values(result, "train/loss")
    assert losses[1] == pytest.approx(math.log(3), abs=1e-5) and 0.5 < losses[3] < 2 and losses[3] != losses[1]
    about = exchange.read_metadata(result["folder"] / "last.safetensors")
    assert about["finetuned_from"]["name"] == "b.npz"
    assert about["img_size"] == ([16, 40] if kind == "not square" else [32, 32])


@pytest.mark.parametrize("kind", ["safetensors", "pth", "folder", "ViT-pytorch"])
def test_other_formats_start_a_run_too(kind, image_folder, tiny_config, tmp_path):
    model = randomise(VisionTransformer(CONFIGS["ViT-demo"], 32, 5))
    if kind == "folder":
        huggingface.save_folder(model, tmp_path / "a", {})
    elif kind == "pth":
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    elif kind == "ViT-pytorch":
        torch.save(vit_pytorch_names(model), tmp_path / "a_checkpoint.bin")
    else:
        save_file(model.state_dict(), tmp_path / "a.safetensors")
    path = next(tmp_path.glob("a*"))
    result = few_steps(image_folder, path, tmp_path / "output")
    assert values(result, "train/loss")[1] == pytest.approx(math.log(3), abs=1e-5)
    about = exchange.read_metadata(result["folder"] / "last.safetensors")
    assert about["finetuned_from"]["name"] == path.name and about["config"]["name"] == "ViT-demo"
    assert about["config"]["gelu"] == ("erf" if kind == "ViT-pytorch" else "tanh")


@pytest.mark.parametrize("channels", [1, 4])
def test_the_channels_asked_for_reach_weights_and_data(channels, start, image_folder):
    for path in image_folder.rglob("*.png"):
        Image.open(path).convert("RGBA").save(path)
    result = start("--in_chans", channels, "--num_steps", 3, "--warmup_steps", 1)
    about = exchange.read_metadata(result["folder"] / "last.safetensors")
    assert about["config"]["in_chans"] == channels and len(about["config"]["mean"]) == channels
    again = start("--pretrained_dir", result["folder"] / "last.safetensors", "--num_steps", 1, name="again")
    assert exchange.load(again["folder"] / "last.safetensors").patch_embed.proj.weight.shape[1] == channels


def test_a_run_learns_evaluates_on_time_and_at_the_end(start):
    result = start("--num_steps", 60, "--warmup_steps", 5, "--eval_every", 25)
    losses = values(result, "train/loss")
    assert losses[1] == losses[2] == pytest.approx(math.log(3), abs=1e-6)  # zero head; the first update has rate zero
    assert losses[60] < 0.3 and result["last"].accuracy == 1.0 and result["last"].images == 12
    assert list(values(result, "test/accuracy")) == [25, 50, 60]
    rates = values(result, "train/lr")
    assert rates[1] == 0 and rates[6] == pytest.approx(0.1) and list(rates) == list(range(1, 61))


def test_the_output_loads_back_with_the_run_s_own_accuracy(start, image_folder):
    result = start("--num_steps", 30, "--eval_every", 7)
    for kind in ("best", "last"):
        path = result["folder"] / f"{kind}.safetensors"
        about, model = exchange.read_metadata(path), exchange.load(path).eval()
        assert about["classes"] == ["blue", "green", "red"] and about["finetuned_from"]["name"] == "tiny.npz"
        assert len(about["finetuned_from"]["sha256"]) == 64 and about["settings"]["learning_rate"] == 0.1
        test = data.load(str(image_folder)).test
        images = (torch.stack(decode_all(test.images)) - 127.5) / 127.5
        with torch.no_grad():
            logits = model(images)
        accuracy = (logits.argmax(1) == test.labels).float().mean().item()
        assert accuracy == pytest.approx(result[kind].accuracy) == pytest.approx(about["accuracy"]["test"])
        loss = torch.nn.functional.cross_entropy(logits, test.labels).item()
        assert loss == pytest.approx(result[kind].loss, rel=1e-5)


def test_a_run_is_a_function_of_its_settings(start):
    first, second, other = start(name="a"), start(name="b"), start("--seed", 1, name="c")
    weights = [exchange.load(r["folder"] / "last.safetensors").state_dict() for r in (first, second, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert values(first, "train/loss") == values(second, "train/loss") != values(other, "train/loss")


def test_evaluating_more_often_changes_no_update(start):
    first, second = start(name="a"), start("--eval_every", 1, "--eval_batch_size", 5, name="b")
    assert values(first, "train/loss") == values(second, "train/loss")
    assert first["last"].loss == pytest.approx(second["last"].loss, rel=1e-6)


def test_micro_batches_see_the_same_images_and_make_the_same_updates(start):
    whole, split = start(name="a"), start("--gradient_accumulation_steps", 4, name="b")
    assert values(whole, "train/loss") == pytest.approx(values(split, "train/loss"), rel=1e-4)
    assert whole["last"].loss == pytest.approx(split["last"].loss, rel=1e-4)


def test_best_is_chosen_on_the_held_out_part_and_the_test_set_is_scored_at_the_end(start, capsys):
    result = start("--val_fraction", 0.25, "--eval_every", 2)
    on_val = values(result, "val/accuracy")
    assert list(on_val) == [2, 4, 6, 8, 10] and list(values(result, "test/accuracy")) == [10]
    best = exchange.read_metadata(result["folder"] / "best.safetensors")
    assert best["accuracy"]["val"] == max(on_val.values()) == on_val[best["step"]]
    assert best["accuracy"]["test"] == result["best"].accuracy
    out = capsys.readouterr().out
    assert "27 train, 9 val, 12 test/" in out and "on the held-out part" in out and "Nothing is held out" not in out


@pytest.mark.parametrize("metric", ["accuracy", "loss", "macro_f1", "map"])
def test_best_is_chosen_by_the_metric_that_was_asked_for(metric, start):
    result = start("--metric", metric, "--eval_every", 1, "--num_steps", 12, "--learning_rate", 0.3, "--seed", 5)
    found = values(result, f"test/{metric}")
    assert list(found) == list(range(1, 13)) and len(set(found.values())) > 1
    best = (min if metric == "loss" else max)(found.values())
    first = min(step for step, value in found.items() if value == best)
    assert exchange.read_metadata(result["folder"] / "best.safetensors")["step"] == first
    if metric != "map":
        assert getattr(result["best"], metric) == pytest.approx(best, rel=1e-5)


def test_without_a_held_out_part_it_is_said_once_that_best_was_picked_on_the_test_set(start, capsys):
    start()
    out = capsys.readouterr().out
    assert out.count("Nothing is held out: `best` will be picked on the test set") == 1
    assert out.index("last  ") < out.index("best  ") and "on this same test set" in out


def test_from_scratch_needs_no_checkpoint(start):
    result = start("--pretrained_dir", "none", "--model_type", "ViT-demo", "--num_steps", 2, "--warmup_steps", 0)
    about = exchange.read_metadata(result["folder"] / "last.safetensors")
    assert about["finetuned_from"] == {} and about["config"]["name"] == "ViT-demo"


def test_fp16_on_a_cpu_says_what_it_uses_and_goes_on(start, capsys):
    result = start("--fp16", "--precision", "auto")
    assert "A CPU has no use for float16" in capsys.readouterr().out and result["last"].images == 12


def test_dropout_and_views_can_be_set_by_flag(start):
    result = start("--dropout", 0.2, "--min_area", 0.9, "--no_flip")
    about = exchange.read_metadata(result["folder"] / "last.safetensors")
    assert about["config"]["dropout_rate"] == 0.2
    assert values(result, "train/loss") != values(start(name="plain"), "train/loss")


def test_every_optimiser_and_decay_trains(start):
    for optimizer, rate in (("sgd", 0.1), ("adam", 0.003), ("adamw", 0.003)):
        result = start("--optimizer", optimizer, "--learning_rate", rate, "--decay_type", "linear", "--weight_decay",
                       0.01, "--num_steps", 20, name=optimizer)
        losses = values(result, "train/loss")
        assert losses[20] < 0.8 * losses[1]


def test_the_position_embedding_is_resized_to_the_images(start):
    result = start("--img_size", "24,16", "--num_steps", 1, "--warmup_steps", 0)
    assert exchange.load(result["folder"] / "last.safetensors").grid == (6, 4)


def test_a_size_that_is_no_whole_number_of_patches_is_said(start, capsys):
    start("--img_size", 18, "--num_steps", 1, "--warmup_steps", 0)
    assert "18 x 18 px are no whole number of patches: what is right of or below 16 x 16" in capsys.readouterr().out


def test_a_learning_rate_that_explodes_stops_with_the_step_and_advice(start, capsys):
    message = error_of(capsys, start, "--learning_rate", 1e38, "--max_grad_norm", 0, "--warmup_steps", 0)
    assert "Update " in message and "was not made" in message and "--learning_rate" in message


def test_an_existing_run_is_not_overwritten_without_being_asked(start, capsys):
    result = start()
    before = (result["folder"] / "metrics.jsonl").read_bytes()
    assert "holds a run already" in error_of(capsys, start)
    assert (result["folder"] / "metrics.jsonl").read_bytes() == before
    start("--overwrite")


def test_the_default_name_says_data_model_and_size(start, tmp_path):
    result = train.main(["--dataset", str(tmp_path / "images"), "--pretrained_dir", str(tmp_path / "tiny.npz"),
                         "--output_dir", str(tmp_path / "o"), "--num_steps", "1", "--warmup_steps", "0",
                         "--train_batch_size", "4", "--img_size", "16", "--device", "cpu"])
    assert result["folder"] == tmp_path / "o" / "images-custom-16"


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "cifar1"], "neither a named set"), (["--model_type", "ViT-B_16"], "not ViT-B_16"),
    (["--model_type", "ViT-Q"], "no model 'ViT-Q'"), (["--train_batch_size", 10, "--gradient_accumulation_steps", 3],
                                                      "--train_batch_size 10 cannot be split"),
    (["--pretrained_dir", "weights.txt"], "weights.txt"), (["--img_size", 2], "smaller than one patch"),
    (["--learning_rate", "nan"], "--learning_rate is nan"), (["--name", "../x"], "would leave --output_dir"),
    (["--seed", 10**20], "below 2^63"), (["--num_workers", -7], "--num_workers is -7")])
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(start, capsys, tmp_path, argv, words):
    assert words in error_of(capsys, start, *argv)
    assert not (tmp_path / "output").exists()


def test_a_truncated_checkpoint_is_one_sentence(start, checkpoint, capsys):
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "is not a complete .npz file" in error_of(capsys, start)


def test_a_broken_image_is_named(start, image_folder, capsys):
    (image_folder / "train" / "red" / "3.png").write_bytes(b"text")
    assert "3.png cannot be read as an image" in error_of(capsys, start)


def test_debug_shows_the_traceback(start):
    with pytest.raises(ValueError, match="no model"):
        start("--model_type", "ViT-Q", "--debug")


def test_the_same_seed_starts_from_the_same_random_weights(start):
    scratch = ("--pretrained_dir", "none", "--model_type", "ViT-demo", "--num_steps", 1)
    first, second, other = (start(*scratch, "--seed", seed, name=name) for seed, name in ((3, "a"), (3, "b"), (4, "c")))
    weights = [exchange.load(r["folder"] / "last.safetensors").pos_embed for r in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_dropout_masks_differ_from_step_to_step(start, monkeypatch):
    seeds = []
    monkeypatch.setattr("utils.step.torch.manual_seed", seeds.append)
    start("--dropout", 0.1, "--gradient_accumulation_steps", 2, "--num_steps", 3, "--warmup_steps", 0)
    assert len(seeds) == len(set(seeds)) == 6


def test_the_settings_that_decided_the_run_are_kept_with_it(start):
    result = start("--fp16", "--precision", "auto", "--dropout", 0.3)
    kept = json.loads((result["folder"] / "settings.json").read_text())
    assert kept["command"].startswith("python train.py --dataset ") and "--dropout 0.3" in kept["command"]
    assert kept["resolved"]["dropout"] == 0.3 and kept["resolved"]["min_area"] == 0.05
    assert kept["resolved"]["precision"] in ("bfloat16", "float32") and kept["resolved"]["device"] == "cpu"


def test_sets_too_large_for_memory_are_streamed_to_the_same_result(start, monkeypatch, capsys):
    """Dropout, crops and order on; files decoded by two worker processes."""
    first = start("--dropout", 0.1, name="a")
    monkeypatch.setattr(feeds, "memory", lambda: 0)
    second = start("--dropout", 0.1, "--num_workers", 2, name="b")
    assert "worker processes will decode them" in capsys.readouterr().out
    assert values(first, "train/loss") == values(second, "train/loss") and first["last"] == second["last"]


def test_a_run_leaves_predictions_a_report_and_its_first_images(start, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = start("--train_batch_size", 4, report=True)
    folder = result["folder"]
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 12 == result["last"].images and {row["label"] for row in rows} == {"blue", "green", "red"}
    assert sum(row["label"] == row["predicted"] for row in rows) / 12 == result["last"].accuracy
    text = (folder / "report.html").read_text()
    assert f"{100 * result['last'].accuracy:.2f} %" in text
    assert f"report   {folder / 'report.html'}" in capsys.readouterr().out
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    (image,), expected = events.Images("train/images"), 2 * (16 + 2) + 2
    assert (image.step, image.height, image.width) == (0, expected, expected)

    def broken(folders):
        raise RuntimeError("no more ink")
    monkeypatch.setattr(train.report, "write", broken)
    assert start("--overwrite", report=True)["last"] == start("--overwrite")["last"]
    assert ("warning: No report: no more ink. It can be made later: python -m utils.report "
            f"{folder}") in capsys.readouterr().out


def test_predictions_are_of_the_weights_that_one_would_take(start):
    folder = start("--val_fraction", 0.25)["folder"]
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    away = {}
    for kind in ("best", "last"):
        trained = open_trained(str(folder), torch.device("cpu"), weights=kind)
        with torch.no_grad():
            sure = trained.model(trained.images([row["image"] for row in rows])).softmax(dim=1).amax(dim=1)
        away[kind] = max(abs(a - float(row["confidence"])) for a, row in zip(sure.tolist(), rows))
    assert away["best"] < 1e-5 < 1e-3 < away["last"]


@pytest.mark.parametrize("what, moved", [
    ("head", {"head"}), ("last:1", {"head", "blocks.1", "norm"}), ("norm", {"head", "norm", "blocks.0", "blocks.1"}),
    ("lora:2", {"head", "blocks.0", "blocks.1"})])
def test_only_what_is_to_train_moves_and_the_file_is_a_plain_model(start, checkpoint, what, moved, capsys):
    """AdamW with weight decay, which would move what has no gradient."""
    folder = start("--train", what, "--optimizer", "adamw", "--weight_decay", 0.1, "--learning_rate", 0.01)["folder"]
    assert f"trains   {what}: " in capsys.readouterr().out
    before = load_npz(checkpoint, img_size=16, num_classes=3).state_dict()
    trained = open_trained(str(folder), torch.device("cpu")).model.state_dict()
    assert trained.keys() == before.keys()
    changed = {name for name, value in trained.items() if not torch.equal(value, before[name])}
    assert {".".join(name.split(".")[:1 + name.startswith("blocks")]) for name in changed} == moved
    kinds = {"norm": ("norm", "head"), "lora:2": ("attn.qkv.weight", "attn.proj.weight", "head")}.get(what)
    assert kinds is None or all(any(kind in name for kind in kinds) for name in changed)


def test_what_cannot_train_is_refused_before_anything_is_read(start, capsys):
    assert "custom has 2 blocks: give last:2 at most" in error_of(capsys, start, "--train", "last:3")
    assert "choose head, last:N" in error_of(capsys, start, "--train", "body")


def test_a_few_shot_probe_says_its_accuracy_and_leaves_nothing(start, tmp_path, capsys):
    assert start("--few_shot", 5) == {} and not (tmp_path / "output").exists()
    out = capsys.readouterr().out
    assert "5-shot 100.00 ± 0.00 % of 12 test images (3 draws)" in out and "ridge regression in closed form" in out
    assert "The weights are random" not in out
    assert start("--few_shot", 5, "--pretrained_dir", "none", "--model_type", "ViT-demo") == {}
    assert "warning: The weights are random" in capsys.readouterr().out
    assert start("--few_shot", 5, "--dry_run") == {} and "5-shot" not in capsys.readouterr().out
    assert "--few_shot 13 draws 13 training images of each class, and blue has 12" in error_of(
        capsys, start, "--few_shot", 13)


def test_an_interrupt_ends_with_a_sentence(start, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train_step", interrupt)
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 130 and "Interrupted" in capsys.readouterr().err


def test_a_full_memory_ends_with_advice(start, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train, "train_step", full)
    assert "--gradient_accumulation_steps" in error_of(capsys, start)


def test_every_setting_is_read_somewhere():
    """A flag that nothing reads is a promise that nothing keeps."""
    root, read = Path(train.__file__).parent, set()
    for path in (root / "train.py", *(root / "utils").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in ("settings", "s"):
                read.add(node.attr)
    unread = {f.name for f in fields(train.Settings)} - read
    # Used before there are settings, or become others there; by its name in `located`.
    assert unread == {"recipe", "model", "warmup_epochs", "summary", "debug", "data_dir"}
