import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.configs import replace
from models.modeling import VisionTransformer
from utils.batches import EvalBatches
from utils.data import Split
from utils.evaluation import (
    Outputs,
    average_precisions,
    calibration_error,
    evaluate,
    measure,
    outputs,
    report,
    stream,
)


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(0, 256, (10, 3, 16, 16), generator=generator, dtype=torch.uint8),
                 torch.arange(10) % 5, tuple("abcde"))


def test_every_image_counts_once_whatever_the_batch_size(tiny_model, split):
    logits = tiny_model((split.images.float() - 127.5) / 127.5)
    accuracy = (logits.argmax(1) == split.labels).float().mean().item()
    loss = F.cross_entropy(logits, split.labels).item()
    for batch_size in (3, 4, 10, 64):
        found = evaluate(tiny_model, EvalBatches(split, size=(16, 16), batch_size=batch_size, mean=(0.5,) * 3,
                                                 std=(0.5,) * 3, device="cpu"))
        assert found.images == 10 and found.accuracy == pytest.approx(accuracy)
        assert found.loss == pytest.approx(loss, rel=1e-5)


def test_dropout_is_off_while_evaluating(tiny_config, split):
    model = VisionTransformer(replace(tiny_config, dropout_rate=0.5), 16, 5).train()
    torch.nn.init.normal_(model.head.weight)
    batches = EvalBatches(split, size=(16, 16), batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, device="cpu")
    assert evaluate(model, batches) == evaluate(model, batches)


def test_the_model_comes_back_in_the_mode_it_came_in(tiny_model, split):
    batches = EvalBatches(split, size=(16, 16), batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, device="cpu")
    for mode in (True, False):
        tiny_model.train(mode)
        evaluate(tiny_model, batches)
        assert tiny_model.training is mode


# --- What is said about each image -----------------------------------------------------------------------------------

LOOK = dict(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, device="cpu")


@pytest.fixture
def files(tmp_path):
    """Nine PNG files of noise, the fifth of which is text."""
    rng, paths = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(9)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    paths[4].write_bytes(b"no image")
    return Split(paths, torch.arange(9) % 5, tuple("abcde"))


def test_outputs_are_what_the_logits_say(tiny_model, split):
    logits = tiny_model((split.images.float() - 127.5) / 127.5).detach()
    said = outputs(tiny_model, EvalBatches(split, batch_size=4, **LOOK), scores=True)
    assert said.indices.tolist() == list(range(10)) and torch.equal(said.labels, split.labels)
    assert torch.equal(said.predicted, logits.argmax(1))
    assert torch.allclose(said.loss.float(), F.cross_entropy(logits, split.labels, reduction="none"), rtol=1e-4)
    assert torch.allclose(said.scores, logits.softmax(1), atol=1e-6)
    assert torch.allclose(said.confidence, logits.softmax(1).amax(1), atol=1e-6)
    order = logits.argsort(dim=1, descending=True).tolist()
    assert said.rank.tolist() == [row.index(label) for row, label in zip(order, split.labels.tolist())]


def test_nothing_of_the_size_of_the_head_is_kept_unless_asked_for(tiny_model, split):
    said = outputs(tiny_model, EvalBatches(split, batch_size=4, **LOOK))
    assert said.scores is None and all(column.ndim == 1 for column in said if column is not None)


def test_several_labels_have_a_sigmoid_each(tiny_model, split):
    labels = (torch.rand(10, 5, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    said = outputs(tiny_model, EvalBatches(replace_labels(split, labels), batch_size=4, **LOOK), scores=True)
    logits = tiny_model((split.images.float() - 127.5) / 127.5).detach()
    assert torch.equal(said.predicted, logits > 0) and torch.allclose(said.scores, logits.sigmoid(), atol=1e-6)
    bce = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    assert torch.allclose(said.loss.float(), bce, rtol=1e-4) and said.rank is None and said.confidence is None
    found = measure(said, 5)
    assert found.accuracy == ((logits > 0) == labels.bool()).all(1).double().mean().item()
    assert found.map is not None and found == measure(said, 5)


def replace_labels(split, labels):
    return Split(split.images, labels, split.classes)


@pytest.mark.parametrize("several", [False, True])
def test_parts_of_any_order_are_the_whole_bit_for_bit(tiny_model, split, several):
    split = replace_labels(split, F.one_hot(split.labels, 5).float()) if several else split
    batches = EvalBatches(split, batch_size=3, **LOOK)
    whole = outputs(tiny_model, batches, scores=several)
    parts = [outputs(tiny_model, batches, scores=several, numbers=range(rank, 4, 5)) for rank in (4, 2, 0, 3, 1)]
    assert len(parts[0].indices) == 0  # a process for which there was no batch
    for ours, theirs in zip(Outputs.cat(parts), whole):
        assert (ours is theirs is None) or torch.equal(ours, theirs)
    assert measure(Outputs.cat(parts), 5) == evaluate(tiny_model, batches, scores=several)


def test_evaluation_can_be_stopped_between_batches(tiny_model, split):
    def stop():
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model.train(), EvalBatches(split, batch_size=3, **LOOK), stop=stop)
    assert tiny_model.training


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("several", [False, True])
def test_a_broken_image_is_named_and_left_out(tiny_model, files, caplog, workers, several):
    files = replace_labels(files, F.one_hot(files.labels, 5).float()) if several else files
    batches = EvalBatches(files, batch_size=4, workers=workers, **LOOK)
    said = outputs(tiny_model, batches)
    assert said.indices.tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and torch.equal(said.labels, files.labels[said.indices])
    assert [record.getMessage().count("4.png") for record in caplog.records] == [1]
    good = outputs(tiny_model, EvalBatches(files.subset(said.indices), batch_size=4, **LOOK))
    assert torch.equal(good.predicted, said.predicted) and torch.allclose(good.loss, said.loss, rtol=1e-5)
    assert files.labels.min() == 0  # the split's own labels are untouched


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_never_makes_the_host_wait_for_the_device(tiny_model, split):
    model, batches = tiny_model.cuda(), EvalBatches(split, batch_size=2, **{**LOOK, "device": "cuda"})
    outputs(model, batches)  # the first time may set things up
    parts = stream(model, batches, scores=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = list(parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert Outputs.cat(parts).indices.tolist() == list(range(10))


# --- Metrics ---------------------------------------------------------------------------------------------------------

def said_of(labels, predicted, confidence=None, rank=None, loss=None):
    labels, predicted, N = torch.tensor(labels), torch.tensor(predicted), len(labels)
    return Outputs(torch.arange(N), labels, torch.tensor(loss or [1.0] * N, dtype=torch.float64), predicted,
                   torch.tensor(confidence or [0.5] * N), torch.tensor(rank or [0] * N), None)


def test_the_report_by_hand():
    said = said_of([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0], rank=[0, 0, 5, 0, 0, 4], loss=[1.0, 2.0, 3.0, 0.0, 0.0, 0.0])
    found = report(said, list("abcdefg"), known=[0, 1, 2])
    assert found["top1"] == pytest.approx(4 / 6) and found["top5"] == pytest.approx(5 / 6) and found["loss"] == 1.0
    a, b, c, *others = found["classes"]
    assert (a["precision"], a["recall"], a["f1"], a["images"], a["predicted"]) == pytest.approx((2/3, 2/3, 2/3, 3, 3))
    assert (b["precision"], b["recall"], b["f1"], b["images"], b["predicted"]) == pytest.approx((2/3, 1, 0.8, 2, 3))
    assert (c["precision"], c["recall"], c["f1"], c["images"], c["predicted"]) == (0, 0, 0, 1, 0)
    assert not any(row["images"] or row["in_data"] for row in others)
    assert found["macro_f1"] == pytest.approx((2/3 + 0.8) / 3) and found["macro_recall"] == pytest.approx(5/9)
    assert found["balanced_accuracy"] == pytest.approx(5/9) and found["macro_precision"] == pytest.approx(4/9)
    assert found["confusion"] == [[0, 0, 2], [0, 1, 1], [1, 1, 2], [2, 0, 1]]
    assert found["calibration_error"] == pytest.approx(4/6 - 0.5) and json.loads(json.dumps(found)) == found
    assert measure(said, 3).macro_f1 == pytest.approx(found["macro_f1"]) and measure(said, 3).map is None
    assert report(said, list("abc"))["top5"] is None


def test_the_calibration_error_by_hand():
    """Equation 3 of Guo et al. 2017: two bins of two images, one of one; a bin includes its upper end."""
    confidence, right = torch.tensor([0.95, 0.99, 0.5, 0.52, 0.2]), torch.tensor([True, False, True, True, False])
    by_hand = 2/5 * abs(0.5 - 0.97) + 2/5 * abs(1 - 0.51) + 1/5 * 0.2
    assert calibration_error(confidence, right) == pytest.approx(by_hand)
    ends = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)  # bins (0, 0.5] and (0.5, 1]
    assert calibration_error(ends, torch.tensor([True, False, True]), bins=2) == pytest.approx(2/3 * abs(0.5 - 0.375))


def test_average_precision_by_hand():
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]])
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.8, 0.9, 0.2], [0.7, 0.7, 0.3], [0.1, float("nan"), 0.4]])
    said = Outputs(torch.arange(4), labels, torch.ones(4, dtype=torch.float64), scores > 0.5, None, None, scores)
    first, second = (1 + 2/3) / 2, (1 + 2/3 + 3/4) / 3  # precision where each positive is found; NaN ranks last
    assert average_precisions(said) == pytest.approx({0: first, 1: second})
    found = report(said, list("abc"))
    assert found["mean_average_precision"] == pytest.approx((first + second) / 2) == pytest.approx(measure(said, 3).map)
    assert found["classes"][2]["average_precision"] is None and "confusion" not in found
    true, decided = 4, 6  # of the 5 labels, and of the cells above 0.5
    assert found["micro_f1"] == pytest.approx(2 * true / (5 + decided)) and found["all_labels_right"] == 0.25
