"""The Vision Transformer of Dosovitskiy et al. 2021, computed as Google's `vit_jax/models_vit.py` computes it.

Letters: B batch, T tokens, D width, H heads, C classes, P patch, (h, w) the grid of patches. Parameters have timm's
names. What PyTorch habit would get wrong comes from the config: tanh GELU, norm epsilon 1e-6, zero head.
"""

import torch
from ml_collections import FrozenConfigDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.kernels import Linear, attention, linear
from models.modeling_resnet import ResNetStem, init_stem, lecun_normal_, stem


class PatchEmbed(nn.Module):
    """(B, in_chans, H, W) -> (B, h * w, D), row by row: one convolution of stride P, behind the ResNet stem if any.

    Pixels at the bottom and right that fill no patch are dropped, as Google's VALID convolution does.
    """

    def __init__(self, config):
        super().__init__()
        channels = config.in_chans
        if config.resnet is not None:
            self.backbone = stem(config.resnet, channels, config.norm_eps)
            channels = self.backbone.out_channels
        self.proj = nn.Conv2d(channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        if hasattr(self, "backbone"):
            images = self.backbone(images)            # (B, channels, ceil(H / scale), ceil(W / scale))
        return self.proj(images).flatten(2).mT        # (B, h * w, D)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection; dropout acts on the probabilities.

    queries: how many tokens, the first ones, ask (default: all); all are asked.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout_rate
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        D = x.shape[-1]
        if queries is None:
            q, k, v = self.heads(self.qkv(x))                                     # each (B, H, T, D / H)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            (q,) = self.heads(linear(x[:, :queries], weight[:D], bias[:D]))       # (B, H, queries, D / H)
            k, v = self.heads(linear(x, weight[D:], bias[D:]))
        x = attention(q, k, v, self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, T or queries, D)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, n D) -> (n, B, H, T, D / H)."""
        return x.unflatten(2, (-1, self.num_heads, self.qkv.in_features // self.num_heads)).permute(2, 0, 3, 1, 4)


class MLP(nn.Module):
    """Dense, GELU, dropout, dense."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.mlp_dim)
        self.act = nn.GELU(approximate={"tanh": "tanh", "erf": "none"}[config.gelu])
        self.drop = nn.Dropout(config.dropout_rate)
        self.fc2 = Linear(config.mlp_dim, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Block(nn.Module):
    """Pre-norm encoder block (`Encoder1DBlock`): (B, T, D) -> (B, T, D), or its first `queries` rows."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        x = x[:, :queries] + self.drop(self.attn(self.norm1(x), queries))
        return x + self.drop(self.mlp(self.norm2(x)))


class PreLogits(nn.Module):
    """The old files' layer before the head: dense, tanh (the paper's MLP head; fine-tuning drops it)."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.hidden_size, config.representation_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


class VisionTransformer(nn.Module):
    """Images (B, in_chans, H, W), normalised to [-1, 1] -> logits (B, C).

    config: one of `models.configs`; img_size: pixels, an int or (H, W), square or not;
    num_classes: C, or 0 for no head (the output is then what the head would see).
    """

    def __init__(self, config: FrozenConfigDict, img_size: int | tuple[int, int] = 224, num_classes: int = 1000):
        super().__init__()
        self.config = config
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.num_classes = num_classes
        self.gradient_checkpointing = False  # True: in training blocks are computed anew on the way back
        self.grid = grid_size(config, self.img_size)
        D, tokens = config.hidden_size, self.grid[0] * self.grid[1]

        self.patch_embed = PatchEmbed(config)
        if config.classifier == "token":
            self.cls_token = nn.Parameter(torch.empty(1, 1, D))
            tokens += 1
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, D))  # the class token has a row of its own, the first
        self.pos_drop = nn.Dropout(config.dropout_rate)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.pre_logits = PreLogits(config) if config.representation_size else nn.Identity()
        self.head = nn.Linear(config.representation_size or D, num_classes) if num_classes else nn.Identity()
        if not self.pos_embed.is_meta:  # a model without memory is about to be filled from a file
            self.initialize()

    def forward_features(self, images: Tensor, queries: int | None = None) -> Tensor:
        """(B, in_chans, H, W) -> (B, T, D), after the final norm; the class token, if there is one, comes first.

        queries: of the T rows only so many, the first ones, are needed: then the last block computes no others.
        """
        expected = (self.config.in_chans, *self.img_size)
        if images.shape[1:] != expected:
            raise ValueError(f"This model takes images (B, {', '.join(map(str, expected))}) and was given "
                             f"{tuple(images.shape)}. Load it with the img_size and in_chans of your images.")
        x = self.patch_embed(images)                                              # (B, h * w, D)
        if self.config.classifier == "token":
            x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # (B, 1 + h * w, D)
        x = self.pos_drop(x + self.pos_embed)
        *blocks, last = self.blocks
        for block in blocks:
            x = self._run(block, x)
        return self.norm(self._run(last, x, queries))                             # (B, T or queries, D)

    def _run(self, block: Block, *inputs) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(self, images: Tensor) -> Tensor:
        token = self.config.classifier == "token"  # the head reads it alone
        x = self.forward_features(images, queries=1 if token else None)
        x = x[:, 0] if token else x.mean(dim=1)                                   # (B, D)
        return self.head(self.pre_logits(x))                                      # (B, C)

    @torch.no_grad()
    def initialize(self) -> None:
        """Google's initial values (flax defaults where `models_vit.py` names none)."""
        if hasattr(self.patch_embed, "backbone"):
            init_stem(self.patch_embed.backbone)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        if self.config.classifier == "token":
            nn.init.zeros_(self.cls_token)
        nn.init.normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            for kernel in block.attn.qkv.weight.chunk(3):  # three D x D kernels, each with its own fan
                nn.init.xavier_uniform_(kernel)
            nn.init.xavier_uniform_(block.attn.proj.weight)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)
            for dense in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(dense.weight)
                nn.init.normal_(dense.bias, std=1e-6)
        if self.config.representation_size:
            lecun_normal_(self.pre_logits.fc.weight)
            nn.init.zeros_(self.pre_logits.fc.bias)
        if self.num_classes:
            nn.init.zeros_(self.head.weight)  # all logits are equal at the start: the first loss is ln(C)
            nn.init.zeros_(self.head.bias)


def grid_size(config: FrozenConfigDict, img_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches for images of `img_size` (H, W). ValueError: not even one patch fits."""
    size = tuple(img_size)
    if config.resnet is not None:
        size = ResNetStem.output_size(size, config.resnet.num_layers)
    grid = (size[0] // config.patch_size[0], size[1] // config.patch_size[1])
    if min(grid) < 1:
        raise ValueError(f"Images of {img_size[0]} x {img_size[1]} pixels are smaller than one patch of "
                         f"{config.name}. Choose a larger --img_size.")
    return grid
