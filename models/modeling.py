"""The Vision Transformer of Dosovitskiy et al. 2021, computed as Google's `vit_jax/models_vit.py` computes it.

Letters: B batch, T tokens, D width, H heads, C classes, P patch, (h, w) the grid of patches. Parameters have timm's
names. What PyTorch habit would get wrong comes from the config: tanh GELU, norm epsilon 1e-6, zero head.
"""

import torch
from ml_collections import FrozenConfigDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import positions
from models.configs import check
from models.kernels import Linear, attention, linear
from models.modeling_resnet import ResNetStem, init_stem, lecun_normal_, stem


class PatchEmbed(nn.Module):
    """(B, in_chans, H, W) -> (B, h * w, D), row by row: one convolution of stride P, behind the ResNet stem if any.

    Pixels at the bottom and right that fill no patch are dropped, as Google's VALID convolution does. patch_proj
    "linear" is the same function as the paper writes it (equation 1): flattened patches times a matrix.
    """

    def __init__(self, config):
        super().__init__()
        channels = config.in_chans
        if config.resnet is not None:
            self.backbone = stem(config.resnet, channels, config.norm_eps)
            channels = self.backbone.out_channels
        self.proj = nn.Conv2d(channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.linear = config.patch_proj == "linear"

    def forward(self, images: Tensor) -> Tensor:
        if hasattr(self, "backbone"):
            images = self.backbone(images)            # (B, channels, ceil(H / scale), ceil(W / scale))
        if self.linear:
            return linear(self.patches(images), self.proj.weight.flatten(1), self.proj.bias)
        return self.proj(images).flatten(2).mT        # (B, h * w, D)

    def patches(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h * w, C P P'), each patch (of P x P' pixels) in the order of the kernel."""
        (P, Q), (H, W) = self.proj.kernel_size, images.shape[-2:]
        x = images[..., :H // P * P, :W // Q * Q].unflatten(3, (-1, Q)).unflatten(2, (-1, P))  # (B, C, h, P, w, P')
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


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
    """Pre-norm encoder block (`Encoder1DBlock`): (B, T, D) -> (B, T, D), or its first `queries` rows.

    kept: of stochastic depth, a factor (B, 1, 1) for each of the two branches.
    """

    def __init__(self, config, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path  # the rate that the model draws `kept` with
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor, queries: int | None = None, kept: list[Tensor] | None = None) -> Tensor:
        attended = self.drop(self.attn(self.norm1(x), queries))
        x = x[:, :queries] + (attended * kept[0] if kept else attended)
        dense = self.drop(self.mlp(self.norm2(x)))
        return x + (dense * kept[1] if kept else dense)


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
    ValueError: not even one patch fits, or the config has a word or a rate that does not exist.
    """

    def __init__(self, config: FrozenConfigDict, img_size: int | tuple[int, int] = 224, num_classes: int = 1000):
        super().__init__()
        check(config)
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
        # The class token has a row of its own, the first. By formula it is a parameter, too: any tool can then load it.
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, D), requires_grad=config.pos_embed == "learned")
        self.pos_drop = nn.Dropout(config.dropout_rate)
        rates = [config.drop_path_rate * i / max(config.num_layers - 1, 1) for i in range(config.num_layers)]
        self.blocks = nn.Sequential(*(Block(config, rate) for rate in rates))
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

    def _run(self, block: Block, x: Tensor, queries: int | None = None) -> Tensor:
        # Drawn out here, as torch.compile would write each block anew for its rate.
        kept = [survivors(x, block.drop_path) for _ in range(2)] if self.training and block.drop_path else None
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, x, queries, kept, use_reentrant=False)
        return block(x, queries, kept)

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
        if self.config.pos_embed == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)
        else:
            self.pos_embed.copy_(positions.by_formula(self.config, self.grid))
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


def survivors(x: Tensor, rate: float) -> Tensor:
    """(B, 1, 1): 0 with probability `rate`, else 1 / (1 - rate). Stochastic depth (Huang et al. 2016) for each image,
    drawn as `torchvision.ops.stochastic_depth` does in its mode "row"."""
    return x.new_empty(len(x), 1, 1).bernoulli_(1 - rate).div_(1 - rate)


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
