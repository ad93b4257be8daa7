"""bench/pretrain.py: which commands, what of their output is kept, what the table says; nothing is trained."""

import argparse
import json

import pytest

from bench import pretrain
from bench.pretrain import Job, command, jobs, outcome, table, without_classes
from utils.settings import parse


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(data=tmp_path / "data", work=tmp_path / "work", pilot=True)


@pytest.mark.parametrize("pilot", [True, False])
def test_every_command_is_one_that_train_py_takes(pilot, args):
    found = jobs(pilot)
    assert len({job.name for job in found}) == len(found)
    for job in found:
        words = command(job, args)[2:]
        settings = parse(words)
        assert settings.dataset.startswith((str(args.data), str(args.work)))
        assert settings.few_shot or (settings.resume == "auto" and settings.name == job.name)


def test_the_tutorials_three_are_as_published_and_transfer_has_three_seeds_of_each():
    full = {job.name: parse(job.flags.split()) for job in jobs(False)}
    three = [full[f"tutorial-{i}"] for i in range(3)]
    assert [(s.patch_proj, s.pos_embed) for s in three] == [
        ("linear", "learned"), ("linear", "sincos1d"), ("conv", "sincos1d")]
    assert {(s.model_type, s.num_epochs, s.learning_rate, s.weight_decay, s.train_batch_size) for s in three} == {
        ("ViT-CIFAR", 50, 1e-3, 5e-5, 256)}
    rows = [job.row for job in jobs(False) if job.name.startswith("transfer")]
    assert len(set(rows)) == 8 and all(rows.count(row) == 3 for row in rows)


def test_a_run_s_numbers_and_a_probe_s_are_kept(args, tmp_path):
    folder = args.work / "run"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text("{}")
    lines = [{"step": k, "name": name, "value": value, "time": k} for k, name, value in
             ((1, "train/loss", 1.0), (1, "test/accuracy", 0.5), (2, "train/loss", 1.0), (2, "test/accuracy", 0.4))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert outcome(Job("run", "row", ""), args, "") == {
        "accuracy": 40.0, "best_on_test": 50.0, "steps": 2, "evaluations": 2}
    said = "5-shot 35.40 ± 1.25 % of 10,000 test images (3 draws)"
    assert outcome(Job("x", "row", ""), args, said) == {
        "accuracy": 35.4, "spread_of_draws": 1.25, "test_images": 10_000}


def test_the_table_has_means_and_deviations_over_seeds():
    runs = [{"row": "a", "accuracy": value, "best_on_test": value + 1, "evaluations": 2, "minutes": 2.0} for value in
            (50.0, 52.0, 54.0)] + [{"row": "5-shot", "accuracy": 30.0, "spread_of_draws": 1.5, "minutes": 0.5}]
    lines = table(runs).splitlines()
    assert lines[2] == "| a | 52.00 % ± 2.00 | 3 | 53.00 % | 6.0 |"
    assert lines[3] == "| 5-shot | 30.00 % ± 1.50 | 1 | - | 0.5 |"


def test_classes_that_cifar_has_are_left_out_as_links(tmp_path):
    data = tmp_path / "tiny32"
    for part in ("train", "val"):
        for name in ("n1", "n2", "n3"):
            (data / part / name).mkdir(parents=True)
    (data / "overlap_cifar10.txt").write_text("# wnid\nn2\tfrog\tsame\tbullfrog\n")
    for _ in range(2):  # links may be there already
        without_classes(data, tmp_path / "far")
    assert sorted(path.name for path in (tmp_path / "far" / "train").iterdir()) == ["n1", "n3"]
    assert (tmp_path / "far" / "val" / "n3").resolve() == data / "val" / "n3"


def test_what_waits_for_weights_is_said(args, capsys, monkeypatch):
    args.data.mkdir()
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--data", str(args.data), "--pilot", "--work", str(args.work),
                                     "--results", str(args.work), "--only", "linear-upstream"])
    pretrain.main()
    assert "linear-upstream: waits for upstream" in capsys.readouterr().out
