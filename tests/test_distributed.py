"""Two processes of torchrun against one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.kill import stripped
from utils.batches import EvalBatches, TrainBatches
from utils.data import Split, View
from utils.distributed import ALONE, launcher

ROOT = Path(__file__).parent.parent
FLAGS = ["--model_type", "ViT-demo", "--pretrained_dir", "checkpoint/ViT-demo.npz", "--dataset", "digits",
         "--img_size", "16", "--num_steps", "8", "--warmup_steps", "2", "--train_batch_size", "16", "--eval_every", "5",
         "--precision", "fp32", "--device", "cpu", "--eval_batch_size", "50", "--dropout", "0"]


def run(output, name, processes, *flags):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([sys.executable, *(torchrun if processes > 1 else []), "train.py", *FLAGS, "--output_dir",
                           str(output), "--name", name, *flags], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = output / name / "metrics.jsonl"
    return done, [stripped(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def test_two_processes_train_like_one_and_either_continues_the_other(tmp_path):
    done, one = run(tmp_path, "one", 1)
    assert done.returncode == 0, done.stderr
    done, two = run(tmp_path, "two", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recipe ") == 1  # the first process speaks
    assert [line[:2] for line in one] == [line[:2] for line in two] and one != two
    assert [line[2] for line in one if line[2]] == pytest.approx([line[2] for line in two if line[2]], rel=2e-4)
    assert [value for _, name, value in one if name == "test/accuracy"] == [value for _, name, value in two if
                                                                         name == "test/accuracy"]
    done, more = run(tmp_path, "two", 1, "--resume", "auto", "--num_steps", "10")
    assert done.returncode == 0, done.stderr
    assert "resumed  from step 8 of 10" in done.stdout and [line for line in more if line[0] <= 8] == [
        line for line in two if line[0] <= 8] + [(8, "run/num_steps", 10)]
    assert max(step for step, *_ in more) == 10


def test_losses_of_two_processes_equal_those_of_one_to_1e_5(tmp_path):
    """With accumulation; 359 test images, an odd number, are each counted once."""
    flags = "--num_steps", "20", "--gradient_accumulation_steps", "2"
    (_, one), (_, two) = (run(tmp_path, name, processes, *flags) for name, processes in (("one", 1), ("two", 2)))
    losses = [[value for _, name, value in lines if name == "train/loss"] for lines in (one, two)]
    assert len(losses[0]) == 20 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    state = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    assert state["finished"]["last"]["images"] == 359


def test_when_one_process_is_killed_the_other_ends_with_a_message(tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                                "train.py", *FLAGS, "--output_dir", str(tmp_path), "--name", "run", "--num_steps",
                                "5000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for line in process.stdout:
            if line.startswith("step 5/"):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        started = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and time.monotonic() - started < 60
    assert "Another process of this run is gone" in errors
    assert not any(Path(f"/proc/{child}").exists() for child in children)


SLOW = """
import sys, time
sys.path.insert(0, ".")
import train
from utils import state
def slowly(folder, content, write=state.write):
    print("saving", flush=True)
    time.sleep(3)
    write(folder, content)
state.write = slowly
train.main()
"""


def test_a_signal_to_the_first_process_alone_does_not_cost_the_state_that_it_is_saving(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                                tmp_path / "slow.py", *FLAGS, "--output_dir", str(tmp_path), "--name", "run",
                                "--num_steps", "5000", "--eval_every", "5000"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (metrics := tmp_path / "run" / "metrics.jsonl").exists() or not metrics.stat().st_size:
            time.sleep(0.1)
            assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        first = next(int(child) for child in children if b"\0RANK=0\0" in Path(f"/proc/{child}/environ").read_bytes())
        os.kill(first, signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "saving" in said and "SIGTERM: stopped after step" in said
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] > 0


def test_an_error_is_one_sentence_of_each_process_that_meets_it(tmp_path):
    """torchrun ends the others as soon as one has failed, which may come before they have spoken."""
    done, _ = run(tmp_path, "bad", 2, "--train_batch_size", "15")
    sentences = [line for line in done.stderr.splitlines() if "error: A batch of 15" in line]
    assert sentences and {line.removeprefix("[process 1] ") for line in sentences} == {
        "error: A batch of 15 images cannot be split over 2 processes."}
    assert done.returncode != 0 and not (tmp_path / "bad").exists()


@pytest.mark.parametrize("size, here, words", [("1", "1", "python"), ("8", "8", "torchrun --nproc_per_node 8"),
                                               ("16", "8", "torchrun --nnodes 2 --nproc_per_node 8")])
def test_the_command_of_a_run_names_what_started_it(monkeypatch, size, here, words):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert " ".join(launcher()) == words


def test_alone_nothing_is_sent():
    tensor = torch.ones(3)
    ALONE.average([tensor])
    assert tensor.tolist() == [1, 1, 1] and ALONE.any(True, False) == [True, False] and ALONE.gather("x") == ["x"]
    with ALONE.first():
        pass


@pytest.mark.parametrize("processes", [2, 3])
def test_the_processes_shares_are_the_batch(processes):
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    split = Split(images, torch.arange(20), tuple(map(str, range(20))))
    look = dict(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, device="cpu", batch_size=12, seed=3)
    whole = TrainBatches(split, training_view=View(), **look)
    shares = [TrainBatches(split, training_view=View(), rank=rank, processes=processes, **look)
              for rank in range(processes)]
    for k in range(4):
        images, labels = (torch.cat(column) for column in zip(*(share[k] for share in shares)))
        assert torch.equal(labels, whole[k][1]) and torch.equal(images, whole[k][0])
    look.pop("seed")
    assert EvalBatches(split, **look).count(1) == 8
