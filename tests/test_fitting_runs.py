"""Whole runs whose split into micro-batches changes on the way: the numbers stay what they are."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from bench.kill import differences
from models.modeling import VisionTransformer
from utils import fitting, resources, state
from utils.settings import Settings

ROOT = Path(__file__).parent.parent
STEPS = 12


@pytest.fixture
def start(small_run):
    """start("--flag", value ...) -> main's result for a run of twelve updates of twelve images."""
    return partial(small_run, "--num_steps", STEPS, "--learning_rate", 0.03, "--val_fraction", 0.25)


@pytest.fixture
def limit():
    """with limit(images, step=1): from that update on a training pass of more images runs out of memory."""
    class Limit:
        def __init__(self, images, step=1, stop=None):
            self.images, self.step, self.stop, self.at, self.sizes = images, step, stop, 0, {}

        def __enter__(self):
            self.patch = pytest.MonkeyPatch()
            update, forward = train.train_step, VisionTransformer.forward

            def counted(*args, **kwargs):
                self.at = kwargs["dropout_seed"][1]
                if self.at == self.stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return update(*args, **kwargs)

            def limited(model, images):
                if model.training and self.at >= self.step and len(images) > self.images:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                if model.training:
                    self.sizes.setdefault(self.at, set()).add(len(images))
                return forward(model, images)
            self.patch.setattr(train, "train_step", counted)
            self.patch.setattr(VisionTransformer, "forward", limited)
            return self

        def __exit__(self, *_):
            self.patch.undo()
    return Limit


def losses(folder):
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {event["step"]: event["value"] for event in events if event["name"] == "train/loss"}


def split_of(folder):
    return torch.load(folder / "state.pt", weights_only=True)["split"]["micro_batches"]


# The same numbers under a limit


def test_under_a_limit_the_losses_are_those_without_it(start, limit, capsys):
    """One that is there from the start, and one that bites on the way or in the last update."""
    whole = losses(start(name="whole")["folder"])
    for images, step, parts in ((6, 1, 2), (1, 1, 12), (5, 5, 4), (3, STEPS, 4)):
        capsys.readouterr()
        with limit(images, step) as seen:
            result = start("--overwrite")
        assert losses(result["folder"]) == pytest.approx(whole, rel=1e-5) and len(whole) == STEPS
        assert seen.sizes == {k: {12} if k < step else {12 // parts} for k in range(1, STEPS + 1)}
        out = capsys.readouterr().out
        assert out.count("12 at once (auto)") == 1 and out.count("done again") == [2, 4, 12].index(parts) + 1
        assert (f"warning: step {step}: the memory was full; this step is done again, and from here on an update is "
                "cut into 2 micro-batches instead of 1 (with dropout: with other masks).") in out
        kept = json.loads((result["folder"] / "settings.json").read_text())
        assert kept["gradient_accumulation_steps"] == "auto" and kept["resolved"]["gradient_accumulation_steps"] == 1
        assert split_of(result["folder"]) == parts and result["last"].images == 12


def test_the_split_is_chosen_by_the_estimate_said_once_and_stored(start, capsys, monkeypatch, tiny_config):
    model = VisionTransformer(tiny_config, 16, 3)
    needs = resources.memory(model, Settings(train_batch_size=12), torch.float32, torch.device("cpu"), 1, 3).total
    monkeypatch.setattr(resources, "free_memory", lambda device: 2 * needs)
    folder = start()["folder"]
    out = capsys.readouterr().out
    assert out.count("(auto)") == 1 and "batch    12 in 3 micro-batches of 4 (auto); 12 steps" in out
    assert re.search(r"^output   .*, after 0 min \d\d s, peak memory [\d.]+ [GM]iB$", out, re.MULTILINE)
    assert json.loads((folder / "settings.json").read_text())["resolved"]["gradient_accumulation_steps"] == 3
    assert split_of(folder) == 3 and "--gradient_accumulation_steps" not in out
    start("--dry_run", name="dry")
    assert "gradient_accumulation_steps  > 3" in capsys.readouterr().out


def test_a_number_given_by_hand_is_taken_as_it_is(start, limit, capsys):
    with limit(6, 3), pytest.raises(SystemExit) as stop:
        start("--gradient_accumulation_steps", 1)
    assert stop.value.code == 2
    assert "error: The memory is full. Try --gradient_accumulation_steps auto, or " in capsys.readouterr().err


def test_where_one_image_does_not_fit_it_stops_with_advice_and_nothing_is_lost(start, limit, capsys):
    whole = start("--save_every", 1, name="whole")
    with limit(0, 6), pytest.raises(SystemExit) as stop:
        start("--save_every", 1)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines == [f"error: {fitting.ONE_IMAGE}"]
    folder = whole["folder"].with_name("run")
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 5 and split_of(folder) == 1
    train.main(["--resume", str(folder)])
    assert differences(whole["folder"], folder) == []


LIMITED = """
import resource, sys
import torch
import train
from utils import device

folder, images, *argv = sys.argv[1:]
update = train.train_step
device.keep_memory = lambda: None  # what is freed goes back, so that the limit meets the next allocation

def limited(*args, **kwargs):
    if kwargs["dropout_seed"][1] == 3:
        size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:"))
        resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 120 * 2**20, resource.RLIM_INFINITY))
    return update(*args, **kwargs)

argv = [*argv, "--output_dir", folder, "--dataset", images]
train.main([*argv, "--name", "whole"])
train.train_step = limited
train.main([*argv, "--name", "limited"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, and reads Linux's /proc")
def test_an_allocation_that_fails_on_a_cpu_in_mid_run_is_survived(image_folder, tmp_path):
    """A real one: from the third update on the process may take 120 MiB more; a whole batch would take about 300."""
    argv = ["--model_type", "ViT-demo", "--pretrained_dir", "none", "--img_size", "32", "--num_steps", "4",
            "--warmup_steps", "2", "--train_batch_size", "64", "--val_fraction", "0.25", "--precision", "fp32",
            "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path, image_folder, *argv], capture_output=True,
                          text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3: the memory was full; this step is done again" in done.stdout
    whole, limited = tmp_path / "whole", tmp_path / "limited"
    assert losses(limited) == pytest.approx(losses(whole), rel=1e-5) and len(losses(limited)) == 4
    assert split_of(whole) == 1 < split_of(limited)


# Runs that go on


def resume(folder, *argv):
    return train.main(["--resume", str(folder), *map(str, argv)])


def cut_off(call, *args):
    with pytest.raises(SystemExit) as stop:
        call(*args)
    assert stop.value.code == 143


def test_a_run_goes_on_with_the_split_that_it_had(start, limit):
    """To the bit, with dropout, which another split would draw otherwise. The limit comes with the sixth update; a run
    that was stopped after it goes on where there is none."""
    flags = ("--dropout", 0.1)
    with limit(4, 6):
        whole = start(*flags, name="whole")["folder"]
    assert split_of(whole) == 4
    for step in (3, 6, 9):
        folder = whole.with_name(f"cut{step}")
        with limit(4, 6, stop=step):
            cut_off(lambda folder=folder: start(*flags, name=folder.name))
        assert split_of(folder) == (1 if step < 6 else 4)
        with limit(4, 6) if step < 6 else limit(12) as seen:
            resume(folder)
        assert differences(whole, folder) == [] and split_of(folder) == 4 and seen.sizes[STEPS] == {3}
    assert differences(whole, start(*flags, name="unlimited")["folder"]) != []


def test_a_split_asked_for_on_the_way_is_said_where_it_is_another_one(start, limit, capsys):
    with limit(12, stop=5):
        cut_off(start, "--dropout", 0.1)
    folder = Path(capsys.readouterr().out.strip().rsplit(" ", 1)[-1])
    with limit(12, stop=6):
        cut_off(resume, folder, "--gradient_accumulation_steps", 1)  # auto had it so
    assert "other masks" not in capsys.readouterr().out
    with limit(12, stop=7):
        cut_off(resume, folder, "--gradient_accumulation_steps", 4)
    out = capsys.readouterr().out
    assert "--gradient_accumulation_steps 1 -> 4: equal up to rounding, with dropout other masks" in out
    with limit(12, stop=8) as seen:
        cut_off(resume, folder)
    assert seen.sizes == {8: {3}} and "batch    12 = 4 x 3;" in capsys.readouterr().out
    resume(folder, "--gradient_accumulation_steps", "auto")
    out = capsys.readouterr().out
    assert "--gradient_accumulation_steps 4 -> 1: equal up to rounding" in out and "12 at once (auto)" in out
    kept = json.loads((folder / "settings.json").read_text())
    assert [c.get("gradient_accumulation_steps") for c in kept["continued"]] == [1, 4, None, "auto"]


def test_a_state_from_before_there_was_auto_goes_on(start, limit, capsys):
    flags = ("--dropout", 0.1, "--gradient_accumulation_steps", 2)
    whole = start(*flags, name="whole")
    with limit(12, stop=5):
        cut_off(start, *flags)
    folder = whole["folder"].with_name("run")
    content = state.read(folder)
    del content["split"], content["about"]["settings"]["resolved"]["gradient_accumulation_steps"], content["read_from"]
    state.write(folder, content)
    capsys.readouterr()
    resume(folder)
    assert differences(whole["folder"], folder) == [] and split_of(folder) == 2
    assert "batch    12 = 2 x 6;" in capsys.readouterr().out
    state.write(folder, content)
    resume(folder, "--gradient_accumulation_steps", "auto")
    assert "--gradient_accumulation_steps 2 -> 1: equal up to rounding" in capsys.readouterr().out


# Several processes


TOGETHER = """
import os, sys
import torch
import train
from models.modeling import VisionTransformer

parts, most, *argv = sys.argv[1:]
update, forward, begin, at, sizes = train.train_step, VisionTransformer.forward, train.begin, [0], {}

def found(*args):
    fitting = begin(*args)
    fitting.parts = fitting.agreed = int(parts)
    return fitting

def counted(*args, **kwargs):
    at[0] = kwargs["dropout_seed"][1]
    return update(*args, **kwargs)

def limited(model, images):
    if model.training and os.environ["RANK"] == "1" and at[0] >= 3 and len(images) > int(most):
        raise torch.OutOfMemoryError("CUDA out of memory")
    if model.training and at[0]:
        sizes[at[0]] = len(images)
    return forward(model, images)

train.begin, train.train_step, VisionTransformer.forward = found, counted, limited
train.main(argv)
print("process", os.environ["RANK"], *sizes.values())
"""


def test_one_of_two_processes_cuts_finer_alone_and_from_the_next_update_on_both_do(image_folder, tmp_path):
    """Eight images each; the limit is the second one's, from the third update on."""
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)

    def run(name, parts, most):
        flags = {"--model_type": "ViT-demo", "--pretrained_dir": "none", "--img_size": 16, "--num_steps": 5,
                 "--warmup_steps": 2, "--train_batch_size": 16, "--val_fraction": 0.25, "--precision": "fp32",
                 "--device": "cpu", "--dataset": image_folder, "--output_dir": tmp_path, "--name": name}
        argv = [str(word) for pair in flags.items() for word in pair]
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                               script, str(parts), str(most), *argv], capture_output=True, text=True, cwd=ROOT,
                              timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    whole, cut, failed = run("whole", 2, 8), run("cut", 2, 2), run("failed", 1, 4)
    for done in (whole, cut):
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert "process 0 4 4 4 2 2\n" in cut.stdout and "process 1 4 4 2 2 2\n" in cut.stdout
    assert split_of(tmp_path / "whole") == 2 and split_of(tmp_path / "cut") == 4
    assert failed.returncode != 0
    assert ("[process 1] error: The memory is full in the part of a step that cannot be done again, as the processes "
            "wait for one another. The last saved state is whole: continue with --resume FOLDER "
            "--gradient_accumulation_steps 2.\n") in failed.stderr
