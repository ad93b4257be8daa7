"""The hybrid's ResNet stem as Google computes it (`vit_jax/models_resnet.py`).

Three habits of PyTorch would be wrong here: padding is TensorFlow's SAME (the odd pixel goes to the bottom and
right, so it depends on the input's size), convolution kernels are standardised with `std + 1e-5` (not
`sqrt(var + eps)`), and group norms have 32 groups and an epsilon of 1e-6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(height: int, width: int, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) of TensorFlow's SAME: the output has ceil(n / stride) cells."""
    def one(n):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        return total // 2, total - total // 2
    return *one(width), *one(height)


class StdConv2d(nn.Conv2d):
    """Convolution without bias, SAME padding, with a standardised kernel (`weight_standardize`)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Per output channel; the biased deviation of the centred kernel, epsilon added to the deviation itself.
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.std(dim=(1, 2, 3), correction=0, keepdim=True) + 1e-5)
        x = F.pad(x, same_padding(*x.shape[-2:], self.kernel_size[0], self.stride[0]))
        return F.conv2d(x, weight, None, self.stride)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


class Shortcut(nn.Module):
    def __init__(self, in_channels, out_channels, stride, eps):
        super().__init__()
        self.conv = StdConv2d(in_channels, out_channels, 1, stride)
        self.norm = group_norm(out_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ResidualUnit(nn.Module):
    """Bottleneck in post-activation order: ReLU(shortcut(x) + y)."""

    def __init__(self, in_channels, width, stride, eps):
        super().__init__()
        self.conv1 = StdConv2d(in_channels, width, 1)
        self.norm1 = group_norm(width, eps)
        self.conv2 = StdConv2d(width, width, 3, stride)
        self.norm2 = group_norm(width, eps)
        self.conv3 = StdConv2d(width, 4 * width, 1)
        self.norm3 = group_norm(4 * width, eps)
        changes = in_channels != 4 * width or stride != 1
        self.downsample = Shortcut(in_channels, 4 * width, stride, eps) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.downsample(x) + self.norm3(self.conv3(y)))


class Root(nn.Module):
    """7x7 convolution of stride 2, norm, ReLU, 3x3 max-pool of stride 2: a quarter of the size."""

    def __init__(self, in_chans, width, eps):
        super().__init__()
        self.conv = StdConv2d(in_chans, width, 7, stride=2)
        self.norm = group_norm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.pad(x, same_padding(*x.shape[-2:], 3, 2))  # zeros do for -inf: nothing is negative after the ReLU
        return F.max_pool2d(x, 3, stride=2)


class ResNetStem(nn.Module):
    """Root, then stages of residual units: (B, in_chans, H, W) -> (B, channels, ceil(H / scale), ceil(W / scale))."""

    def __init__(self, num_layers, width_factor, in_chans, eps):
        super().__init__()
        width = int(64 * width_factor)
        self.stem = Root(in_chans, width, eps)
        self.stages = nn.ModuleList()
        self.out_channels = width
        for i, units in enumerate(num_layers):
            stage = nn.Module()
            stage.blocks = nn.Sequential()
            for j in range(units):
                stride = 2 if i > 0 and j == 0 else 1
                stage.blocks.append(ResidualUnit(self.out_channels, width * 2**i, stride, eps))
                self.out_channels = 4 * width * 2**i
            self.stages.append(stage)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage.blocks(x)
        return x

    @staticmethod
    def output_size(size: tuple[int, int], num_layers) -> tuple[int, int]:
        """Height and width of the output; each of the strided steps rounds up."""
        for _ in range(2 + max(len(num_layers) - 1, 0)):
            size = tuple(-(-n // 2) for n in size)
        return size


def stem(resnet, in_chans: int, eps: float) -> nn.Module:
    """The stem of a config's `resnet`; timm names a root without stages with no `.stem` before it, so do we."""
    if not resnet.num_layers:
        root = Root(in_chans, int(64 * resnet.width_factor), eps)
        root.out_channels = root.conv.out_channels
        return root
    return ResNetStem(resnet.num_layers, resnet.width_factor, in_chans, eps)


@torch.no_grad()
def init_stem(module: nn.Module) -> None:
    """Flax's defaults for a stem trained from scratch; the last norm of each unit starts at zero."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d):
            lecun_normal_(child.weight)
        elif isinstance(child, nn.GroupNorm):
            nn.init.constant_(child.weight, 0.0 if name.endswith("norm3") else 1.0)
            nn.init.zeros_(child.bias)


def lecun_normal_(weight: Tensor) -> None:
    """Flax's default kernel: truncated normal of variance 1 / fan_in (0.8796 undoes what the cut takes off)."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
