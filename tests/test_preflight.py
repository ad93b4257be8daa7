"""What is checked before a run: each warning where it belongs and only there; estimates against what is measured."""

import logging
import math
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import configs
from models.modeling import VisionTransformer
from utils import preflight, resources
from utils.data import Data, Split, View, load
from utils.device import Computing
from utils.fitting import Fitting
from utils.settings import Settings

CPU, GIB = torch.device("cpu"), 2**30
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def split(counts, classes=None, test=False):
    """A split in memory with so many images of each class, no two alike."""
    labels = torch.repeat_interleave(torch.tensor(counts))
    images = torch.from_numpy(RNG.integers(0, 256, (len(labels), 3, 4, 4), dtype=np.uint8))
    return Split(images, labels, classes or tuple("abcdefgh"[:len(counts)]))


def in_memory(train, test=None, val=None):
    return Data("set", split(train), val and split(val), split(test or [1] * len(train)), View(), "test")


def paths(folder):
    return sorted(folder.rglob("*.png"))


def check(folder, **settings):
    return preflight.check_data(load(str(folder)), Settings(**settings), (16, 16))


def warnings_of(said):
    return [record.getMessage() for record in said.records if record.levelno == logging.WARNING]


# Unreadable images


def test_sound_images_pass_unchanged_and_in_silence(image_folder, said):
    dataset = load(str(image_folder))
    assert preflight.check_data(dataset, Settings(), (16, 16)) is dataset and said.text == ""
    check(image_folder, check_data=True, skip_unreadable=True)
    assert warnings_of(said) == [] and "checked  48 images in" in said.text and "no two are equal" in said.text


def test_one_unreadable_image_is_named_with_its_reason_and_the_way_out(image_folder):
    broken = image_folder / "test" / "red" / "2.png"
    broken.write_bytes(b"")
    with pytest.raises(ValueError) as error:
        check(image_folder)
    assert str(error.value) == (f"{broken} cannot be read as an image (it is empty: 0 bytes): replace or remove it, or "
                                "leave it out with --skip_unreadable.")


def test_of_many_unreadable_images_five_are_named(image_folder):
    for i in range(7):
        (image_folder / "train" / "red" / f"{i}.png").write_bytes(b"text")
    with pytest.raises(ValueError) as error:
        check(image_folder)
    assert str(error.value).startswith("7 of the 48 images that were looked at cannot be read (train/red/0.png, "
                                       "train/red/1.png, train/red/2.png, train/red/3.png, train/red/4.png and 2 more)")
    assert str(error.value).endswith("or leave all of them out with --skip_unreadable.")


def test_unreadable_images_are_left_out_when_asked_for_and_named_once(image_folder, said):
    before = load(str(image_folder))
    gone = [image_folder / "train" / "green" / "1.png", image_folder / "test" / "blue" / "0.png"]
    for path in gone:
        path.write_bytes(b"text")
    dataset = check(image_folder, skip_unreadable=True)
    assert dataset.train.images == [path for path in before.train.images if path not in gone]
    assert dataset.train.labels.tolist() == [0] * 12 + [1] * 11 + [2] * 12 and len(dataset.test) == 11
    only, = warnings_of(said)
    assert only.startswith("2 unreadable images are left out: ") and all(str(path) in only for path in gone)
    dataset = check(image_folder, skip_unreadable=True, check_data=True)
    assert "checked  46 images" in said.text and len(dataset.train) == 35


def test_a_class_or_a_part_of_unreadable_images_only_cannot_be_left_out(image_folder):
    for path in paths(image_folder / "test"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot be read.* No image of the test part can be read, so leaving them"):
        check(image_folder, skip_unreadable=True)
    for path in paths(image_folder / "train" / "red"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"No image of class red can be read, so leaving them out leaves nothing\."):
        check(image_folder, skip_unreadable=True)


@pytest.mark.parametrize("place, found", [(0, True), (499, True), (1, False), (250, None)])
def test_one_broken_file_of_five_hundred_is_found_by_a_lucky_sample_and_by_looking_at_all(tmp_path, place, found):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    files = [tmp_path / "train" / "ab"[i // 250] / f"{i:03}.png" for i in range(500)]
    Image.new("RGB", (4, 4)).save(files[0])
    for path in files[1:]:
        shutil.copy(files[0], path)
    shutil.copytree(tmp_path / "train" / "b", tmp_path / "test" / "b")
    files[place].write_bytes(b"")
    seen = preflight._look(load(str(tmp_path)).train, whole=False, compare=False)
    assert len(seen) == 200 and min(seen) == 0 and max(seen) == 499
    assert max(b - a for a, b in zip(list(seen), list(seen)[1:])) == 3
    assert isinstance(seen.get(place), str) == (place in seen)
    if found is not None:
        assert (place in seen) == found
    with pytest.raises(ValueError, match=f"{place:03}.png cannot be read"):
        check(tmp_path, check_data=True)


# Copies


def test_copies_across_parts_are_found_under_any_name_and_lossless_format(image_folder, said):
    """Also a grey one, stored once as grey and once as colours."""
    Image.open(image_folder / "train/red/0.png").save(image_folder / "test/red/x.bmp")
    shutil.copy(image_folder / "train/blue/4.png", image_folder / "test/green/other.png")
    grey = Image.fromarray(RNG.integers(0, 256, (16, 16), dtype=np.uint8))
    grey.save(image_folder / "train/red/grey.png")
    grey.convert("RGB").save(image_folder / "test/red/grey.tif")
    check(image_folder)
    assert said.text == ""
    check(image_folder, check_data=True)
    only, = warnings_of(said)
    assert only.startswith("3 of 15 test images are in train, too, pixel for pixel (train/blue/4.png = "
                           "test/green/other.png, train/red/grey.png = test/red/grey.tif, train/red/0.png = "
                           "test/red/x.bmp): its scores count")
    assert "checked  52 images in" in said.text and "3 are copies of others" in said.text


def test_copies_between_each_two_parts_are_told_apart_and_at_most_three_are_named(said):
    data = in_memory([9, 9], [9, 9], [9, 9])
    data.val.images[:5] = data.train.images[:5]
    data.test.images[3] = data.val.images[10]
    preflight.check_data(data, Settings(check_data=True), (4, 4))
    first, second = warnings_of(said)
    assert first.startswith("5 of 18 val images are in train, too, pixel for pixel (train[0] = val[0], train[1] = "
                            "val[1], train[2] = val[2] and 2 more)")
    assert second.startswith("1 of 18 test images are in val, too, pixel for pixel (val[10] = test[3])")


def test_copies_inside_train_are_said_where_their_labels_differ(said):
    data = in_memory([9, 9])
    data.train.images[1] = data.train.images[0]
    preflight.check_data(data, Settings(check_data=True), (4, 4))
    assert warnings_of(said) == [] and "1 are copies of others" in said.text
    data.train.images[[11, 12]] = data.train.images[[2, 0]]
    preflight.check_data(data, Settings(check_data=True), (4, 4))
    assert warnings_of(said) == ["2 images are in train more than once and under different labels (train[0] = train[1],"
                                 " train[2] = train[11]): keep each under one."]


def test_copies_with_other_sets_of_labels_are_found_too(said):
    data = in_memory([6, 6])
    labels = torch.nn.functional.one_hot(data.train.labels, 2).float()
    data = replace(data, train=replace(data.train, labels=labels))
    data.train.images[7] = data.train.images[8]
    preflight.check_data(data, Settings(check_data=True), (4, 4))
    assert warnings_of(said) == []
    labels[8, 0] = 1
    preflight.check_data(data, Settings(check_data=True), (4, 4))
    assert len(warnings_of(said)) == 1 and "(train[7] = train[8])" in said.text


def test_the_same_pixels_in_another_shape_are_no_copy(tmp_path, said):
    pixels = RNG.integers(0, 256, (4, 8, 3), dtype=np.uint8)
    for part, array in (("train", pixels), ("test", pixels.reshape(8, 4, 3))):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(5):
                Image.fromarray(array + np.uint8(i + 10 * (name == "b"))).save(tmp_path / part / name / f"{i}.png")
    check(tmp_path, check_data=True)
    assert "no two are equal" in said.text and warnings_of(said) == []


# Classes and sizes


@pytest.mark.parametrize("train, test, settings, words", [
    ([5, 5], [1, 1], {}, None), ([4, 5, 4], [1, 1, 1], {}, "2 classes (a, c) have fewer than 5 training images: add"),
    ([9, 0], [1, 1], {}, "1 classes have no training image (b) and will not be predicted"),
    ([500, 9], [1, 1], {}, "1 classes (b) have less than 2 % of the images of the largest, a (500): accuracy hardly"),
    ([500, 9], [1, 1], {"class_weights": "balanced"}, None), ([500, 10], [1, 1], {}, None),
    ([9, 9, 9], [1, 0, 1], {}, "No image in the test part for 1 of train's classes (b): its scores say nothing")])
def test_what_the_labels_tell_of_the_classes_is_said(said, train, test, settings, words):
    preflight.check_data(in_memory(train, test), Settings(**settings), (4, 4))
    assert len(warnings_of(said)) == (words is not None) and (words or "") in said.text


def test_of_several_labels_an_image_each_counts(said):
    data = in_memory([8, 4])
    labels = torch.zeros(12, 2)
    labels[:, 0] = labels[:5, 1] = 1
    preflight.check_data(replace(data, train=replace(data.train, labels=labels)), Settings(), (4, 4))
    assert said.text == ""
    labels[0, 1] = 0
    preflight.check_data(replace(data, train=replace(data.train, labels=labels)), Settings(), (4, 4))
    assert "1 classes (b) have fewer than 5" in said.text


def test_images_that_have_to_be_enlarged_are_mentioned(image_folder, said):
    preflight.check_data(load(str(image_folder)), Settings(), (16, 32))
    preflight.check_data(in_memory([5, 5]), Settings(), (4, 4))
    assert said.text == ""
    preflight.check_data(load(str(image_folder)), Settings(), (24, 32))
    assert "Images of 16 x 16 px (median) are enlarged to 24 x 32" in said.text
    preflight.check_data(in_memory([5, 5]), Settings(), (8, 8))
    assert "Images of 4 x 4 px (median) are enlarged to 8 x 8" in said.text and warnings_of(said) == []


# The recipe


def summarise(model, data=None, origin=None, fitting=None, **settings):
    settings = {"num_steps": 100, "warmup_steps": 10, "train_batch_size": 8, **settings}
    origin = {"name": "a.npz", "sha256": "0123456789abcdef"} if origin is None else origin
    preflight.summarise(Settings(**settings), data or in_memory([5, 5], val=[2, 2]), model, origin,
                        Computing(CPU, torch.float32), Path("output/x"),
                        fitting or Fitting(settings.get("gradient_accumulation_steps", 1)))


def test_the_summary_tells_the_run_in_a_few_aligned_lines(tiny_model, said):
    summarise(tiny_model, train_batch_size=8, gradient_accumulation_steps=2)
    lines = dict(line.split(maxsplit=1) for line in said.messages)
    assert lines["model"] == "custom, 0.02 M parameters, 16 x 16 px, 3 channels, dropout 0"
    assert lines["weights"] == "a.npz (sha256 0123456789ab), new head"
    assert lines["data"] == "set: 10 train, 4 val, 2 test, 2 classes"
    assert lines["batch"] == "8 = 2 x 4; 100 steps are 80 epochs"
    assert lines["recipe"].startswith("sgd, LR 0.03 after 10 steps of warm-up, cosine, clip 1")
    assert lines["device"].startswith("cpu, float32, about ") and lines["output"] == "output/x"
    assert len(said.messages) == 7 and {line[8] for line in said.messages} == {" "}


def test_whoever_starts_from_nothing_on_few_images_is_told_what_to_expect(tiny_model, said, monkeypatch):
    monkeypatch.setattr(preflight, "training_seconds", lambda model, images, computing: 9 * images)
    summarise(tiny_model)
    assert "expect" not in said.text and "hours" not in said.text
    summarise(tiny_model, origin={}, learning_rate=0.03)
    assert "expect   from random weights on 10 images, far less than from pretrained ones." in said.text
    assert "roughly 2.0 hours of training here" in said.text  # 100 steps of 8 images of 9 seconds


def test_what_goes_beyond_the_papers_recipe_is_said(tiny_config, said):
    model = VisionTransformer(configs.replace(tiny_config, drop_path_rate=0.2, pos_embed="sincos2d"), 16, 2)
    summarise(model, mixup=0.8, randaugment=2, pad_crop=4, ema=0.99, early_stopping=3, label_smoothing=0.1)
    assert ("extras   crops out of 4 px around, mixup 0.8, RandAugment 2 of magnitude 9, label smoothing 0.1, EMA "
            "0.99, stops after 3 evaluations without a new best, stochastic depth 0.2, positions sincos2d") in said.text
    said.clear()
    summarise(VisionTransformer(tiny_config, 16, 2))
    assert "extras" not in said.text


def test_averaged_weights_are_in_the_estimates(tiny_model):
    plain, ema = Settings(num_steps=1), Settings(num_steps=1, ema=0.9)
    weights = 4 * sum(p.numel() for p in tiny_model.parameters())
    needs = [resources.memory(tiny_model, s, torch.float32, CPU, 1, 1).total for s in (plain, ema)]
    assert needs[1] - needs[0] == weights
    assert resources.disk(tiny_model, ema) - resources.disk(tiny_model, plain) == 4 * weights  # three states, one file


@pytest.mark.parametrize("parts, settled, words", [
    (1, True, "8 at once (auto); 100"), (2, True, "8 in 2 micro-batches of 4 (auto); 100"),
    (2, False, "8 in as few parts as fit (auto); 100")])
def test_the_summary_tells_the_split_that_was_chosen(tiny_model, said, parts, settled, words):
    summarise(tiny_model, fitting=Fitting(parts, automatic=True, settled=settled))
    assert f"batch    {words} steps are 80 epochs" in said.messages


@pytest.mark.parametrize("settings, words", [
    ({}, None), ({"warmup_steps": 99}, None), ({"train_batch_size": 10}, None), ({"train_batch_size": 2}, None),
    ({"warmup_steps": 100}, "The warm-up of 100 steps is not over when the run of 100 ends, and the learning rate stays"
                            " small: try --warmup_steps 5."),
    ({"train_batch_size": 11}, "A batch of 11 shows some of the 10 training images more than once")])
def test_a_recipe_that_does_not_fit_is_said(tiny_model, said, settings, words):
    summarise(tiny_model, **settings)
    assert [line[:len(words or "")] for line in warnings_of(said)] == ([words] if words else [])


def test_what_is_held_out_and_what_is_cut_off_is_said(tiny_config, said):
    summarise(VisionTransformer(tiny_config, (18, 16), 2), in_memory([5, 5]))
    assert [line.split(":")[0] for line in warnings_of(said)] == [
        "Nothing is held out", "Images of 18 x 16 px are no whole number of patches"]
    assert "right of or below 16 x 16" in said.text


@pytest.mark.parametrize("optimizer, scratch, rate, batch, words", [
    ("sgd", False, 0.03, 512, None), ("sgd", False, 0.001, 512, None), ("sgd", False, 0.06, 512, None),
    ("sgd", False, 1.0, 512, "1 is far above what the paper's fine-tuning with sgd took (0.001 to 0.06): try "
                             "--learning_rate 0.01."),
    ("sgd", False, 1.0, 4096, None), ("sgd", False, 1e-5, 512, "1e-05 is far below"), ("sgd", False, 1e-5, 8, None),
    ("adamw", False, 0.03, 512, "0.03 is far above what fine-tuning with adamw usually takes (1e-05 to 0.001): try "
                                "--learning_rate 0.0001."),
    ("adamw", False, 0.03, 50_000, "far above"), ("adam", False, 1e-4, 512, None),
    ("adam", False, 0.01, 512, "0.01 is far above"),
    ("adamw", True, 3e-3, 512, None), ("adamw", True, 0.03, 512, "far above what training from scratch with adamw"),
    ("sgd", True, 0.3, 512, None), ("sgd", True, 3.0, 512, "far above what training from scratch with sgd takes")])
def test_a_learning_rate_far_outside_of_what_works_is_said_with_a_better_one(tiny_model, said, optimizer, scratch, rate,
                                                                             batch, words):
    data = in_memory([25_000, 25_000], val=[1, 1])
    summarise(tiny_model, data, {} if scratch else None, optimizer=optimizer, learning_rate=rate,
              train_batch_size=batch)
    assert len(warnings_of(said)) == (words is not None) and (words or "") in said.text


# Memory


@pytest.mark.parametrize("batch, changes, precision, heads", [
    (4, {}, torch.float32, 2), (4, {"dropout_rate": 0.1}, torch.float32, 2), (3, {}, torch.bfloat16, 2),
    (3, {"dropout_rate": 0.1}, torch.bfloat16, 4)])
def test_what_a_block_keeps_is_what_autograd_keeps(tiny_config, batch, changes, precision, heads):
    """17 x 17 + 1 tokens: above the 128 up to which a CPU in bfloat16 takes another kernel."""
    kept, sizes = {}, {}
    for layers in (1, 3):
        config = configs.replace(tiny_config, num_layers=layers, num_heads=heads, **changes)
        model = VisionTransformer(config, 68, 5).train()
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        kept[layers] = found = {}

        def keep(tensor, found=found, own=own):
            if tensor.untyped_storage()._cdata not in own:
                found[tensor.untyped_storage()._cdata] = tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
             torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            model(torch.zeros(batch, 3, 68, 68))
        sizes[layers] = resources.activations(model, batch, precision, CPU) / resources.SLACK
    counted = {n: sum(t.untyped_storage().nbytes() for t in found.values()) for n, found in kept.items()}
    copies = 2 * 2 * 8 * 32 * 32 * (precision == torch.bfloat16)  # two blocks' weights in bfloat16 are counted apart
    assert sizes[3] - sizes[1] == pytest.approx(counted[3] - counted[1] - copies, rel=0.01)


MEASURE = """
import torch
from torch.nn.functional import cross_entropy
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils import resources
from utils.optim import make_optimizer
from utils.settings import Settings

def train(batch, steps):
    model = VisionTransformer(CONFIGS["ViT-demo"], 32, 10)
    optimizer = make_optimizer(model, "sgd")
    for _ in range(steps):
        cross_entropy(model(torch.randn(batch, 3, 32, 32)), torch.zeros(batch, dtype=torch.int64)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model

def peak():  # not ru_maxrss, which begins with what the process of the tests had
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
train(1, 1)
before = peak()
model = train(96, 2)
estimate = resources.memory(model, Settings(train_batch_size=96), torch.float32, torch.device("cpu"), 1, 1).total
print((peak() - before) / estimate)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_the_estimate_is_near_the_measured_peak_of_the_demo():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert 0.7 < float(done.stdout) < 1.3


def test_memory_follows_optimiser_micro_batches_and_processes(tiny_model):
    def needs(processes=1, parts=1, **settings):
        settings = Settings(train_batch_size=64, **settings)
        return resources.memory(tiny_model, settings, torch.float32, CPU, processes, parts)
    numbers = sum(p.numel() for p in tiny_model.parameters())
    assert needs().optimizer == needs().weights == 4 * numbers and needs(optimizer="adamw").optimizer == 8 * numbers
    assert needs(momentum_dtype="bfloat16").optimizer == 2 * numbers
    assert needs(parts=4).activations == pytest.approx(needs().activations / 4, abs=1)
    assert needs(parts=4).gradients == 4 * numbers and needs().gradients == 0
    assert needs(2, parts=4).gradients == 8 * numbers and needs(2).gradients == 4 * numbers  # DDP's copies
    assert needs(4).batch == needs().batch // 4 and needs().batch == 64 * 3 * 16 * 16 * 4
    assert needs(2).total < needs().total == sum(needs())


def test_a_hybrid_s_stem_is_counted(tiny_config):
    hybrid = configs.replace(tiny_config, resnet={"num_layers": (1, 1), "width_factor": 0.5}, patch_size=(1, 1))
    model = VisionTransformer(hybrid, 32, 5)
    stem = resources._stem(model.config, model.img_size)
    half = resources._stem(model.config, (16, 16))
    assert resources._stem(tiny_config, (32, 32)) == 0 and half < stem == pytest.approx(4 * half, rel=0.1)


@pytest.mark.parametrize("free, advice", [
    (None, None), (1, None), (2, "try --gradient_accumulation_steps 2."), (8, "try --gradient_accumulation_steps 8."),
    (0, "try a smaller --img_size or model.")])
def test_a_step_that_does_not_fit_is_said_with_the_split_that_would(tiny_model, said, monkeypatch, free, advice):
    """free: as much as a step of so many micro-batches takes."""
    free = free and resources.memory(tiny_model, Settings(train_batch_size=32), torch.float32, CPU, 1, free).total
    monkeypatch.setattr(resources, "free_memory", lambda device: free)
    summarise(tiny_model, in_memory([40, 40], val=[1, 1]), train_batch_size=32)
    assert [line.split(": ")[1] for line in warnings_of(said)] == ([advice] if advice else [])
    assert ("A training step takes about " in said.text) == bool(advice)


@pytest.mark.parametrize("limit, free", [("1000", 1000 - 700 + 200), ("800", 300), ("100", 0), ("max", None)])
def test_free_memory_keeps_to_the_limit_of_a_container(tmp_path, limit, free):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 100\n")
    found = resources.free_memory(CPU, tmp_path)
    assert found == free if free is not None else found > 10**6


def test_free_memory_is_a_plausible_number():
    free = resources.free_memory(CPU)
    assert free is None or 2**20 < free < 2**50


# The disk


Usage = namedtuple("Usage", "total used free")


def test_the_outputs_need_three_states_and_three_files_of_weights(tiny_model):
    weights = sum(p.numel() * 4 for p in tiny_model.parameters())
    one, two = (resources.disk(tiny_model, Settings(optimizer=name, num_steps=1)) for name in ("sgd", "adam"))
    assert one == 3 * 3 * weights + 3 * weights + 900 and two - one == 3 * weights
    assert resources.disk(tiny_model, Settings(num_steps=1001)) - one == 1000 * 900


def test_too_little_room_is_an_error_and_just_enough_a_warning(tiny_model, tmp_path, monkeypatch, said):
    need = resources.disk(tiny_model, Settings())
    asked = []

    def room(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(10 * GIB, 0, free))
        preflight.check_room(Settings(), tiny_model, tmp_path / "not" / "there" / "yet")
    room(int(1.5 * need) + 1)
    assert said.text == "" and asked == [tmp_path]
    room(need)
    only, = warnings_of(said)
    assert only.startswith(f"The outputs of this run take up to {resources.amount(need)}, and ")
    with pytest.raises(ValueError, match=rf"take up to {resources.amount(need)}, and {resources.amount(need // 2)} are "
                                         r"free where .*yet will lie\. Make room, or choose another --output_dir\."):
        room(need // 2)


def test_what_a_run_replaces_counts_as_room(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(GIB, GIB, 1000))
    (tmp_path / "state.pt").write_bytes(bytes(5000))
    assert resources.free_disk(tmp_path) == 6000 and resources.free_disk(tmp_path / "new") == 1000


@pytest.mark.parametrize("size, words", [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1536, "1.5 KiB"),
                                         (5 * 2**20, "5 MiB"), (3.2 * 2**30, "3.2 GiB"), (2**41, "2 TiB")])
def test_amounts_are_readable(size, words):
    assert resources.amount(size) == words


# The dry run


def dry(model, said, data=None, **settings):
    settings = {"num_steps": 100, "warmup_steps": 10, "train_batch_size": 8, **settings}
    preflight.dry_run(Settings(**settings), data or in_memory([40, 40], [4, 9]), model, Computing(CPU, torch.bfloat16),
                      Path("output/x"), Fitting(4, automatic=True))
    told, = said.messages
    lines = [line.split() for line in told.splitlines() if line.startswith("  ")]
    return {name: " ".join(words) for name, *words in reversed(lines)}  # data before settings: both have a `train`


def test_a_dry_run_tells_data_course_needs_and_every_setting(tiny_model, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = dry(tiny_model, said, eval_every=30, optimizer="adamw")
    assert told["train"] == "80 images of 2 classes: 40 in each"
    assert told["test"] == "13 images of 2 classes: 4 (a) to 9 (b)"
    assert told["epochs"] == "10, of 10 steps each"
    assert told["evaluations"] == "4, every 30 steps and at the end, on test"
    rates = dict(pair.rsplit(": ", 1) for pair in told["learning"].removeprefix("rate ").split(", "))
    assert rates["step 1"] == "0" and rates["step 11"] == "0.03" and list(rates) == ["step 1", "step 11", "step 50",
                                                                                     "step 100"]
    assert float(rates["step 50"]) == pytest.approx(0.015 * (1 + math.cos(math.pi * 39 / 90)), rel=0.01)
    assert float(rates["step 100"]) < 1e-4
    assert told["memory"].startswith("about ") and "activations" in told["memory"] and "of" in told["disk"]
    assert told["optimizer"] == "* adamw" and told["precision"] == "> bfloat16" and told["seed"] == "42"
    assert told["img_size"] == "> 16,16" and told["model_type"] == "> custom" and told["min_area"] == "> 0.05"
    assert told["eval_every"] == "* 30" and told["metric"] == "> accuracy" and told["name"] == "> x"
    assert told["gradient_accumulation_steps"] == "> 4" and told["compile"] == "> off"
    assert "Nothing was written" in said.text and list(tmp_path.iterdir()) == []


def test_a_dry_run_without_warm_up_or_of_one_step(tiny_model, said):
    assert dry(tiny_model, said, num_steps=1, warmup_steps=0)["learning"] == "rate step 1: 0.03"


def test_a_dry_run_shows_each_setting_that_decides(tiny_model, said):
    told = dry(tiny_model, said)
    assert {f.name for f in fields(Settings)} - told.keys() == preflight.NOT_SHOWN
