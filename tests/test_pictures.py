"""Pictures: pixels are those that the model saw, and heat lies where its patch is."""

import numpy as np
import pytest
import torch

from models.attention import class_rollout, rollout
from models.configs import replace
from models.modeling import VisionTransformer
from tests.conftest import randomise
from utils import pictures


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_come_back_as_they_were(tiny_config, channels):
    config = replace(tiny_config, in_chans=channels, mean=(0.4,) * channels, std=(0.2,) * channels)
    pixels = np.random.default_rng(0).integers(0, 256, (2, channels, 5, 7), dtype=np.uint8)
    found = pictures.shown((torch.from_numpy(pixels) / 255 - 0.4) / 0.2, config)
    expected = pixels[:, [0, 0, 0] if channels == 1 else [0, 1, 2]].transpose(0, 2, 3, 1)
    assert found.dtype == np.uint8 and np.array_equal(found, expected)


def test_heat_covers_its_patch_and_nothing_where_no_patch_is(tiny_config):
    model = VisionTransformer(tiny_config, (18, 27), 2)   # 4 x 6 patches of 4 px, 2 rows and 3 columns of pixels left
    maps = torch.zeros(2, 4, 6)
    maps[0, 1, 2], maps[1] = 5, 7
    found = pictures.over_pixels(model, maps)
    assert found.shape == (2, 18, 27) and found[0].min() == 0 and found[0].max() == 1 and not found[1].any()
    row, column = np.unravel_index(found[0].argmax(), (18, 27))
    assert 4 <= row < 8 and 8 <= column < 12
    assert not found[0, 16:].any() and not found[0, :, 24:].any()


def test_heat_of_a_hybrid_whose_stem_rounds_up_is_cut(tiny_config):
    config = replace(tiny_config, resnet={"num_layers": (), "width_factor": 0.5}, patch_size=(1, 1))
    model = VisionTransformer(config, (15, 18), 2)        # 4 x 5 cells of 4 px
    maps = torch.zeros(1, 4, 5)
    maps[0, 3, 4] = 1
    found = pictures.over_pixels(model, maps)
    assert model.grid == (4, 5) and found.shape == (1, 15, 18)
    assert found[0, 14:, 17:].min() > 0.5 > found[0, :10].max()


def test_an_overlay_is_hot_where_heat_is_and_keeps_the_image_visible():
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    image[1, 0] = 200
    found = pictures.overlay(image, np.float32([[0, 1], [0, 0]])).astype(int)
    assert found[0, 1].sum() > found[0, 0].sum() + 200 and found[1, 0].sum() > found[0, 0].sum() + 100


def test_a_shadow_is_image_times_heat_doubled():
    image = np.array([[[10, 100, 200]]], dtype=np.uint8)
    assert pictures.shaded(image, np.float32([[0.5]])).tolist() == [[[10, 100, 200]]]
    assert pictures.shaded(image, np.float32([[1.0]])).tolist() == [[[20, 200, 255]]]
    assert pictures.shaded(image, np.float32([[0.0]])).tolist() == [[[0, 0, 0]]]


def test_an_explanation_is_the_image_and_three_views_of_it(tiny_config):
    model = randomise(VisionTransformer(tiny_config, (16, 24), 5))
    images, classes = torch.rand(2, 3, 16, 24) * 2 - 1, torch.tensor([4, 1])
    for n, panels in enumerate(pictures.explained(model, images, classes)):
        seen, _, rolled, for_class = panels.values()
        assert np.array_equal(seen, pictures.shown(images, model.config)[n])
        for picture, heat in ((rolled, rollout(model, images)), (for_class, class_rollout(model, images, classes))):
            assert np.array_equal(picture, pictures.overlay(seen, pictures.over_pixels(model, heat)[n]))


def test_a_figure_has_a_panel_a_picture(tmp_path):
    figure = pictures.figure({"one": np.zeros((4, 8, 3), np.uint8), "two": np.zeros((4, 8, 3), np.uint8)}, "title")
    assert [axes.get_xlabel() for axes in figure.axes] == ["one", "two"]
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
