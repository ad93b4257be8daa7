"""The experiments on small ViTs: `python bench/pretrain.py --data DIR [--pilot] [--only WORD ...]`; a table at the end.

Each run is a command of train.py that goes on where it was cut off; what is finished is not done again, so that the
whole fits into pieces of any length (`--minutes`). --pilot is the same, cut down to what two cores can do in two hours.
DIR holds cifar10/ and tiny32/ as folders of classes, JPEG copies of the published sets.
"""

import argparse
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.hardware import machine, slug, versions
from utils.history import read

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
SHOTS = (5, 10, 25)
UPSTREAMS = ("upstream", "upstream-far")  # of all of tiny32; without the classes like CIFAR-10's


class Job(NamedTuple):
    """A command of train.py. `row` is what the runs of several seeds have in common; after: whose weights it needs."""
    name: str
    row: str
    flags: str
    after: str = ""


# --- What is run -----------------------------------------------------------------------------------------------------

def jobs(pilot: bool) -> list[Job]:
    """All runs, in an order in which each finds what it needs. Data is named relative to --data."""
    return [*tutorial(pilot), *upstreams(pilot), *transfer(pilot), *probes()]


def tutorial(pilot: bool) -> list[Job]:
    """ViT-CIFAR from scratch: the published tutorial's three (75.03, 76.05, 78.55 %), then our recipe."""
    epochs = 1 if pilot else 50
    three = {"linear patches, learned positions": "--patch_proj linear --pos_embed learned",
             "linear patches, sinusoids": "--patch_proj linear --pos_embed sincos1d",
             "convolution, sinusoids": "--patch_proj conv --pos_embed sincos1d"}
    plain = [Job(f"tutorial-{i}", f"tutorial, {row}, {epochs} epochs",
                 f"--dataset cifar10 --recipe tutorial {flags} --num_epochs {epochs} --seed 0")
             for i, (row, flags) in enumerate(three.items())]
    return plain + [Job(f"scratch-{n}", f"recipe scratch, ViT-CIFAR, {n} epochs",
                        f"--dataset cifar10 --recipe scratch --model_type ViT-CIFAR --num_epochs {n} --seed 0")
                    for n in ((1,) if pilot else (50, 200))]


def upstreams(pilot: bool) -> list[Job]:
    """ViT-demo (2.73 M parameters) on tiny32, with and without the classes that CIFAR-10 has, too."""
    length = ("--num_steps 1600 --warmup_steps 200 --train_batch_size 128 --optimizer adamw --learning_rate 0.001 "
              "--weight_decay 0.05 --min_area 0.25 --eval_every 1600" if pilot else
              "--recipe scratch --num_epochs 100 --train_batch_size 256")
    return [Job(name, f"{name} on tiny32", f"--dataset {data} --model_type ViT-demo --pretrained_dir none {length} "
                "--img_size 32") for name, data in zip(UPSTREAMS, ("tiny32", "tiny32-far"))]


def transfer(pilot: bool) -> list[Job]:
    """The paper's experiment in miniature: CIFAR-10 by its recipe, from weights and from scratch, as many steps."""
    starts = {"checkpoint/ViT-demo.npz": "", **{f"{name}.npz": name for name in UPSTREAMS}, "none": ""}
    found = []
    for size in (32, 64):
        steps, batch = ((100, 128) if size == 32 else (60, 64)) if pilot else (2500, 512)
        seeds = SEEDS[:1] if pilot and size == 64 else SEEDS
        for start, after in starts.items():
            if pilot and size == 64 and after:
                continue
            row = f"{size} px, {steps} steps of {batch}, from {Path(start).stem if start != 'none' else 'scratch'}"
            found += [Job(f"transfer-{size}-{Path(start).stem}-{seed}", row,
                          f"--dataset cifar10 --model_type ViT-demo --pretrained_dir {start} --img_size {size} "
                          f"--num_steps {steps} --warmup_steps {steps // 10} --train_batch_size {batch} "
                          f"--eval_every {steps} --seed {seed}", after) for seed in seeds]
    return found


def probes() -> list[Job]:
    """Frozen features: a linear layer trained on them, and few-shot ridge regression, at 32 px."""
    found = []
    for start, after in {"checkpoint/ViT-demo.npz": "", **{f"{name}.npz": name for name in UPSTREAMS}}.items():
        stem = Path(start).stem
        flags = f"--dataset cifar10 --model_type ViT-demo --pretrained_dir {start} --img_size 32"
        found += [Job(f"linear-{stem}", f"linear probe (--train head, 200 steps of 128) of {stem}", f"{flags} --train "
                      "head --num_steps 200 --warmup_steps 20 --train_batch_size 128 --eval_every 200 --seed 0", after)]
        found += [Job(f"shots-{stem}-{K}", f"{K}-shot of {stem}", f"{flags} --few_shot {K}", after) for K in SHOTS]
    return found


# --- Running ---------------------------------------------------------------------------------------------------------

def command(job: Job, args) -> list[str]:
    """train.py's words: data and weights where they are, and what every run here has in common."""
    words = shlex.split(job.flags)
    for i, word in enumerate(words):
        if words[i - 1] == "--dataset":
            words[i] = str(args.work / word if word == "tiny32-far" else args.data / word)
        elif words[i - 1] == "--pretrained_dir" and word in [f"{name}.npz" for name in UPSTREAMS]:
            words[i] = str(args.work / word)
    if "--few_shot" in words:
        return [sys.executable, "train.py", *words, "--eval_batch_size", "500"]
    return [sys.executable, "train.py", *words, "--eval_batch_size", "500", "--output_dir", str(args.work), "--name",
            job.name, "--resume", "auto", "--no_report"]


def run(job: Job, args, left: float) -> tuple[int, str, float]:
    """(exit code, what it said, seconds); stopped, its state saved, when no time is left."""
    began = time.monotonic()
    process = subprocess.Popen(command(job, args), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    try:
        said, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate()
    except BaseException:
        process.terminate()  # nobody else would end it
        raise
    return process.returncode, said, time.monotonic() - began


def outcome(job: Job, args, said: str) -> dict:
    """What a finished run brought: accuracies of `last` and, beside it, of the best evaluation on the test set."""
    if found := re.search(r"-shot ([\d.]+) ± ([\d.]+) % of ([\d,]+) test images", said):
        return {"accuracy": float(found[1]), "spread_of_draws": float(found[2]),
                "test_images": int(found[3].replace(",", ""))}
    history = read(args.work / job.name)
    tests = history.series["test/accuracy"].values
    return {"accuracy": 100 * float(tests[-1]), "best_on_test": 100 * float(tests.max()), "steps": history.step,
            "evaluations": len(tests)}


def without_classes(data: Path, folder: Path) -> None:
    """tiny32 as links, without the classes that are or are close to one of CIFAR-10's (overlap_cifar10.txt)."""
    lines = (data / "overlap_cifar10.txt").read_text(encoding="utf-8").splitlines()
    out = {line.split("\t")[0] for line in lines if line and not line.startswith("#")}
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for source in sorted((data / part).iterdir()):
            link = folder / part / source.name
            if source.name not in out:
                link.unlink(missing_ok=True)  # it may lead to where the data was
                link.symlink_to(source.resolve())


def export(job: Job, args) -> None:
    """The upstream's last weights in Google's layout, float16."""
    subprocess.run([sys.executable, "convert.py", str(args.work / job.name / "last.safetensors"),
                    str(args.work / f"{job.name}.npz"), "--dtype", "float16", "--overwrite"], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--data", type=Path, required=True, help="folder of cifar10/ and tiny32/")
    p.add_argument("--pilot", action="store_true", help="cut down for a CPU")
    p.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="jobs whose names begin so")
    p.add_argument("--minutes", type=float, default=10_000, help="stop then; the next call goes on")
    p.add_argument("--work", type=Path, help="where the runs go (default: output/pretrain, or output/pilot)")
    p.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    p.add_argument("--list", action="store_true", help="show the commands, and stop")
    return p


def main() -> None:
    args = parser().parse_args()
    args.work = (args.work or ROOT / "output" / ("pilot" if args.pilot else "pretrain")).absolute()
    args.data, end = args.data.absolute(), time.monotonic() + 60 * args.minutes
    todo = [job for job in jobs(args.pilot) if job.name.startswith(tuple(args.only))]
    if args.list:
        print("\n".join(f"python train.py {job.flags}" for job in todo))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if (args.data / "tiny32").is_dir():
        without_classes(args.data / "tiny32", args.work / "tiny32-far")
    for job in todo:
        record = args.work / f"{job.name}.json"
        if record.exists():
            continue
        if job.after and not (args.work / f"{job.after}.npz").exists():
            print(f"{job.name}: waits for {job.after}", flush=True)
            continue
        if (left := end - time.monotonic()) < 30:
            break
        spent = args.work / f"{job.name}.seconds"
        code, said, seconds = run(job, args, left)
        total = seconds + (float(spent.read_text()) if spent.exists() else 0.0)
        spent.write_text(str(total))
        if code in (128 + signal.SIGTERM, -signal.SIGTERM):  # the second, before it could note a signal
            break
        if code:
            print(f"{job.name}: exit code {code}\n{said[-2000:]}", flush=True)
            continue
        if job.name in UPSTREAMS:
            export(job, args)  # before the record: what is recorded is never done again
        record.write_text(json.dumps({**job._asdict(), "command": f"python train.py {job.flags}",
                                      **outcome(job, args, said), "minutes": round(total / 60, 2)}))
        print(f"{job.name}: {record.read_text()}", flush=True)
    write(args)


# --- Results ---------------------------------------------------------------------------------------------------------

def write(args) -> None:
    """One JSON of all that is finished, and a table of it on the screen."""
    found = [json.loads((args.work / f"{job.name}.json").read_text()) for job in jobs(args.pilot)
             if (args.work / f"{job.name}.json").exists()]
    device = next((line for line in [os.environ.get("GPU_NAME")] if line), platform.processor() or "cpu")
    about = {"machine": machine(), "versions": versions(), "device": device, "pilot": args.pilot, "runs": found,
             "note": "images are JPEG copies: compare with each other, not with numbers on the original pixels"}
    about["machine"].pop("load")
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"{'pilot' if args.pilot else 'pretrain'}-{slug(about['machine']['processor'])}.json"
    (args.results / name).write_text(json.dumps(about, indent=1) + "\n")
    print(table(found))


def table(found: list[dict]) -> str:
    """Markdown: a line for the runs of each row, mean and standard deviation (n - 1) over their seeds."""
    lines = ["| run | test accuracy | n | the best of its evaluations on test | minutes |", "|---|---|---|---|---|"]
    for row in dict.fromkeys(run["row"] for run in found):
        runs = [run for run in found if run["row"] == row]
        values = [run["accuracy"] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else runs[0].get("spread_of_draws")
        best = [run["best_on_test"] for run in runs if run.get("evaluations", 1) > 1]
        lines.append(f"| {row} | {statistics.fmean(values):.2f} %" + (f" ± {spread:.2f}" if spread is not None else "")
                     + f" | {len(values)} | {f'{statistics.fmean(best):.2f} %' if best else '-'} | "
                     f"{sum(run['minutes'] for run in runs):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
