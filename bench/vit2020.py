"""A Vision Transformer as one wrote it in 2020: three projections, softmax attention spelled out, dropout 0.1.

It computes what ours computes with erf GELU (`tests/test_compare.py` copies the weights and compares the logits).
Letters as in `models/modeling.py`.
"""

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """(B, T, D) -> (B, T, D); the T x T table of probabilities is kept, as one liked to look at it."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.drop_weights, self.drop_out = nn.Dropout(dropout), nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)              # (B, H, T, D / H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5           # (B, H, T, T)
        weights = self.drop_weights(torch.softmax(scores, dim=-1))
        mixed = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()            # (B, T, H, D / H)
        return self.drop_out(self.out(mixed.flatten(2)))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.attention = SelfAttention(width, heads, dropout)
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.wide, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act, self.drop = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.drop(self.narrow(self.drop(self.act(self.wide(self.mlp_norm(x))))))


class ViT2020(nn.Module):
    """Images (B, 3, S, S) -> logits (B, C), with the sizes of `config` (`models.configs`); no hybrid."""

    def __init__(self, config, size: int, classes: int, dropout: float = 0.1):
        super().__init__()
        if config.resnet is not None or config.classifier != "token":
            raise NotImplementedError(f"no {config.name} here")
        width, (patch, _) = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, config.mlp_dim, config.num_heads, dropout)
                                    for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)                          # (B, h * w, D)
        x = self.drop(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Our model's weights under the names used here."""
    theirs = {"token": model.cls_token, "positions": model.pos_embed}

    def put(name: str, module: nn.Module) -> None:
        theirs[f"{name}.weight"], theirs[f"{name}.bias"] = module.weight, module.bias
    for name, module in (("patches", model.patch_embed.proj), ("norm", model.norm), ("head", model.head)):
        put(name, module)
    for i, block in enumerate(model.blocks):
        for part, weight, bias in zip(("query", "key", "value"), block.attn.qkv.weight.chunk(3),
                                      block.attn.qkv.bias.chunk(3)):
            theirs[f"layers.{i}.attention.{part}.weight"], theirs[f"layers.{i}.attention.{part}.bias"] = weight, bias
        for name, module in (("attention.out", block.attn.proj), ("attention_norm", block.norm1),
                             ("mlp_norm", block.norm2), ("wide", block.mlp.fc1), ("narrow", block.mlp.fc2)):
            put(f"layers.{i}.{name}", module)
    return theirs
