"""Kills a run again and again, continues it each time, and compares it with one that was left alone.

`python bench/kill.py --kills 20`: SIGKILL at random moments of its running (8 of 20), of its start-up (4), and while a
state is being written (8); then SIGTERM twice. Weights, optimiser state, what is known of best and last, and every line
of metrics.jsonl have to be equal to the bit (wall times and throughputs apart). `--processes 2` starts torchrun.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

MOMENTS = ("running", "saving", "running", "saving", "starting")
ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"--model_type": "ViT-demo", "--dataset": "digits", "--img_size": 16, "--num_steps": 60, "--warmup_steps": 5,
         "--train_batch_size": 16, "--gradient_accumulation_steps": 2, "--dropout": 0.1, "--eval_every": 14,
         "--eval_batch_size": 359, "--save_every": 4, "--precision": "fp32", "--device": "cpu"}


def start(output: Path, name: str, processes: int, flags: dict, *more: str) -> subprocess.Popen:
    """A run of `train.py` in a session of its own; its words go to NAME.log."""
    program = [sys.executable, "train.py"] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "train.py"]
    flags = {**FLAGS, **flags, "--output_dir": output, "--name": name}
    words = [str(word) for pair in flags.items() for word in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(output / f"{name}.log", "ab") as log:
        return subprocess.Popen([*program, *words, "--no_report", *more], cwd=ROOT, env=environment, stdout=log,
                                stderr=log, start_new_session=True)


def victim(process: subprocess.Popen, processes: int, rng: random.Random) -> int:
    """The process to be killed: the run, or one of torchrun's (which then ends the others)."""
    if processes == 1:
        return process.pid
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(rng.choice(children)) if children else process.pid


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> bool:
    """Whether the condition came true while the process lived."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


def kill_once(output: Path, number: signal.Signals, moment: str, processes: int, flags: dict,
              rng: random.Random) -> str:
    """Continues the run and kills it: while it starts, saves (for the first to third time), or runs: up to 12 updates
    after its first, at any moment of one (an evaluation and a saving may fall into it). RuntimeError: it ended before.
    """
    folder, opened = output / "killed", time.time()
    metrics, part = folder / "metrics.jsonl", folder / "state.pt.part"
    process = start(output, "killed", processes, flags, "--resume", "auto")
    if moment == "starting":
        time.sleep(rng.uniform(0, 4))
    else:
        wait_for(lambda: metrics.exists() and metrics.stat().st_mtime > opened, process)
    if moment == "saving":
        for _ in range(rng.randint(0, 2)):
            wait_for(part.exists, process)
            wait_for(lambda: not part.exists(), process)
        wait_for(part.exists, process)
    elif moment == "running":
        target = last_step(metrics) + rng.randint(1, 12)
        wait_for(lambda: last_step(metrics) >= target, process)
        time.sleep(rng.uniform(0, 0.1))
    if process.poll() is not None:
        raise RuntimeError("The run had ended before it was killed: give it more --num_steps.")
    os.kill(victim(process, processes, rng), number)
    code = process.wait()
    return f"{number.name} while {moment}, near step {last_step(metrics):3d}: exit code {code}"


def last_step(metrics: Path) -> int:
    """That of the last whole line; 0 before the first."""
    lines = metrics.read_text().rpartition("\n")[0].splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def differences(one: Path, other: Path) -> list[str]:
    """What of two finished runs is not equal to the bit."""
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (one, other)]
    found = [key for key in ("step", "weights", "optimizer", "scaler", "split", "last", "best", "best_weights",
                              "finished") if not same(states[0][key], states[1][key])]
    found += ["predictions.csv"] * (len({(folder / "predictions.csv").read_bytes() for folder in (one, other)}) > 1)
    lines = [list(map(stripped, (folder / "metrics.jsonl").read_text().splitlines())) for folder in (one, other)]
    return found + ([f"metrics.jsonl ({len(lines[0])} and {len(lines[1])} lines)"] if lines[0] != lines[1] else [])


def stripped(line: str) -> tuple:
    """A line of metrics.jsonl without its wall time, and without the value where that is a throughput."""
    event = json.loads(line)
    return event["step"], event["name"], None if "per_second" in event["name"] else event["value"]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def ordeal(output: Path, kills: int, terms: int, processes: int = 1, seed: int = 0, flags: dict | None = None,
           say=print) -> list[str]:
    """An untouched run and one that is killed and continued; returns what differs in the end."""
    flags, rng = flags or {}, random.Random(seed)
    if (code := start(output, "untouched", processes, flags).wait()) != 0:
        raise RuntimeError(f"The untouched run ended with {code}:\n{(output / 'untouched.log').read_text()[-2000:]}")
    for n in range(kills + terms):
        number = signal.SIGKILL if n < kills else signal.SIGTERM
        moment = MOMENTS[n % len(MOMENTS)] if n < kills else "running"
        if processes > 1 and moment == "starting":  # torchrun itself would be killed, and leave its children behind
            moment = "running"
        say(f"{n + 1:3d}  {kill_once(output, number, moment, processes, flags, rng)}")
    if (code := start(output, "killed", processes, flags, "--resume", "auto").wait()) != 0:
        raise RuntimeError(f"The last run ended with {code}:\n{(output / 'killed.log').read_text()[-2000:]}")
    return differences(output / "untouched", output / "killed")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--terms", type=int, default=2)
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num_steps", type=int, default=240)
    args = p.parse_args()
    output = Path(tempfile.mkdtemp(prefix="kill-"))
    found = ordeal(output, args.kills, args.terms, args.processes, args.seed, {"--num_steps": args.num_steps})
    result = f"different: {', '.join(found)}; see {output}" if found else (
        "weights, optimiser, scores and every line of metrics are equal to the bit")
    print(f"after {args.kills} SIGKILL and {args.terms} SIGTERM: {result}")
    if found:
        raise SystemExit(1)
    shutil.rmtree(output)


if __name__ == "__main__":
    main()
