"""Where a Vision Transformer spends its time, linear layers and attention: on a GPU PyTorch's own kernels, on a CPU the
fastest of those that it has. All compute the same function; `bench/README.md` has the measurements behind each choice.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 256       # below, oneDNN is no faster (768 x 3072, processor time: 0.2 to 1.0 times; above 1.0 to 1.3)
MANY_TOKENS = 640    # above, a CPU keeps no T x T table of an image: its memory would grow with the square


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, T, I), (O, I), (O,) -> (B, T, O), as `F.linear`.

    In float32 on AMD as a convolution of 1 x 1: PyTorch gives it to oneDNN, which uses AVX-512 there, forwards and
    backwards, where MKL, to which it gives a linear layer, stays with AVX2.
    """
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and _by_convolution(x, weight):
        image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)               # (1, I, 1, B T), channels last
        image = F.conv2d(image, weight[:, :, None, None], bias)                    # (1, O, 1, B T)
        return image.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(d)) v: (B, H, Q, d), (B, H, T, d), (B, H, T, d) -> (B, H, Q, d).

    PyTorch's fused kernel, but on a CPU in bfloat16: there it is slower than plain products on tables of moderate size
    (its backward pass three to seven times).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= MANY_TOKENS:
        weights = (q * q.shape[-1] ** -0.5) @ k.mT                 # (B, H, Q, T)
        return F.dropout(weights.softmax(dim=-1, dtype=q.dtype), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def _by_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN gets it and is the faster one; with a single thread PyTorch gives convolutions to MKL, too."""
    return (_mkl_is_slow() and torch.get_num_threads() > 1 and x.dtype == weight.dtype == torch.float32
            and x.numel() >= FEW_ROWS * x.shape[-1] and not torch.is_autocast_enabled("cpu"))


def _mkl_is_slow() -> bool:
    """Whether this is an AMD processor with AVX-512 and a PyTorch with oneDNN."""
    return {"AuthenticAMD", "avx512f"} <= processor() and torch.backends.mkldnn.is_available()


@cache
def processor() -> frozenset[str]:
    """What Linux says of the processor, as words: its vendor, its instruction sets. Empty on other systems."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()
