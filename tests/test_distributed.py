"""Two processes of torchrun against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.kill import stripped
from utils.batches import EvalBatches, TrainBatches
from utils.data import Split, View
from utils.distributed import ALONE, _buckets

ROOT = Path(__file__).parent.parent
FLAGS = ["--model_type", "ViT-demo", "--pretrained_dir", "checkpoint/ViT-demo.npz", "--dataset", "digits",
         "--img_size", "16", "--num_steps", "8", "--warmup_steps", "2", "--train_batch_size", "16", "--eval_every", "5",
         "--precision", "fp32", "--device", "cpu", "--eval_batch_size", "50", "--dropout", "0"]


def run(output, name, processes, *flags):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([sys.executable, *(torchrun if processes > 1 else []), "train.py", *FLAGS, "--output_dir",
                           str(output), "--name", name, *flags], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
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


def test_an_error_is_one_sentence_of_the_first_process(tmp_path):
    done, _ = run(tmp_path, "bad", 2, "--train_batch_size", "15")
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sentences == ["error: A batch of 15 images cannot be split over 2 processes."]
    assert done.returncode != 0 and not (tmp_path / "bad").exists()


def test_alone_nothing_is_sent():
    tensor = torch.ones(3)
    ALONE.average([tensor])
    assert tensor.tolist() == [1, 1, 1] and ALONE.any(True, False) == [True, False] and ALONE.gather("x") == ["x"]
    with ALONE.first():
        pass


def test_gradients_travel_in_buckets_of_one_type(monkeypatch):
    monkeypatch.setattr("utils.distributed.BUCKET", 40)
    tensors = [torch.zeros(n) for n in (4, 6, 1, 30, 2)] + [torch.zeros(1, dtype=torch.float64)]
    assert [[t.numel() for t in bucket] for bucket in _buckets(tensors)] == [[4, 6], [1], [30], [2], [1]]


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
