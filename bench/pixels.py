"""One model, two preprocessings: `python bench/pixels.py MODEL.safetensors FOLDER`.

Predicts the test images of a folder from our pixels (Google's bilinear resize, not antialiased) and from those that
transformers' own image processor makes for the same model, and tells how often the two agree.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models import exchange, huggingface
from utils import data
from utils.batches import EvalBatches


def our_images(test, model) -> torch.Tensor:
    """(N, 3, H, W) as training and evaluation see them."""
    batches = EvalBatches(test, size=model.img_size, mean=model.config.mean, std=model.config.std, device="cpu",
                          name="test", batch_size=64, workers=0)
    return torch.cat([batches[k][0] for k in range(len(batches))])


def their_images(test, model, classes) -> torch.Tensor:
    """(N, 3, H, W) as a pipeline of transformers sees them."""
    from transformers import AutoImageProcessor
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_folder(model, Path(folder) / "model", {"classes": classes})
        processor = AutoImageProcessor.from_pretrained(Path(folder) / "model")
    return torch.cat([processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
                      for path in test.images])


@torch.no_grad()
def predict(model, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part) for part in images.split(64)]).softmax(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a fine-tuned file of ours")
    parser.add_argument("folder", help="the images it was trained on")
    args = parser.parse_args()
    model, test = exchange.load(args.model).eval(), data.load(args.folder).test
    classes = exchange.read_metadata(args.model)["classes"]
    ours = predict(model, our_images(test, model))
    theirs = predict(model, their_images(test, model, classes))
    print(f"{len(test):,} images at {model.img_size[0]} x {model.img_size[1]} px: {accuracy(ours, test):.2%} from our "
          f"pixels, {accuracy(theirs, test):.2%} from transformers'.\nThe two predict the same class for "
          f"{(ours.argmax(1) == theirs.argmax(1)).double().mean():.1%} of the images; their probabilities differ by "
          f"{(ours - theirs).abs().max():.2f} at most.")


def accuracy(probabilities, test) -> float:
    return (probabilities.argmax(dim=1) == test.labels).double().mean().item()


if __name__ == "__main__":
    main()
