"""Bad input ends with exit code 2 and one or two sentences on its true cause, and leaves every file as it was."""

import importlib
import io
import json
import os
import re
import shutil
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from models import exchange
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from models.npz import save_npz
from models.published import imagenet_classes
from tests.conftest import randomise

NEW = ("--pretrained_dir tiny.npz --img_size 16 --num_steps 4 --warmup_steps 1 --train_batch_size 12 --eval_every 2 "
       "--device cpu --precision fp32 ")
TRAIN = NEW + "--dataset images --name new "
RESUME = "--device cpu --resume output/run "


def draw(folder, classes, count, size=16):
    """count PNGs for each class, in a colour of its own."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the cases start from: sets of images, weights of 7 unnamed and of ImageNet's classes, two finished runs."""
    root = tmp_path_factory.mktemp("world")
    sets = {"images": ("blue", "green", "red"), "two": ("cat", "dog"), "fish": ("tench", "goldfish")}
    for name, classes in sets.items():
        draw(root / name / "train", classes, 4)
        draw(root / name / "test", classes, 2)
    tiny = replace(CONFIGS["ViT-demo"], name="custom", hidden_size=32, mlp_dim=64, num_heads=2, num_layers=2)
    save_npz(randomise(VisionTransformer(tiny, 16, 7)), root / "tiny.npz")
    thousand = randomise(VisionTransformer(tiny, 16, 1000))
    exchange.save(thousand, root / "thousand.safetensors", {"classes": imagenet_classes()})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train.main((NEW + "--dataset images --name run --save_every 2").split())
        train.main((NEW + "--dataset two --name two").split())
    return root.rename(root.with_name("moved"))  # so that the runs find the data beside them, in each copy


# --- What a case does to its copy of the world before the command ----------------------------------------------------

def write(path, content=""):
    """A file, text or bytes, in the place of whatever was there."""
    def change():
        target = Path(path)
        if target.is_dir():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def remove(*paths):
    def change():
        for path in map(Path, paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return change


def folder(path):
    """An empty folder, in the place of whatever was there."""
    def change():
        if Path(path).is_file():
            Path(path).unlink()
        Path(path).mkdir(parents=True)
    return change


def copy(source, target):
    def change():
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if Path(source).is_dir() else shutil.copy)(source, target)
    return change


def cut(*paths):
    """Files that end in their middle."""
    def change():
        for path in map(Path, paths):
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return change


def flip(path):
    """One bit of a file is another one."""
    def change():
        data = bytearray(Path(path).read_bytes())
        data[len(data) // 2] ^= 1
        Path(path).write_bytes(data)
    return change


def saved(path, content):
    """A file of torch.save."""
    def change():
        torch.save(content, path)
    return change


def edited(**changes):
    """Both states of the run with other entries."""
    def change():
        for name in ("state.pt", "state.previous.pt"):
            path = Path("output/run", name)
            torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return change


def no_numbers():
    path = "output/run/last.safetensors"
    about = {"vit": json.dumps(exchange.read_metadata(path))}
    save_file({name: value / 0 for name, value in load_file(path).items()}, path, about)


def header(path, text):
    """Other words in the header of a weights file."""
    def change():
        save_file(load_file(path), path, {"vit": text})
    return change


class Foreign:
    """What no file of weights should hold: unpickling it would make a file."""
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def hollow(width, height):
    """A PNG of a few bytes that claims so many pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def array(shape, dtype):
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype=dtype), allow_pickle=True)
    return file.getvalue()


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("holiday.txt", "no weights")
    return file.getvalue()


def table(text):
    """A file of labels; `@` stands for a red and a blue image, without which most tables would be refused anyway."""
    rows = "train/red/0.png,red\ntrain/blue/0.png,blue\n"
    return write("labels.csv", text.replace("@", rows) if isinstance(text, str) else text)


RED = "images/train/red/3.png"
STATES = ("output/run/state.pt", "output/run/state.previous.pt")
BOTH = "state.pt is damaged.*state.previous.pt is damaged"

SETTINGS = {  # flags -> words
    "--num_steps 0": "--num_steps is 0; it must be at least 1",
    "--num_steps ten": "num_steps.*invalid int value: 'ten'",
    "--train_batch_size -8": "--train_batch_size is -8",
    "--train_batch_size 10 --gradient_accumulation_steps 3": "10 cannot be split into .* 3 equal parts",
    "--learning_rate nan": "--learning_rate is nan",
    "--learning_rate -1": "--learning_rate is -1",
    "--warmup_steps -1": "--warmup_steps is -1",
    "--seed 99999999999999999999": r"--seed is .* below 2\^63",
    "--img_size 0": "'0' is no image size",
    "--img_size 16,16,16": "'16,16,16' is no image size",
    "--img_size 2": "2 x 2 pixels are smaller than one patch",
    "--optimizer lion": "invalid choice: 'lion'",
    "--optimizer adam --momentum_dtype bfloat16": "is for sgd's momentum",
    "--fp16 --bf16 --precision auto": "[Tt]wo precisions",
    "--device cuda --precision auto": "sees no GPU",
    "--learnign_rate 1": "no flag --learnign_rate: did you mean --learning_rate",
    "--label_smoothing 1": "--label_smoothing is 1.0; it must lie between 0 and 1",
    "--val_fraction 1.5": "--val_fraction is 1.5",
    "--dropout -0.1": "--dropout is -0.1",
    "--metric f1": "--metric.*'f1'",
    "--class_weights inverse": "--class_weights.*'inverse'",
    "--save_every -1": "--save_every is -1",
    "--num_workers -2": "--num_workers is -2",
    "--in_chans 0": "--in_chans is 0",
    "--in_chans 2": "channels R, G, B, and --in_chans is 2",
    "--model_type ViT-Q_16": "no model 'ViT-Q_16'",
    "--model_type ViT-B_16": "tiny.npz.* not ViT-B_16",
    "--name ../new": "would leave --output_dir",
    "--name tiny.npz --output_dir .": "tiny.npz is a file; the run's folder would go there",
    "--output_dir tiny.npz": "tiny.npz",
    "--name run": "output/run holds a run already.*--overwrite",
    "--overwrite --name run --dataset nowhere": "nowhere is neither a named set .* nor a folder",
    "--overwrite --name run --pretrained_dir nowhere.npz": "nowhere.npz",
    "--dataset tiny.npz": "tiny.npz is a file; expected a folder",
    "--dataset .": "is not a set of images itself but holds one",
    "--pretrained_dir images": "images",
    "--labels labels.csv": "labels.csv does not exist",
    "--labels images": "images is a folder; --labels takes a CSV",
    "--resume": "--resume.*expected one argument",
}

DATA = {  # what is done -> words, for a new run on `images`
    "empty folder": ([remove("images"), folder("images")], "images holds 0 images and no class folders"),
    "images without classes": ([remove("images"), copy("two/train/cat", "images")], "4 images and no class folders"),
    "one class": ([remove("images/train/red", "images/train/blue")], "has one class only, green"),
    "a class without images": ([remove("images/train/red"), folder("images/train/red")], "train/red holds no images"),
    "no test image": ([remove("images/test"), folder("images/test/red")], "test holds no images"),
    "a class that train lacks": ([copy("two/train/cat", "images/test/cat")], "test/cat is a class that train lacks"),
    "two folders for train": ([copy("images/train", "images/training")], "has both train.*training"),
    "no train": ([copy("images/train", "images/red"), remove("images/train")], "has test/ but no train/"),
    "an image of text": ([write(RED, "no image")], "red/3.png cannot be read as an image .its content is no JPEG"),
    "an empty image": ([write(RED)], "red/3.png cannot be read as an image .it is empty"),
    "an image cut off": ([cut(RED)], "red/3.png cannot be read as an image"),
    "a decompression bomb": ([write(RED, hollow(60000, 60000))], "red/3.png cannot be read as an image .*100 meg"),
    "90 megapixels of nothing": ([write(RED, hollow(9500, 9500))], "red/3.png cannot be read as an image"),
    "a pipe called image": ([remove(RED), lambda: os.mkfifo(RED)], "red/3.png .*no file but a folder, a pipe"),
    "an array of objects": ([write("images/train/red/x.npy", array((4, 4, 3), object))], r"x.npy holds \(4, 4, 3\)"),
    "an array of 5 channels": ([write("images/train/red/x.npy", array((9, 9, 5), "u1"))], r"x.npy holds \(9, 9, 5\)"),
    "a bad test image": ([cut("images/test/red/1.png")], "test/red/1.png cannot be read"),
    "weights cut off": ([cut("tiny.npz")], "tiny.npz is not a complete .npz file"),
    "weights of nothing": ([write("tiny.npz")], "tiny.npz"),
    "a zip, but no weights": ([write("tiny.npz", archive())], "tiny.npz"),
    "weights of one array": ([lambda: np.savez("tiny.npz", x=np.zeros(3))], "tiny.npz"),
    "the run's name is a file": ([write("output/new", "precious")], "output/new is a file"),
}

WEIGHTS = {  # another --pretrained_dir, what is done -> words
    "a pickle of code": ("x.bin", [saved("x.bin", {"state_dict": Foreign()})], "x.bin holds more than tensors"),
    "a text": ("x.txt", [write("x.txt", "weights")], "x.txt: weights are read from"),
    "a model of Hugging Face without weights": ("x", [write("x/config.json", "{}")], "x"),
    "published, but nowhere to be had": ("new/ViT-B_16.npz", [], "new/ViT-B_16.npz is not here, and no source gave it"),
    "a run without weights": ("output/run", [remove("output/run/last.safetensors", "output/run/best.safetensors")],
                              "output/run is a run without last.safetensors"),
    "a run's damaged weights": ("output/run", [cut("output/run/last.safetensors")],
                                "last.safetensors is not a complete .safetensors file"),
}

CHECKED = {  # more flags, what is done -> words
    "a bad image, looked for": ("--check_data", [cut("images/test/red/1.png")], "test/red/1.png"),
    "a class of bad images alone": ("--skip_unreadable", [write(f"images/train/red/{i}.png") for i in range(4)], "red"),
    "nothing readable": ("--skip_unreadable", [write(path) for c in ("red", "green", "blue") for path in
                                               [f"images/train/{c}/{i}.png" for i in range(4)]], "red|blue|read"),
    "a dry run without data": ("--dry_run", [remove("images")], "images is neither a named set"),
    "a dry run into a file": ("--dry_run", [write("output/new", "precious")], "output/new is a file"),
    "labels of a named set": ("--dataset digits --labels labels.csv", [write("labels.csv", "image,label")],
                              "digits is a named set with labels of its own"),
}

LABELS = {  # a file of labels -> words
    "empty": (table(""), "labels.csv is empty"),
    "a header alone": (table("image,label\n"), "has a header and no rows"),
    "no column of images": (table("photo_id,label\n@"), "no column is called image"),
    "no column of labels": (table("image,split\ntrain/red/0.png,train\n"), "there is no column label"),
    "a column nobody knows": (table("image,label,weight\ntrain/red/0.png,red,3\n"), "what is the column weight"),
    "two columns of one name": (table("image,cat,cat\ntrain/red/0.png,0,1\n"), "two columns are called 'cat'"),
    "no class 0 or 1": (table("image,cat,dog\ntrain/red/0.png,0,maybe\n"), "line 2: column dog has 'maybe'"),
    "fields too many": (table("image,label\n@train/red/1.png,red,train\n"), "line 4: 3 fields, where the header has 2"),
    "an unknown split": (table("image,label,split\ntrain/red/0.png,red,holdout\n"), "line 2: the split is 'holdout'"),
    "an image that is not there": (table("image,label\n@train/red/99.png,red\n"), r"1 of 3 images .*99.png \(line 4\)"),
    "no image by its suffix": (table("image,label\n@train/red/0.txt,red\n"), "line 4: .*0.txt is no image"),
    "no label": (table("image,label\n@train/red/1.png,\n"), "line 4: .*1.png has no label"),
    "one class": (table("image,label\ntrain/red/0.png,red\ntrain/red/1.png,red\n"), "has one class only, red"),
    "two labels of one image": (table("image,label\n@train/red/0.png,blue\n"), "line 4: .* is blue here and red in"),
    "an image in two parts": (table("image,label,split\ntrain/red/0.png,red,train\ntrain/red/0.png,red,test\n"),
                              "line 3: .* is in test here and in train in line 2"),
    "no row of train": (table("image,label,split\ntrain/red/0.png,red,test\ntrain/blue/0.png,blue,test\n"),
                        "has no row of train"),
    "a class of test alone": (table("image,label,split\ntrain/red/0.png,red,train\ntrain/blue/0.png,blue,train\n"
                                    "test/green/0.png,green,test\n"), "line 4: no image of train has the class green"),
    "no UTF-8": (table(b"image,label\ntrain/red/0.png,r\xe9d\n"), "line 2: byte 0xe9 is not UTF-8"),
    "an image in place of a table": (copy(RED, "labels.csv"), "labels.csv, line 1: .* is not UTF-8"),
    "an open quote": (table('image,label\ntrain/red/0.png,"red\n'), "labels.csv, line 2: this is not CSV"),
}

CONTINUED = {  # more flags, what is done to the run that is continued -> words
    "another rate": ("--learning_rate 0.5", [], "--learning_rate 0.03 -> 0.5"),
    "other steps": ("--num_steps 2", [], "--num_steps 4 -> 2"),
    "another precision": ("--precision bf16", [], "--precision .*bf16"),
    "another batch": ("--train_batch_size 6", [], "--train_batch_size 12 -> 6"),
    "replaced, too": ("--overwrite", [], "--resume .* and --overwrite"),
    "another name": ("--name two", [], "--resume .* and --name"),
    "no such flag": ("--resum auto", [], "no flag --resum: did you mean --resume"),
    "an image less": ("", [remove(RED)], "data.* not .* with which"),
    "other labels": ("", [lambda: Path("images/train/red").rename("images/train/pink"),
                          lambda: Path("images/test/red").rename("images/test/pink")], "data.* not .* with which"),
    "other data by flag": ("--dataset two", [], "data.* not .* with which"),
    "no data": ("", [remove("images")], "images is neither"),
    "no run": ("", [remove("output/run")], "no run at output/run"),
    "a file": ("", [remove("output/run"), write("output/run", "x")], "output/run is a file"),
    "an empty folder": ("", [remove("output/run"), folder("output/run")], "no .*state.pt"),
    "a folder of images": ("--resume images", [], "no .*state.pt"),
    "no states": ("", [remove(*STATES)], "no .*state.pt"),
    "garbage for states": ("", [write(path, "garbage") for path in STATES], BOTH),
    "empty states": ("", [write(path) for path in STATES], BOTH),
    "states cut off": ("", [cut(*STATES)], BOTH),
    "states with a wrong bit": ("", [flip(path) for path in STATES], BOTH),
    "folders for states": ("", [folder(path) for path in STATES], "state.pt"),
    "a damaged state alone": ("", [cut(STATES[0]), remove(STATES[1])], "state.pt is damaged.*previous.pt is not there"),
    "states of foreign code": ("", [saved(path, {"step": Foreign()}) for path in STATES], "state.pt is damaged"),
    "states of another program": ("", [saved(path, [1, 2]) for path in STATES], "state.pt.* no state of a run"),
    "states of another version": ("", [edited(format=99)], "another version of this toolkit"),
    "states without their settings": ("", [edited(about={})], "another version of this toolkit"),
    "states of other weights": ("", [edited(weights={"x": torch.zeros(3)})], "output/run"),
    "states without an optimiser": ("", [edited(optimizer={})], "output/run"),
    "auto, and garbage": ("--resume auto --name run", [write(path, "garbage") for path in STATES], BOTH),
    "a folder for metrics": ("", [remove("output/run/metrics.jsonl"), folder("output/run/metrics.jsonl")],
                             "metrics.jsonl|cannot be written"),
    "a folder for settings": ("", [remove("output/run/settings.json"), folder("output/run/settings.json/x")],
                              "settings.json|cannot be written"),
}

RUN = "output/run --device cpu "
REAL = "thousand.safetensors --dataset fish --device cpu --real_labels real.json"
EVALUATED = {  # arguments of evaluate.py, what is done -> words
    "nothing": ("", [], "required|CHECKPOINT"),
    "no such file": ("nowhere.npz --dataset images", [], "nowhere.npz"),
    "no such flag": (RUN + "--datset images", [], "did you mean --dataset"),
    "a folder without a run": ("images --dataset images", [], "images"),
    "a run without weights": (RUN, [remove("output/run/last.safetensors", "output/run/best.safetensors")],
                              "without last.safetensors"),
    "damaged weights": (RUN, [cut("output/run/last.safetensors")], "last.safetensors is not a complete"),
    "no safetensors at all": (RUN, [write("output/run/last.safetensors", "x" * 100)], "last.safetensors"),
    "weights of foreign code": ("x.bin --dataset images", [saved("x.bin", {"state_dict": Foreign()})],
                                "x.bin holds more than tensors"),
    "a file without its data": ("output/run/last.safetensors --dataset nowhere", [], "nowhere is neither"),
    "the data is gone": (RUN, [remove("images")], "images"),
    "data of other classes": (RUN + "--dataset two", [], "class"),
    "weights of another run": (RUN, [copy("output/two/last.safetensors", "output/run/last.safetensors")], "class|two"),
    "7 unnamed classes for 3": ("tiny.npz --device cpu --dataset images", [], "7 classes|class"),
    "a broken table": (RUN + "--dataset images --labels labels.csv", [table("image,label\n")], "header and no rows"),
    "an unknown split": (RUN + "--split holdout", [], "holdout"),
    "a part that is not there": (RUN + "--split val", [], "has no part held out"),
    "an unknown choice of weights": (RUN + "--weights worst", [], "worst"),
    "the best weights are gone": (RUN + "--weights best", [remove("output/run/best.safetensors")], "best.safetensors"),
    "an image size of nothing": (RUN + "--img_size 0", [], "'0' is no image size"),
    "less than a patch": (RUN + "--img_size 2", [], "smaller than one patch"),
    "an output that is there": (RUN + "--output a.json", [write("a.json", "precious")], "a.json.*--overwrite"),
    "an output of another kind": (RUN + "--output a.xlsx", [], "a.xlsx"),
    "an output below a file": (RUN + "--output tiny.npz/a.json", [], "tiny.npz"),
    "a folder for an output": (RUN + "--output a.json --overwrite", [folder("a.json")], "a.json"),
    "the weights as output": (RUN + "--output output/run/last.safetensors --overwrite", [], "last.safetensors"),
    "no ReaL labels": (REAL, [], "real.json cannot be read as ReaL labels: No such file"),
    "garbage for ReaL labels": (REAL, [write("real.json", "[[1], [2,")], "real.json .* no JSON list of lists"),
    "numbers for ReaL labels": (REAL, [write("real.json", "[1, 2]")], "real.json .* no JSON list of lists"),
    "ReaL labels of no ImageNet": (REAL, [write("real.json", "[[1], [1000]]")], "expected lists of class numbers"),
    "ReaL labels for images without number": (REAL, [write("real.json", "[[1], [2]]")], "by its name, ILSVRC2012_val"),
    "ReaL labels for fewer images": (REAL, [write("real.json", "[[1], [2]]"), lambda: [
        path.rename(path.with_name("ILSVRC2012_val_00000003.png")) for path in Path("fish/test").glob("*/*.png")]],
        "real.json has labels for 2 images"),
    "ReaL labels for 3 classes": (RUN + "--real_labels real.json", [write("real.json", "[[1], [2]]")],
                                  "for ImageNet's 1,000 classes"),
    "damaged settings": (RUN, [write("output/run/settings.json", "{")], "settings.json is damaged"),
    "other settings": (RUN, [write("output/run/settings.json", '{"dataset": 3}')], "settings.json is damaged"),
    "a file of settings": ("output/run/settings.json --dataset images", [], "settings.json: weights are read from"),
    "weights that are no numbers": (RUN + "--output a.json", [no_numbers], "not finite"),
    "a metadata header of nonsense": (RUN, [header("output/run/last.safetensors", "nonsense")],
                                      "last.safetensors"),
    "a metadata header of another version": (RUN, [header("output/run/last.safetensors", '{"config": 3}')],
                                             "last.safetensors"),
}

PREDICTED = {  # arguments of predict.py, what is done -> words
    "nothing": ("", [], "required|CHECKPOINT"),
    "no image": ("output/run", [], "required: IMAGE"),
    "no such image": (f"output/run {RED} nowhere.png", [], "no image and no folder at nowhere.png"),
    "an empty list": ("output/run -", [], "Standard input has named no image"),
    "weights that are no numbers": (f"output/run {RED} --output a.csv", [no_numbers], "not finite"),
    "no such weights": (f"nowhere.npz {RED}", [], "nowhere.npz"),
    "an image for weights": (f"{RED} {RED}", [], "3.png: weights are read from"),
    "a run without weights": (f"output/run {RED}", [remove("output/run/last.safetensors")], "without last.safetensors"),
    "damaged weights": (f"output/run {RED}", [cut("output/run/last.safetensors")], "is not a complete"),
    "a folder without images": ("output/run empty", [folder("empty")], "empty"),
    "an unknown format": (f"output/run {RED} --format xml", [], "xml"),
    "none of the best": (f"output/run {RED} --top_k 0", [], "top_k"),
    "an output that is there": (f"output/run {RED} --format csv --output a.csv", [write("a.csv", "precious")], "a.csv"),
    "an output below a file": (f"output/run {RED} --format csv --output tiny.npz/a.csv", [], "tiny.npz"),
    "a folder for an output": (f"output/run {RED} --format csv --output a.csv", [folder("a.csv")], "a.csv"),
    "an image for output": (f"output/run images --output {RED}", [], "3.png"),
    "no such flag": (f"output/run {RED} --topk 3", [], "did you mean --top_k"),
}


def cases():
    """(command, arguments, changes, words), each with a name."""
    for flags, words in SETTINGS.items():
        yield pytest.param("train", TRAIN + flags, [], words, id=f"train: {flags}")
    for name, (changes, words) in DATA.items():
        yield pytest.param("train", TRAIN, changes, words, id=f"data: {name}")
    for name, (path, changes, words) in WEIGHTS.items():
        yield pytest.param("train", f"{TRAIN} --pretrained_dir {path}", changes, words, id=f"weights: {name}")
    for name, (flags, changes, words) in CHECKED.items():
        yield pytest.param("train", TRAIN + flags, changes, words, id=f"checks: {name}")
    for name, (change, words) in LABELS.items():
        yield pytest.param("train", TRAIN + "--labels labels.csv", [change], words, id=f"labels: {name}")
    for name, (flags, changes, words) in CONTINUED.items():
        yield pytest.param("train", RESUME + flags, changes, words, id=f"resume: {name}")
    for command, table in (("evaluate", EVALUATED), ("predict", PREDICTED)):
        for name, (argv, changes, words) in table.items():
            yield pytest.param(command, argv, changes, words, id=f"{command}: {name}")


def tree(root):
    """Every path below root, with the bytes of the files."""
    return {path.relative_to(root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture
def limited(monkeypatch):
    """No GPU, no standard input, no network, and an end for what would wait for ever."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr("models.sources.BUCKET", "http://127.0.0.1:9")  # the port that discards
    monkeypatch.setattr("models.sources.HUB", "http://127.0.0.1:9")

    def late(*_):
        pytest.fail("Nothing was said for 20 s.")  # not an OSError, which the code under test may take for a bad image
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("command, argv, changes, words", list(cases()))
def test_bad_input_is_said_in_a_sentence_or_two_and_changes_no_file(command, argv, changes, words, world, tmp_path,
                                                                    monkeypatch, capsys, limited):
    main = importlib.import_module(command).main
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for change in changes:
        change()
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(argv.split())
    log, *errors = re.split("^(?=error: )", capsys.readouterr().err, flags=re.MULTILINE)
    assert stop.value.code == 2 and len(errors) == 1 and "Traceback" not in log + errors[0], (log, errors)
    said = errors[0]
    assert re.search(words, said), said
    text = re.sub(r"\n  .*", "", said).strip()  # names to choose from, or what each source answered
    assert len(re.split(r"(?<=[.?!]) (?=[A-Z(-])", text)) <= 2 and len(text.splitlines()) <= 2, said
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "here")  # pytest would keep thousands of files
