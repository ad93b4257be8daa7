"""Ours beside theirs: the same rows as Markdown, CSV and a page, whatever the names are."""

import csv

from tests.pages import Page
from utils.comparison import NAMES, Row, html, markdown, summary, write

ODD = "a|b <script>alert(1)</script> & `c` *d*\n\\"
ROWS = [
    Row("paper", "ViT-B_16", "imagenet21k", "cifar10", 384, 10_000, 0.03, 98.934, 0.0451, 3, 98.95, -0.016, 0.188,
        "pass", "arXiv 2010.11929, Table 5", 133.2, "1 x H200"),
    Row("paper", "ViT-B_16", "imagenet21k", "cifar100", 224, 500, 0.01, 77.0, None, 1, 91.67, -14.67, 0.856, "fail",
        "arXiv 2010.11929, Table 5", 0.5, note="too low", causes=("The run was at 224 px.", "Which file?")),
    Row("ViT-pytorch", "ViT-B_16", "imagenet21k", "cifar10", 224, 10_000, 0.03, 99.0, 0.1, 2, 99.08, -0.08, 0.201,
        "pass", "ViT-pytorch README", 59.6, best_on_test=True),
    Row("mini", ODD, ODD, ODD, note=ODD, source=ODD, hardware=ODD, word="failed", causes=(ODD,)),
]


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_rows_of_the_markdown_table_align_and_missing_numbers_are_dashes():
    lines = lines_of(markdown(ROWS))
    assert len(lines) == 2 + len(ROWS) and len({len(line) for line in lines}) == 1
    bars = [[i for i, mark in enumerate(line) if mark == "|" and line[i - 1] != "\\"] for line in lines]
    assert all(found == bars[0] for found in bars)
    first, odd = ([cell.strip(" |") for cell in line.split(" | ")] for line in (lines[2], lines[-1]))
    assert first[4:] == ["384", "10,000", "0.03", "98.93 ± 0.05", "3", "98.95", "-0.02", "0.19", "pass", "2 h 13 min",
                         "1 x H200"]
    assert odd[4:14] == ["-", "-", "-", "-", "0", "-", "-", "-", "failed", "-"]
    assert "99.08 (best on test)" in lines[4] and lines[1].split("|")[8].strip().endswith("-:")


def test_markdown_says_why_a_cell_failed_and_names_each_source_once():
    text = markdown(ROWS)
    assert "**paper: ViT-B_16 from imagenet21k, cifar100, 224 px** (fail): too low\n1. The run was at 224 px." in text
    assert text.count("- arXiv 2010.11929, Table 5") == 1 and "4 cells: 1 fail, 1 failed, 2 pass." in text
    assert "<script" not in text


def test_the_csv_reads_back_with_its_numbers_in_full(tmp_path):
    write(ROWS, tmp_path)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(ROWS)
    assert float(found[0]["ours"]) == 98.934 and float(found[0]["minutes"]) == 133.2 and found[1]["spread"] == ""
    assert found[1]["causes"] == "The run was at 224 px.; Which file?" and found[3]["model"] == ODD
    assert [row["best_on_test"] for row in found] == ["False", "False", "True", "False"]


def test_the_page_escapes_names_asks_for_nothing_and_shows_each_protocol_by_itself():
    page = Page(html(ROWS, "A & B", about=[("paper", "384 px <all>")]).decode())
    assert page.title == "A & B" and page.asks() == []
    assert not any(name == "script" for name, _ in page.elements) and "<script>alert(1)</script>" in page.text
    assert [len(table) - 1 for table in page.tables] == [2, 1, 1] and "384 px <all>" in page.text
    assert page.tables[0][1][:6] == ["ViT-B_16cifar10 from imagenet21k", "pass", "98.93 ± 0.05n = 3", "98.95", "-0.02",
                                     "0.19"]
    assert page.tables[1][1][3] == "99.08best on test" and page.tables[2][1][3] == "-"
    assert [found.get("class") for name, found in page.elements if name == "tr"].count("changed") == 1
    assert "The run was at 224 px." in page.text


def test_three_files_are_written_whole_and_written_anew(tmp_path):
    folder = tmp_path / "new" / "folder"
    write([], folder)
    assert write(ROWS, folder) == [folder / name for name in NAMES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    assert (folder / "table.md").read_text(encoding="utf-8") == markdown(ROWS)
    assert (folder / "table.html").read_bytes() == html(ROWS)


def test_a_table_of_nothing_and_of_one_is_a_sentence():
    assert summary([]) == "0 cells" and summary(ROWS[:1]) == "1 cell: 1 pass" and "Sources" not in markdown([])


def test_a_name_that_is_no_text_is_written(tmp_path):
    write([Row("mini", "\udcff", "none", "birds")], tmp_path)
    assert b"\xff" in (tmp_path / "table.md").read_bytes()
