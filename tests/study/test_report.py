"""The report says what `results.json` says, stands alone, and is the same bytes for the same results."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.report import write_report
from jax_selftrain.report.tables import Column, RowHeader, Table, interval, number
from jax_selftrain.stats.estimators import Estimate

VOID = {"meta", "br", "wbr", "path", "use", "rect", "line"}


class Page(HTMLParser):
    """Text of a page, its links, and whether its elements close properly."""

    def __init__(self, page: str):
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.links: list[str | None] = []
        self.tags: set[str] = set()
        self.ids: list[str | None] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.ids += [values["id"]] if "id" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def results(finished: Path) -> dict[str, Any]:
    return atomic.read_json(finished / "results.json")


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page((finished / "report.html").read_text(encoding="utf-8"))


def rows(finished: Path, name: str) -> list[dict[str, str]]:
    with (finished / "tables" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_page_is_well_formed_and_stands_alone(page: Page, finished: Path) -> None:
    assert page.open == []
    assert all(link is not None and link.startswith("#") for link in page.links)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert "url(http" not in text


def test_ids_are_unique_and_every_reference_has_its_target(page: Page) -> None:
    assert len(set(page.ids)) == len(page.ids)
    assert {str(link).removeprefix("#") for link in page.links} <= set(page.ids)


def test_the_first_screen_answers_in_words(page: Page, results: dict[str, Any]) -> None:
    first = page.text[: page.text.index("Perplexity\n")]
    corpus, training = results["corpus"], results["training"]
    assert f"wrote {corpus['samples']:,} texts from its start token alone" in first
    assert f"{corpus['tokens']:,} tokens in all" in first
    assert f"{training['steps']:,} steps, {training['targets']:,} predicted tokens" in first
    change = results["texts"][0]["nll"]["change"]
    assert f"{number(abs(change['value']), 4)} nats {interval(Estimate(**change), 4, signed=True)}" in first
    macro = results["macro"]["accuracy"]["change"]
    assert f"{interval(Estimate(**macro), 2, scale=100, signed=True)}, n = {results['macro']['n']:,} questions" in first
    flips = results["extraction"]["classes"]["all"]["flips"]
    assert f"{flips['kept']} kept, {flips['lost']} lost, {flips['gained']} gained, {flips['never']} never" in first
    assert "One pair of checkpoints, one seed: exploratory, no verdict." in first


def test_every_number_of_the_tables_stands_in_the_page(page: Page, results: dict[str, Any]) -> None:
    for task in results["tasks"]:
        for side in ("before", "after"):
            assert number(task["accuracy"][side]["value"], 1, scale=100) in page.text
            assert interval(Estimate(**task["accuracy"][side]), 1, scale=100) in page.text
        assert interval(Estimate(**task["accuracy"]["change"]), 1, scale=100, signed=True) in page.text
    for text in results["texts"]:
        for side in ("before", "after"):
            assert number(text["nll"][side]["value"], 4) in page.text
    for part in [*results["extraction"]["classes"].values(), *results["extraction"]["groups"]]:
        if part["n"]:
            assert interval(Estimate(**part["exact_match"]["change"]), 1, scale=100, signed=True) in page.text
            assert interval(Estimate(**part["logprob"]["change"]), 2, signed=True) in page.text


def test_tables_hold_the_unrounded_numbers(finished: Path, results: dict[str, Any]) -> None:
    written = {row["task"]: row for row in rows(finished, "tasks")}
    for task in results["tasks"]:
        row = written[task["name"]]
        assert int(row["n"]) == task["n"]
        for side in ("before", "after", "change"):
            estimate = task["accuracy"][side]
            ends = [float(row[f"accuracy_{side}{end}"]) for end in ("", "_low", "_high")]
            assert ends == [estimate["value"], estimate["low"], estimate["high"]]
    classes = results["extraction"]["classes"].values()
    for row, part in zip(rows(finished, "extraction"), classes, strict=True):
        assert int(row["n"]) == part["n"]
        if part["n"]:
            assert [int(row[kind]) for kind in ("kept", "lost", "gained", "never")] == [
                part["flips"][kind] for kind in ("kept", "lost", "gained", "never")
            ]
    steps = [int(row["step"]) for row in rows(finished, "training")]
    assert steps == results["training"]["curve"]["step"]


def test_the_samples_shown_are_those_of_the_corpus(page: Page, results: dict[str, Any]) -> None:
    for example in results["corpus"]["examples"]:
        assert f"sample {example['sample_id']:,} ·" in page.text
        assert example["text"] in page.text


def test_provenance_and_limits_are_told(page: Page, results: dict[str, Any]) -> None:
    for words in (
        "What this cannot show",
        "jax-selftrain run --config config.yaml --out DIR",
        "learning_rate: 0.01",
        "config.yaml",
    ):
        assert words in page.text
    for mark in ("base", "student", "corpus", "tokenizer", "sequences"):
        assert results["fingerprints"][mark] in page.text
    for mark in results["fingerprints"]["files"].values():
        assert mark in page.text
    assert results["versions"]["training"]["jax"] in page.text


def test_figures_are_files_and_in_the_page(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    figures = sorted(path.stem for path in (finished / "figures").iterdir())
    assert figures == ["discoverable", "extraction", "lengths", "tasks", "training"]
    for path in (finished / "figures").iterdir():
        svg = path.read_text(encoding="utf-8")
        assert svg in text
        assert "<metadata" not in svg
        assert "dc:date" not in svg


def test_reporting_again_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    shutil.copy(finished / "results.json", folder)
    write_report(folder)
    for part in ("report.html", "figures/*.svg", "tables/*.csv"):
        paths = sorted(finished.glob(part))
        assert paths
        for path in paths:
            assert (folder / path.relative_to(finished)).read_bytes() == path.read_bytes()


def test_what_the_source_wrote_cannot_break_the_page(finished: Path, tmp_path: Path) -> None:
    results = atomic.read_json(finished / "results.json")
    results["corpus"]["examples"][0]["text"] = '</p><script>alert("x")</script> & <b>'
    results["title"] = "<i>title</i>"
    atomic.write_json(tmp_path / "results.json", results)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    assert not page.tags & {"script", "b", "i"}
    assert '<script>alert("x")</script> & <b>' in page.text


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(InputError, match="is not a round"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match="is not finished"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(InputError, match="not the results of a round"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "digits", "options", "shown"),
    [
        (0.12345, 3, {}, "0.123"),
        (-0.5, 1, {}, "−0.5"),
        (-0.0001, 2, {}, "0.00"),
        (0.0001, 2, {"signed": True}, "0.00"),
        (0.25, 1, {"scale": 100, "signed": True}, "+25.0"),
        (1234567.0, 0, {}, "1,234,567"),
    ],
)
def test_numbers_are_written_for_the_eye(value: float, digits: int, options: dict[str, Any], shown: str) -> None:
    assert number(value, digits, **options) == shown


def test_a_table_without_interval_says_so() -> None:
    table = Table("t", "T", (Column("a", "A"), Column("p", "p", p_value=True)), ((Estimate(1.0, None, None, 1), 1e-9),))
    assert "no interval from one" in table.to_html()
    assert "&lt; 0.001" in table.to_html()
    assert table.to_csv() == "a,a_low,a_high,p\n1.0,,,1e-09\n"


def test_a_level_among_changes_has_no_plus_sign_and_is_a_number_in_the_csv() -> None:
    column = Column("change", "change", 1, signed=True)
    table = Table("t", "t", (column,), ((RowHeader(12.34),), (1.0,), (Estimate(-2.0, -3.0, -1.0, 5),)))
    html = table.to_html()
    assert "<td>12.3</td>" in html
    assert "<td>+1.0</td>" in html
    assert table.to_csv().splitlines() == ["change,change_low,change_high", "12.34,,", "1.0,,", "-2.0,-3.0,-1.0"]
