"""What is on these images: `python predict.py output/NAME photo.jpg folder/ ...`, or `-` for a list on standard input.

Images are looked at exactly as `evaluate.py` looks at them. What was predicted goes to standard output or `--output`,
batch after batch; everything else that is said goes to standard error.
"""

import csv
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from tqdm import tqdm

from utils.commands import add_shared, at_least_one, check_free, opened, run
from utils.data import Split
from utils.device import choose_device
from utils.evaluation import Outputs, stream
from utils.images import SUFFIXES, suffix_of
from utils.pictures import explained, figure
from utils.settings import Parser
from utils.state import replacing
from utils.tables import some
from utils.trained import Trained, open_trained

log = logging.getLogger("predict")

FORMATS = {".txt": "table", ".jsonl": "jsonl", ".csv": "csv"}  # by the ending of --output
ATTENTION_BATCH = 8  # images: gradients take more memory than predictions
LIKELY = 0.5  # from where on one of several labels counts as predicted: a logit above 0


class Prediction(NamedTuple):
    """What the model says about one image."""
    file: str
    labels: list[str]  # the most likely class; where an image may have several, those above LIKELY
    top: list[tuple[int, str, float]]  # (number, name, probability) of the likeliest classes, the likeliest first


# --- Images ----------------------------------------------------------------------------------------------------------

def find_images(words: list[str]) -> list[str]:
    """Files as they are, folders as the image files below them (sorted), `-` as the lines of standard input.

    ValueError: a path of the command line that does not exist, or no image at all. What is wrong in a long list is
    found when it is its turn.
    """
    files = []
    for word in words:
        if word == "-":
            listed = [os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer]
            files += [file for line in listed if line for file in (_below(line) if os.path.isdir(line) else [line])]
        elif os.path.isdir(word):
            found = _below(word)
            if not found:
                raise ValueError(f"{word} holds no images ({' '.join(sorted(SUFFIXES))}).")
            files += found
        elif os.path.exists(word):
            files.append(word)
        else:
            raise FileNotFoundError(f"There is no image and no folder at {word}.")
    if not files:
        raise ValueError("Standard input has named no image.")
    return files


def _below(folder: str) -> list[str]:
    """The image files in a folder and in those below it; hidden ones are not looked at."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [os.path.join(root, name) for name in sorted(names) if name[0] != "." and suffix_of(name) in SUFFIXES]
    return found


# --- Predictions -----------------------------------------------------------------------------------------------------

def predictions(trained: Trained, files: list[str], device, batch_size: int, workers: int,
                top_k: int) -> Iterator[list[Prediction]]:
    """Batch after batch, in the order of the files; one that cannot be read is said and left out.

    ValueError: what the model computes are no numbers.
    """
    C = trained.model.num_classes
    names = trained.classes or tuple(map(str, range(C)))
    labels = torch.zeros(len(files), C) if trained.multi_label else torch.zeros(len(files), dtype=torch.int64)
    split = Split([Path(file) for file in files], labels, names, trained.model.config.in_chans)
    for part in stream(trained.model, trained.batches(split, device, batch_size, workers), scores=True):
        said = Outputs.cat([part])
        if not said.scores.isfinite().all():
            raise ValueError(f"{trained.path} computes numbers that are not finite: the weights are of no use.")
        several = said.predicted.sum(dim=1).tolist() if trained.multi_label else [1] * len(said.indices)
        values, places = said.scores.topk(max([top_k, *several]), dim=1)                  # (B, k)
        batch = []
        for n, i in enumerate(said.indices.tolist()):
            k = max(top_k, several[n])  # all that are likely
            top = [(c, names[c], p) for c, p in zip(places[n, :k].tolist(), values[n, :k].tolist())]
            likely = said.predicted[n].nonzero()[:, 0] if trained.multi_label else said.predicted[n, None]
            batch.append(Prediction(files[i], [names[c] for c in likely.tolist()], top))
        yield batch


# --- Attention -------------------------------------------------------------------------------------------------------

def picture_files(output: str | None, files: list[str], overwrite: bool) -> dict[str, Path]:
    """Where each image's picture goes: `attention/` beside --output, or here, under the image's own name; a second one
    of that name gets a number. Makes the folder. ValueError: a picture is there already, or the folder cannot be."""
    folder, taken, pictures = Path(output or "").parent / "attention", set(), {}
    for file in dict.fromkeys(files):
        stem = Path(file).stem
        name = next(name for name in chain([stem], (f"{stem}-{n}" for n in count(2))) if name not in taken)
        taken.add(name)
        pictures[file] = folder / f"{name}.png"
    there = [str(path) for path in pictures.values() if path.exists()]
    if there and not overwrite:
        raise ValueError(f"{some(there, 3)}: there already. --overwrite replaces pictures.")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"The pictures would go to {folder}, which cannot be made ({error.strerror}). Give --output "
                         "elsewhere.") from error
    return pictures


def draw_attention(trained: Trained, said: dict[str, Prediction], pictures: dict[str, Path], device,
                   batch_size: int) -> None:
    """A PNG for each image that could be read, of where the model looks (`utils.pictures.explained`)."""
    files = [file for file in pictures if file in said]
    split = Split([Path(file) for file in files], torch.zeros(len(files), dtype=torch.int64), ("",),
                  trained.model.config.in_chans)
    batches = trained.batches(split, device, batch_size, 0)
    with tqdm(total=len(files), unit=" pictures", disable=None, leave=False) as bar:
        for k, (images, _) in enumerate(batches.stream(range(len(batches)))):
            told = [said[files[i]] for i in batches.indices(k)]
            classes = torch.tensor([one.top[0][0] for one in told], device=device)
            for one, panels in zip(told, explained(trained.model, images, classes)):
                _, name, p = one.top[0]
                with replacing(pictures[one.file]) as file:
                    figure(panels, f"{Path(one.file).name}: {name}, {100 * p:.1f} %").savefig(file, format="png")
                bar.update()
    log.info("attention: %s", some([str(pictures[file]) for file in files], 3))


# --- Formats ---------------------------------------------------------------------------------------------------------

def table_writer(file: TextIO, files: list[str], top_k: int, several: bool) -> Callable[[Prediction], None]:
    """A line for each class, the image named on the first; of several labels, those above LIKELY have a mark."""
    width = max(len("image"), *map(len, files))
    file.write(f"{'image':{width}}  probability  class\n")

    def write(said: Prediction) -> None:
        for row, (_, name, p) in enumerate(said.top):
            mark = (" *" if name in said.labels else "  ") * several
            file.write(f"{'' if row else said.file:{width}}  {100 * p:9.2f} %{mark}  {name}\n")
    return write


def jsonl_writer(file: TextIO, files: list[str], top_k: int, several: bool) -> Callable[[Prediction], None]:
    """A JSON object an image, on a line of its own."""
    def write(said: Prediction) -> None:
        answer = {"labels": said.labels} if several else {"label": said.labels[0]}
        top = [{"class": name, "index": c, "probability": round(p, 6)} for c, name, p in said.top]
        file.write(json.dumps({"image": said.file, **answer, "top": top}) + "\n")
    return write


def csv_writer(file: TextIO, files: list[str], top_k: int, several: bool) -> Callable[[Prediction], None]:
    """A row an image: its label (several are joined by |), then the likeliest classes with their probabilities."""
    rows = csv.writer(file, lineterminator="\n")
    heads = [f"{what}_{k}" for k in range(1, top_k + 1) for what in ("class", "probability")]
    rows.writerow(["image", "labels" if several else "label", *heads])

    def write(said: Prediction) -> None:
        cells = [cell for _, name, p in said.top[:top_k] for cell in (name, f"{p:.6f}")]
        rows.writerow([said.file, "|".join(said.labels), *cells])
    return write


WRITERS = {"table": table_writer, "jsonl": jsonl_writer, "csv": csv_writer}


# --- Command line ----------------------------------------------------------------------------------------------------

def predict(args) -> int:
    """From the arguments to the last line; the exit code."""
    check_free(args.output, args.overwrite)
    if args.output and not args.format and Path(args.output).suffix not in FORMATS:
        raise ValueError(f"--output {args.output}: expected the ending {', '.join(FORMATS)}, or --format.")
    files = find_images(args.images)
    pictures = picture_files(args.output, files, args.overwrite) if args.attention else {}
    device = choose_device(args.device)
    trained = open_trained(args.checkpoint, device, weights=args.weights, img_size=args.img_size,
                           model_type=args.model_type)
    log.info("%s", trained)
    top_k = min(args.top_k, trained.model.num_classes)
    kind = args.format or FORMATS.get(Path(args.output or "").suffix, "table")
    quiet = None if args.output or not sys.stdout.isatty() else True  # lines on the terminal are progress enough
    done, told = 0, {}
    with opened(args.output) as file, tqdm(total=len(files), unit=" images", disable=quiet, leave=False) as bar:
        write = WRITERS[kind](file, files, top_k, trained.multi_label)
        for batch in predictions(trained, files, device, args.batch_size, args.num_workers, top_k):
            for said in batch:
                write(said)
                if pictures:
                    told[said.file] = said
            file.flush()
            done += len(batch)
            bar.update(len(batch))
    if told:
        draw_attention(trained, told, pictures, device, min(args.batch_size, ATTENTION_BATCH))
    if kind == "table" and trained.multi_label:
        log.info("* more likely than not")
    if skipped := len(files) - done:
        log.warning("%d of %d images could not be read.", skipped, len(files))
    return int(bool(skipped))


def parser() -> Parser:
    p = Parser(prog="predict.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    add_shared(p)
    p.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders, or - for a list on standard input")
    p.add_argument("--top_k", type=at_least_one, default=5, metavar="N", help="classes that are shown (default: 5)")
    p.add_argument("--format", choices=list(WRITERS), help="(default: by the ending of --output, else table)")
    p.add_argument("--attention", action="store_true", help="a PNG for each image of where the model looks, in "
                   "attention/ beside --output, or here")
    p.add_argument("--output", metavar="FILE", help="write there and not to standard output")
    return p


def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 1 where images were skipped, 2 for an error of one sentence."""
    run(predict, parser().parse_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
