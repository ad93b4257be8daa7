"""Datasets and folders -> splits. All images are written here; nothing is downloaded."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from utils import data

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def images(root, counts, suffix=".png"):
    """ROOT/PATH/0.png, ... for {PATH: count}."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(RGB).save(root / folder / f"{i}{suffix}")
    return str(root)


# Folders


def test_val_selects_and_test_scores_where_both_exist(tmp_path):
    counts = {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 1, "test/dog": 2}
    root = images(tmp_path / "pets", counts)
    pets = data.load(root)
    assert (pets.name, len(pets.train), len(pets.val), len(pets.test)) == ("pets", 5, 2, 2)
    assert (pets.test_name, pets.view, pets.train.classes) == ("test/", data.View(0.05, True), ("cat", "dog"))
    assert pets.train.labels.tolist() == [0, 0, 0, 1, 1] and pets.train.labels.dtype == torch.int64
    assert pets.val.images == [tmp_path / "pets/val/cat/0.png", tmp_path / "pets/val/dog/0.png"]


@pytest.mark.parametrize("folder", ["test", "val", "valid", "validation", "Test"])
def test_the_only_other_part_scores(tmp_path, folder):
    root = images(tmp_path, {"train/a": 2, "train/b": 2, f"{folder}/a": 1, f"{folder}/b": 1, "samples/x": 3})
    loaded = data.load(root)
    assert (loaded.val, len(loaded.test), loaded.test_name) == (None, 2, f"{folder}/")


@pytest.mark.parametrize("train", ["train/", ""])
def test_without_a_test_part_a_stratified_fifth_is_held_out_and_said(tmp_path, caplog, train):
    root = images(tmp_path, {f"{train}a": 10, f"{train}b": 20, f"{train}single": 1})
    with caplog.at_level(logging.INFO):
        loaded = data.load(root, seed=3)
    assert loaded.test.labels.bincount().tolist() == [2, 4]
    assert loaded.train.labels.bincount().tolist() == [8, 16, 1]
    assert not {*loaded.train.images} & {*loaded.test.images}
    assert loaded.test_name == "held-out 20 % of train" and loaded.val is None
    assert "neither test/ nor val/: 6 of 31 images (20 %, stratified, seed 3) are held out" in caplog.text
    assert data.load(root, seed=3).test.images == loaded.test.images != data.load(root, seed=4).test.images


def test_class_numbers_come_from_train_when_the_test_part_lacks_a_class(tmp_path, caplog):
    root = images(tmp_path, {"train/a": 1, "train/b": 1, "train/c": 1, "test/a": 1, "test/c": 2})
    with caplog.at_level(logging.INFO):
        test = data.load(root).test
    assert test.labels.tolist() == [0, 2, 2] and test.classes == ("a", "b", "c")
    assert "has no images of b; class numbers stay those of train." in caplog.text


def test_files_are_found_below_their_class_in_any_case_and_sorted(tmp_path, caplog):
    root = tmp_path
    images(root, {"train/a": 1, "train/b": 1, "test/a": 1, "train/a/deep/er": 1})
    for name in ["Z.JPG", "y.jpeg", ".h.png", "x.Tiff", "w.gif", "v.webp", "u.bmp", "notes.txt", "clip.mp4"]:
        (root / "train/a" / name).touch()
    images(root, {"train": 1, "train/.cache": 1})
    train = data.load(str(root)).train
    names = "a/0.png a/Z.JPG a/deep/er/0.png a/u.bmp a/v.webp a/w.gif a/x.Tiff a/y.jpeg b/0.png"
    assert train.images == [root / "train" / name for name in names.split()]
    assert "1 files with other suffixes are ignored (1 .mp4)" in caplog.text
    assert "1 images lie outside of the class folders" in caplog.text


@pytest.mark.parametrize("counts, message", [
    ({"train/a": 1, "train/b": 1, "test/A": 1}, r"test.A is a class that train lacks; there: a, b\."),
    ({"train/a": 1, "train/b": 0, "test/a": 1}, r"train.b holds no images \(.*: fill this class folder"),
    ({"train/a": 1, "train/b": 1, "test/b": 0}, r"test holds no images in its class folders"),
    ({"train/a": 5}, r"train has one class only, a \(5 images\): training needs two or more\."),
    ({"a": 5}, r"has one class only, a "),
    ({"a": 1, "b": 1}, r"no test part and one image in each class"),
    ({"train": 3}, r"train holds 3 images and no class folders\. Expected DIR/train/CLASS"),
    ({"": 4}, r"holds 4 images and no class folders\. Expected DIR/train/CLASS"),
    ({"test/a": 1, "test/b": 1}, r"has test/ but no train/\. Expected DIR/train/CLASS"),
    ({"train/a": 1, "val/a": 1, "valid/a": 1}, r"has both val/ and valid/: keep one of them as val/\."),
    ({"one/train/a": 1, "two/train/a": 1}, r"not a set of images itself but holds one: give .*one\.$")])
def test_a_folder_that_cannot_be_meant_is_explained(tmp_path, counts, message):
    with pytest.raises(ValueError, match=message):
        data.load(images(tmp_path, counts))


def test_what_is_neither_a_named_set_nor_a_folder_is_said_with_the_nearest_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar-10")
    assert str(error.value) == ("cifar-10 is neither a named set (cifar10, cifar100, digits, pets, flowers, "
                                "imagenet) nor a folder that exists. Did you mean cifar10?")
    with pytest.raises(FileNotFoundError, match=r"nor a folder that exists\.$"):
        data.load(str(tmp_path / "absent"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; expected a folder \(DIR/train/CLASS"):
        data.load(str(tmp_path / "file"))


# Splits


def test_stratified_holds_out_its_share_of_every_class():
    labels = torch.arange(1000) % 4
    kept, held = data.stratified(labels, 0.1, seed=5)
    assert labels[held].bincount().tolist() == [25] * 4
    assert torch.cat([kept, held]).sort().values.tolist() == list(range(1000))
    assert held.tolist() == sorted(held.tolist()) and kept.tolist() == sorted(kept.tolist())
    assert torch.equal(held, data.stratified(labels, 0.1, seed=5)[1])
    assert not torch.equal(held, data.stratified(labels, 0.1, seed=6)[1])


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_each_class_of_two_keeps_one_on_each_side_and_a_single_image_is_kept(fraction):
    kept, held = data.stratified(torch.tensor([3, 0, 0, 1, 3]), fraction, seed=0)
    assert torch.tensor([3, 0, 0, 1, 3])[kept].sort().values.tolist() == [0, 1, 3]
    assert len(held) == 2
    with pytest.raises(ValueError, match="more than 0 and less than 1"):
        data.stratified(torch.tensor([0, 0]), 1.0, seed=0)


def test_val_fraction_is_taken_from_train_alone(tmp_path, caplog):
    root = images(tmp_path, {"train/a": 10, "train/b": 10, "test/a": 1, "test/b": 1})
    whole, loaded = data.load(root), data.load(root, val_fraction=0.3, seed=1)
    assert loaded.val.labels.tolist() == [0] * 3 + [1] * 3 and loaded.test.images == whole.test.images
    assert sorted(loaded.train.images + loaded.val.images) == whole.train.images
    images(tmp_path, {"val/a": 1})
    loaded = data.load(root, val_fraction=0.3)
    assert (len(loaded.train), len(loaded.val)) == (20, 1)
    assert "val_fraction 0.3 is ignored" in caplog.text


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_val_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="the share of train to hold out is 0 to below 1"):
        data.load("digits", val_fraction=fraction)


def test_a_subset_keeps_the_given_order_for_tensors_and_for_files(tmp_path):
    labels, classes = torch.tensor([0, 1, 2]), ("a", "b", "c")
    pixels = data.Split(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1), labels, classes).subset([2, 0])
    files = data.Split([tmp_path / name for name in "xyz"], labels, classes).subset(torch.tensor([2, 0]))
    assert pixels.images.flatten().tolist() == pixels.labels.tolist() == [2, 0]
    assert [path.name for path in files.images] == ["z", "x"] and files.classes == classes and len(files) == 2


def test_several_labels_are_stratified_by_the_rarest_of_each_image():
    """Rare classes within 2 images of their share; chance alone is off by 3 or more of 50 in a third of draws."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(1000, 4, generator=generator) < torch.tensor([0.6, 0.3, 0.1, 0.05])).float()
    kept, held = data.stratified(labels, 0.2, seed=5)
    assert torch.cat([kept, held]).sort().values.tolist() == list(range(1000)) and abs(len(held) - 200) <= 2
    for part in (kept, held):
        assert part.tolist() == sorted(part.tolist())
    rare = labels[:, 2:].sum(dim=0)
    assert (labels[held][:, 2:].sum(dim=0) - 0.2 * rare).abs().max() <= 2
    assert (labels[held].mean(dim=0) - labels.mean(dim=0)).abs().max() < 0.05
    assert torch.equal(held, data.stratified(labels, 0.2, seed=5)[1])
    assert not torch.equal(held, data.stratified(labels, 0.2, seed=6)[1])


def test_each_of_several_labels_keeps_an_image_in_train():
    """The third class has two images, each of which a rarer or equally rare class may hold out."""
    labels = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]).float()
    both = 0
    for seed in range(60):
        kept, held = data.stratified(labels, 0.5, seed)
        assert labels[kept].any(dim=0).all() and 2 <= len(held) <= 3
        assert torch.cat([kept, held]).sort().values.tolist() == list(range(6))
        both += len(held) == 2
    assert 5 < both < 30  # one draw in four


def fingerprint_of(root, **options):
    return data.load(str(root), **options).fingerprint()


def test_the_fingerprint_is_that_of_the_data_wherever_it_lies(tmp_path, monkeypatch):
    pets = images(tmp_path / "pets", {"train/a": 3, "train/b": 2, "test/a": 1})
    first = fingerprint_of(pets)
    assert len(first) == 64 and int(first, 16) and first == fingerprint_of(pets)
    (tmp_path / "pets").rename(tmp_path / "moved")
    assert fingerprint_of(tmp_path / "moved") == first
    monkeypatch.chdir(tmp_path / "moved")
    assert fingerprint_of(".") == first
    assert fingerprint_of(".", val_fraction=0.5) != first


@pytest.mark.parametrize("change", [
    lambda root: (root / "train/a/0.png").unlink(),
    lambda root: (root / "train/a/0.png").rename(root / "train/a/9.png"),
    lambda root: (root / "train/a/0.png").rename(root / "train/b/0.png"),
    lambda root: (root / "train/a").rename(root / "train/c"),
    lambda root: (root / "test").rename(root / "val"),
    lambda root: (root / "train/a/0.png").write_bytes((root / "train/a/0.png").read_bytes() + b"x"),
    lambda root: (root / "test/b/7.png").write_bytes((root / "test/b/0.png").read_bytes())])
def test_another_image_name_label_size_or_part_is_another_fingerprint(tmp_path, change):
    root = images(tmp_path, {"train/a": 2, "train/b": 1, "test/b": 1})
    Image.fromarray(RGB).save(tmp_path / "train/b/5.png")
    first = fingerprint_of(root)
    change(tmp_path)
    assert fingerprint_of(root) != first


def test_the_fingerprint_sees_pixels_in_memory_and_the_labels_of_a_file(tmp_path):
    pixels, labels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    other = pixels.clone()
    other[3, 2, 1, 1] = 1

    def of(pixels, labels, classes=("a", "b")):
        split = data.Split(pixels, labels, classes)
        return data.Data("x", split, None, split, data.View(), "test").fingerprint()
    found = [of(pixels, labels), of(other, labels), of(pixels, labels.flip(0)), of(pixels, labels, ("a", "c")),
             of(pixels.view(4, 3, 4, 1), labels), of(pixels, torch.eye(2)[labels])]
    assert len(set(found)) == 6 and of(pixels.clone(), labels.clone()) == found[0]

    root = images(tmp_path, {"": 4})
    found = []
    for words in ("aabb", "abab", "bbaa"):
        text = "image,label\n" + "".join(f"{i}.png,{word}\n" for i, word in enumerate(words))
        (tmp_path / "labels.csv").write_text(text)
        found.append(fingerprint_of(root, labels=str(tmp_path / "labels.csv")))
    assert len(set(found)) == 3


# Named sets


def test_digits_are_scaled_to_bytes_and_their_test_part_does_not_depend_on_the_seed():
    digits, other = data.load("digits", seed=1), data.load("digits", seed=2, val_fraction=0.1)
    assert digits.train.images.shape == (1438, 3, 8, 8) and digits.train.images.dtype == torch.uint8
    assert sorted(digits.train.images.unique().tolist()) == [round(value * 255 / 16) for value in range(17)]
    assert digits.train.images[0, :, 0].tolist() == [[0, 0, 80, 207, 143, 16, 0, 0]] * 3
    assert digits.train.classes == tuple("0123456789") and digits.view == data.View(min_area=0.6, flip=False)
    assert torch.equal(digits.test.images, other.test.images) and len(digits.test) == 359
    assert len(other.train) + len(other.val) == 1438
    assert digits.test.labels.bincount().min() == 35


def test_a_row_of_the_table_is_all_that_a_named_set_needs(monkeypatch, tmp_path):
    split = data.Split(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    row = data.NamedSet(lambda data_dir: (split, split), data.View(0.3), "test")
    monkeypatch.setitem(data.NAMED, "tiny", row)
    loaded = data.load("tiny", data_dir=str(tmp_path), val_fraction=0.5)
    assert (len(loaded.train), len(loaded.val), len(loaded.test), loaded.view.min_area) == (2, 2, 4, 0.3)
