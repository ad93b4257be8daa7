"""Folders of JPEGs to measure with: `python bench/pictures.py DIR --pixels 32 --train 1280 --test 2000`.

Random crops of scikit-learn's two sample photographs, so that nothing is fetched: DIR/train/CLASS/*.jpg and
DIR/test/CLASS/*.jpg. --pixels 32 gives squares of 32; 500 gives about 500 x 375, no two quite the same.
"""

import argparse
import os
from pathlib import Path

CLASSES = 10


def make(folder: Path, pixels: int, train: int, test: int, seed: int = 0) -> None:
    """Writes the files, about 3,000 small ones a second."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng, photographs = np.random.default_rng(seed), load_sample_images().images  # 427 x 640
    for part, count in (("train", train), ("test", test)):
        for label in range(CLASSES):
            (folder / part / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            photograph = photographs[rng.integers(len(photographs))]
            if pixels > 100:
                height, width = int(rng.integers(340, 411)), int(rng.integers(450, 551))
            else:
                height = width = int(rng.integers(pixels, 257))
            top, left = (int(rng.integers(full - cut + 1)) for full, cut in zip(photograph.shape, (height, width)))
            image = Image.fromarray(photograph[top:top + height, left:left + width])
            image = image if pixels > 100 else image.resize((pixels, pixels), Image.Resampling.BILINEAR)
            image.save(folder / part / f"class{i % CLASSES}" / f"{i:05d}.jpg", quality=90)


def part_of(folder: str, part: str) -> Path:
    """Where the images of train or test lie: in a folder of that name, or val for test, or all together."""
    names = ("train", "training") if part == "train" else ("test", "testing", "val", "valid", "validation")
    there = {entry.name.lower(): Path(entry) for entry in os.scandir(folder) if entry.is_dir()}
    return next((there[name] for name in names if name in there), Path(folder))


def spread(count: int, there: int) -> list[int]:
    """So many positions, evenly over `there` images sorted by class; some twice where there are fewer."""
    return [i * there // count if count <= there else i % there for i in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    for name, value in (("pixels", 32), ("train", 1000), ("test", 1000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    make(given.folder, given.pixels, given.train, given.test)
