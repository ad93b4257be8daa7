"""A file with a published model's full layout and random values: `python bench/random_checkpoint.py MODEL PATH`.

For trying sizes, load times and memory without Google's weights. It looks like a file of the `imagenet21k` folder:
21,843 classes, pre_logits, 224 px. Its head is random and its accuracy is that of chance.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.configs import get_config, replace
from models.modeling import VisionTransformer
from models.npz import save_npz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a published name, such as ViT-B_16")
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    if args.path.exists():
        raise SystemExit(f"{args.path} exists already: it is not overwritten.")
    try:
        config = get_config(args.model)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    torch.manual_seed(0)
    model = VisionTransformer(replace(config, representation_size=config.hidden_size), 224, 21_843)
    torch.nn.init.normal_(model.head.weight, std=0.01)
    save_npz(model, args.path)
    print(f"{args.path}: {config.name} with random values, {args.path.stat().st_size / 2**20:.1f} MiB.")


if __name__ == "__main__":
    main()
