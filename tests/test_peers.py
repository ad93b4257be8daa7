import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORACLE = ROOT / "tests" / "oracle" / "forward" / "cases"
TANH = "timm, tanh GELU"
HUB_TANH = "transformers, tanh GELU, norm epsilon 1e-6"

with_timm = pytest.mark.skipif(not find_spec("timm"), reason="timm is not installed")
with_transformers = pytest.mark.skipif(not find_spec("transformers"), reason="transformers is not installed")


def rows_of(output: str) -> dict:
    """(case, size) -> {column: cell}, from the printed table."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {tuple(row[:2]): dict(zip(head, row)) for row in rows}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle") / "forward" / "cases"
    for case in ("gap", "plain", "plain_rep_not_hidden", "posemb_28_to_48", "hybrid_root"):
        shutil.copytree(ORACLE / case, folder / case)
    done = subprocess.run([sys.executable, ROOT / "bench" / "peers.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ours_is_exact_on_every_size_and_says_googles_zero_edge(output):
    table = rows_of(output)
    assert len(table) == 12
    for (case, size), row in table.items():
        edge = re.fullmatch(r"(\S+) \((\S+) with Google's zero edge\)", row["ours"])
        assert bool(edge) == ((case, size) == ("posemb_28_to_48", "smaller"))
        assert float(edge[2] if edge else row["ours"]) < 5e-6
    assert re.search(r"torch \d.*threads\)\.", output)


@with_timm
def test_timm_needs_the_tanh_gelu_and_resizes_otherwise(output):
    table = rows_of(output)
    for case in ("plain", "gap"):
        assert float(table[case, "native"]["timm"]) > 5e-5
        assert float(table[case, "native"][TANH]) < 5e-6
        assert float(table[case, "nonsquare"][TANH]) > 1e-2
    assert float(table["hybrid_root", "native"][TANH]) > 1e-3


@with_transformers
def test_transformers_needs_two_settings_and_resizes_otherwise(output):
    table = rows_of(output)
    assert float(table["plain", "native"]["transformers"]) > 1e-4
    assert float(table["plain", "native"][HUB_TANH]) < 5e-6
    assert float(table["plain", "nonsquare"][HUB_TANH]) > 1e-2


@with_timm
@with_transformers
def test_what_a_peer_cannot_do_is_said_with_what_it_raised(output):
    table = rows_of(output)
    assert table["hybrid_root", "remainder"]["timm"].startswith("no: AssertionError [")
    assert table["gap", "native"]["transformers"].startswith("no: ValueError [")
    refusals = set(re.findall(r"no: \w+ \[(\d+)\]", output))
    notes = dict(re.findall(r"^\[(\d+)\] (.+)$", output, re.MULTILINE))
    assert refusals == set(notes) and len(notes) == len(set(notes.values()))
    assert any("vit.embeddings.cls_token" in note for note in notes.values())
    assert any("timm: assert self.feature_size" in note for note in notes.values())


def without_peers(*arguments):
    code = ("import runpy, sys; sys.modules['timm'] = sys.modules['transformers'] = None; sys.argv = sys.argv[1:]; "
            "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')")
    command = [sys.executable, "-c", code, str(ROOT / "bench" / "peers.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_peer_that_is_not_installed_is_left_out_and_worst_is_a_row_a_case():
    done = without_peers(ORACLE, "--worst")
    table = rows_of(done.stdout)
    assert done.returncode == 0 and len(table) == len(list(ORACLE.iterdir()))
    assert all(list(row) == ["case", "size", "ours"] for row in table.values())
    assert "timm is not installed, transformers is not installed" in done.stdout
    assert "smaller (" in table["posemb_28_to_48", "worst of 2"]["ours"]


def test_a_folder_with_nothing_to_compare_is_no_success(tmp_path):
    done = without_peers(tmp_path)
    assert done.returncode == 2 and "Nothing to compare" in done.stdout
