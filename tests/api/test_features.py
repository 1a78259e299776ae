"""The feature matrix is true of this repository: every yes has its test, and every test that is named exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "node" / "api" / "FEATURES.md"
LINK = re.compile(r'\[([^\]]+)\]\(([^ )]+) "([^"]+)"\)')
COLUMNS = ["", "openlora-node", "LoRAX", "vLLM 0.33", "SGLang 0.5.23", "S-LoRA", "TGI"]
WORDS = ("yes", "partly", "no", "not checked", "does not apply")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables() -> list[list[str]]:
    """The rows of every feature table, without its head."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    heads = [index for index, line in enumerate(lines) if line.startswith("| | openlora-node")]
    rows: list[list[str]] = []
    for index in heads:
        assert cells(lines[index]) == COLUMNS
        for line in lines[index + 2 :]:
            if not line.startswith("|"):
                break
            rows.append(cells(line))
    return rows


ROWS = tables()


def test_page_names_versions_and_dates_of_every_peer():
    text = PAGE.read_text(encoding="utf-8")
    for peer, version, date in (
        ("LoRAX", "a7394ba", "2026-05-28"),
        ("vLLM", "0.33.0", "2026-11-01"),
        ("SGLang", "0.5.23", "2026-10-30"),
        ("S-LoRA", "c1ddf48", "2024-01-03"),
        ("TGI", "db931fc", "2026-01-08"),
    ):
        assert re.search(rf"^\| {peer} \| .*{re.escape(version)}.*\| {date} \|$", text, re.MULTILINE), peer
    assert len(ROWS) > 45
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_row_says_one_word_for_each_server_and_shows_our_yes(row):
    assert len(row) == len(COLUMNS)
    ours = row[1]
    links = LINK.findall(ours)
    assert ours.startswith("no") or (links and links[0][0] in ("yes", "partly")), "a yes without a test"
    assert "yes" not in LINK.sub("", ours)
    assert all(cell.startswith(WORDS) for cell in row[2:])


@pytest.mark.parametrize("row", [row for row in ROWS if LINK.search(row[1])], ids=lambda row: row[0])
def test_linked_test_exists(row):
    for _, path, name in LINK.findall(row[1]):
        file = (PAGE.parent / path).resolve()
        assert file.is_file(), path
        assert re.search(rf"^(async )?def {re.escape(name)}\(", file.read_text(encoding="utf-8"), re.MULTILINE), name
