"""The kernels compute what PyTorch's own operations compute, forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F

from models import kernels


@pytest.mark.parametrize("rows", [(1, 65), (3, 100), (4, 1), (400,)])
def test_a_linear_layer_by_convolution_is_a_linear_layer(monkeypatch, rows):
    monkeypatch.setattr(kernels, "_mkl_is_slow", lambda: True)
    calls = []
    convolution = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: calls.append(1) or convolution(*args))
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*rows, 48), torch.randn(32, 48), torch.randn(32)
    given = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.linear(*given)
    towards = torch.randn(expected.shape)
    gradients = torch.autograd.grad(expected, given, towards.double())
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    found = kernels.linear(*ours)
    assert len(calls) == (x[..., 0].numel() >= kernels.FEW_ROWS)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, ours, towards), gradients):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max() * 20


def test_only_float32_outside_of_autocast_goes_by_convolution(monkeypatch):
    monkeypatch.setattr(kernels, "_mkl_is_slow", lambda: True)
    x, weight = torch.randn(2, 160, 16), torch.randn(8, 16)
    assert kernels._by_convolution(x, weight)
    assert not kernels._by_convolution(x.double(), weight.double())
    assert not kernels._by_convolution(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not kernels._by_convolution(x, weight)
        assert kernels.linear(x, weight, None).dtype == torch.bfloat16


@pytest.mark.parametrize("queries", [1, 65])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_is_softmax_of_scaled_products(dtype, limit, queries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 64, dtype=torch.float64) for tokens in (queries, 65, 65))
    given = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", *given[:2]) / 8, -1) @ given[2]
    narrow = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    found = kernels.attention(*narrow)
    assert found.dtype == dtype and (found - expected).abs().max() < limit
    towards = torch.randn_like(expected)
    for one, other in zip(torch.autograd.grad(found, narrow, towards.to(dtype)),
                          torch.autograd.grad(expected, given, towards)):
        assert (one - other).abs().max() < limit * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_acts_on_the_probabilities_and_keeps_their_mean(dtype):
    torch.manual_seed(0)
    q, k, v = torch.zeros(3, 8, 4, 100, 16, dtype=dtype).unbind()
    found = kernels.attention(q, k, v + 1, dropout=0.25)  # each output: the share of the kept, 100 equal ones, / 0.75
    kept = (found * 0.75 * 100).float()
    assert kept.mean().item() == pytest.approx(75, abs=0.5) and kept.std().item() == pytest.approx(4.33, abs=0.3)
    assert torch.allclose(kernels.attention(q, k, v + 1), torch.ones((), dtype=dtype), atol=0.01)


def test_long_sequences_keep_no_table_of_all_pairs(monkeypatch):
    monkeypatch.setattr(kernels, "MANY_TOKENS", 64)
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    for tokens in (64, 65):
        kernels.attention(*torch.randn(3, 1, 1, tokens, 16).bfloat16().unbind())
    assert len(calls) == 1
