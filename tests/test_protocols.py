"""The cells of the published tables, as their sources describe them."""

import pytest

from utils.data import NAMED
from utils.protocols import AUGREG, PROTOCOLS, Option, rows


def test_the_papers_cells_are_those_of_its_appendix():
    (row,) = rows("paper", ["ViT-B_16"], ["cifar10"])
    assert row.options == tuple(Option(10_000, 500, rate) for rate in (0.001, 0.003, 0.01, 0.03))
    assert (row.size, row.batch, row.held_out, row.kept_back, row.best_on_test) == (384, 512, 0.02, 0.0, False)
    assert [cell.flags()["val_fraction"] for cell in row.choosing()] == 4 * [0.02]
    (final,) = row.finals(Option(10_000, 500, 0.003), seeds=1)
    assert "val_fraction" not in final.flags()  # all of train, and test once: at the end
    assert final.flags()["eval_every"] == final.flags()["num_steps"] == 10_000
    found = {row.dataset: row for row in rows("paper", ["ViT-L_16"])}
    assert {name: (row.options[0].steps, len(row.options), row.held_out) for name, row in found.items()} == {
        "cifar10": (10_000, 4, 0.02), "cifar100": (10_000, 4, 0.02), "pets": (500, 4, 0.1), "flowers": (500, 4, 0.1),
        "imagenet": (20_000, 4, 0.01)}
    assert len(rows("paper")) == 5 * 5 and PROTOCOLS["paper"].seeds == 3


def test_vit_jax_keeps_a_part_back_and_has_two_columns():
    one, two = rows("vit_jax", ["ViT-B_16"], ["cifar10"])
    assert [dict(row.flags)["dropout"] for row in (one, two)] == [0.0, 0.1]
    assert one.options == (Option(10_000, 500, 0.01),) and one.choosing() == []
    flags = one.finals(one.options[0], 1)[0].flags()
    assert (flags["val_fraction"], flags["momentum_dtype"], flags["img_size"]) == (0.02, "bfloat16", 384)
    assert rows("vit_jax", ["ViT-B_32"], ["cifar10"])[0].options[0].rate == 0.03
    assert rows("vit_jax", ["ViT-L_16"], ["imagenet"])[0].kept_back == 0.01


def test_augreg_chooses_among_steps_and_rates_at_two_sizes():
    (small,) = rows("augreg", ["ViT-S_16"], ["pets"])
    assert (small.size, small.held_out) == (224, 0.1)
    assert [row.size for row in rows("augreg", ["ViT-S_16"], ["imagenet"])] == [224, 384]
    assert small.options == tuple(Option(*length, rate) for length in ((500, 100), (2_500, 200))
                                  for rate in (0.001, 0.003, 0.01, 0.03))
    assert rows("augreg", ["ViT-S_16"], ["imagenet"])[0].options == (
        Option(20_000, 500, 0.01), Option(20_000, 500, 0.03))
    assert rows("augreg", ["ViT-B_16"], ["pets"])[0].checkpoint == (
        "checkpoint/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz")
    assert len(rows("augreg")) == len(AUGREG) * 4


def test_short_and_vit_pytorch_are_as_their_readmes_say():
    assert [row.options for row in rows("short", ["ViT-B_16"], ["cifar100"])] == [
        (Option(500, 50, 0.03),), (Option(1_000, 100, 0.03),)]
    found = rows("ViT-pytorch", ["ViT-B_16"], ["cifar10"])
    assert [(row.size, *row.options[0][:2], row.family) for row in found] == [
        (224, 10_000, 500, "imagenet21k"), (384, 10_000, 500, "imagenet21k"), (224, 500, 100, "imagenet21k"),
        (224, 1_000, 100, "imagenet21k"), (224, 10_000, 500, "imagenet21k+imagenet2012")]
    flags = found[0].finals(found[0].options[0], 1)[0].flags()
    assert (flags["eval_every"], flags["no_flip"], flags["dropout"], flags["learning_rate"]) == (100, True, 0.1, 0.03)
    assert all(row.best_on_test for row in found) and "val_fraction" not in flags


@pytest.mark.parametrize("table", PROTOCOLS)
def test_every_cell_has_a_folder_of_its_own_and_flags_that_train_py_has(table):
    from utils.settings import resolve
    found = rows(table)
    cells = [cell for row in found for cell in row.choosing() + row.finals(row.options[0], 2)]
    assert len({cell.name for cell in cells}) == len(cells) and len({row.name for row in found}) == len(found)
    for cell in cells:
        settings = resolve({**cell.flags(), "img_size": (cell.row.size,) * 2})
        assert settings.num_steps == cell.option.steps and settings.seed == cell.seed
        assert settings.dataset in NAMED and settings.max_grad_norm == 1.0 and settings.weight_decay == 0.0


def test_what_a_protocol_does_not_have_is_refused():
    with pytest.raises(ValueError, match="The protocol short has no model 'ViT-L_16': it has ViT-B_16."):
        rows("short", ["ViT-L_16"])
    with pytest.raises(ValueError, match="The protocol paper has no data set 'photos'"):
        rows("paper", [], ["photos"])
    assert rows("mini", [], ["photos"])[0].dataset == "photos"
