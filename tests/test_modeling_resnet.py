import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.modeling_resnet import ResNetStem, Root, StdConv2d, init_stem, same_padding


@pytest.mark.parametrize("size, kernel, stride, before_after", [
    (32, 7, 2, (2, 3)), (33, 7, 2, (3, 3)), (32, 3, 2, (0, 1)), (33, 3, 2, (1, 1)), (32, 3, 1, (1, 1)),
    (32, 1, 2, (0, 0))])
def test_same_padding_puts_the_odd_pixel_last(size, kernel, stride, before_after):
    left, right, top, bottom = same_padding(size, size, kernel, stride)
    assert (left, right) == (top, bottom) == before_after


def test_kernels_are_standardised_with_the_epsilon_on_the_deviation():
    conv = StdConv2d(2, 3, 3).double()
    torch.nn.init.normal_(conv.weight, std=1e-5)  # small, so that the epsilon matters
    kernel = conv.weight.detach().numpy()
    axes = (1, 2, 3)
    kernel = kernel - kernel.mean(axes, keepdims=True)
    kernel = kernel / (np.sqrt((kernel**2).mean(axes, keepdims=True)) + 1e-5)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    expected = F.conv2d(x, torch.from_numpy(kernel), padding=1)
    assert torch.allclose(conv(x), expected, rtol=0, atol=1e-12)


def test_root_is_a_quarter_of_the_size_rounded_up_and_never_negative():
    y = Root(3, 32, 1e-6)(torch.randn(1, 3, 37, 40))
    assert y.shape == (1, 32, 10, 10) and y.min() >= 0


def test_stages_halve_and_widen():
    stem = ResNetStem((1, 2), 0.5, 3, 1e-6)
    assert stem(torch.randn(1, 3, 37, 64)).shape == (1, 256, 5, 8)
    assert stem.out_channels == 256 and ResNetStem.output_size((37, 64), (1, 2)) == (5, 8)


def test_a_new_stem_starts_with_its_last_norms_at_zero():
    stem = ResNetStem((1,), 0.5, 3, 1e-6)
    init_stem(stem)
    assert torch.count_nonzero(stem.stages[0].blocks[0].norm3.weight) == 0
    assert torch.equal(stem.stages[0].blocks[0].norm1.weight, torch.ones(32))
