"""A finished run beside the published numbers: what is compared with what, and what cannot be."""

import csv
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from utils.checking import check

TIMM = "augreg/B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0"


def finished(folder, test, *, settings=(), about=(), resolved=(), evaluations=(), step=10_000, val=(), images=0):
    """A run of ViT-B_16 on CIFAR-10 as train.py leaves it, with this accuracy at its end, at `step`; evaluations on the
    test set before, val: on a held-out part; images: of predictions.csv, none for no file."""
    flags = {"dataset": "cifar10", "model_type": "ViT-B_16", "pretrained_dir": "checkpoint/ViT-B_16.npz",
             "num_steps": 10_000, "warmup_steps": 500, "learning_rate": 0.01, "train_batch_size": 512,
             "optimizer": "sgd", "val_fraction": 0.0, "img_size": [384, 384], "train": "all", **dict(settings)}
    folder.mkdir()
    header = {"accuracy": {"test": test}, "config": {"name": flags["model_type"]}, "img_size": flags["img_size"],
              "classes": ["no", "yes"], **dict(about)}
    save_file({"head.bias": np.zeros(1, np.float32)}, folder / "last.safetensors", metadata={"vit": json.dumps(header)})
    (folder / "settings.json").write_text(json.dumps({**flags, "resolved": dict(resolved)}))
    lines = [{"step": at, "name": name, "value": value, "time": at} for name, values in
             (("test/accuracy", [*evaluations, (step, test)]), ("val/accuracy", val)) for at, value in values]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if images:
        with open(folder / "predictions.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "label", "predicted", "confidence"])
            right = round(test * images)
            table.writerows([str(i), "yes", "yes" if i < right else "no", 0.9] for i in range(images))
    return folder


def by_protocol(folder):
    return {row.protocol: row for row in check(folder)}


def test_a_run_like_the_papers_comes_first_and_passes(tmp_path):
    rows = check(finished(tmp_path / "run", 0.9890))
    assert (rows[0].protocol, rows[0].word, rows[0].theirs) == ("paper", "pass", 98.95) and not rows[0].causes
    assert "another recipe" not in rows[0].note and all(row.ours == pytest.approx(98.9) for row in rows)


def test_the_runs_own_dropout_chooses_the_column(tmp_path):
    without = by_protocol(finished(tmp_path / "a", 0.9890, resolved={"dropout": 0.0}))["vit_jax"]
    with_it = by_protocol(finished(tmp_path / "b", 0.9890, resolved={"dropout": 0.1}))["vit_jax"]
    assert (without.theirs, with_it.theirs) == (99.02, 98.76)


@pytest.mark.parametrize("evaluations, val, theirs", [
    ([(5_000, 0.9906)], [], 99.06),             # the test set was looked at on the way
    ([], [], None),                             # only at the end
    ([(5_000, 0.9906)], [(5_000, 0.98)], None)  # a held-out part was, and test when the run was continued
])
def test_the_best_on_test_is_for_runs_that_looked_at_it_on_their_way(tmp_path, evaluations, val, theirs):
    rows = by_protocol(finished(tmp_path / "run", 0.98, evaluations=evaluations, val=val))
    row = rows["ViT-pytorch"]
    assert row.theirs == theirs and row.best_on_test == (theirs is not None)
    assert row.ours == pytest.approx(99.06 if theirs else 98.0) and rows["paper"].ours == pytest.approx(98.0)
    assert theirs or (row.word == "unknown" and "cannot be compared" in row.note)


def test_a_run_that_stopped_early_is_compared_by_the_steps_that_it_made(tmp_path):
    row = by_protocol(finished(tmp_path / "run", 0.97, settings={"early_stopping": 3}, step=2_000))["paper"]
    assert row.steps == 2_000 and row.word == "fail"
    assert any(cause.startswith("--num_steps was 2000; theirs 10000") for cause in row.causes)
    epochs = by_protocol(finished(tmp_path / "epochs", 0.97, settings={"num_epochs": 20.0}, step=2_000))["paper"]
    assert any(cause.startswith("--num_steps was 2000") for cause in epochs.causes)


def test_a_run_from_nothing_is_shown_what_the_model_reaches_otherwise(tmp_path):
    rows = by_protocol(finished(tmp_path / "run", 0.90, settings={"pretrained_dir": "none"}))
    assert rows["paper"].theirs == 98.95 and rows["paper"].causes[0].startswith("The run started from nothing")
    small = finished(tmp_path / "small", 0.8, settings={"pretrained_dir": "none", "model_type": "ViT-Ti_16",
                                                        "dataset": "cifar100", "img_size": [224, 224]})
    assert by_protocol(small)["augreg"].theirs == 87.2
    assert check(finished(tmp_path / "ours", 0.9, settings={"pretrained_dir": "none", "model_type": "ViT-CIFAR"})) == []


@pytest.mark.parametrize("start, told", [
    ("hub/google/vit-base-patch16-224-in21k", "vit-base-patch16-224-in21k"),
    ("hub/models--google--vit-base-patch16-224-in21k/snapshots/0ab1", "0ab1"),
    ("vit_base_patch16_224.orig_in21k.safetensors", "vit_base_patch16_224.orig_in21k.safetensors"),
    ("elsewhere/link", "ViT-B_16.npz")])
def test_a_copy_is_taken_for_the_published_file(tmp_path, start, told):
    run = finished(tmp_path / "run", 0.9890, settings={"pretrained_dir": start},
                   about={"finetuned_from": {"name": told}})
    assert by_protocol(run)["paper"].theirs == 98.95 and by_protocol(run)["paper"].word == "pass"


def test_a_start_of_ones_own_is_compared_with_nothing(tmp_path):
    run = finished(tmp_path / "run", 0.99, settings={"pretrained_dir": "output/other/best.safetensors"},
                   about={"finetuned_from": {"name": "best.safetensors"}})
    assert check(run) == []


def test_the_number_of_another_file_judges_nothing_and_both_are_named(tmp_path):
    run = finished(tmp_path / "run", 0.8, settings={"pretrained_dir": f"checkpoint/{TIMM}.npz", "dataset": "imagenet",
                                                    "model_type": "ViT-B_32", "num_steps": 20_000}, step=20_000)
    (row,) = check(run)
    assert (row.word, row.theirs) == ("unknown", None) and "light1" in row.note and "medium1" in row.note


def test_a_number_without_a_resolution_judges_no_run_at_384_px(tmp_path):
    flags = {"pretrained_dir": "timm/vit_base_patch16_224.augreg_in21k", "dataset": "pets", "num_steps": 500}
    large = by_protocol(finished(tmp_path / "large", 0.94, settings=flags, step=500))["augreg"]
    assert large.word == "unknown" and "does not state its resolution" in large.note
    small = by_protocol(finished(tmp_path / "small", 0.947, settings={**flags, "img_size": [224, 224]}, step=500))
    assert (small["augreg"].word, small["augreg"].theirs) == ("pass", 94.7)


def test_a_folder_counts_as_the_published_set_if_it_has_as_many_images(tmp_path):
    flags = {"dataset": "/data/pets", "num_steps": 500}
    whole = finished(tmp_path / "whole", 3_450 / 3_669, settings=flags, step=500, images=3_669)
    assert by_protocol(whole)["paper"].theirs == 94.43
    part = finished(tmp_path / "part", 0.95, settings=flags, step=500, images=100)
    with pytest.raises(ValueError, match=r"/data/pets is not the published set: 100 test images, .* pets has 3,669"):
        check(part)
    listed = finished(tmp_path / "listed", 0.95, settings={**flags, "dataset": "pets", "labels": "few.csv"}, step=500,
                      images=100)
    with pytest.raises(ValueError, match="pets is not the published set"):
        check(listed)


def test_without_predictions_the_training_images_tell_whether_it_is_the_published_set(tmp_path):
    flags = {"dataset": "/data/pets", "val_fraction": 0.1}
    assert check(finished(tmp_path / "whole", 0.94, settings=flags, resolved={"train_images": 3_315}))
    with pytest.raises(ValueError, match="not the published set: 900 training images"):
        check(finished(tmp_path / "part", 0.94, settings=flags, resolved={"train_images": 900}))
    with pytest.raises(ValueError, match="cannot be told"):
        check(finished(tmp_path / "unknown", 0.94, settings=flags))
    assert check(finished(tmp_path / "photos", 0.94, settings={"dataset": "/data/photos"})) == []


@pytest.mark.parametrize("about, words", [({"config": {}}, "does not name its model"), ({"config": None}, "its model"),
                                          ({"accuracy": {}}, "has not ended"), ({"img_size": None}, None)])
def test_a_header_that_lacks_something_is_one_sentence(tmp_path, about, words):
    run = finished(tmp_path / "run", 0.99, about=about)
    if words is None:
        assert check(run)[0].resolution == 384
        return
    with pytest.raises(ValueError, match=words):
        check(run)


def test_settings_that_nobody_has_are_one_sentence(tmp_path):
    run = finished(tmp_path / "run", 0.99)
    (run / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="Neither settings.json nor the weights of .* tell dataset"):
        check(run)
