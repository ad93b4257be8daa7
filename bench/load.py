"""Time and memory of loading one of Google's files: `python bench/load.py PATH.npz [--vit_pytorch DIR] [--runs 5]`.

For fine-tuning (100 classes, 224 px) and with the file's own head: ours, timm's way and ViT-pytorch's (DIR: a checkout
of jeonsworld/ViT-pytorch; left out without it). Every run is a fresh process, the tools take turns, the file is in the
page cache. Time: from the path to a model on the CPU, imports not counted; "load call" is the part in which a model
that was built before is filled (ours builds and fills in one call). Memory: the highest resident memory (ru_maxrss)
less that after the imports. A file made by `bench/random_checkpoint.py` serves.
"""

import argparse
import importlib.util
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Nothing heavy above: on Linux a process starts with its parent's ru_maxrss.
ROOT = Path(__file__).resolve().parent.parent
TIMM_NAMES = {
    "ViT-Ti_16": "vit_tiny_patch16_224", "ViT-S_16": "vit_small_patch16_224", "ViT-S_32": "vit_small_patch32_224",
    "ViT-B_8": "vit_base_patch8_224", "ViT-B_16": "vit_base_patch16_224", "ViT-B_32": "vit_base_patch32_224",
    "ViT-L_16": "vit_large_patch16_224", "ViT-L_32": "vit_large_patch32_224", "ViT-H_14": "vit_huge_patch14_224",
    "R+ViT-Ti_16": "vit_tiny_r_s16_p8_224", "R26+ViT-S_32": "vit_small_r26_s32_224",
    "R50+ViT-B_16": "vit_base_r50_s16_224", "R50+ViT-L_32": "vit_large_r50_s32_224",
}

VIT_PYTORCH_NAMES = ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50+ViT-B_16")


# --- in a process of its own: imports, then what is measured ----------------------------------------------------------

def tell(path: str) -> dict:
    """What the file is; reads it once, so that it lies in the page cache."""
    sys.path.insert(0, str(ROOT))
    import numpy
    import torch

    from models.npz import identify

    with open(path, "rb") as file:
        while file.read(2**24):
            pass
    start = time.perf_counter()
    what = identify(path)
    return {"identify": time.perf_counter() - start, "name": what.config.name, "classes": what.num_classes,
            "pre_logits": bool(what.config.representation_size), "torch": torch.__version__,
            "numpy": numpy.__version__, "threads": torch.get_num_threads()}


def ours(path, name, classes, kept):
    sys.path.insert(0, str(ROOT))
    from models.npz import load_npz

    start = mark()
    model = load_npz(path, img_size=224, num_classes=None if kept else classes)
    return start, None, model, model.pos_embed


def timm(path, name, classes, kept):
    import timm

    start = mark()
    model = timm.create_model(TIMM_NAMES[name], num_classes=classes)
    built = mark()
    model.load_pretrained(path)
    return start, built, model, model.pos_embed


def vit_pytorch(path, name, classes, kept, checkout):
    sys.path.insert(0, checkout)
    import numpy as np

    from models.modeling import CONFIGS, VisionTransformer

    start = mark()
    model = VisionTransformer(CONFIGS[name.replace("+", "-")], 224, zero_head=not kept, num_classes=classes)
    built = mark()
    model.load_from(np.load(path))
    return start, built, model, model.transformer.embeddings.position_embeddings


TOOLS = {"ours": ours, "timm": timm, "ViT-pytorch": vit_pytorch}


def mark() -> tuple[float, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return time.perf_counter(), peak * (1 if sys.platform == "darwin" else 1024)


def measure(tool: str, *args) -> dict:
    start, built, model, positions = TOOLS[tool](*args)
    end = mark()
    import numpy as np
    with np.load(args[0]) as file:
        stored = file["Transformer/posembed_input/pos_embedding"]
    if stored.shape == positions.shape and not np.array_equal(stored, positions.detach().numpy()):
        raise SystemExit(f"{tool} has not loaded the file.")
    return {"whole": end[0] - start[0], "load call": end[0] - built[0] if built else None, "peak": end[1] - start[1],
            "imports": start[1], "model": sum(p.numel() * p.element_size() for p in model.parameters())}


# --- here -------------------------------------------------------------------------------------------------------------

def child(*args) -> dict:
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(args)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{args}: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_all(tools: dict, path, facts, classes, kept, runs) -> dict[str, list[dict]]:
    """The runs of each tool; they take turns."""
    found = {tool: [] for tool in tools}
    for done in range(runs):
        print(f"run {done + 1} of {runs} ...", end="\r", file=sys.stderr, flush=True)
        for tool, extra in tools.items():
            found[tool].append(child(tool, path, facts["name"], classes, kept, *extra))
    return found


def print_table(found: dict[str, list[dict]]) -> None:
    print("| | whole, s (least to most) | ours : whole | load call, s | ours : load call | peak memory, MiB | "
          "of its model | ours : peak | after imports, MiB |\n|---|---|---|---|---|---|---|---|---|")

    def median(tool, what):
        return statistics.median(run[what] for run in found[tool])

    whole, peak = median("ours", "whole"), median("ours", "peak")
    for tool, runs in found.items():
        times = [run["whole"] for run in runs]
        call = "in the whole | "
        if runs[0]["load call"] is not None:
            call = f"{median(tool, 'load call'):.2f} | {whole / median(tool, 'load call'):.2f}"
        print(f"| {tool} | {median(tool, 'whole'):.2f} ({min(times):.2f} to {max(times):.2f}) | "
              f"{whole / median(tool, 'whole'):.2f} | {call} | {median(tool, 'peak') / 2**20:.0f} | "
              f"{median(tool, 'peak') / runs[0]['model']:.2f} x {runs[0]['model'] / 2**20:.0f} MiB | "
              f"{peak / median(tool, 'peak'):.2f} | {median(tool, 'imports') / 2**20:.0f} |")


def processor() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", help="one of Google's .npz files")
    parser.add_argument("--vit_pytorch", metavar="DIR", help="a checkout of jeonsworld/ViT-pytorch")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--heads", nargs="+", choices=("new", "own"), default=("new", "own"))
    args = parser.parse_args()
    if not Path(args.path).is_file():
        raise SystemExit(f"error: there is no file {args.path}.")
    facts, tools = child("tell", args.path), {"ours": ()}
    timm_version = None
    if importlib.util.find_spec("timm") and facts["name"] in TIMM_NAMES:
        from importlib.metadata import version
        tools["timm"], timm_version = (), version("timm")
    if args.vit_pytorch and facts["name"] in VIT_PYTORCH_NAMES:
        tools["ViT-pytorch"] = (args.vit_pytorch,)
    for tool in [tool for tool in TOOLS if tool not in tools]:
        print(f"{tool} is left out: not installed, no checkout given or no model like {facts['name']}.")
    for head in args.heads:
        classes = 100 if head == "new" else facts["classes"]
        print(f"\n{facts['name']} at 224 px, {'a new' if head == 'new' else 'its own'} head of {classes} classes\n")
        print_table(run_all(tools, args.path, facts, classes, head == "own", args.runs))
    if "own" in args.heads and facts["pre_logits"] and len(tools) > 1:
        print("\nWith its own head ours also keeps the file's pre_logits, which the others have no place for.")
    print(f"\n`identify` took {1000 * facts['identify']:.1f} ms (once, a fresh process).")
    print(f"Medians of {args.runs}. torch {facts['torch']}, numpy {facts['numpy']}"
          f"{f', timm {timm_version}' if timm_version else ''}. {processor()}, {facts['threads']} threads.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        called, *arguments = json.loads(sys.argv[2])
        print(json.dumps(tell(*arguments) if called == "tell" else measure(called, *arguments)))
    else:
        main()
