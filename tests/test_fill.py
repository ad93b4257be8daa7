import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch

from models.archive import Archive
from models.configs import replace
from models.fill import google_zeroes_edge, resize_pos_embed, with_channels
from models.modeling import VisionTransformer
from models.npz import identify, load_npz, save_npz
from tests.conftest import randomise

ROOT = Path(__file__).parent.parent


def test_resize_keeps_the_class_row_and_the_corners_and_says_so(caplog):
    pos = torch.randn(1, 1 + 9, 4)
    with caplog.at_level(logging.INFO):
        out = resize_pos_embed(pos, (3, 3), (5, 4))
    grid, old = out[0, 1:].reshape(5, 4, 4), pos[0, 1:].reshape(3, 3, 4).double()
    assert torch.equal(out[0, 0], pos[0, 0].double())
    assert torch.equal(grid[[0, 0, -1, -1], [0, -1, 0, -1]], old[[0, 0, -1, -1], [0, -1, 0, -1]])
    assert torch.allclose(grid[1, 0], (old[0, 0] + old[1, 0]) / 2)
    assert "from 3 x 3 to 5 x 4" in caplog.text and "zero" not in caplog.text


def test_the_edge_that_google_zeroes_is_interpolated_and_said(caplog):
    assert google_zeroes_edge(28, 48) and google_zeroes_edge(16, 30) and google_zeroes_edge(24, 22)
    assert not google_zeroes_edge(14, 24) and not google_zeroes_edge(7, 12) and not google_zeroes_edge(28, 28)
    with caplog.at_level(logging.INFO):
        out = resize_pos_embed(torch.ones(1, 28 * 28, 1), (28, 28), (48, 48))
    assert torch.allclose(out, torch.ones_like(out)) and "Google's own resize leaves" in caplog.text


@pytest.mark.parametrize("old, new", [((14, 14), (24, 24)), ((7, 7), (12, 12)), ((3, 5), (6, 2)), ((12, 12), (1, 1))])
def test_resize_is_the_scipy_zoom_that_google_calls(old, new):
    grid = np.random.default_rng(0).normal(size=(*old, 3))
    google = scipy.ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    ours = resize_pos_embed(torch.from_numpy(grid.reshape(1, -1, 3)), old, new)
    assert np.allclose(ours.numpy().reshape(*new, 3), google, rtol=0, atol=1e-13)


def test_a_grey_image_gives_what_its_copy_in_three_channels_gave(tiny_model, tmp_path, caplog):
    save_npz(tiny_model, tmp_path / "a.npz")
    with caplog.at_level(logging.INFO):
        grey = load_npz(tmp_path / "a.npz", in_chans=1, dtype=torch.float64).eval()
    assert "adapted from 3 to 1 channels: summed" in caplog.text
    assert grey.config.in_chans == 1 and grey.config.mean == (0.5,) and grey.config.std == (0.5,)
    images = torch.rand(2, 1, 16, 16, dtype=torch.float64)
    expected = load_npz(tmp_path / "a.npz", dtype=torch.float64).eval()(images.expand(-1, 3, -1, -1))
    assert torch.allclose(grey(images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_more_channels_repeat_the_kernel_and_keep_its_scale(channels, tiny_model, tmp_path):
    save_npz(tiny_model, tmp_path / "a.npz")
    many = load_npz(tmp_path / "a.npz", in_chans=channels)
    kernel, ours = tiny_model.patch_embed.proj.weight, many.patch_embed.proj.weight
    for c in range(channels):
        assert torch.allclose(ours[:, c], kernel[:, c % 3] * 3 / channels)
    assert many.config.mean == (0.5,) * channels
    assert many(torch.zeros(1, channels, 16, 16)).shape == (1, 5)


def test_statistics_follow_the_channels_in_turn(tiny_config):
    config = replace(tiny_config, mean=(0.1, 0.2, 0.6), std=(1.0, 2.0, 3.0))
    assert with_channels(config, 5).mean == (0.1, 0.2, 0.6, 0.1, 0.2) and with_channels(config, 3) is config
    assert with_channels(config, 1).mean == pytest.approx((0.3,)) and with_channels(config, 1).std == (2.0,)


@pytest.mark.parametrize("stages", [(), (1, 1)])
def test_a_hybrid_adapts_its_root_convolution(stages, tiny_config, tmp_path):
    config = replace(tiny_config, patch_size=(1, 1), resnet={"num_layers": stages, "width_factor": 0.5})
    model = randomise(VisionTransformer(config, 32, 5))
    save_npz(model, tmp_path / "a.npz")
    root = (model.patch_embed.backbone.stem if stages else model.patch_embed.backbone).conv.weight
    grey = load_npz(tmp_path / "a.npz", in_chans=1)
    assert torch.equal((grey.patch_embed.backbone.stem if stages else grey.patch_embed.backbone).conv.weight,
                       root.double().sum(dim=1, keepdim=True).float())
    save_npz(grey, tmp_path / "b.npz")  # and such a file says by its shapes what it takes
    assert identify(tmp_path / "b.npz").config.in_chans == 1
    assert load_npz(tmp_path / "b.npz").config.mean == (0.5,)


def test_a_head_of_zeros_is_said_when_it_is_kept_and_not_when_it_is_replaced(tiny_config, tmp_path, caplog):
    save_npz(VisionTransformer(tiny_config, 16, 5), tmp_path / "a.npz")
    with caplog.at_level(logging.WARNING):
        load_npz(tmp_path / "a.npz", num_classes=5)
        assert not caplog.text
        load_npz(tmp_path / "a.npz")
    assert "its head is all zero, so every logit is zero" in caplog.text


def test_wrong_shapes_are_refused_before_a_tensor_is_read(tiny_model, tmp_path, monkeypatch):
    save_npz(tiny_model, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays["head/kernel"] = arrays["head/kernel"].T.copy()
    np.savez(tmp_path / "a.npz", **arrays)
    monkeypatch.setattr(Archive, "read", None)
    with pytest.raises(ValueError, match=r"'head/kernel' has shape \(5, 32\), expected \(32, 5\)"):
        load_npz(tmp_path / "a.npz")


def test_loading_imports_no_compiler_and_no_algebra(tiny_model, tmp_path):
    """On the meta device some calls of torch load sympy or inductor, which took longer than all of the reading."""
    save_npz(tiny_model, tmp_path / "a.npz")
    code = ("import sys; from models.npz import load_npz; before = set(sys.modules); "
            f"load_npz({str(tmp_path / 'a.npz')!r}, num_classes=3); "
            "print({'sympy', 'torch._dynamo', 'torch._inductor'} & (set(sys.modules) - before))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    older = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)  # there, torch's own meta device loads sympy
    assert done.stdout in ("set()\n", "{'sympy'}\n" if older else ""), done
