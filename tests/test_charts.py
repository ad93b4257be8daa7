import re

import numpy as np
import pytest
import torch

from tests.pages import Page
from utils.charts import Curve, Series, calibration, curves, palette, smooth, thin
from utils.evaluation import reliability


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(size=count)


def series(values, steps=None):
    return Series(np.arange(1, len(values) + 1) if steps is None else np.array(steps), np.array(values, dtype=float))


def fit(data, drawn):
    """The affine map (scale, offset) from data to the page, and the largest distance from it in points."""
    scale, offset = np.polyfit(data, drawn, 1)
    return (scale, offset), np.abs(scale * data + offset - drawn).max()


# --- Long curves -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1203, 5000, 20_000])
def test_what_is_thinned_keeps_both_ends_and_the_extremes_of_each_bucket(count):
    values = noise(count)
    values[[7, count // 2]] = 1e3, -1e3
    kept = thin(values, 400)
    assert (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == count - 1 and len(kept) <= 802
    for bucket in np.array_split(np.arange(count), 400):
        mine = kept[(kept >= bucket[0]) & (kept <= bucket[-1])]
        assert values[mine].min() == values[bucket].min() and values[mine].max() == values[bucket].max()


def test_a_short_curve_is_left_whole_and_gaps_stay_gaps():
    assert thin(noise(1200), 400).tolist() == list(range(1200))
    values = noise(4000)
    values[1000:1100] = values[3333] = np.nan
    kept = thin(values, 400)
    assert 3333 in kept and np.isnan(values[kept]).sum() == 11  # one in each of ten empty buckets, and the single one
    assert thin(np.full(4000, np.nan), 400).tolist() == [0, *range(10, 4000, 10), 3999]


def test_the_mean_over_a_long_curve_is_that_of_its_parts():
    found = smooth(series(np.arange(1000.0)), 10)
    assert found.steps.tolist() == [50.5 + 100 * k for k in range(10)]
    assert found.values.tolist() == [49.5 + 100 * k for k in range(10)]
    values = np.arange(1000.0)
    values[::2] = np.nan
    assert smooth(series(values), 10).values.tolist() == [50.0 + 100 * k for k in range(10)]


# --- Curves ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [12, 1200, 20_000])
def test_the_corners_of_a_drawn_curve_are_the_values(count):
    train, test = series(noise(count)), series([3.0, 2.5, 2.75], [count // 3, count // 2, count])
    page = Page(curves("loss", "Loss", [Curve("train/loss.0", train, "#0072b2", faint=True),
                                        Curve("test/loss.0", test, "#d55e00")]))
    kept, drawn = thin(train.values), page.curve("loss-train/loss.0")
    assert len(drawn) == len(kept)
    (x, x0), away = fit(train.steps[kept], drawn[:, 0])
    assert away < 1e-4 and x > 0
    (y, y0), away = fit(train.values[kept], drawn[:, 1])
    assert away < 1e-4 and y < 0  # an SVG's y grows downwards
    other = page.curve("loss-test/loss.0")
    np.testing.assert_allclose(other[:, 0], x * test.steps + x0, atol=1e-3)
    np.testing.assert_allclose(other[:, 1], y * test.values + y0, atol=1e-3)
    np.testing.assert_allclose(page.marks["loss-test/loss.0"], other, atol=1e-4)
    assert ("loss-train/loss.0.mean" in page.paths) == (count >= 300)


def test_a_value_that_was_not_finite_leaves_a_gap():
    page = Page(curves("loss", "Loss", [Curve("train/loss.0", series([4, 3, np.nan, np.nan, 2, 1]), "#0072b2")]))
    path = page.paths["loss-train/loss.0"]
    assert re.findall("[ML]", path) == ["M", "L", "M", "L"]
    assert fit(np.array([1, 2, 5, 6]), page.curve("loss-train/loss.0")[:, 0])[1] < 1e-4


def test_a_point_that_no_line_reaches_has_a_mark():
    page = Page(curves("loss", "Loss", [Curve("test/loss.0", series([0.5], [100]), "#0072b2")]))
    assert len(page.marks["loss-test/loss.0"]) == 1
    values = noise(100)
    values[[49, 51]] = np.nan
    page = Page(curves("loss", "Loss", [Curve("a", series(values), "#0072b2")]))
    assert len(page.marks["loss-a"]) == 1


def test_charts_on_one_page_share_no_id_and_are_the_same_each_time():
    line = Curve("train/loss.0", series(noise(500)), "#0072b2", faint=True)
    one, two = (curves(name, "Loss", [line]) for name in ("loss", "norm"))
    ids = [attributes["id"] for name, attributes in Page(one + two).elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10 and curves("loss", "Loss", [line]) == one
    for address in re.findall(r'(?:href="|url\()#([^")]*)', one + two):
        assert address in ids
    assert "metadata" not in one and "<text" in one and 'aria-label="Loss"' in one


def test_accuracy_is_written_in_percent():
    page = Page(curves("accuracy", "Accuracy", [Curve("a", series([0.2, 0.4]), "#0072b2")], percent=True))
    assert "20%" in page.text.replace(".0", "") and "40%" in page.text.replace(".0", "")


def test_runs_have_colours_of_their_own():
    for count in (1, 6, 7, 40):
        assert len(set(palette(count))) == count


# --- Calibration -----------------------------------------------------------------------------------------------------

def test_the_reliability_diagram_shows_accuracy_over_confidence_and_leaves_empty_bins_out():
    confidence = torch.tensor([0.55, 0.56, 0.81, 0.99, 0.98, 0.97], dtype=torch.float64)
    found = reliability(confidence, torch.tensor([True, False, True, True, True, False]))
    assert found.images.tolist() == [0] * 8 + [2] + [0] * 3 + [1] + [0] + [3]
    assert np.isnan(found.accuracy[0]) and found.accuracy[[8, 12, 14]].tolist() == [0.5, 1.0, pytest.approx(2 / 3)]
    drawn = Page(calibration("calibration", "Calibration", found)).curve("calibration-calibration")
    for column, values in enumerate((found.confidence, found.accuracy)):
        assert fit(values[[8, 12, 14]], drawn[:, column])[1] < 1e-4

