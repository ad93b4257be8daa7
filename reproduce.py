"""Is my number right? `python reproduce.py --table paper --models ViT-B_16 --datasets cifar10` runs what a paper ran,
and says whether ours is theirs; `--check output/NAME` asks it of a run that is finished."""

import csv
import logging
import os
import re
import statistics
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from models import sources
from utils import comparison, data, grid, pace, reference
from utils.checking import check, judged
from utils.commands import run
from utils.device import Computing, choose_device, choose_precision, training_flops
from utils.grid import Grid
from utils.opening import bare_model
from utils.prices import Price, disk, price, said, shard, work
from utils.protocols import PROTOCOLS, Row, rows
from utils.resources import amount, free_disk
from utils.settings import Parser, Settings
from utils.state import replacing_text

log = logging.getLogger("reproduce")

MINI = (4_000, 1_000)  # train and test images of a folder that the table mini takes, spread evenly over its classes


# --- What is run -----------------------------------------------------------------------------------------------------

def planned(args) -> list[Row]:
    """The rows of the table that was asked for; a folder becomes a small part of itself."""
    folders = [name for name in args.datasets if args.table == "mini" and name not in data.NAMED]
    for name in folders:
        data.check_there(name)
    bases = [Path(name).resolve().name for name in folders]
    if len(set(bases)) < len(bases):
        raise ValueError(f"Two of --datasets are called {max(bases, key=bases.count)}: run them one after the other, "
                         "each with its own --output_dir.")
    found = rows(args.table, args.models, args.datasets)
    return [row if row.dataset in data.NAMED else of_folder(row, args.folder, args.dry_run) for row in found]


def of_folder(row: Row, folder: Path, dry: bool = False) -> Row:
    """The row on a few images of a folder: a CSV lists them, the same each time. dry: nothing is written.

    ValueError: a class's name is one that a CSV takes for something else.
    """
    name = Path(row.dataset).resolve().name
    whole, file = data.load(row.dataset), folder / f"{name}.csv"
    if odd := [name for name in whole.train.classes if "|" in name or name != name.strip()]:
        raise ValueError(f"The class folder '{odd[0]}' of {row.dataset} cannot stand in a CSV: rename it.")
    parts = {"train": _first(whole.train, MINI[0]), "test": _first(whole.test, MINI[1])}
    if not dry:
        folder.mkdir(parents=True, exist_ok=True)
        _list(file, row.dataset, parts)
    return replace(row, dataset=os.path.abspath(row.dataset), flags=(*row.flags, ("labels", str(file.absolute()))),
                   images=(len(parts["train"]), len(parts["test"])))


def _list(file: Path, folder: str, parts: dict[str, data.Split]) -> None:
    """image,label,split of the parts of a folder."""
    with replacing_text(file) as out:
        table = csv.writer(out)
        table.writerow(["image", "label", "split"])
        for part, split in parts.items():
            table.writerows([os.path.relpath(image, folder), split.classes[label], part]
                            for image, label in zip(split.images, split.labels.tolist()))


def _first(split: data.Split, most: int) -> data.Split:
    """About so many images, as many of each class: the first in the order of their names."""
    each = max(most // len(split.classes), 1)
    return split.subset(sorted(i for c in range(len(split.classes))
                               for i in (split.labels == c).nonzero().flatten()[:each].tolist()))


@cache
def model_of(row: Row):
    """The row's model, without memory."""
    return bare_model({"model_type": row.model, "pretrained_dir": row.checkpoint, "dataset": row.dataset,
                       "img_size": (row.size, row.size)})


def priced(whole: Grid, args) -> tuple[list[Price], str]:
    """What is left to be done of each row costs here, and from what that follows: one step, of the smallest of the
    models, is measured; the others' follow from their floating-point operations."""
    models = [model_of(row) for row in whole.rows]
    if not any(whole.to_do(row) for row in whole.rows):
        return [Price(0, 0, 0.0, 0)] * len(whole.rows), "nothing was measured"
    settings = Settings(device=args.device, precision=args.precision)
    device = choose_device(args.device)
    computing = Computing(device, choose_precision(settings, device))
    least = min(models, key=training_flops)
    rate = pace.images_per_second(least.config, least.img_size, settings, computing)
    prices = []
    for row, model in zip(whole.rows, models):
        weights = 4 * sum(p.numel() for p in model.parameters())
        speed = rate * training_flops(least) / training_flops(model)
        prices.append(price(row, whole.seeds, images_of(row), speed, weights, whole.to_do(row)))
    return prices, (f"measured: {least.config.name} at {least.img_size[0]} px trains on {rate:.3g} images/s "
                    f"({grid.hardware()}, {computing.in_words()['precision']})")


def prepare(whole: Grid, args) -> None:
    """Every set and every checkpoint that is still needed is fetched once, before cells that start together would each
    fetch it. ValueError, OSError: one cannot be had."""
    needed = [row for row in whole.rows if whole.to_do(row)]
    for dataset in dict.fromkeys(row.dataset for row in needed if row.dataset in data.NAMED):
        data.load(dataset, data_dir=args.data_dir)
    for checkpoint in dict.fromkeys(row.checkpoint for row in needed):
        sources.fetch(grid.ROOT / checkpoint)  # runs start from there


def images_of(row: Row) -> tuple[int, int]:
    """Of train and test."""
    named = data.NAMED.get(row.dataset)
    return row.images or (named.train_images, named.test_images)


def say_plan(found: list[Row], prices: list[Price], seeds: int) -> None:
    """Every cell, with its steps, learning rate, split and price."""
    for row, cost in zip(found, prices):
        (train, test), steps = images_of(row), {option.steps for option in row.options}
        print(f"\n{row.name}: {row.size} px, batch {row.batch}, from {row.checkpoint}; {cost.cells} runs, "
              f"{cost.seconds / 3600:.3g} hours")
        for cell in row.choosing():
            held = round(row.held_out * train)
            print(f"  choose  {cell.option.steps:6,} steps, {cell.option.warmup} of warm-up, LR {cell.option.rate:<6g} "
                  f"train {train - held:,}, held out {held:,}")
        how = f"{min(steps):6,} steps" if len(steps) == 1 else "chosen steps"
        rate = f"LR {row.options[0].rate:g}" if len(row.options) == 1 else "the chosen LR"
        for seed in range(seeds):
            print(f"  final   {how}, {rate}, seed {seed}, train {train - round(row.kept_back * train):,}, test {test:,}"
                  + ", the best of its evaluations" * row.best_on_test)


# --- What came out ---------------------------------------------------------------------------------------------------

def compared(row: Row, whole: Grid, failed: list) -> comparison.Row:
    """A row of the table: ours, as far as it is there, beside what the protocol's source says."""
    option, results = whole.chosen(row), whole.finals(row)
    values = [100 * result["best_on_test" if row.best_on_test else "last"] for result in results]
    ours = comparison.Row(row.protocol, row.model, row.family, Path(row.dataset).name, row.size,
                          best_on_test=row.best_on_test, word="failed" if any(cell.row == row for cell in failed) else
                          "not run")
    lost = sum(cell.row == row for cell in failed)
    if not values:
        return ours
    ours = replace(ours, steps=option.steps, learning_rate=option.rate, ours=statistics.fmean(values), n=len(values),
                   spread=statistics.stdev(values) if len(values) > 1 else None, hardware=results[0]["hardware"],
                   minutes=statistics.fmean(result["minutes"] for result in results), word="unknown")
    if row.protocol not in reference.PROTOCOLS:
        unknown = "Nobody has published a number of this protocol."
        return replace(ours, note=f"{lost} runs failed. {unknown}" if lost else unknown)
    flags = results[0]["flags"]
    records = reference.find(row.protocol, row.model, row.checkpoint, row.dataset, row.size, option.steps,
                             flags.get("dropout"))
    why = reference.why_not(row.protocol, row.model, row.checkpoint, row.dataset, row.size)
    found = judged(ours, values, records, flags, why_not=why)
    return replace(found, note=f"{lost} runs failed. {found.note}") if lost else found


# --- The command line ------------------------------------------------------------------------------------------------

def part_of(text: str) -> tuple[int, int]:
    """'2/4' -> (2, 4)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return int(found[1]), int(found[2])
    raise ValueError(f"--shard is '{text}': give i/n, such as 1/4 for the first of four machines.")


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parser() -> Parser:
    p = Parser(prog="reproduce.py", allow_abbrev=False, description=__doc__.split("\n\n")[0])
    p.add_argument("--table", choices=list(PROTOCOLS), help="; ".join(
        f"{name}: {found.about}" for name, found in PROTOCOLS.items()).replace("%", "%%"))
    p.add_argument("--check", metavar="RUN", type=Path, help="the folder of a finished run: is its number right?")
    p.add_argument("--models", type=names, default=[], metavar="A,B", help="only these (default: the protocol's)")
    p.add_argument("--datasets", type=names, default=[], metavar="A,B",
                   help="only these (default: the protocol's); of mini any folders of images, of which it takes a part")
    p.add_argument("--seeds", type=int, metavar="N", help="runs that count, of a row (default: as many as published)")
    p.add_argument("--shard", default="1/1", metavar="i/n", help="the i-th part of n, for several machines")
    p.add_argument("--dry_run", action="store_true", help="list all runs with their price, and stop")
    p.add_argument("--workers", type=int, metavar="N", help="processes at once (default: one a GPU; one on a CPU)")
    p.add_argument("--output_dir", type=Path, metavar="DIR", help="(default: output/reproduce/TABLE)")
    p.add_argument("--data_dir", default="data", metavar="DIR", help="where named sets are kept or downloaded to")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="as train.py's")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p


def reproduce(args) -> int:
    """The exit code: 1, where a run failed or a number is not theirs."""
    if bool(args.table) == bool(args.check):
        raise ValueError("Give --table NAME to run a table, or --check output/NAME for a run that is finished.")
    if args.check:
        found = check(args.check)
        if not found:
            raise ValueError(f"Nobody published a number for the model and data of {args.check}, as far as we know.")
        print(comparison.markdown(found))
        return 0 if found[0].word != "fail" else 1
    args.folder = (args.output_dir or Path("output/reproduce") / args.table).absolute()
    seeds = PROTOCOLS[args.table].seeds if args.seeds is None else args.seeds
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; it must be at least 1.")
    part, parts = part_of(args.shard)
    found = planned(args)
    costs = [work(row, seeds, images_of(row), training_flops(model_of(row))) for row in found]
    common = ("--data_dir", os.path.abspath(args.data_dir), "--device", args.device, "--precision", args.precision)
    whole, mine = (Grid(rows, args.folder, seeds, common) for rows in (found, shard(found, costs, part, parts)))
    devices = grid.devices(args.workers, cpu=args.device == "cpu")
    prices, measured = priced(mine, args)
    print(f"{args.table}: {PROTOCOLS[args.table].about}\n{said(prices, len(devices))} ({measured})")
    if args.dry_run:
        say_plan(mine.rows, prices, seeds)
        return 0
    if (need := disk(prices, len(devices))) > (free := free_disk(args.folder)):
        raise ValueError(f"The runs need up to {amount(need)} of disk, and {amount(free)} are free at {args.folder}. "
                         "Take fewer --models or --datasets, or another --output_dir.")
    prepare(mine, args)
    failed = grid.run(mine, devices)
    table = [compared(row, whole, failed) for row in found]  # of all machines, as far as it is there
    written = comparison.write(table, args.folder, f"{args.table}: ours beside the published numbers",
                               [(args.table, PROTOCOLS[args.table].about)])
    print(comparison.markdown(table), *written, sep="\n")
    return 1 if failed or any(row.word == "fail" for row in table) else 0


def main(argv: list[str] | None = None) -> None:
    """The command line: exit code 0; 1 for a fail, of a run or of a number; 2 for an error of one sentence."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    args.output = None
    run(reproduce, args)


if __name__ == "__main__":
    main()
