"""LoRA (Hu et al. 2021): instead of a kernel W, train what is added to it, a product of two small matrices.

Every block's `attn.qkv` and `attn.proj` have W + alpha / R B A as their `weight`. So whoever reads the weight gets the
sum: the whole layer, the last block that needs only some rows of it, the attention maps, the file of a run. The merged
model is the same to the bit, as it computes with the same numbers.

The price against (x A') B' beside x W': in each pass the sum is made once (as costly as R tokens) and kept until the
way back, 4 D^2 numbers a block; and on the way to the gradients of A and B lies that of all of W, as in full training.
PyTorch's own parametrizations make a class for each layer, for which torch.compile would write each block anew.
"""

import torch
from torch import Tensor, nn

from models.kernels import Linear, linear
from models.modeling import VisionTransformer


class LowRank(nn.Module):
    """A linear layer whose weight is W + alpha / R B A, (O, I), and which is used like one.

    W may be several kernels of equal shape, one below the other (`parts`): each has an A (R, I) and a B (O / parts, R)
    of its own, as the paper's query, key and value have. A is drawn as in the paper's code, uniform within 1 / sqrt(I)
    (the text says Gaussian); B is zero.
    """

    def __init__(self, kernel: Linear, rank: int, alpha: float, parts: int, generator: torch.Generator):
        super().__init__()
        self.kernel = kernel  # W and the bias
        self.in_features, self.out_features = kernel.in_features, kernel.out_features
        self.scale = alpha / rank
        bound = self.in_features**-0.5
        A = torch.empty(parts, rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(kernel.weight))
        self.B = nn.Parameter(kernel.weight.new_zeros(parts, self.out_features // parts, rank))

    @property
    def weight(self) -> Tensor:
        return self.sum(self.kernel.weight, self.A, self.B)

    @property
    def bias(self) -> Tensor:
        return self.kernel.bias

    def sum(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """(O, I), (parts, R, I), (parts, O / parts, R) -> (O, I). Autocast would round the product to 16 bits, of
        which a merged weight knows nothing."""
        with torch.autocast(W.device.type, enabled=False):
            return W + self.scale * (B @ A).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def add(model: VisionTransformer, rank: int, alpha: float | None = None, *, seed: int = 0) -> None:
    """Freezes the model and adds matrices of this rank to every block's qkv (three pairs) and proj; they alone train.
    It still computes what it did, as B is zero.

    alpha: None: the rank, so that the sum is W + B A. The paper sets it once and does not tune it: it acts like the
    learning rate. seed: what the A are drawn from, on any device the same.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    alpha = rank if alpha is None else alpha
    for block in model.blocks:
        block.attn.qkv = LowRank(block.attn.qkv, rank, alpha, 3, generator)
        block.attn.proj = LowRank(block.attn.proj, rank, alpha, 1, generator)


def parameters(model: VisionTransformer) -> list[nn.Parameter]:
    """All A and B; none, if the model has no LoRA."""
    return [p for layer in _layers(model).values() for p in (layer.A, layer.B)]


@torch.no_grad()
def merge(model: VisionTransformer) -> None:
    """A model with LoRA becomes a plain one that computes the same; its W stay the same parameters, and frozen."""
    for name, layer in _layers(model).items():
        layer.kernel.weight.copy_(layer.weight)
        model.set_submodule(name, layer.kernel)


def merged(model: VisionTransformer, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict that the model, which stays as it is, will have after `merge`; its own without LoRA.

    weights: other values than its present ones, by the names of its `state_dict()`.
    """
    plain = dict(model.state_dict() if weights is None else weights)
    for name, layer in _layers(model).items():
        W, bias, A, B = (plain.pop(f"{name}.{part}") for part in ("kernel.weight", "kernel.bias", "A", "B"))
        plain |= {f"{name}.weight": layer.sum(W, A, B), f"{name}.bias": bias}
    return plain


def _layers(model: VisionTransformer) -> dict[str, LowRank]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
