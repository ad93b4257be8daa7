"""A CSV of labels -> splits, every mistake in one in a sentence with the line, and what runs make of such labels."""

import csv
import logging

import numpy as np
import pytest
import torch
from PIL import Image

import train
from models.modeling import VisionTransformer
from models.npz import save_npz
from utils import data
from utils.labels import read_labels


@pytest.fixture
def pets(tmp_path):
    """pets/0.png to pets/11.png and a writer of pets/labels.csv, which returns what `data.load` takes."""
    (tmp_path / "pets").mkdir()
    for i in range(12):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "pets" / f"{i}.png")

    def write(text, **options):
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "pets" / "labels.csv").write_bytes(content)
        return {"dataset": str(tmp_path / "pets"), "labels": str(tmp_path / "pets" / "labels.csv"), **options}
    return write


def table(options):
    return read_labels(options["labels"], options["dataset"])


def names(split):
    return [path.name for path in split.images]


# What it says


def test_image_label_split(pets):
    loaded = data.load(**pets("image,label,split\n0.png,dog,train\n1.png,cat,train\n2.png,dog,val\n3.png,cat,test\n"))
    assert loaded.train.classes == loaded.test.classes == ("cat", "dog") and not loaded.train.multi_label
    assert [names(part) for part in (loaded.train, loaded.val, loaded.test)] == [["0.png", "1.png"], ["2.png"],
                                                                                ["3.png"]]
    assert loaded.train.labels.tolist() == [1, 0] and loaded.train.labels.dtype == torch.int64
    assert (loaded.name, loaded.test_name, loaded.view) == ("pets", "test in labels.csv", data.View())


@pytest.mark.parametrize("text", [
    "Filename;LABELS\n0.png;a\n1.png;b\n", "path\tlabel\r\n0.png\ta\r\n1.png\tb",
    "\ufefflabel,name\ra,0.png\rb,1.png\r", '"file","label"\n"0.png", a\n\n,\n 1.png ,"b"\n',
    "image,class\n./0.png,a\n../pets/1.png,b\n"])
def test_separators_line_ends_column_names_and_blank_lines_of_other_programs(pets, text):
    found = table(pets(text))
    files, labels = found.parts["train"]
    assert found.parts.keys() == {"train"} and [file.name for file in files] == ["0.png", "1.png"]
    assert labels.tolist() == [0, 1] and found.classes == ("a", "b")


def test_a_name_in_quotes_may_hold_the_separator_and_a_line_end(pets, tmp_path):
    for name in ("a,b.png", "a\nb.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / "pets" / name)
    text = 'image,label\n"a,b.png",x\n"a\nb.png",y\n9.png,z,z\n'
    with pytest.raises(ValueError, match=r"line 5: 3 fields"):
        data.load(**pets(text))
    files, _ = table(pets(text.replace("z,z", "z"))).parts["train"]
    assert [file.name for file in files] == ["a,b.png", "a\nb.png", "9.png"]


def test_whole_numbers_are_class_names_in_their_order(pets):
    rows = "".join(f"{i}.png,{name}\n" for i, name in enumerate(["10", "9", "-1", "10", "9", "-1"]))
    assert data.load(**pets("image,label\n" + rows)).train.classes == ("-1", "9", "10")
    rows = rows.replace("-1", "b")
    assert data.load(**pets("image,label\n" + rows)).train.classes == ("10", "9", "b")


MULTI = ("image,label,split\n0.png,cat|dog,train\n1.png,,train\n2.png, owl | cat ,train\n3.png,dog,test\n",
         "image,cat,dog,owl,split\n0.png,1,1,0,train\n1.png,0,0,0,train\n2.png,1.0,0.0,1.0,train\n3.png,0,1,0,test\n")


@pytest.mark.parametrize("text", MULTI)
def test_several_labels_in_a_field_or_a_column_a_class(pets, text, caplog):
    with caplog.at_level(logging.INFO):
        loaded = data.load(**pets(text))
    assert loaded.train.multi_label and loaded.train.labels.dtype == torch.float32
    assert loaded.train.labels.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert loaded.test.labels.tolist() == [[0, 1, 0]] and loaded.train.classes == ("cat", "dog", "owl")
    assert "several labels or none (1.33 on average of 3), so each class is a yes or no" in caplog.text
    assert "no image of test has the class cat, owl." in caplog.text
    assert loaded.train.subset([2, 0]).labels.tolist() == [[1, 0, 1], [1, 1, 0]]


def test_classes_that_are_columns_keep_their_order(pets):
    assert table(pets("image,b,a\n0.png,1,0\n1.png,1,1\n")).classes == ("b", "a")


@pytest.mark.parametrize("word, part", [
    ("Training", "train"), ("VALID", "val"), ("validation", "val"), ("testing", "test")])
def test_parts_have_the_names_that_folders_may_have(pets, word, part):
    files, _ = table(pets(f"image,label,split\n0.png,a,train\n1.png,b,train\n2.png,a,{word}\n")).parts[part]
    assert files[-1].name == "2.png"


def test_without_a_part_to_score_a_stratified_fifth_is_held_out_and_said(pets, caplog):
    rows = "".join(f"{i}.png,{'ab'[i > 8]},train\n" for i in range(12))
    with caplog.at_level(logging.INFO):
        loaded = data.load(**pets("image,label,split\n" + rows, seed=3))
    assert loaded.test.labels.bincount().tolist() == [2, 1] and loaded.test_name == "held-out 20 % of train"
    assert ("labels.csv has rows of neither test nor val: 3 of 12 images (20 %, stratified, seed 3) are held out as "
            "its test part.") in caplog.text
    alone = data.load(**pets("image,label,split\n0.png,a,train\n1.png,b,train\n2.png,a,val\n"))
    assert (alone.val, names(alone.test), alone.test_name) == (None, ["2.png"], "val in labels.csv")


def test_images_lie_in_the_dataset_or_wherever_the_file_says(pets, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "else.png")
    text = f"image,label\n0.png,a\n1.png,a\n../else.png,b\n{tmp_path / 'pets' / '2.png'},b\n"
    options = pets(text)
    (tmp_path / "lists").mkdir()
    (tmp_path / "pets" / "labels.csv").rename(tmp_path / "lists" / "labels.csv")
    loaded = data.load(options["dataset"], labels=str(tmp_path / "lists" / "labels.csv"))
    assert sorted(names(loaded.train) + names(loaded.test)) == ["0.png", "1.png", "2.png", "else.png"]
    assert all(path.exists() for path in loaded.train.images)


def test_rows_that_repeat_are_counted_once(pets, caplog):
    files, _ = table(pets("image,label\n0.png,a|b\n./0.png,b|a\n1.png,a\n")).parts["train"]
    assert len(files) == 2 and "1 rows repeat an earlier one and are ignored" in caplog.text


# What is wrong with it

PARTS = "image,label,split\n0.png,a,train\n1.png,b,train\n"
COLUMNS = "image,a,b\n0.png,1,0\n1.png,0,1\n"


@pytest.mark.parametrize("text, message", [
    ("", "labels.csv is empty: expected a header image,label"), (" \n,\n", "is empty"),
    ("image,label\n", "has a header and no rows"), ("image,a,b\n\n", "has a header and no rows"),
    ("0.png,a\n1.png,b\n", r"line 1: no column is called image \(image, file, .*; found 0.png, a\. Expected a header"),
    ("label,split\na,train\n", "line 1: no column is called image"),
    ("image,path,label\n0.png,0.png,a\n", r"line 1: two columns could be the images' \(.*found image, path, label\."),
    ("image\n0.png\n", "line 1: there is no column label and none that could be a class; found image"),
    ("image,cat\n0.png,1\n", "line 1: there is no column label and one column that could be a class"),
    ("image,label,width,height\n0.png,a,4,4\n", "line 1: beside label, what is the column width, height?"),
    ("image,label,labels\n0.png,a,a\n", "line 1: beside label, what is the column labels?"),
    ("image,a,A\n0.png,1,0\n", "line 1: two columns are called 'a'"),
    (",image,label\n0,0.png,a\n", "line 1: column 1 has no name; pandas writes such a one without index=False"),
    ("image,label\n0.png,a\n1.png,b,c\n", "line 3: 3 fields, where the header has 2; a field that holds"),
    ("image,label\n\n0.png\n", "line 3: 1 fields, where the header has 2"),
    ("image,label\n,a\n", "line 2: the image has no name"),
    ("image,label\n0.png,a\n1.png,\n", r"line 3: 1.png has no label\. Only in a file where"),
    (PARTS + "2.png,a,eval\n", "line 4: the split is 'eval'; expected train, val or test"),
    (PARTS + "2.png,a,\n", "line 4: the split is ''"),
    (PARTS + "2.png,a,test\n2.png,a,train\n", "line 5: 2.png is in train here and in test in line 4"),
    (PARTS + "2.png,c,test\n", "line 4: no image of train has the class c, but 2.png of test has"),
    ("image,label,split\n0.png,a,test\n1.png,b,val\n", "has no row of train, only of val and test"),
    ("image,a,b,split\n0.png,1,0,train\n1.png,0,1,test\n", "line 3: no image of train has the class b, but 1.png"),
    ("image,label\n0.png,a\n./0.png,b\n1.png,b\n",
     r"line 3: ./0.png is b here and a in line 2; several labels of an image stand in one line, as in a\|b"),
    ("image,label\n0.png,a|b\n0.png,\n", r"line 3: 0.png is without a label here and a\|b in line 2"),
    ("image,label\n0.png,a\n1.png,a\n", r"has one class only, a \(2 images\)"),
    ("image,label\n0.png,a|\n1.png,\n", "has one class only, a "), ("image,label\n0.png,|\n", "has no class "),
    *((COLUMNS + f"2.png,0,{word}\n", f"line 4: column b has '{word}'; each column but image and split is a class")
      for word in ("2", "nan", "yes", "", "0.5", "-1", "True")),
    ("image,label\n0.png,a\nx.png,b\n", r"1 of 2 images do not exist: x.png \(line 3\)\. Names are relative to .*;"),
    ("image,label\na.png,a\nb.png,b\nc.png,a\nd.png,a\n0.png,b\n",
     r"4 of 5 images do not exist: a.png \(line 2\), b.png \(line 3\), c.png \(line 4\), \.\.\.\. Names"),
    ("image,label\n../pets,a\n", "line 2: ../pets is no image by its suffix; expected one of .bmp"),
    ("image,label\n0.png,a\n1.pdf,b\n", "line 3: 1.pdf is no image by its suffix"),
    ("image,label\n0,a\n1,b\n", "line 2: 0 is no image by its suffix"),
    ('image,label\n0.png,a\n"1.png,b\n2.png,b\n', r"line 3: this is not CSV \("),
    ('image,label\n"0".png,a\n', r"line 2: this is not CSV \("),
    ("image,label\n0.png,a\n1.png,zoë\n".encode("latin-1"), "line 3: byte 0xeb is not UTF-8; expected a text file"),
    ("image,label\n0.png,a\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    (b"\x89PNG\r\n\x1a\n\0\0", "line 1: byte 0x89 is not UTF-8"),
    (b"image,label\n\0.png,a\n", "line 2"), (b'[{"image": "0.png"}' + b"," * 10_000 + b"x" * 10_000, "line 1: two col"),
    ("image,label\n" + "x" * 200_000 + ".png,a\n", r"line 2: this is not CSV")])
def test_a_mistake_is_one_sentence_with_the_file_and_line(pets, text, message):
    with pytest.raises(ValueError, match=message) as error:
        data.load(**pets(text))
    assert "labels.csv" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_labels_need_a_folder_and_a_file(pets, tmp_path):
    options = pets("image,label\n0.png,a\n1.png,b\n")
    with pytest.raises(ValueError, match="labels.csv is for images in a folder, but digits is a named set"):
        data.load("digits", labels=options["labels"])
    with pytest.raises(FileNotFoundError, match="neither a named set .* nor a folder that exists"):
        data.load(str(tmp_path / "absent"), labels=options["labels"])
    with pytest.raises(ValueError, match=r"labels\.csv is a file; expected a folder"):
        data.load(options["labels"], labels=options["labels"])
    with pytest.raises(ValueError, match="pets is a folder; --labels takes a CSV file with a header"):
        data.load(options["dataset"], labels=options["dataset"])
    with pytest.raises(FileNotFoundError, match=r"no\.csv does not exist; --labels takes"):
        data.load(options["dataset"], labels=str(tmp_path / "no.csv"))
    with pytest.raises(ValueError, match="one image in each class none can be held out"):
        data.load(**options)


# What runs make of them


@pytest.fixture
def one_thread():
    """Batches so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def finish(folder, *argv):
    """A run on FOLDER/labels.csv of 16-px images."""
    flags = {"--dataset": folder, "--labels": folder / "labels.csv", "--img_size": 16, "--train_batch_size": 32,
             "--learning_rate": 0.05, "--num_steps": 20, "--warmup_steps": 2, "--output_dir": folder / "output",
             "--precision": "fp32", "--device": "cpu"}
    return train.main([str(word) for pair in flags.items() for word in pair] + [str(word) for word in argv])


def write_set(folder, rows):
    """Images (H, W, 3), their labels and parts -> FOLDER/labels.csv beside the images."""
    folder.mkdir(exist_ok=True)
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "split"))
        for i, (pixels, label, part) in enumerate(rows):
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
            writer.writerow((f"{i}.png", label, part))


def squares(count, rng):
    """Each of four colours is there or not (a third of the time), as a noisy square in a corner of its own."""
    colours = {"blue": (40, 60, 230), "green": (30, 200, 60), "red": (230, 40, 40), "yellow": (230, 220, 40)}
    for i in range(count):
        pixels = rng.integers(60, 160, (16, 16, 3))
        there = [name for name in colours if rng.random() < 0.4]
        for corner, name in zip(rng.permutation(4), there):
            top, left = corner // 2 * 8 + rng.integers(3), corner % 2 * 8 + rng.integers(3)
            pixels[top:top + 6, left:left + 6] = np.array(colours[name]) + rng.integers(-20, 20, (6, 6, 3))
        yield pixels, "|".join(there), "train" if i < 2 / 3 * count else "test"


def test_a_run_with_several_labels_learns_them_all(tmp_path, one_thread):
    """Mean average precision; guessing has the share of images with the class, 0.4."""
    write_set(tmp_path / "set", squares(240, np.random.default_rng(0)))
    result = finish(tmp_path / "set", "--pretrained_dir", "checkpoint/ViT-demo.npz")
    assert result["last"].images == 80 and result["last"].map > 0.95 and result["last"].accuracy > 0.8


def tints(counts, part, rng):
    """Noise with a tint that the class decides and chance blurs."""
    for label, count in enumerate(counts):
        for _ in range(count):
            tint = 14 * np.eye(3)[label] + rng.normal(0, 4, 3)
            yield 110 + tint + rng.normal(0, 20, (16, 16, 3)), "abc"[label], part


def test_balanced_class_weights_find_the_rare_classes(tmp_path, tiny_config, one_thread):
    """200, 20 and 8 training images, the test part in the same proportion; short runs from scratch, two seeds."""
    rng = np.random.default_rng(0)
    write_set(tmp_path / "set", [*tints((200, 20, 8), "train", rng), *tints((400, 40, 16), "test", rng)])
    torch.manual_seed(0)
    save_npz(VisionTransformer(tiny_config, 16, 3), tmp_path / "tiny.npz")
    argv = ["--pretrained_dir", tmp_path / "tiny.npz", "--optimizer", "adam", "--learning_rate", 0.003, "--num_steps",
            40]
    for seed in (1, 2):
        plain, balanced = (finish(tmp_path / "set", *argv, "--seed", seed, "--class_weights", weights, "--name",
                                  f"{weights}-{seed}")["last"] for weights in ("none", "balanced"))
        assert balanced.macro_f1 > plain.macro_f1 + 0.15
