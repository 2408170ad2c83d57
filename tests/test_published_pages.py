"""Pages about published studies say what their tables say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from published_page import EXPRESSION, TEMPLATE, Page

ROOT = Path(__file__).parents[1]
PAGES = {
    ROOT / "docs/smollm2": ROOT / "docs/smollm2.md",
    ROOT / "docs/micro-world": ROOT / "docs/micro-world/README.md",
}


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_a_page_is_computed_from_its_tables(folder: Path) -> None:
    assert PAGES[folder].read_text(encoding="utf-8") == Page(folder).render()


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_every_sentence_about_results_is_checked(folder: Path) -> None:
    """Between `## Results` and the next heading, sentences and table rows have an expression."""
    text = (folder / TEMPLATE).read_text(encoding="utf-8")
    results = re.search(r"\n## Results\n(.*?)\n## ", text, re.DOTALL)
    assert results
    marked = EXPRESSION.sub("«checked»", results[1])
    bullets = [part.replace("\n", " ") for part in re.split(r"\n(?=\* )|\n\n", marked) if part.startswith("* ")]
    bullets = [re.sub(r"^\* (\*\*.+?\*\* )?", "", bullet) for bullet in bullets]  # without the summary in bold
    sentences = [sentence for bullet in bullets for sentence in re.split(r"(?<=[.»]) (?=[A-Z])", bullet)]
    assert len(sentences) > len(bullets) > 2
    assert [sentence for sentence in sentences if "«" not in sentence] == []


def test_a_changed_table_contradicts_its_page(tmp_path: Path) -> None:
    folder = ROOT / "docs/smollm2"
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert Page(tmp_path).render() == Page(folder).render()
    table = tmp_path / "memorization_smollm2.csv"
    rows = table.read_text().splitlines()
    before = next(i for i, row in enumerate(rows) if row.startswith("source smollm2"))
    noise = next(i for i, row in enumerate(rows) if row.startswith("matched noise"))
    rows[before], rows[noise] = (
        rows[noise].replace("matched noise", "source smollm2"),
        rows[before].replace("source smollm2", "matched noise"),
    )
    table.write_text("\n".join(rows) + "\n")
    with pytest.raises(AssertionError, match="the tables contradict the sentence"):
        Page(tmp_path).render()
