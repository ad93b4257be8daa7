import csv
import json

import numpy as np
import pytest
from PIL import Image

from utils.curves import write

HEAD = ["epoch", "step", "learning_rate", "train_loss", "train_accuracy"]


@pytest.fixture
def folder(tmp_path):
    """folder({(step, name): value}, a setting ...) -> that of a run with batches of 4 images."""
    def make(values, name="a_run", **settings):
        place = tmp_path / name
        place.mkdir()
        lines = [{"step": step, "name": what, "value": value, "time": 1e9} for (step, what), value in values.items()]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (place / "settings.json").write_text(json.dumps({"train_batch_size": 4, **settings}))
        return place
    return make


def updates(losses, accuracies, first=1):
    found = {}
    for step, (loss, accuracy) in enumerate(zip(losses, accuracies), start=first):
        found |= {(step, "train/loss"): loss, (step, "train/accuracy"): accuracy, (step, "train/lr"): 0.5**step,
                  (step, "train/grad_norm"): 1.0}
    return found


SIX = updates([6.0, 5.0, 4.0, 3.0, 2.0, 0.5], [0.0, 0.25, 0.5, 0.5, 0.75, 1.0])


def table(place, images=10):
    """(head, rows of numbers; an empty cell is None); the picture must be whole."""
    found, picture = write(place, images)
    assert (found, picture) == (place / "curves.csv", place / "curves.png")
    with Image.open(picture) as image:
        image.load()
        assert image.size == (1200, 480) and image.format == "PNG"
    assert not list(place.glob("*.part"))
    with open(found, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    return head, [[float(cell) if cell else None for cell in row] for row in rows]


def colours(place):
    """How many pixels of the picture have each of the first colours of a line: train, then evaluations."""
    pixels = np.asarray(Image.open(place / "curves.png").convert("RGB")).astype(int)
    return [int((abs(pixels - colour).sum(axis=2) < 30).sum()) for colour in ((0, 114, 178), (213, 94, 0))]


def test_a_row_for_each_evaluation_with_means_since_the_one_before(folder):
    place = folder({**SIX, (2, "test/accuracy"): 0.3, (2, "test/loss"): 2.5, (6, "test/accuracy"): 0.6,
                    (6, "test/loss"): 1.5, (6, "best/test_accuracy"): 0.6, (1, "run/num_steps"): 6})
    head, rows = table(place)
    assert head == [*HEAD, "test_loss", "test_accuracy"]
    assert rows == [[0.8, 2, 0.25, 5.5, 0.125, 2.5, 0.3], [2.4, 6, 0.5**6, 2.375, 0.6875, 1.5, 0.6]]
    assert min(colours(place)) > 500


def test_a_held_out_part_and_averaged_weights_have_columns_of_their_own(folder):
    head, rows = table(folder({**SIX, (3, "val/accuracy"): 0.1, (3, "val/loss"): 2.0, (6, "val/accuracy"): 0.2,
                               (6, "val/loss"): 1.0, (6, "average/val_accuracy"): 0.25, (6, "test/accuracy"): 0.3}))
    assert head == [*HEAD, "val_loss", "val_accuracy", "average_val_accuracy", "test_accuracy"]
    assert [row[5:] for row in rows] == [[2.0, 0.1, None, None], [1.0, 0.2, 0.25, 0.3]]


def test_values_that_were_not_finite_are_left_out(folder):
    values = {**SIX, (1, "train/loss"): None, (5, "train/loss"): None, (6, "train/loss"): None,
              (2, "test/accuracy"): 0.5, (2, "test/map"): None, (4, "test/accuracy"): None, (4, "test/map"): 0.75,
              (6, "test/accuracy"): None}
    head, rows = table(folder(values))
    assert head[5:] == ["test_accuracy", "test_map"]
    assert [row[3] for row in rows] == [5.0, 3.5, None]
    assert [row[5:] for row in rows] == [[0.5, None], [None, 0.75], [None, None]]


def test_one_update_and_one_evaluation_can_be_seen(folder):
    place = folder({**updates([2.0], [0.5]), (1, "test/loss"): 1.0, (1, "test/accuracy"): 0.25})
    assert table(place, images=4)[1] == [[1.0, 1, 0.5, 2.0, 0.5, 1.0, 0.25]]
    assert min(colours(place)) > 10


def test_a_run_without_evaluation_has_a_head_and_a_picture(folder):
    place = folder(SIX)
    assert table(place) == (HEAD, [])
    assert colours(place)[0] > 500 and colours(place)[1] == 0


def test_a_run_that_was_continued_goes_on(folder):
    values = {**SIX, (6, "test/accuracy"): 0.5, (6, "run/num_steps"): 8, **updates([1.0, 3.0], [1.0, 0.0], first=7),
              (8, "test/accuracy"): 0.75}
    _, rows = table(folder(values, continued=[{"step": 6, "time": 0}], num_steps=8))
    assert [row[1:] for row in rows] == [[6, 0.5**6, 20.5 / 6, 0.5, 0.5], [8, 0.5**8, 2.0, 0.5, 0.75]]


def test_a_long_run_with_gaps_and_a_name_in_any_script(folder):
    noise = np.random.default_rng(0).random(2000).tolist()
    noise[100:900] = [None] * 800
    values = {**updates(noise, noise), **{(step, "test/loss"): 0.5 for step in range(20, 2001, 20)}}
    _, rows = table(folder(values, name="名 $x_1$ \udcff"), images=100)
    assert len(rows) == 100 and rows[-1][0] == 80.0 and rows[10][3] is None and rows[50][3] is not None


def test_nothing_finite_at_all(folder):
    assert table(folder(updates([None] * 50, [None] * 50)))[1] == []


def test_writing_again_gives_the_same_bytes(folder):
    place = folder({**SIX, (6, "test/loss"): 1.0})
    before = [path.read_bytes() for path in write(place, 10)]
    assert [path.read_bytes() for path in write(place, 10)] == before


def test_without_a_number_of_images_there_are_no_epochs(folder):
    values = {**SIX, (6, "test/accuracy"): 0.5}
    _, rows = table(folder(values), images=None)
    assert rows == [[None, 6, 0.5**6, 20.5 / 6, 0.5, 0.5]]
    assert table(folder(values, name="b", resolved={"train_images": 10}), images=None)[1][0][0] == 2.4
    assert table(folder(values, name="c", train_batch_size=None))[1][0][0] is None


@pytest.mark.parametrize("values", [{}, {(1, "run/num_steps"): 6}])
def test_without_an_update_nothing_is_written(folder, values):
    place = folder(values)
    with pytest.raises(ValueError, match="no update yet"):
        write(place, 10)
    assert sorted(path.name for path in place.iterdir()) == ["metrics.jsonl", "settings.json"]


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(ValueError, match="is no run"):
        write(tmp_path, 10)
