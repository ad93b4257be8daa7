"""Ours against the tools that one could use instead: `python bench/compare.py` (`make bench`), a table of ratios.

Each cell of a peer is the median over the rounds of its time over ours (above 1: ours is faster), and the least and
the largest of them. All contestants of a row take turns, each in its own process, with random initial weights and 10
classes; ours is set up as `train.py` sets itself up.

  timm          timm's model in a plain PyTorch loop: autocast, backward, clip, SGD
  timm loop     as its own script: channels last, its loader with prefetch, optimiser, loss, schedule; our crops
  transformers  ViTForImageClassification of the same sizes, torchvision its ViT, both in the plain loop
  2020          a model and a loop as one wrote them then: separate projections, spelled-out softmax, dropout 0.1,
                Pillow transforms in the loader's processes, the loss read at each step

Rows: forward (inference), step (given tensors; with its peak memory), loop (files to weights), evaluation (files to
accuracy), defaults (loop, each tool's own precision and augmentation), augmentation (processor time of a batch of
decoded images), load (a .npz of Google's to a model).
"""

import argparse
import datetime
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import load
from bench.hardware import machine, slug, versions
from bench.turns import Failure, Job, Outcome, race, ratios

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("timm", "timm loop", "transformers", "torchvision", "2020")
MODELS = ("ours", "timm", "transformers", "torchvision", "2020")
LOOPS = ("ours", "timm loop", "2020")
MICRO = {"ViT-B_16": 4, "ViT-L_16": 8, "ViT-H_14": 16, "R50+ViT-B_16": 8}  # of 512 images at 224 px, where compiled


class Row(NamedTuple):
    """One line of the table; what is not said of a contestant is the same for all."""
    task: str
    model: str
    size: int           # pixels
    precision: str
    batch: int = 0      # images
    count: int = 1      # steps or batches a round
    contestants: tuple[str, ...] = MODELS
    rounds: int = 7
    compiled: bool = False
    micro_batches: int = 1

    @property
    def name(self) -> str:
        words = [self.model, str(self.size), self.precision if self.task != "defaults" else "", self.task]
        return " ".join(filter(None, words)) + " compiled" * self.compiled

    def jobs(self, device: str, data: str) -> dict[str, Job]:
        common = dict(task=self.task, model=self.model, size=self.size, precision=self.precision, batch=self.batch,
                      count=self.count, device=device, data=data, compiled=self.compiled,
                      micro_batches=self.micro_batches)
        if self.task == "defaults":  # timm's script computes in float32 unless it is told otherwise
            return {name: Job(name, **common | dict(task="loop", as_it_comes=True,
                                                    precision="auto" if name == "ours" else "float32"))
                    for name in self.contestants}
        return {name: Job(name, **common) for name in self.contestants}


def shared_rows() -> list[Row]:
    """What is measured on a processor everywhere."""
    views = ("ours", "torchvision")
    return [Row("augmentation", "ViT-demo", 32, "", 128, 20, views),
            Row("augmentation", "ViT-B_16", 224, "", 32, 2, views),
            Row("load", "ViT-B_16", 224, "", contestants=("ours", "timm"), rounds=5)]


def cpu_rows(bfloat16: bool) -> list[Row]:
    """A step of ViT-B_16 in float32 takes 5 s, hence fewer rounds there: all rows together are to take 40 minutes."""
    rows = []
    for precision in ("float32", "bfloat16") if bfloat16 else ("float32",):
        rounds, few = (5, 1) if precision == "float32" else (7, 2)
        rows += [Row("forward", "ViT-B_16", 224, precision, 8, few, rounds=rounds),
                 Row("step", "ViT-B_16", 224, precision, 8, 1, rounds=rounds),
                 Row("loop", "ViT-B_16", 224, precision, 8, 2, LOOPS, rounds),
                 Row("evaluation", "ViT-B_16", 224, precision, 8, 2, LOOPS, rounds),
                 Row("forward", "ViT-demo", 32, precision, 128, 2 * few),
                 Row("step", "ViT-demo", 32, precision, 128, few),
                 Row("loop", "ViT-demo", 32, precision, 128, 10, LOOPS, rounds),
                 Row("evaluation", "ViT-demo", 32, precision, 100, 20, LOOPS, rounds)]
    return [*rows, Row("defaults", "ViT-B_16", 224, "as they come", 8, 2, ("ours", "timm loop"), 5), *shared_rows()]


def gpu_rows() -> list[Row]:
    """Batches of 512 images, in as many micro-batches as fit."""
    rows = []
    for model in MICRO:
        for size in (224, 384):
            micro = MICRO[model] * (1 if size == 224 else 4)
            for precision in ("bfloat16", "float16"):
                rows += [Row(task, model, size, precision, 512, 3) for task in ("forward", "step")]
            rows += [Row("forward", model, size, "bfloat16", 128, 12, MODELS[:-1], compiled=True),
                     Row("step", model, size, "bfloat16", 512, 3, MODELS[:-1], compiled=True, micro_batches=micro)]
    for model, size, batch, count in (("ViT-B_16", 224, 512, 5), ("ViT-demo", 32, 512, 20)):
        for precision in ("bfloat16", "float16"):
            rows += [Row("loop", model, size, precision, batch, count, ("ours", *PEERS)),
                     Row("evaluation", model, size, precision, 128, 8, ("ours", *PEERS))]
    return [*rows, Row("defaults", "ViT-B_16", 224, "as they come", 512, 5, ("ours", "timm loop")), *shared_rows()]


# --- measuring --------------------------------------------------------------------------------------------------------

def commands(jobs: dict[str, Job]) -> dict[str, list[str]]:
    return {name: [sys.executable, str(ROOT / "bench" / "worker.py"), json.dumps(job)] for name, job in
            ((name, job._asdict()) for name, job in jobs.items())}


def race_to_load(model: str, rounds: int, folder: str, tell: Callable) -> dict[str, Outcome]:
    """`bench/load.py`'s runs, each a fresh process: a new head of 10 classes; the first run of each does not count."""
    path = Path(folder) / f"{model}.npz"
    if not path.exists():
        tell("writes a checkpoint")
        subprocess.run([sys.executable, ROOT / "bench" / "random_checkpoint.py", model, path], check=True,
                       capture_output=True)
    facts, outcomes = load.child("tell", str(path)), {"ours": Outcome(), "timm": Outcome()}
    for number in range(-1, rounds):
        for name, outcome in outcomes.items():
            tell(f"{name}, run {number + 1} of {rounds}")
            try:
                run = None if outcome.failure else load.child(name, str(path), facts["name"], 10, False)
            except SystemExit as error:
                reason = str(error).rpartition("]: ")[2]
                outcome.failure = Failure("absent" if "No module" in reason else "failed", reason)
                continue
            if run and number >= 0:
                outcome.rounds.append({"round": number, "seconds": run["whole"], "images": 1, "peak": run["peak"],
                                       "load call": run["load call"]})
    return outcomes


def summary(outcomes: dict[str, Outcome], work: float = 0.0, rate: float = 0.0) -> dict[str, dict]:
    """Of each contestant what the table and the file hold. work: FLOP an image; rate: FLOP/s that the device reaches
    (0: not asked for)."""
    found = {}
    for name, outcome in outcomes.items():
        entry = {**outcome.about, "failure": outcome.failure, "n": len(outcome.rounds)}
        if outcome.rounds:
            last = outcome.rounds[-1]
            entry |= {"images_per_second": outcome.images_per_second(), "seconds": outcome.of("seconds"),
                      "images": last["images"], "rounds": outcome.of("round"),
                      **{key: last[key] for key in ("peak", "micro_batches", "loss", "load call") if key in last}}
            if rate and work:
                entry["share_of_matrix_rate"] = entry["images_per_second"] * work / rate
        if outcome.rounds and name != "ours" and "ours" in outcomes:
            each = ratios(outcome, outcomes["ours"])
            if each:
                entry |= {"ratios": each, "ratio": statistics.median(each), "least": min(each), "largest": max(each)}
        found[name] = entry
    return found


def flops_of(task: str, outcomes: dict[str, Outcome]) -> float:
    """An image's: those of the forward pass, three times as many where there is a backward pass."""
    forward = next((o.about["forward_flops"] for o in outcomes.values() if "forward_flops" in o.about), 0.0)
    return forward * (1 if task in ("forward", "evaluation") else 3)


def measure(row: Row, device: str, folders: dict[int, str], rate: float = 0.0,
            tell: Callable[[str], None] = lambda text: None, until: float | None = None) -> dict:
    """A row's results. folders: the images for models of 32 px and of more, and under 0 a place for a checkpoint."""
    if row.task == "load":
        outcomes = race_to_load(row.model, row.rounds, folders[0], tell)
    else:
        jobs = row.jobs(device if row.task != "augmentation" else "cpu", folders.get(row.size, folders[224]))
        outcomes = race(commands(jobs), row.rounds, tell=tell, until=until, together=row.compiled)
    return {"row": row.name, **row._asdict(),
            "results": summary(outcomes, flops_of(row.task, outcomes), rate)}


# --- the table --------------------------------------------------------------------------------------------------------

def cells(row: dict) -> dict[str, str]:
    """Column -> text."""
    results, ours = row["results"], row["results"]["ours"]
    batch = f", batch {row['batch']}" * (row["task"] != "load")
    texts = {"": f"{row['row']}{batch}", "ours": ours["failure"][0] if not ours["n"] else own_value(row["task"], row)}
    for name in PEERS:
        peer = results.get(name, {})
        if "ratio" in peer:
            texts[name] = f"**{peer['ratio']:.2f}** ({peer['least']:.2f} to {peer['largest']:.2f})"
        elif peer.get("failure"):
            texts[name] = peer["failure"][0].replace("none", "–")
        else:
            texts[name] = f"{peer['images_per_second']:.3g}/s" if peer.get("n") else ""
    if row["task"] == "step" and ours["n"]:
        others = [f"{name} {results[name]['peak'] / ours['peak']:.2f}" for name in PEERS
                  if results.get(name, {}).get("n") and ours["peak"]]
        texts["peak memory, MiB"] = f"{ours['peak'] / 2**20:,.0f} ({', '.join(others)})"
    if "share_of_matrix_rate" in ours:
        texts["of the matrix rate"] = f"{100 * ours['share_of_matrix_rate']:.0f} %"
    return texts


def own_value(task: str, row: dict) -> str:
    speed = row["results"]["ours"]["images_per_second"]
    if task == "augmentation":
        return f"{1000 * row['batch'] / speed:.3g} ms a batch"
    return f"{1 / speed:.3g} s" if task == "load" else f"{speed:,.4g} images/s"


def table(rows: list[dict]) -> str:
    lines = [cells(row) for row in rows]
    columns = [name for name in ("", "ours", *PEERS, "peak memory, MiB", "of the matrix rate")
               if name == "" or any(line.get(name) for line in lines)]
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(head + [f"| {' | '.join(line.get(name, '') for name in columns)} |" for line in lines])


def notes(report: dict) -> list[str]:
    """What has to be known beside the table: reasons, what is not in the times, the machine."""
    said, rows, ready = [], report["rows"], {}
    for row in rows:
        for name, entry in row["results"].items():
            if entry["failure"] and entry["failure"][0] != "none":
                said.append(f"{row['row']}, {name}: {' '.join(entry['failure'])}")
        ours, timm = row["results"]["ours"], row["results"].get("timm", {})
        if row["task"] in ("loop", "evaluation", "defaults") and ours["n"]:
            ready[row["row"]] = ours["prepare"]
        if row["task"] == "defaults" and ours["n"]:
            said.append(f"{row['row']}: ours chose {ours['precision']}, timm's script computes in float32.")
        if timm.get("load call"):
            said.append(f"{row['row']}: timm's load call alone, without its building of the model, took "
                        f"{timm['load call']:.2f} s (last run).")
    if ready:
        slowest = max(ready, key=ready.get)
        said.append("Loops and evaluations of ours do not contain the decoding of its images, once at the start of a "
                    f"run: with the building of the model at most {ready[slowest]:.1f} s here ({slowest}); nor do "
                    "evaluations the resize, which is made once for all of a run's.")
    return [*said, *about_machine(report)]


def about_machine(report: dict) -> list[str]:
    about, device, rows = report["machine"], report["device"], report["rows"]
    said = [f"{device.get('gpu', '')} {about['processor']} (family {about['family']}, model {about['model']}; "
            f"{', '.join(about['flags'])}), {device['threads']} threads, {about['cores']} cores".strip()]
    if not device["tiny"]:
        rates = ", ".join(f"{name.split()[0]} {device[name] / 1e9:,.0f} GFLOP/s" for name in
                          ("float32 FLOP/s", "bfloat16 FLOP/s"))
        said.append(f"A large matrix product: {rates}; a copy: {device['copy B/s'] / 1e9:,.0f} GB/s read and written.")
    counts = sorted({entry["n"] for row in rows for entry in row["results"].values() if entry["n"]})
    said.append(f"n = {' or '.join(map(str, counts))} rounds after one to warm up; 10 classes; "
                f"{', '.join(f'{name} {v}' for name, v in report['versions'].items())}; {report['date'][:10]}.")
    return said


# --- the command ------------------------------------------------------------------------------------------------------

def chosen(rows: list[Row], patterns: list[str] | None) -> list[Row]:
    """Rows whose name has all the words of one of the patterns. SystemExit: none has."""
    if not patterns:
        return rows
    found = [row for row in rows if any(set(p.split()) <= set(row.name.split()) for p in patterns)]
    if not found:
        raise SystemExit("error: there is no such row. Rows:\n  " + "\n  ".join(row.name for row in rows))
    return found


def look_at(device: str, *flags: str) -> dict:
    done = subprocess.run([sys.executable, ROOT / "bench" / "hardware.py", device, *flags], capture_output=True,
                          text=True)
    if done.returncode:
        raise SystemExit(f"error: {(done.stderr.strip() or 'no answer').splitlines()[-1]}")
    return json.loads(done.stdout)


def make_images(folder: Path, rows: list[Row]) -> dict[int, str]:
    """Folders of JPEGs, as many as the rows need."""
    found = {0: str(folder)}
    for size, pixels in ((32, 32), (224, 500)):
        mine = [row for row in rows if (row.size == 32) == (size == 32) and row.task not in ("forward", "step", "load")]
        most = min(max([row.batch * row.count for row in mine], default=0), 2600 if size == 32 else 640)
        found[size] = str(folder / str(size))
        if most:
            subprocess.run([sys.executable, ROOT / "bench" / "pictures.py", found[size], "--pixels", str(pixels),
                            "--train", str(max(most, 40)), "--test", str(max(most, 40))], check=True)
    return found


def results_file(device: dict, about: dict) -> Path:
    """bench/results/DATE-DEVICE.json, with a number where that is there already."""
    stem = f"{datetime.date.today()}-{slug(device.get('gpu') or about['processor'])}"
    names = (f"{stem}{end}.json" for end in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for name in names if not (path := ROOT / "bench" / "results" / name).exists())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="WORDS", help="only rows that have all these words, such as "
                        "'ViT-demo step'; several may be given")
    parser.add_argument("--rounds", type=int, help="of every row (default: 5 or 7)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--data", metavar="DIR", help="train/CLASS/* and test/CLASS/*, or CLASS/* (default: made up)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(default: bench/results/DATE-DEVICE.json)")
    parser.add_argument("--batch", type=int, help="images, of every row; for trying")
    parser.add_argument("--count", type=int, help="steps or batches a round, of every row; for trying")
    parser.add_argument("--list", action="store_true", help="the rows' names, and nothing more")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, about = parse(argv), machine()
    device = look_at(args.device, *["--tiny"] * bool(args.batch or args.list))
    cuda = device["device"] == "cuda"
    bfloat16 = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(about["flags"]))
    rows = chosen(gpu_rows() if cuda else cpu_rows(bfloat16), args.rows)
    if args.list:
        return print("\n".join(row.name for row in rows))
    changes = {"rounds": args.rounds, "batch": args.batch, "count": args.count}
    rows = [row._replace(**{key: value for key, value in changes.items() if value}) for row in rows]
    file = args.json or results_file(device, about)
    file.parent.mkdir(parents=True, exist_ok=True)
    report = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "command": shlex.join(sys.argv),
              "machine": about, "device": device, "versions": versions(), "rows": []}
    turns = sum((row.rounds + 2) * len(row.contestants) for row in rows)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=turns, unit="turn", dynamic_ncols=True) as bar:
        folders = make_images(Path(folder), rows)
        if args.data:
            folders |= {32: args.data, 224: args.data}
        for row in rows:
            def tell(text: str, row: Row = row) -> None:
                bar.set_description_str(f"{row.name}: {text}")
                bar.update()
            report["rows"].append(measure(row, device["device"], folders, device["bfloat16 FLOP/s"] * cuda, tell))
            report["seconds"] = time.monotonic() - start
            file.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]), "", *notes(report), "" if bfloat16 or cuda else "This processor has no bfloat16 of "
          "its own: those rows are left out.", f"{file}, after {report['seconds'] / 60:.1f} minutes", sep="\n")


if __name__ == "__main__":
    main()
