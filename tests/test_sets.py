"""Named sets in the layout of their publishers -> splits. All files are written here; nothing is downloaded."""

import logging
import pickle
import tarfile
import urllib.error
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from utils import data
from utils.images import decode_all

BREEDS = ("Abyssinian", "american_bulldog", "Bengal")
WNIDS = ("n01440764", "n01443537", "n01484850")
PUBLISHED = {  # train, test, classes, steps, warm-up, rates, share held out
    "cifar10": (50_000, 10_000, 10, 10_000, 500, (.001, .003, .01, .03), .02),
    "cifar100": (50_000, 10_000, 100, 10_000, 500, (.001, .003, .01, .03), .02),
    "digits": (1_438, 359, 10, None, None, (), None),
    "pets": (3_680, 3_669, 37, 500, 100, (.001, .003, .01, .03), .10),
    "flowers": (2_040, 6_149, 102, 500, 100, (.001, .003, .01, .03), .10),
    "imagenet": (1_281_167, 50_000, 1_000, 20_000, 500, (.003, .01, .03, .06), .01)}


@pytest.fixture
def counting(monkeypatch):
    """counting(name, train, test, classes): what is taken for published, as the files here are few."""
    def expect(name, train, test, classes):
        row = replace(data.NAMED[name], train_images=train, test_images=test, classes=classes)
        monkeypatch.setitem(data.NAMED, name, row)
    return expect


@pytest.fixture
def offline(monkeypatch):
    """Every download is refused; the URLs that were asked for."""
    asked = []

    def refused(url, *args, **kwargs):
        asked.append(url)
        raise urllib.error.URLError("no route to host")
    for module in ("cifar", "oxford_iiit_pet", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refused)
    monkeypatch.setattr("torchvision.datasets.flowers102.download_url", refused)
    return asked


def picture(file):
    """A JPEG of 8 x 6 px."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), 90, np.uint8)).save(file, "JPEG")


def empty(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def pets(root, lists, write=picture):
    """oxford-iiit-pet/ as its archives unpack; lists: {trainval, test: [(breed, number of class, of image)]}."""
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for part, rows in lists.items():
        (folder / "annotations" / f"{part}.txt").write_text(
            "".join(f"{breed}_{i} {number} {1 + breed[0].islower()} 1\n" for breed, number, i in rows))
        for breed, _, i in rows:
            write(folder / "images" / f"{breed}_{i}.jpg")
    (folder / "images" / "Abyssinian_100.mat").touch()  # the genuine archive has some, too
    return folder


def few_pets(root):
    rows = [(breed, number, i) for number, breed in enumerate(BREEDS, 1) for i in range(1, 7)]
    return pets(root, {"trainval": [row for row in rows if row[2] > 2], "test": [row for row in rows if row[2] <= 2]})


def flowers(root, labels, write=picture, **ids):
    """flowers-102/; labels (from 1) of images 1, 2, ...; ids: trnid, valid, tstid."""
    folder = root / "flowers-102"
    folder.mkdir(parents=True)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {part: np.array([numbers], np.uint16) for part, numbers in ids.items()})
    for i in range(1, len(labels) + 1):
        write(folder / "jpg" / f"image_{i:05d}.jpg")
    return folder


def imagenet(root, train=3, val=2, wnids=WNIDS):
    for wnid in wnids:
        for i in range(train):
            empty(root / "imagenet/train" / wnid / f"{wnid}_{10 - i}.JPEG")
    for k, wnid in enumerate(wnids * val, 1):
        picture(root / "imagenet/val" / wnid / f"ILSVRC2012_val_{k:08d}.JPEG")
    return root / "imagenet"


def message(kind, name, root, **options):
    with pytest.raises(kind) as error:
        data.load(name, data_dir=str(root), **options)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


# The table


def test_the_table_says_what_was_published():
    assert data.NAMED.keys() == PUBLISHED.keys()
    for name, row in data.NAMED.items():
        found = (row.train_images, row.test_images, row.classes, row.steps, row.warmup, row.rates, row.held_out)
        assert found == PUBLISHED[name], name
        assert row.resolution == (None if name == "digits" else 384)


def test_other_counts_than_the_published_are_refused_with_both(tmp_path, counting):
    few_pets(tmp_path)
    for counts in ((13, 6, 3), (12, 5, 3), (12, 6, 4)):
        counting("pets", *counts)
        assert message(ValueError, "pets", tmp_path) == (
            f"pets in {tmp_path} has 12 training and 6 test images of 3 classes, where {counts[0]} training and "
            f"{counts[1]} test images of {counts[2]} classes were published: it was unpacked in part, or is a "
            "selection, which --dataset takes as a folder.")


def test_a_folder_of_the_same_name_is_said_before_anything_is_downloaded(tmp_path, monkeypatch, offline, caplog):
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        message(OSError, "pets", tmp_path)
    first, second = caplog.messages
    assert first == f"pets is the named set; for the folder here write {tmp_path / 'pets'}."
    assert second == f"Downloading https://www.robots.ox.ac.uk/~vgg/data/pets/data/ into {tmp_path}."


@pytest.mark.parametrize("name, title, url, by_hand", [
    ("cifar10", "CIFAR10", datasets.CIFAR10.url, "cifar-10-python.tar.gz or the folder cifar-10-batches-py there"),
    ("pets", "Oxford-IIIT Pet", "https://www.robots.ox.ac.uk/~vgg/data/pets/data/",
     "images.tar.gz and annotations.tar.gz, or the folders images and annotations, in DIR/oxford-iiit-pet"),
    ("flowers", "Oxford Flowers-102", "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
     "102flowers.tgz (or its folder jpg), setid.mat and imagelabels.mat in DIR/flowers-102")])
def test_a_failed_download_says_what_was_tried_and_where_to_put_the_files(tmp_path, offline, name, title, url, by_hand):
    assert message(OSError, name, tmp_path).replace(str(tmp_path), "DIR") == (
        f"{title} is not in DIR; downloading {url} failed (<urlopen error no route to host>). Put {by_hand} by hand.")
    assert len(offline) == 1 and offline[0].startswith(url)


# CIFAR


def unpacked_cifar(root, cifar, label_key, names):
    """CIFAR's pickles with two images each; the values of image i of file f are 10 f + i."""
    folder = root / cifar.base_folder
    folder.mkdir(parents=True)
    for f, (name, _) in enumerate(cifar.train_list + cifar.test_list):
        pixels = np.full((2, 3072), 10 * f, np.uint8) + np.array([[0], [1]], np.uint8)
        pixels[:, 1:3] = 201, 202  # the second and third pixel of red
        with open(folder / name, "wb") as file:
            pickle.dump({"data": pixels, label_key: [0, 1]}, file)
    with open(folder / cifar.meta["filename"], "wb") as file:
        pickle.dump({cifar.meta["key"]: names}, file)


@pytest.mark.parametrize("name, cifar, key, batches", [
    ("cifar10", datasets.CIFAR10, "labels", 5), ("cifar100", datasets.CIFAR100, "fine_labels", 1)])
def test_unpacked_cifar_is_read_without_a_network(tmp_path, monkeypatch, counting, name, cifar, key, batches):
    unpacked_cifar(tmp_path, cifar, key, ["frog", "ship"])
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", None)
    counting(name, 2 * batches, 2, 2)
    loaded = data.load(name, data_dir=str(tmp_path))
    assert loaded.train.images.shape == (2 * batches, 3, 32, 32) and loaded.train.classes == ("frog", "ship")
    assert loaded.train.labels.tolist() == [0, 1] * batches and loaded.train.images.dtype == torch.uint8
    assert loaded.test.images[:, 1, 4, 5].tolist() == [10 * batches, 10 * batches + 1]
    assert loaded.test.images[0, 0, 0, :3].tolist() == [10 * batches, 201, 202]
    assert (loaded.val, loaded.test_name, loaded.view) == (None, "test", data.View())


# Pets


def test_pets_are_read_from_their_lists(tmp_path, offline, counting):
    few_pets(tmp_path)
    counting("pets", 12, 6, 3)
    loaded = data.load("pets", data_dir=str(tmp_path))
    images = tmp_path / "oxford-iiit-pet/images"
    assert loaded.train.classes == loaded.test.classes == ("Abyssinian", "American Bulldog", "Bengal")
    assert loaded.train.images[:5] == [*(images / f"Abyssinian_{i}.jpg" for i in (3, 4, 5, 6)),
                                       images / "american_bulldog_3.jpg"]
    assert loaded.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and loaded.train.labels.dtype == torch.int64
    assert loaded.test.images[0] == images / "Abyssinian_1.jpg" and loaded.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (loaded.val, loaded.test_name, loaded.view, offline) == (None, "test", data.View(), [])


def test_pets_are_read_as_torchvision_reads_them(tmp_path, counting):
    few_pets(tmp_path)
    counting("pets", 12, 6, 3)
    ours = data.load("pets", data_dir=str(tmp_path))
    for part, split in ((ours.train, "trainval"), (ours.test, "test")):
        theirs = datasets.OxfordIIITPet(tmp_path, split)
        assert part.images == theirs._images and part.labels.tolist() == theirs._labels
        assert list(part.classes) == theirs.classes


def test_whole_pets_have_the_published_sizes_and_a_tenth_is_held_out(tmp_path, offline):
    """As many files as the genuine set has, all empty: they are listed, not decoded."""
    breeds = [*BREEDS, *(f"breed_{number}" for number in range(4, 38))]
    lists = {part: [(breeds[i % 37], i % 37 + 1, start + i) for i in range(count)]
             for part, start, count in (("trainval", 0, 3680), ("test", 10_000, 3669))}
    pets(tmp_path, lists, empty)
    loaded = data.load("pets", data_dir=str(tmp_path), val_fraction=data.NAMED["pets"].held_out, seed=3)
    assert len(loaded.train) + len(loaded.val) == 3680 and len(loaded.test) == 3669 and len(loaded.test.classes) == 37
    assert loaded.val.labels.bincount().tolist() == [10] * 37  # the papers' tenth is 368
    assert not {*loaded.train.images} & {*loaded.val.images} and loaded.test.labels[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("spoil, kind, words", [
    (lambda folder: (folder / "images/Bengal_2.jpg").unlink(), ValueError,
     "images has 17 of the 18 images that the set lists and lacks Bengal_2.jpg: it was unpacked in part"),
    (lambda folder: (folder / "annotations/test.txt").unlink(), FileNotFoundError,
     "test.txt is missing: the set was unpacked in part. Remove"),
    (lambda folder: (folder / "annotations/test.txt").write_text(""), ValueError, "test.txt is empty"),
    (lambda folder: (folder / "annotations/test.txt").write_text("Abyssinian_1 1 1 1\nBengal_2 0 1 1\n"), ValueError,
     "test.txt, line 2: expected an image and three numbers, as in Abyssinian_100 1 1 1; found 'Bengal_2 0 1 1'"),
    (lambda folder: (folder / "annotations/test.txt").write_text("Bengal_1 5 1 1\n"), ValueError,
     "number 4 classes from 1 to 5: some are missing")])
def test_pets_that_are_not_whole_are_explained(tmp_path, offline, spoil, kind, words):
    spoil(few_pets(tmp_path))
    assert words in message(kind, "pets", tmp_path)
    assert not offline


def test_archives_of_pets_put_there_by_hand_are_unpacked(tmp_path, counting, monkeypatch):
    folder = few_pets(tmp_path / "elsewhere")
    root = tmp_path / "oxford-iiit-pet"
    root.mkdir()
    for name in ("images", "annotations"):
        with tarfile.open(root / f"{name}.tar.gz", "w:gz") as file:
            file.add(folder / name, name)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda path, md5=None: True)
    counting("pets", 12, 6, 3)
    assert len(data.load("pets", data_dir=str(tmp_path)).train) == 12


# Flowers


def test_flowers_train_on_their_training_and_validation_lists(tmp_path, offline, counting):
    folder = flowers(tmp_path, [1, 2, 102, 1, 77, 3, 2], trnid=[4, 2], valid=[5, 1], tstid=[7, 3, 6])
    counting("flowers", 4, 3, 102)
    loaded = data.load("flowers", data_dir=str(tmp_path))
    assert [file.name for file in loaded.train.images] == [f"image_0000{i}.jpg" for i in (4, 2, 5, 1)]
    assert loaded.train.images[0].parent == folder / "jpg"
    assert loaded.train.labels.tolist() == [0, 1, 76, 0] and loaded.test.labels.tolist() == [1, 101, 2]
    assert loaded.train.labels.dtype == torch.int64
    assert [loaded.train.classes[i] for i in (0, 1, 76, 101)] == [
        "pink primrose", "hard-leaved pocket orchid", "passion flower", "blackberry lily"]
    assert (loaded.val, loaded.test_name, loaded.view, offline) == (None, "test", data.View(), [])


def test_whole_flowers_have_the_published_sizes_and_a_tenth_is_held_out(tmp_path, offline):
    """10 training and 10 validation images of each class, as in the genuine set; all files are empty."""
    labels = np.arange(8189) % 102 + 1
    order = np.arange(1, 8190)
    flowers(tmp_path, labels, empty, trnid=order[:1020], valid=order[1020:2040], tstid=order[2040:])
    loaded = data.load("flowers", data_dir=str(tmp_path), val_fraction=data.NAMED["flowers"].held_out)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (1836, 204, 6149)
    assert loaded.val.labels.bincount().tolist() == [2] * 102 and loaded.train.labels.bincount().tolist() == [18] * 102


def test_without_torchvisions_names_flowers_are_numbered_and_that_is_said(tmp_path, counting, monkeypatch, caplog):
    monkeypatch.delattr(datasets.Flowers102, "classes")
    flowers(tmp_path, [1, 102], trnid=[1], valid=[2], tstid=[2])
    counting("flowers", 2, 1, 102)
    loaded = data.load("flowers", data_dir=str(tmp_path))
    assert (loaded.train.classes[0], loaded.train.classes[101], loaded.train.labels.tolist()) == ("1", "102", [0, 101])
    assert "This torchvision is too old to name the classes of flowers: they are called 1 to 102." in caplog.text


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / "jpg/image_00002.jpg").unlink(),
     "jpg has 2 of the 3 images that the set lists and lacks image_00002.jpg: it was unpacked in part"),
    (lambda folder: (folder / "setid.mat").write_bytes(b"<html>"), "setid.mat is damaged ("),
    (lambda folder: savemat(folder / "setid.mat", {"trnid": [[1]], "valid": [[2]]}),
     "setid.mat is damaged (KeyError: 'tstid'). Remove it and it is downloaded anew."),
    (lambda folder: savemat(folder / "setid.mat", {"trnid": [[0]], "valid": [[2]], "tstid": [[3]]}),
     "setid.mat is damaged (ValueError: trnid has 0)"),
    (lambda folder: savemat(folder / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[4]]}),
     "expected 102 classes and as many images in both"),
    (lambda folder: savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 103]]}),
     "imagelabels.mat 3 of 103 classes: expected 102 classes and")])
def test_flowers_that_are_not_whole_are_explained(tmp_path, offline, spoil, words):
    spoil(flowers(tmp_path, [1, 2, 3], trnid=[1], valid=[2], tstid=[3]))
    assert words in message(ValueError, "flowers", tmp_path)


def test_flowers_without_their_labels_are_downloaded(tmp_path, offline):
    (flowers(tmp_path, [1, 2, 3], trnid=[1], valid=[2], tstid=[3]) / "imagelabels.mat").unlink()
    assert "Put 102flowers.tgz" in message(OSError, "flowers", tmp_path)


# ImageNet


def test_imagenet_is_numbered_by_sorted_wordnet_ids(tmp_path, counting):
    root = imagenet(tmp_path, wnids=WNIDS[::-1])
    for name in ("ILSVRC2012_devkit/x.txt", "train/n01440764.tar", "train/n01440764/.n.JPEG", "train/n01440764/n.txt"):
        empty(root / name)
    counting("imagenet", 9, 6, 3)
    loaded = data.load("imagenet", data_dir=str(tmp_path))
    assert loaded.train.classes == loaded.test.classes == WNIDS
    assert loaded.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 and loaded.train.labels.dtype == torch.int64
    assert loaded.train.images[0] == root / "train/n01440764/n01440764_10.JPEG"
    assert [(file.parent.name, file.name) for file in loaded.test.images[:2]] == [
        (WNIDS[0], "ILSVRC2012_val_00000003.JPEG"), (WNIDS[0], "ILSVRC2012_val_00000006.JPEG")]
    assert loaded.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (loaded.val, loaded.test_name, loaded.view) == (None, "val/", data.View())


@pytest.mark.parametrize("there, lacks", [
    ("", "train/ and val/"), ("train/n01440764", "val/"), ("val/n01440764", "train/")])
def test_what_imagenet_lacks_is_said_and_where_it_comes_from(tmp_path, there, lacks):
    root = tmp_path / "imagenet"
    (root / there).mkdir(parents=True)
    (root / "val").mkdir(exist_ok=True)
    (root / "val/ILSVRC2012_val_00000001.JPEG").touch()  # not sorted into class folders
    assert message(FileNotFoundError, "imagenet", tmp_path) == (
        f"ImageNet is not in {root} (no class folders in {lacks}) and comes only with an account of "
        f"https://image-net.org: unpack ILSVRC2012_img_train.tar to {root}/train/nXXXXXXXX/*.JPEG and "
        f"ILSVRC2012_img_val.tar, its images sorted into class folders, to {root}/val/nXXXXXXXX/*.JPEG.")


def test_imagenet_in_part_is_refused(tmp_path):
    root = imagenet(tmp_path)
    assert ("has 9 training and 6 test images of 3 classes, where 1281167 training and 50000 test images of 1000 "
            "classes were published") in message(ValueError, "imagenet", tmp_path)
    (root / "val/n01530575").mkdir()
    assert message(ValueError, "imagenet", tmp_path) == (
        f"{root}/val/n01530575 is a class that train lacks: train was unpacked in part.")


# Files of named sets as any others


def test_named_files_are_decoded_in_colour_or_grey_and_in_no_other_way(tmp_path, counting):
    few_pets(tmp_path)
    counting("pets", 12, 6, 3)
    for channels in (3, 1):
        split = data.load("pets", data_dir=str(tmp_path), in_chans=channels).test
        assert [image.shape for image in decode_all(split.images, channels=split.channels)] == [(channels, 6, 8)] * 6
    assert message(ValueError, "pets", tmp_path, in_chans=4) == (
        "--in_chans is 4; pets comes with 3 channels, or with 1 as grey images.")


@pytest.mark.parametrize("name", data.NAMED)
def test_a_named_set_is_there_before_its_files_are(name, tmp_path):
    data.check_there(name)
    with pytest.raises(ValueError, match=f"{name} is a named set with labels of its own"):
        data.load(name, labels=str(tmp_path / "labels.csv"))
