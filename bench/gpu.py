"""What one GPU does in eight minutes: `python bench/gpu.py` (`bench/gpu.sh` finds the packages), parts in the order of
their value. Each has a limit, the results are written after each, and what is late is said to be late.

--tiny runs every part on whatever is here, with the demo model and 4 images: for trying the script, not for numbers.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.compare import MICRO, ROOT, commands, flops_of, look_at, summary
from bench.hardware import machine, slug, versions
from bench.turns import Job, race

GPU_MEMORY = 24  # GB that the largest model has to do with
SHOWN = ("timm", "timm loop", "transformers", "torchvision", "2020")


class Session:
    """What the parts share: the device, the images, the time, and how contestants are run."""

    def __init__(self, args, folder: Path):
        self.tiny, self.folder, self.until = args.tiny, folder, float("inf")
        self.device, self.rate = "cpu" if args.tiny else "cuda", 0.0
        self.data, self.making = args.data, None
        if not args.data:
            count = "40" if args.tiny else "10000"
            self.data = str(folder / "images")
            self.making = subprocess.Popen([sys.executable, ROOT / "bench" / "pictures.py", self.data, "--pixels", "32",
                                            "--train", count, "--test", count])

    def close(self) -> None:
        if self.making is not None:
            self.making.kill()
            self.making.wait()

    def images(self) -> str:
        """The folder, once it is there."""
        if self.making is not None and self.making.wait():
            raise RuntimeError("the images could not be made")
        return self.data

    def job(self, tool: str, task: str, model: str = "ViT-B_16", size: int = 224, batch: int = 512, count: int = 4,
            **options) -> Job:
        job = Job(tool, task, model, size, options.pop("precision", "bfloat16"), batch, count, self.device, **options)
        if not self.tiny:
            return job
        return job._replace(model="ViT-demo", size=32, batch=4, count=min(count, 2), micro_batches=1,
                            precision="bfloat16" if job.precision == "float16" else job.precision)

    def race(self, jobs: dict[str, Job], rounds: int, together: bool = False) -> dict:
        """The results of contestants with names of one's own; shares of the matrix rate are by each one's own task."""
        outcomes = race(commands(jobs), min(rounds, 2) if self.tiny else rounds, until=self.until, together=together)
        if "ours" not in outcomes:  # each is a subject of its own
            return {name: summary({name: outcome}, flops_of(jobs[name].task, {name: outcome}), self.rate)[name]
                    for name, outcome in outcomes.items()}
        return summary(outcomes, flops_of(next(iter(jobs.values())).task, outcomes), self.rate)


# --- the parts --------------------------------------------------------------------------------------------------------

def rates(session: Session) -> dict:
    """The matrix rate and the copy rate."""
    found = look_at(session.device, *["--tiny"] * session.tiny)
    session.rate = found["bfloat16 FLOP/s"]
    return found


def training(session: Session) -> dict:
    """ViT-B_16 at 224, bfloat16, batch 512: training images/s, everybody as they come. Ours then compiles itself, as
    the default run of train.py is long enough for that; "ours, eager" does not."""
    jobs = {"ours": session.job("ours", "step", as_it_comes=True), "ours, eager": session.job("ours", "step")}
    return session.race(jobs | {name: session.job(name, "step") for name in SHOWN}, 5)


def compiled(session: Session) -> dict:
    """The same under torch.compile, in micro-batches of 128, as all compile at once."""
    names = ("ours", "timm", "transformers", "torchvision")
    return session.race({name: session.job(name, "step", compiled=True, micro_batches=4) for name in names}, 5,
                        together=True)


def inference(session: Session) -> dict:
    """ViT-B_16's forward pass in bfloat16, batch 256, as it comes and compiled."""
    jobs = {name: session.job(name.split(",")[0], "forward", batch=256, count=20, compiled="," in name)
            for name in ("ours", "timm", "ours, compiled", "timm, compiled", "torchvision, compiled")}
    return session.race(jobs, 5, together=True)


def whole_run(session: Session) -> dict:
    """`train.py`: 500 steps of batch 512 from JPEG files, seen at 224 px, and one evaluation of the 10,000 test images
    (float32, as what a run reports is). The seconds from the first step to the evaluation's end, and of the command."""
    steps, batch, size, model = (3, 4, 32, "ViT-demo") if session.tiny else (500, 512, 224, "ViT-B_16")
    output, data = session.folder / "output", session.images()
    command = [sys.executable, ROOT / "train.py", "--dataset", data, "--pretrained_dir", "none", "--model_type", model,
               "--img_size", size, "--num_steps", steps, "--warmup_steps", steps // 10, "--train_batch_size", batch,
               "--eval_every", steps, "--output_dir", output, "--name", "run", "--device", session.device]
    start = time.time()
    with open(session.folder / "log", "w") as log:
        try:
            code = subprocess.run(list(map(str, command)), stdout=log, stderr=log,
                                  timeout=max(session.until - time.monotonic(), 1)).returncode
        except subprocess.TimeoutExpired:
            code = "late"
    seconds, said = time.time() - start, (session.folder / "log").read_text().splitlines()
    file = output / "run" / "metrics.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {"exit code": code, "batch": batch, "command, seconds": seconds, **timeline(events, start),
            "log": said[-12:]}


def timeline(events: list[dict], start: float) -> dict:
    """A run's own notes -> when its first step was done, and how long steps and evaluation took together.

    Events are written a few steps late, and the first step's own duration is taken to be the mean of the others.
    """
    steps = [event for event in events if event["name"] == "train/loss"]
    ends = [event for event in events if event["name"] == "test/loss"]
    if len(steps) < 2:
        return {}
    each = (steps[-1]["time"] - steps[0]["time"]) / (len(steps) - 1)
    speeds = [event["value"] for event in events if event["name"] == "train/images_per_second" and event["value"]]
    return {"steps": len(steps), "until the first step, seconds": steps[0]["time"] - start - each,
            "steps, seconds": each * len(steps), "images/s": statistics.median(speeds) if speeds else None,
            "evaluation, seconds": ends[-1]["time"] - steps[-1]["time"] if ends else None,
            "steps and evaluation, seconds": ends[-1]["time"] - steps[0]["time"] + each if ends else None}


def pipeline(session: Session) -> dict:
    """A step with the reading, cropping and resizing of its images against a step on a given batch."""
    found = session.race({"step": session.job("ours", "step", count=12),
                          "loop": session.job("ours", "loop", count=12, data=session.images()),
                          "timm loop": session.job("timm loop", "loop", count=12, data=session.images())}, 5)
    if found["step"]["n"] and found["loop"]["n"]:
        extra = [loop / step - 1 for step, loop in zip(found["step"]["seconds"], found["loop"]["seconds"])]
        found["cost of the input, share of a step"] = statistics.median(extra)
    return found


def halves(session: Session) -> dict:
    """float16, with its loss scale, and bfloat16."""
    return session.race({"bfloat16": session.job("ours", "step"),
                         "float16": session.job("ours", "step", precision="float16")}, 5)


def small_memory(session: Session) -> dict:
    """ViT-H_14 at 224, batch 512, with its published dropout, in 24 GB of memory: as many micro-batches as it needs."""
    return session.race({"ours": session.job("ours", "step", "ViT-H_14", count=1, dropout=None, memory=GPU_MEMORY)}, 2)


def other_sizes(session: Session, size: int) -> dict:
    """Training images/s of the other models, ours and timm's; each starts with micro-batches that should fit."""
    found, more = {}, 1 if size == 224 else 4
    models = [model for model in MICRO if model != "ViT-B_16" or size != 224]
    for model in models:
        jobs = {name: session.job(name, "step", model, size, count=1, micro_batches=max(MICRO[model] // 4 * more, 1))
                for name in ("ours", "timm")}
        found[f"{model} {size}"] = session.race(jobs, 2)
    return found


PARTS: tuple[tuple[str, float, Callable], ...] = (  # name, seconds at most, what is done
    ("rates", 45, rates), ("training", 100, training), ("compiled", 100, compiled), ("inference", 65, inference),
    ("whole run", 125, whole_run), ("pipeline", 60, pipeline), ("float16", 40, halves), ("ViT-H_14", 45, small_memory),
    ("other models 224", 90, lambda session: other_sizes(session, 224)),
    ("other models 384", 120, lambda session: other_sizes(session, 384)))


# --- what is said -----------------------------------------------------------------------------------------------------

def speeds(results: dict) -> str:
    said = []
    for name, entry in results.items():
        if not isinstance(entry, dict) or "n" not in entry:
            continue
        if not entry["n"]:
            said.append(f"{name} {entry['failure'][0]}")
            continue
        share = f" ({100 * entry['share_of_matrix_rate']:.0f} %)" if "share_of_matrix_rate" in entry else ""
        said.append(f"{name} {entry['images_per_second']:,.0f}/s{share}")
    return ", ".join(said)


def best_ratio(results: dict) -> str:
    """Ours over the fastest peer, by the rounds' ratios."""
    peers = {name: entry["ratio"] for name, entry in results.items() if "ratio" in entry and name in SHOWN}
    if not peers:
        return ""
    best = min(peers, key=peers.get)
    return f"; ours {peers[best]:.2f} times the best peer ({best})"


def verdict(name: str, part: dict) -> str:
    """A part in a line."""
    if "failure" in part:
        return f"{name}: {part['failure']}"
    results = part["results"]
    if name == "rates":
        text = (f"{results.get('gpu', results['device'])}: {results['bfloat16 FLOP/s'] / 1e12:,.3g} TFLOP/s bfloat16, "
                f"{results['copy B/s'] / 1e12:.3g} TB/s")
    elif name == "whole run":
        text = ", ".join(f"{key} {value:,.1f}" for key, value in results.items() if isinstance(value, float))
    elif name.startswith("other"):
        text = "; ".join(f"{model}: {speeds(entry)}{best_ratio(entry)}" for model, entry in results.items())
    else:
        text = speeds(results) + (best_ratio(results) if name in ("training", "compiled") else "")
    if name == "pipeline" and "cost of the input, share of a step" in results:
        text += f"; the input costs {100 * results['cost of the input, share of a step']:.1f} % of a step"
    if name == "float16" and all(results[half]["n"] for half in results):
        text += f"; float16 is {speed_of(results, 'float16') / speed_of(results, 'bfloat16'):.3f} of bfloat16"
    if name == "ViT-H_14" and results["ours"]["n"]:
        ours = results["ours"]
        text += f"; {ours['peak'] / 1e9:.1f} GB, {ours['micro_batches']} micro-batches, loss {ours['loss']:.3f}"
    return f"{name} ({part['seconds']:.0f} s): {text}"


def speed_of(results: dict, name: str) -> float:
    return results[name]["images_per_second"]


def run_part(session: Session, work: Callable, limit: float, end: float) -> dict:
    """Its results, or why there are none; a part never ends the others."""
    start = time.monotonic()
    session.until = min(start + limit, end)
    if session.until - start < 5:
        return {"failure": "late: the time was over before it began", "seconds": 0.0}
    try:
        found = {"results": work(session)}
    except (Exception, SystemExit) as error:
        found = {"failure": f"{type(error).__name__}: {error}"}
    return {"about": (work.__doc__ or "").strip(), "seconds": time.monotonic() - start, **found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="train/CLASS/* and test/CLASS/*, 10,000 images each (default: "
                        "made up, 32 px)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help=", ".join(name for name, *_ in PARTS))
    parser.add_argument("--limit", type=float, default=460, help="seconds in all (default: 460)")
    parser.add_argument("--tiny", action="store_true", help="every part with the demo model on a CPU")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.limit * (10 if args.tiny else 1)
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "machine": machine(),
              "versions": versions(), "tiny": args.tiny, "parts": {}}
    file = args.output / "gpu.json"
    with tempfile.TemporaryDirectory() as folder:
        session = Session(args, Path(folder))
        try:
            for name, limit, work in PARTS:
                if args.parts and name not in (*args.parts, "rates"):
                    continue
                report["parts"][name] = part = run_part(session, work, limit * (10 if args.tiny else 1), end)
                if name == "rates" and "results" in part:
                    device = part["results"].get("gpu") or report["machine"]["processor"]
                    file = args.output / f"{datetime.date.today()}-{slug(device)}{'-tiny' * args.tiny}.json"
                if "sees no GPU" in part.get("failure", ""):
                    raise SystemExit("error: PyTorch sees no GPU here; --tiny tries the script without one.")
                print(verdict(name, part), flush=True)
                file.write_text(json.dumps(report, indent=1) + "\n")
        finally:
            session.close()
    print(file)


if __name__ == "__main__":
    main()
