"""The notebook runs from top to bottom as a user would run it, and stays small."""

import json
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "visualize_attention_map.ipynb"
LINE = 'CHECKPOINT, PHOTO = "checkpoint/ViT-demo.npz", load_sample_images().filenames[0]'


def executed(notebook):
    started = time.monotonic()
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return text, pictures, time.monotonic() - started


def test_it_shows_the_demo_checkpoint_and_a_photograph():
    text, pictures, seconds = executed(nbformat.read(NOTEBOOK, as_version=4))
    assert "ViT-demo" in text and text.count(" %  ") == 5 and len(pictures) == 7
    assert sum(map(len, pictures)) < 1_000_000 and seconds < 60


def test_it_shows_a_users_own_run_with_one_line_changed(small_run, image_folder, tmp_path):
    run = small_run("--num_steps", 2, "--warmup_steps", 1)["folder"]
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if LINE in cell.source]
    assert len(cells) == 1
    cells[0].source = cells[0].source.replace(LINE, f"CHECKPOINT, PHOTO = {str(run)!r}, "
                                              f"{str(image_folder / 'test' / 'red' / '0.png')!r}")
    text, pictures, _ = executed(notebook)
    assert "16 x 16 px, 3 classes" in text and len(pictures) == 7
    assert all(f" %  {name}\n" in text for name in ("red", "green", "blue"))


def test_it_has_few_cells_no_functions_and_small_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) <= 15 and NOTEBOOK.stat().st_size < 1_000_000
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(word in text for text in source for word in ("def ", "lambda"))
    assert not any(path in NOTEBOOK.read_text() for path in ("/home/", "/work/", "/root/", "/tmp/"))
    assert all(cell["outputs"] for cell in cells if cell["cell_type"] == "code")
