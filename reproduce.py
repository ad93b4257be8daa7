"""Is my number right? `python reproduce.py --table paper --models ViT-B_16 --datasets cifar10` runs what a paper ran,
and says whether ours is theirs; `--check output/NAME` asks it of a run that is finished."""

import csv
import logging
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from utils import comparison, data, grid, history, pace, reference
from utils.commands import run
from utils.device import Computing, choose_device, choose_precision, training_flops
from utils.grid import Grid, Price
from utils.opening import bare_model
from utils.protocols import PROTOCOLS, Row, rows
from utils.resources import amount, free_disk
from utils.settings import Parser, Settings
from utils.state import replacing_text

log = logging.getLogger("reproduce")

MINI = (4_000, 1_000)  # train and test images of a folder that the table mini takes, spread evenly over its classes


# --- What is run -----------------------------------------------------------------------------------------------------

def planned(args) -> list[Row]:
    """The rows of the table that was asked for; a folder becomes a small part of itself."""
    if args.table == "mini":
        for name in args.datasets:
            data.check_there(name)
    found = rows(args.table, args.models, args.datasets)
    return [row if row.dataset in data.NAMED else of_folder(row, args.folder) for row in found]


def of_folder(row: Row, folder: Path) -> Row:
    """The row on a few images of a folder: a CSV lists them, the same each time."""
    name = Path(row.dataset).resolve().name
    whole, file = data.load(row.dataset), folder / f"{name}.csv"
    parts = {"train": _first(whole.train, MINI[0]), "test": _first(whole.test, MINI[1])}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_text(file) as out:
        table = csv.writer(out)
        table.writerow(["image", "label", "split"])
        for part, split in parts.items():
            table.writerows([os.path.relpath(image, row.dataset), split.classes[label], part]
                            for image, label in zip(split.images, split.labels.tolist()))
    return replace(row, dataset=os.path.abspath(row.dataset), flags=(*row.flags, ("labels", str(file.absolute()))),
                   images=(len(parts["train"]), len(parts["test"])))


def _first(split: data.Split, most: int) -> data.Split:
    """About so many images, as many of each class: the first in the order of their names."""
    each = max(most // len(split.classes), 1)
    return split.subset(sorted(i for c in range(len(split.classes))
                               for i in (split.labels == c).nonzero().flatten()[:each].tolist()))


def priced(found: list[Row], seeds: int, args) -> tuple[list[Price], str]:
    """What each row costs here, and from what that follows: one step, of the smallest of the models, is measured; the
    others' follow from their floating-point operations."""
    models = [bare_model({"model_type": row.model, "pretrained_dir": row.checkpoint, "dataset": row.dataset,
                          "img_size": (row.size, row.size)}) for row in found]
    device = choose_device(args.device)
    settings = Settings(**{name: value for name, value in vars(args).items() if name in ("device", "precision")})
    computing = Computing(device, choose_precision(settings, device))
    least = min(models, key=training_flops)
    rate = pace.images_per_second(least.config, least.img_size, settings, computing)
    prices = []
    for row, model in zip(found, models):
        weights = 4 * sum(p.numel() for p in model.parameters())
        speed = rate * training_flops(least) / training_flops(model)
        prices.append(grid.price(row, seeds, images_of(row), speed, weights))
    return prices, (f"measured: {least.config.name} at {least.img_size[0]} px trains on {rate:.3g} images/s "
                    f"({grid.hardware()}, {computing.in_words()['precision']})")


def images_of(row: Row) -> tuple[int, int]:
    """Of train and test."""
    named = data.NAMED.get(row.dataset)
    return row.images or (named.train_images, named.test_images)


def say_plan(found: list[Row], prices: list[Price], seeds: int) -> None:
    """Every cell, with its steps, learning rate, split and price."""
    for row, price in zip(found, prices):
        (train, test), steps = images_of(row), {option.steps for option in row.options}
        print(f"\n{row.name}: {row.size} px, batch {row.batch}, from {row.checkpoint}; {price.cells} runs, "
              f"{price.seconds / 3600:.3g} hours")
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
    if not values:
        return ours
    ours = replace(ours, steps=option.steps, learning_rate=option.rate, ours=statistics.fmean(values), n=len(values),
                   spread=statistics.stdev(values) if len(values) > 1 else None, hardware=results[0]["hardware"],
                   minutes=statistics.fmean(result["minutes"] for result in results), word="unknown")
    if row.protocol not in reference.PROTOCOLS:
        return replace(ours, note="Nobody has published a number of this protocol.")
    flags = results[0]["flags"]
    records = reference.find(row.protocol, row.model, row.checkpoint, row.dataset, row.size, option.steps,
                             flags.get("dropout"))
    return judged(ours, values, records, flags, why_not=reference.why_not(row.protocol, row.model, row.checkpoint,
                                                                          row.dataset))


def judged(ours: comparison.Row, values: list[float], records: list, settings: dict,
           why_not: str | None = None) -> comparison.Row:
    """`ours` with the verdict, and with the usual causes where it is a fail."""
    verdict = reference.judge(values, records, ours.dataset, best_on_test=ours.best_on_test)
    causes = reference.causes(verdict.record, settings) if verdict.word == "fail" else ()
    return replace(ours, theirs=verdict.theirs, difference=verdict.difference, tolerance=verdict.tolerance,
                   word=verdict.word, source=verdict.source, note=why_not or verdict.sentence, causes=tuple(causes))


def check(folder: Path) -> list[comparison.Row]:
    """A finished run beside all published numbers of its model and data, those that were made most like it first.

    ValueError: no run, or one that has not ended.
    """
    found = history.read(folder)
    if "test" not in found.about.get("accuracy", {}):
        raise ValueError(f"{folder} has not ended: python train.py --resume {folder}")
    if "test/accuracy" not in found.series or found.multi_label:
        raise ValueError(f"{folder} has no accuracy to compare: nobody published one for several labels an image.")
    about, resolved = found.about, found.resolved
    settings = {**resolved, **{name: value for name, value in found.settings.items() if value not in (None, "auto")}}
    model, dataset = about["config"]["name"], Path(str(found.settings["dataset"])).name
    start = found.settings.get("pretrained_dir") or f"checkpoint/{model}.npz"
    tests = found.series["test/accuracy"].values
    lines = []
    for protocol in reference.PROTOCOLS:
        records = reference.find(protocol, model, start, dataset, about["img_size"][0], settings["num_steps"])
        best = any(record.best_on_test for record in records)
        value = 100 * float(tests.max() if best else tests[-1])
        row = comparison.Row(protocol, model, start, dataset, about["img_size"][0], settings["num_steps"],
                             settings["learning_rate"], value, None, 1, minutes=found.seconds / 60, best_on_test=best)
        if records:
            others = reference.deviations(records[0], settings)
            row = judged(row, [value], records, settings)
            if others and row.word == "pass":
                row = replace(row, note=f"{row.note} It was another recipe, though: {' '.join(others)}")
            lines.append((len(others), row))
    return [row for _, row in sorted(lines, key=lambda pair: pair[0])]


# --- The command line ------------------------------------------------------------------------------------------------

def part_of(text: str) -> tuple[int, int]:
    """'2/4' -> (2, 4)."""
    try:
        part, parts = map(int, text.split("/"))
        if 1 <= part <= parts:
            return part, parts
    except ValueError:
        pass
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
    prices, measured = priced(found, seeds, args)
    mine = grid.shard(found, [price.seconds for price in prices], part, parts)
    prices = [price for row, price in zip(found, prices) if row in mine]
    devices = grid.devices(args.workers) if args.device != "cpu" else [""] * (args.workers or 1)
    print(f"{args.table}: {PROTOCOLS[args.table].about}\n{grid.said(prices, len(devices))} ({measured})")
    if args.dry_run:
        say_plan(mine, prices, seeds)
        return 0
    if (need := sum(price.disk for price in prices)) > (free := free_disk(args.folder)):
        raise ValueError(f"The runs need up to {amount(need)} of disk, and {amount(free)} are free at {args.folder}. "
                         "Take fewer --models or --datasets, or another --output_dir.")
    common = ("--data_dir", os.path.abspath(args.data_dir), "--device", args.device, "--precision", args.precision)
    whole = Grid(mine, args.folder, seeds, common)
    failed = grid.run(whole, devices)
    table = [compared(row, whole, failed) for row in mine]
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
