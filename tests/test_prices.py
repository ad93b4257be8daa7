"""What the runs of a table cost, and how they are dealt out to machines."""

import pytest

from utils.prices import START, Price, price, said, shard, work
from utils.protocols import Option, Row


def row(*rates, dataset="cifar10", **options):
    return Row("mini", "ViT-demo", "checkpoint/ViT-demo.npz", dataset, 32, tuple(Option(4, 1, rate) for rate in rates),
               held_out=0.1, **options)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shards_cover_each_row_exactly_once(parts):
    rows = [row(0.01 * i, dataset=f"set{i}") for i in range(1, 6)]
    costs = [5.0, 1.0, 1.0, 1.0, 2.0]
    found = [shard(rows, costs, part, parts) for part in range(1, parts + 1)]
    assert sorted(r.dataset for part in found for r in part) == [r.dataset for r in rows]
    if parts == 2:
        assert [sum(costs[rows.index(r)] for r in part) for part in found] == [5.0, 5.0]


def test_the_price_follows_from_the_measured_speed():
    one = Row("paper", "ViT-B_16", "x", "cifar10", 384, tuple(Option(1_000, 50, rate) for rate in (0.01, 0.03)),
              held_out=0.1)
    found = price(one, seeds=3, images=(40_000, 10_000), rate=100.0, weights=1000)
    assert (found.cells, found.images) == (5, 5 * 1_000 * 512)
    scored = 2 * (4_000 + 10_000) + 3 * 10_000  # two candidates on the held-out part and at their end on test
    assert found.seconds == pytest.approx(5 * START + found.images / 100 + scored / 300)
    twice = price(one, 3, (40_000, 10_000), 200.0, 1000)
    assert twice.seconds - 5 * START == pytest.approx((found.seconds - 5 * START) / 2)


def test_shards_go_by_operations():
    one = row(0.01, 0.02)
    assert work(one, 2, (1000, 100), 10.0) == pytest.approx(10 * (4 * 4 * 512 + (2 * 200 + 2 * 100) / 3))
    assert work(one, 2, (1000, 100), 20.0) == 2 * work(one, 2, (1000, 100), 10.0)


def test_images_that_are_kept_back_are_scored():
    plain, kept = (price(Row("x", "m", "c", "d", 32, (Option(4, 1, 0.1),), kept_back=share), 1, (1000, 100), 1.0, 7)
                   for share in (0.0, 0.2))
    assert kept.seconds - plain.seconds == pytest.approx(200 / 3)


def test_hours_are_at_least_those_of_a_row_and_words_are_counted():
    one = row(0.01, 0.02)
    found = price(one, 1, (1000, 100), 1.0, 7)
    candidate, final = (START + 4 * 512 + scored / 3 for scored in (200, 100))
    assert (found.seconds, found.chain) == pytest.approx((2 * candidate + final, candidate + final))
    assert f"about {round(found.chain / 60)} minutes on 8 devices" in said([found], 8)
    assert "1 run, " in said([Price(1, 100, 60, 1)], 1)
    assert "about 1 minute on 1 device," in said([Price(1, 100, 60, 1)], 1)
