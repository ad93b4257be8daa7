"""Published name -> frozen model configuration. A table, no logic.

Sizes: Dosovitskiy et al. 2021 (arXiv 2010.11929), Table 1, and Google's `vit_jax/configs/models.py`,
which also gives the dropout rates. Everything that decides a number stands here.
"""

from ml_collections import FrozenConfigDict

CHOICES = {"pos_embed": ("learned", "sincos1d", "sincos2d", "none"), "patch_proj": ("conv", "linear")}


def _vit(name, patch, width, mlp, heads, layers, *, dropout=0.0, stem=None, classifier="token"):
    return FrozenConfigDict({
        "name": name,
        "in_chans": 3,                  # of the images; `mean` and `std` have one value a channel
        "patch_size": (patch, patch),   # in pixels; for a hybrid in cells of the stem's output
        "hidden_size": width,
        "mlp_dim": mlp,
        "num_heads": heads,
        "num_layers": layers,
        "classifier": classifier,       # "token", or "gap": mean over the tokens, no class token
        "representation_size": None,    # width of `pre_logits` (Dense, tanh) before the head, or None
        "resnet": stem,                 # hybrids: {"num_layers": units of each stage, "width_factor": root width / 64}
        "pos_embed": "learned",         # or by formula, never trained: "sincos1d", "sincos2d", "none" (all zero)
        "patch_proj": "conv",           # or "linear": the same function and file, computed as one matrix product
        "dropout_rate": dropout,
        "attention_dropout_rate": 0.0,  # zero in everything that Google published
        "drop_path_rate": 0.0,          # stochastic depth of the last block; the first has 0, linear between
        "gelu": "tanh",                 # Google's form; "erf" for weights that other tools trained
        "norm_eps": 1e-6,               # LayerNorm and GroupNorm; PyTorch's default is 1e-5
        "mean": (0.5, 0.5, 0.5),        # what the weights expect: (x / 255 - mean) / std, here [-1, 1]
        "std": (0.5, 0.5, 0.5),
    })


def _stem(*num_layers):
    return {"num_layers": num_layers, "width_factor": 1.0}


CONFIGS = {
    config.name: config
    for config in (
        #                patch width   mlp heads layers
        _vit("ViT-demo",    4,  192,  768,  3,  6),   # ours, for 32 px: `checkpoint/README.md`
        _vit("ViT-CIFAR",   4,  192,  768, 12, 12),   # 32 px, the published small-ViT tutorial's: 12 heads of 16
        _vit("ViT-Ti_16",  16,  192,  768,  3, 12),
        _vit("ViT-S_16",   16,  384, 1536,  6, 12),
        _vit("ViT-S_32",   32,  384, 1536,  6, 12),
        _vit("ViT-B_8",     8,  768, 3072, 12, 12),
        _vit("ViT-B_16",   16,  768, 3072, 12, 12),
        _vit("ViT-B_32",   32,  768, 3072, 12, 12),
        _vit("ViT-L_16",   16, 1024, 4096, 16, 24, dropout=0.1),
        _vit("ViT-L_32",   32, 1024, 4096, 16, 24),
        _vit("ViT-H_14",   14, 1280, 5120, 16, 32, dropout=0.1),
        _vit("ViT-S_16-gap-norep", 16,  384, 1536,  6, 12, classifier="gap"),
        _vit("ViT-S_32-gap-norep", 32,  384, 1536,  6, 12, classifier="gap"),
        _vit("ViT-B_16-gap-norep", 16,  768, 3072, 12, 12, classifier="gap"),
        _vit("ViT-B_32-gap-norep", 32,  768, 3072, 12, 12, classifier="gap"),
        _vit("R+ViT-Ti_16",  8,  192,  768,  3, 12, stem=_stem()),
        _vit("R26+ViT-S_32", 1,  384, 1536,  6, 12, stem=_stem(2, 2, 2, 2)),
        _vit("R26+ViT-B_32", 1,  768, 3072, 12, 12, stem=_stem(2, 2, 2, 2)),
        _vit("R50+ViT-B_16", 1,  768, 3072, 12, 12, stem=_stem(3, 4, 9), dropout=0.1),
        _vit("R50+ViT-L_32", 1, 1024, 4096, 16, 24, stem=_stem(3, 4, 6, 3), dropout=0.1),
    )
}


def get_config(name: str) -> FrozenConfigDict:
    """The configuration of a published name.

    ViT-pytorch's `R50-ViT-B_16` and names with a size (`ViT-B_16-224`) are accepted.
    ValueError: no such name (the known ones are listed).
    """
    stem, dash, size = name.rpartition("-")
    plain = stem if dash and size.isdigit() else name
    plain = plain.replace("-ViT", "+ViT")
    if plain not in CONFIGS:
        raise ValueError(f"There is no model '{name}'. Known: {', '.join(CONFIGS)}.")
    return CONFIGS[plain]


def replace(config: FrozenConfigDict, **changes) -> FrozenConfigDict:
    """A copy of `config` with other values; KeyError for a field that does not exist."""
    unknown = set(changes) - set(config)
    if unknown:
        raise KeyError(f"a model configuration has no field {sorted(unknown)}")
    return FrozenConfigDict({**config.to_dict(), **changes})


def check(config: FrozenConfigDict) -> None:
    """ValueError: a word or a rate that no model has."""
    for field, words in CHOICES.items():
        if config[field] not in words:
            raise ValueError(f"{config.name} has {field} {config[field]!r}: choose {', '.join(words)}.")
    if not 0 <= config.drop_path_rate < 1:
        raise ValueError(f"{config.name} has drop_path_rate {config.drop_path_rate}: give at least 0 and less than 1.")
