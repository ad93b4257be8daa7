"""The published numbers: found cell by cell as they are printed, never of two protocols at once; bands worked out by
hand; what is said of a run that misses them."""

import json
from math import sqrt

import pytest

from models import published
from models.configs import CONFIGS
from utils import records as numbers
from utils.records import DATASETS, MODELS, PROTOCOLS, Record, family, find, records, why_not, withheld
from utils.reference import causes, deviations, judge, rates, tolerance

BOTH = "checkpoint/imagenet21k+imagenet2012"
LIGHT1 = "augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"
MEDIUM1 = "augreg/B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0"
NONE = {"resolution": None, "steps": None, "metric": "top1_pct", "std": None, "note": None}


def first(*cell, **more):
    return find(*cell, **more)[0]


def record(value, std=None, source=f"{numbers.PAPER} 5 (appendix C)", **more):
    return Record(**{**NONE, "model": "ViT-B/16", "upstream": "ImageNet-21k", "dataset": "CIFAR-10", "value": value,
                     "std": std, "source": source, **more})


# --- Records ---------------------------------------------------------------------------------------------------------

def test_the_file_has_the_942_numbers_that_were_read_each_with_its_source():
    found = records()
    assert len(found) == 942 and all(r.source and r.model and r.dataset for r in found)
    assert all(isinstance(r.value, int | float) for r in found)
    assert sum(r.metric == "top1_pct" for r in found) == 816
    assert numbers.FILE.stat().st_size < 400_000
    lines = numbers.FILE.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 944 and json.loads(lines[1].rstrip(","))["value"] == found[0].value == 88.55  # a record a line


@pytest.mark.parametrize("cell, value", [
    (("paper", "ViT-B_16", "imagenet21k", "cifar10"), 98.95),
    (("paper", "ViT-B_16", "imagenet21k", "cifar100"), 91.67),
    (("paper", "ViT-B_32", "imagenet21k", "imagenet"), 81.28),
    (("paper", "ViT-L_32", "imagenet21k", "imagenet_real"), 85.65),
    (("paper", "ViT-H_14", "checkpoint/ViT-H_14.npz", "flowers"), 99.51),
    (("paper", "ViT-L_16", "imagenet21k", "pets"), 94.67),  # Table 2, three runs, before Table 5's 94.73
    (("paper", "ViT-L_16", "imagenet21k", "imagenet"), 85.15),  # 384 px, before Table 2's 512 px
    (("paper", "ViT-L_16", "imagenet21k", "imagenet", 512), 85.30),
    (("paper", "ViT-B_16", "imagenet", "cifar10"), 98.13),
    (("paper", "R50+ViT-B_16", "jft", "cifar100"), 92.63),
    (("vit_jax", "ViT-B_16", "imagenet21k", "cifar10"), 99.02),
    (("vit_jax", "ViT-B_16", "imagenet21k", "cifar10", 384, 10_000, 0.1), 98.76),
    (("vit_jax", "ViT-L_16", "imagenet21k", "cifar100"), 93.22),  # its published configuration has dropout 0.1
    (("vit_jax", "R50+ViT-B_16", "checkpoint/R50+ViT-B_16.npz", "imagenet", None, None, 0.0), 83.72),
    (("augreg", "R26+ViT-S_32", "augreg", "cifar100"), 90.9),
    (("augreg", "R50+ViT-L_32", "augreg", "pets"), 94.9),
    (("augreg", "ViT-B_16", "augreg", "imagenet", 224), 83.96),
    (("augreg", "ViT-B_16", "augreg", "imagenet", 384), 85.49),
    (("augreg", "ViT-B_32", LIGHT1, "imagenet", 384), 83.59),
    (("short", "ViT-B_16", "imagenet21k", "cifar10", 384, 500), 98.59),
    (("short", "ViT-B_16", "imagenet21k", "cifar100", None, 1000), 91.15),
    (("ViT-pytorch", "ViT-B_16", "imagenet21k", "cifar10"), 99.08),
    (("ViT-pytorch", "ViT-B_16", "imagenet21k", "cifar10", 384), 99.06),
    (("ViT-pytorch", "ViT-B_16", "imagenet21k", "cifar100", 224, 500), 90.72),
    (("ViT-pytorch", "ViT-B_16", f"{BOTH}/ViT-B_16-224.npz", "cifar100"), 92.45),
    (("ViT-pytorch", "ViT-L_32", f"{BOTH}/ViT-L_32.npz", "cifar10"), 99.03),
    (("big_vision", "ViT-B_32", LIGHT1, "cifar10"), 98.55),
    (("big_vision", "ViT-B_32", "augreg", "flowers"), 99.43),
])
def test_a_cell_has_the_number_that_was_published(cell, value):
    assert first(*cell).value == value


def test_no_record_is_of_two_protocols_and_a_look_up_gives_records_of_one():
    sources = [source for protocol in PROTOCOLS.values() for source in protocol.sources]
    assert len(sources) == len(set(sources)) and set(sources) <= {r.source for r in records()}
    for protocol in PROTOCOLS:
        for model in MODELS:
            for dataset in DATASETS:
                for r in (r for start in ("imagenet21k", "augreg", "imagenet21k+imagenet2012") for r in find(
                        protocol, model, start, dataset)):
                    assert r.protocol == protocol and r.metric == "top1_pct"
                    assert r.best_on_test == (protocol == "ViT-pytorch")
                    assert "VTAB-1k" not in r.dataset and "no adaptation" not in r.upstream


def test_only_the_named_augreg_file_or_the_table_of_all_of_them_is_found():
    assert {r.upstream for r in find("augreg", "ViT-B_32", LIGHT1, "imagenet")} == {
        "AugReg ImageNet-21k 300ep (light1 wd0.1 do0 sd0)", "AugReg ImageNet-21k 300ep"}
    assert not any("light1" in r.upstream for r in find("augreg", "ViT-B_32", MEDIUM1, "imagenet"))
    assert find("big_vision", "ViT-B_32", MEDIUM1, "cifar10") == []
    assert first("augreg", "ViT-Ti_16", "augreg/Ti_16-i1k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", "imagenet",
                 384).upstream == "AugReg ImageNet 300ep"


def from_timm(model, *settings):
    """The name of the AugReg file of 300 epochs of ImageNet-21k that timm has."""
    return "augreg/{}-i21k-300ep-lr_0.001-aug_{}-wd_{}-do_{}-sd_{}".format(model, *settings)


@pytest.mark.parametrize("model, file, theirs", [
    ("ViT-S_32", from_timm("S_32", "light1", 0.03, 0.0, 0.0), "none wd0.1 do0 sd0"),
    ("ViT-B_32", MEDIUM1, "light1 wd0.1 do0 sd0"),
    ("R26+ViT-S_32", from_timm("R26_S_32", "medium2", 0.03, 0.0, 0.0), "light1 wd0.1 do0 sd0"),
    ("R50+ViT-L_32", from_timm("R50_L_32", "medium2", 0.1, 0.0, 0.0), "medium1 wd0.1 do0.1 sd0.1")])
def test_the_number_of_a_recommended_file_is_not_that_of_another_one(model, file, theirs):
    cell = ("augreg", model, file, "imagenet", 384)
    assert find(*cell) == [] and judge([80.0], find(*cell), "imagenet").word == "unknown"
    for said in (withheld(*cell), why_not(*cell)):
        assert theirs in said and numbers.upstreams(file)[0] in said
    assert [r.resolution for r in find(*cell[:4], 224)] == [224] and why_not(*cell[:4], 224) is None
    assert find("augreg", model, "augreg", "imagenet", 384)  # no file was named


def test_timms_large_file_is_the_pick_on_imagenetv2():
    file = from_timm("L_16", "medium1", 0.1, 0.1, 0.1)
    found = find("augreg", "ViT-L_16", file, "imagenet", 384)
    assert [r.value for r in found] == [87.08] and withheld("augreg", "ViT-L_16", file, "imagenet", 384) is None
    assert "87.10" in judge([87.0], found, "imagenet").sentence
    assert find("augreg", "ViT-L_16", from_timm("L_16", "none", 0.1, 0.1, 0.1), "imagenet", 384) == []


@pytest.mark.parametrize("dataset", ["cifar100", "pets"])
def test_a_number_without_a_resolution_is_compared_at_one_size_alone(dataset):
    cell = ("augreg", "ViT-B_16", "augreg", dataset)
    assert len(find(*cell, 224)) == 3 and find(*cell, 384) == []
    assert "does not state its resolution" in why_not(*cell, 384) and why_not(*cell, 224) is None
    assert "resolution is not stated" in PROTOCOLS["augreg"].about


@pytest.mark.parametrize("name, folder", [
    ("checkpoint/ViT-B_16-224.npz", "imagenet21k+imagenet2012"), ("checkpoint/ViT-B_16.npz", "imagenet21k"),
    ("ViT-S_16.npz", "sam"), ("checkpoint/ViT-B_32-gap-norep.npz", "gsam"), ("R50-ViT-L_32.npz", "imagenet21k"),
    ("checkpoint/sam/ViT-B_16.npz", "sam"), (f"elsewhere/{LIGHT1.split('/')[1]}.npz", "augreg"), ("mine.npz", None),
    ("output/run/last.safetensors", None)])
def test_a_file_is_of_the_folder_that_has_its_name(name, folder):
    assert family(name) == folder


def test_a_bare_name_that_one_folder_has_is_found_there():
    cell = ("ViT-pytorch", "ViT-B_16", "checkpoint/ViT-B_16-224.npz", "cifar100")
    assert first(*cell) == first(*cell[:2], f"{BOTH}/ViT-B_16-224.npz", "cifar100")
    run = {**PAPER, "pretrained_dir": "checkpoint/ViT-B_16-224.npz"}
    assert "files of one model's name differ" in deviations(paper(), run)[0]


def test_what_the_sources_leave_open_is_said():
    for protocol, words in (("short", "not stated either, ours are vit_jax's"), ("augreg", "500 or 2,500 steps"),
                            ("paper", "dropout at fine-tuning is not")):
        assert words in PROTOCOLS[protocol].about


def test_another_resolution_is_given_only_where_there_is_no_other():
    assert [r.resolution for r in find("ViT-pytorch", "ViT-B_16", "imagenet21k", "cifar10", 384)] == [384]
    assert [r.resolution for r in find("paper", "ViT-B_16", "imagenet21k", "cifar10", 224)] == [384]


def test_every_published_file_and_configuration_is_of_a_model_in_the_mapping():
    names = {*published.SIZES, *published.SAME_WEIGHTS, *published.GOOGLE_ONLY}
    assert {published.model_name(name) for name in names} <= set(MODELS) and set(MODELS) == set(CONFIGS)
    known = {r.model for r in records()}
    absent = {model for model, theirs in MODELS.items() if not known & set(theirs)}
    assert absent == {"ViT-B_8", "R26+ViT-B_32", "ViT-demo", "ViT-CIFAR"} | {m for m in MODELS if "gap" in m}
    assert {r.dataset for r in records()} >= {theirs for names in DATASETS.values() for theirs in names}


@pytest.mark.parametrize("cell, words", [
    (("paper", "ViT-B_16", "jft", "cifar10"), "never released"), (("paper", "ViT-B_16", "imagenet", "pets"), "AugReg"),
    (("paper", "R50+ViT-B_16", "imagenet21k", "cifar10"), "vit_jax"),
    (("paper", "ViT-B_8", "imagenet21k", "pets"), "no number"),
    (("augreg", "ViT-B_32", f"{LIGHT1}--imagenet2012-steps_20k-lr_0.01-res_384", "cifar100"), "already fine-tuned"),
    (("vit_jax", "ViT-B_16", "sam", "cifar10"), "no number"),
])
def test_what_cannot_be_compared_has_a_reason(cell, words):
    assert words in why_not(*cell)


def test_a_cell_with_a_number_needs_no_reason_and_a_protocol_without_numbers_is_refused():
    assert why_not("paper", "ViT-B_16", "imagenet21k", "cifar10") is None
    with pytest.raises(ValueError, match="'mini'. Known: paper, vit_jax"):
        find("mini", "ViT-demo", "imagenet21k", "cifar10")


# --- Tolerances ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset, low, high", [("cifar10", 98.46, 98.60), ("cifar100", 91.09, 91.62),
                                                ("pets", 93.62, 94.00), ("flowers", 99.42, 99.45),
                                                ("imagenet", 83.22, 83.33)])
def test_a_single_number_is_as_uncertain_as_one_of_the_five_repeated_runs(dataset, low, high):
    points, source = tolerance(dataset, record(98.95), 3)
    assert points == pytest.approx(2.64 * (high - low) / 2.326 * sqrt(1 + 1 / 3) + 0.005)
    assert "transfer.py" in source and f"{low:.2f} to {high:.2f}" in source
    assert tolerance(dataset, record(98.95), 1)[0] > points > tolerance(dataset, record(98.95), 10**9)[0] > 0.7 * points


def test_a_mean_of_three_runs_has_its_own_deviation():
    points, source = tolerance("pets", first("paper", "ViT-L_16", "imagenet21k", "pets"), 3)
    assert points == pytest.approx(4.30 * 0.15 * sqrt(2 / 3) + 0.005) and "Table 2" in source


def test_a_mean_of_five_runs_counts_as_five_and_one_decimal_widens_the_band():
    five = first("big_vision", "ViT-B_32", "augreg", "cifar10")
    assert tolerance("cifar10", five, 5)[0] == pytest.approx(2.64 * 0.14 / 2.326 * sqrt(2 / 5) + 0.005)
    steiner = first("augreg", "ViT-B_16", "augreg", "cifar100")
    assert tolerance("cifar100", steiner, 1)[0] == pytest.approx(2.64 * 0.53 / 2.326 * sqrt(2) + 0.05)


def test_no_band_is_narrower_than_what_was_printed():
    printed_as_zero = record(99.74, std=0.0, note="mean and sd of 3 fine-tuning runs")
    assert tolerance("flowers", printed_as_zero, 1000)[0] > 0.005


def test_without_repeated_runs_there_is_no_tolerance_and_no_verdict():
    real = first("paper", "ViT-B_16", "imagenet21k", "imagenet_real")
    assert tolerance("imagenet_real", real, 3) is None
    assert judge([50.0], [real], "imagenet_real").word == "unknown"


def test_two_published_runs_of_one_recipe_agree():
    low, high = (sorted(r.value for r in records() if "#21 and #84" in r.source))
    assert (low, high) == (98.92, 99.03) and judge([low], [record(high)], "cifar10").word == "pass"


def test_no_runs_and_no_percentages_are_refused():
    with pytest.raises(ValueError, match="give 1 or more"):
        tolerance("cifar10", record(98.95), 0)
    for values in ([], [float("nan")], [101.0]):
        with pytest.raises(ValueError, match="in percent"):
            judge(values, [record(98.95)], "cifar10")


# --- Verdicts --------------------------------------------------------------------------------------------------------

def test_the_words_change_at_the_edges_of_the_band():
    theirs = record(98.95)
    band = tolerance("cifar10", theirs, 1)[0]
    for shift, word, said in ((0, "pass", "within"), (-band, "pass", "within"), (-band - 1e-6, "fail", "more than"),
                              (band, "pass", "within"), (band + 1e-6, "pass", "higher than published")):
        verdict = judge([98.95 + shift], [theirs], "cifar10")
        assert (verdict.word, said in verdict.sentence) == (word, True)
        assert verdict.difference == pytest.approx(shift) and verdict.tolerance == band and verdict.theirs == 98.95


def test_the_mean_of_the_seeds_counts_and_their_own_scatter_excuses_nothing():
    theirs = record(98.95)
    assert judge([98.90, 99.00], [theirs], "cifar10").sentence == "98.95 (n = 2) is 0.00 above 98.95, within 0.20."
    assert judge([98.0, 99.3], [theirs], "cifar10").word == judge([98.65, 98.65], [theirs], "cifar10").word == "fail"


def test_the_best_on_test_is_only_compared_with_such():
    official = find("vit_jax", "ViT-B_16", "imagenet21k", "cifar10")
    best = find("ViT-pytorch", "ViT-B_16", "imagenet21k", "cifar10", 224, 10_000)
    for found, flag in ((official, True), (best, False)):
        verdict = judge([99.0], found, "cifar10", best_on_test=flag)
        assert verdict.word == "unknown" and verdict.theirs is None and "cannot be compared" in verdict.sentence
    assert judge([99.0], best, "cifar10", best_on_test=True).word == "pass"
    assert judge([99.0], official, "cifar10").theirs == 99.02
    assert judge([99.0], [], "cifar10").sentence == "There is no published number to compare with."


def test_the_other_column_of_a_table_is_mentioned():
    verdict = judge([99.0], find("vit_jax", "ViT-B_16", "imagenet21k", "cifar10"), "cifar10")
    assert "Also published: 98.76 (ImageNet-21k, dropout 0.1)." in verdict.sentence


# --- Causes ----------------------------------------------------------------------------------------------------------

PAPER = {"pretrained_dir": "checkpoint/ViT-B_16.npz", "model_type": "ViT-B_16", "img_size": (384, 384), "num_steps":
         10_000, "learning_rate": 0.03, "train_batch_size": 512, "optimizer": "sgd", "no_flip": False,
         "val_fraction": 0.0, "warmup_steps": 500, "decay_type": "cosine", "max_grad_norm": 1.0, "dropout":
         None, "num_epochs": 0.0}


def paper():
    return first("paper", "ViT-B_16", "imagenet21k", "cifar10")


def test_a_run_as_published_has_no_deviation_but_still_suspects():
    assert deviations(paper(), PAPER) == []
    said = causes(paper(), PAPER)
    assert said[0].startswith("Which file") and any("tanh" in sentence for sentence in said)


def test_a_run_at_224_px_is_told_the_resolution_first():
    said = causes(paper(), {**PAPER, "img_size": [224, 224], "num_steps": 500, "optimizer": "adam"})
    assert said[0].startswith("The run was at 224 px, theirs at 384 px: --img_size 384.")
    assert said[1].startswith("--optimizer was adam") and any("--num_steps was 500" in sentence for sentence in said)
    short = first("short", "ViT-B_16", "imagenet21k", "cifar10")
    assert "384 px (by its times)" in causes(short, {"img_size": 224})[0]
    assert deviations(first("ViT-pytorch", "ViT-B_16", "imagenet21k", "cifar10"), {"img_size": 224}) == []


@pytest.mark.parametrize("change, words", [
    ({"pretrained_dir": "none"}, "started from nothing"),
    ({"pretrained_dir": f"{BOTH}/ViT-B_16.npz"}, "files of one model's name differ"),
    ({"pretrained_dir": "checkpoint/sam/ViT-B_16.npz"}, "theirs from ImageNet-21k"),
    ({"train": "head"}, "--train was head; theirs all."),
    ({"learning_rate": 0.1}, "0.1 at batch 512; theirs 0.001 or 0.003 or 0.01 or 0.03 at 512."),
    ({"train_batch_size": 64}, "0.00013 or 0.00038 or 0.0013 or 0.0037 at 64."),
    ({"no_flip": True}, "--no_flip was True"),
    ({"val_fraction": 0.1}, "--val_fraction was 0.1; theirs 0.0"), ({"mixup": 0.8}, "--mixup was 0.8"),
    ({"weight_decay": 0.1}, "--weight_decay"), ({"max_grad_norm": 0.0}, "--max_grad_norm"),
    ({"decay_type": "constant"}, "theirs cosine")])
def test_what_differs_is_told_before_what_is_only_suspected(change, words):
    assert words in causes(paper(), {**PAPER, **change})[0]


def test_a_protocols_own_recipe_is_no_deviation():
    jax = first("vit_jax", "ViT-B_16", "imagenet21k", "cifar10", dropout=0.1)
    run = {**PAPER, "learning_rate": 0.01, "val_fraction": 0.02, "dropout": 0.1}
    assert deviations(jax, run) == []
    assert deviations(jax, {**run, "dropout": None}) == ["--dropout was 0.0; theirs 0.1."]
    assert "9,728 of 10,000" in " ".join(causes(jax, run)) and "9,728" not in " ".join(causes(paper(), run))
    old = first("ViT-pytorch", "ViT-B_16", "imagenet21k", "cifar10", 224, 500)
    run = {**PAPER, "img_size": 224, "num_steps": 500, "warmup_steps": 100, "no_flip": True, "dropout": 0.1}
    assert deviations(old, run) == []
    assert deviations(old, {**run, "warmup_steps": 50}) == ["--warmup_steps was 50; theirs 100."]


@pytest.mark.parametrize("change, said", [
    ({"min_area": 0.6}, "--min_area was 0.6; theirs 0.05."), ({"ema": 0.999}, "--ema was 0.999; theirs 0.0."),
    ({"class_weights": "balanced"}, "--class_weights was balanced; theirs none."), ({"swa": 0.25}, "--swa was 0.25"),
    ({"in_chans": 1}, "--in_chans was 1; theirs 3."), ({"early_stopping": 5}, "--early_stopping was 5; theirs 0.")])
def test_a_setting_that_moves_the_result_is_a_deviation(change, said):
    usual = {"min_area": 0.05, "class_weights": "none", "ema": 0.0, "swa": 0.0, "in_chans": 3, "early_stopping": 0}
    assert deviations(paper(), {**PAPER, **usual}) == []
    (found,) = deviations(paper(), {**PAPER, **usual, **change})
    assert found.startswith(said)


def test_the_numbers_at_512_px_are_of_averaged_weights_and_a_crop_of_another_kind_has_no_smallest_area():
    large = first("paper", "ViT-L_16", "imagenet21k", "imagenet", 512)
    assert "--ema was 0.0; theirs 0.9999." in deviations(large, {"ema": 0.0})
    assert deviations(first("big_vision", "ViT-B_32", LIGHT1, "cifar10"), {"min_area": 0.6}) == []


def test_the_sweep_of_augregs_table_5_is_its_own():
    record = first("augreg", "ViT-B_16", "augreg", "cifar100", 224)
    run = {"pretrained_dir": "augreg", "img_size": 224, "learning_rate": 0.03, "num_steps": 2500, "dropout": 0.0}
    assert rates(record) == (0.001, 0.003, 0.01, 0.03) and deviations(record, run) == []
    assert deviations(record, {**run, "num_steps": 10_000}) == ["--num_steps was 10000; theirs 500 or 2500."]
