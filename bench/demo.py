"""`make demo`: the demo checkpoint fine-tuned on real images, beside the same model trained from scratch as long."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

ROOT = Path(train.__file__).parent
STEPS = ["--dataset", "digits", "--model_type", "ViT-demo", "--num_steps", "550", "--warmup_steps", "55",
         "--train_batch_size", "32", "--learning_rate", "0.06", "--val_fraction", "0.1", "--eval_every", "150",
         "--eval_batch_size", "256", "--output_dir", str(ROOT / "output"), "--overwrite"]


def main() -> None:
    print("1 of 2: fine-tuning checkpoint/ViT-demo.npz on scikit-learn's handwritten digits\n", flush=True)
    tuned = train.main([*STEPS, "--pretrained_dir", str(ROOT / "checkpoint" / "ViT-demo.npz"), "--name", "demo"])
    print("\n2 of 2: the same from scratch\n", flush=True)
    scratch = train.main([*STEPS, "--pretrained_dir", "none", "--name", "demo-scratch"])
    print("\ntest accuracy on digits, after the same 550 steps of 32 images")
    for name, result in (("pretrained", tuned), ("from scratch", scratch)):
        print(f"  {name:<14}{result['last'].accuracy:7.2%}   {result['folder']}")
    print("\nYour own images:  .venv/bin/python train.py --dataset FOLDER --pretrained_dir checkpoint/ViT-demo.npz")


if __name__ == "__main__":
    main()
