"""The report shows the numbers of `results.json` and is deterministic."""

from __future__ import annotations

import copy
import csv
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import load_pages
from report_page import without_costs

from jax_selftrain import cli
from jax_selftrain.config import ReportConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import load_score_result
from jax_selftrain.io import json_files
from jax_selftrain.report import format_effects, write_report
from jax_selftrain.report.chapters import design_chapters
from jax_selftrain.report.figures import assign_styles, clean_label
from jax_selftrain.report.formatting import (
    Chapter,
    Table,
    format_interval,
    format_number,
    make_columns,
    parse_estimate,
)
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.study.costs import collect_costs

VOID = {"meta", "br", "wbr", "path", "use", "rect", "line"}


class Page(HTMLParser):
    """Text, links, ids and tags of a page with closed elements."""

    def __init__(self, page: str):
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.links: list[str | None] = []
        self.tags: set[str] = set()
        self.ids: list[str | None] = []
        self.scripts = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.scripts += tag == "script"
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
def results(finished_run: Path) -> dict[str, Any]:
    return json_files.read_json(finished_run / "results.json")


@pytest.fixture(scope="module")
def page(finished_run: Path) -> Page:
    return Page((finished_run / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cell(results: dict[str, Any]) -> dict[str, Any]:
    (one,) = results["cells"]
    return one


def rows(finished_run: Path, name: str) -> list[dict[str, str]]:
    with (finished_run / "tables" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_page_is_well_formed_and_self_contained(page: Page, finished_run: Path) -> None:
    assert page.open == []
    assert all(link is not None and link.startswith("#") for link in page.links)
    assert not page.tags & {"link", "img", "iframe", "object"}
    assert page.scripts == 1
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert "url(http" not in text


def test_ids_are_unique_and_every_reference_has_its_target(page: Page) -> None:
    assert len(set(page.ids)) == len(page.ids)
    assert {str(link).removeprefix("#") for link in page.links} <= set(page.ids)


def test_the_first_screen_describes_the_run_and_its_main_changes(
    page: Page, results: dict[str, Any], cell: dict[str, Any]
) -> None:
    first = page.text[: page.text.index("Not tested")]
    (corpus,), training = results["corpora"].values(), cell["training"]
    assert f"sampled {corpus['samples']:,} texts from the BOS token alone" in first
    assert f"{corpus['tokens']:,} tokens" in first
    assert f"{training['steps']:,} steps, {training['targets']:,} target tokens" in first
    for name in ("text/stories", "exact_match"):
        change = cell["measures"][name]["change"]
        digits, scale = (4, 1) if name.startswith("text/") else (2, 100)
        assert format_interval(Estimate(**change), digits, scale=scale, signed=True) in first
        assert f"{change['n']:,} items of one pair of checkpoints" in first
    assert "No claims were declared" in first
    assert "1 seed: a verdict needs 5" in first


def test_the_page_shows_every_number_of_the_tables(page: Page, cell: dict[str, Any]) -> None:
    for task in cell["tasks"]:
        for side in ("before", "after"):
            assert format_number(task["accuracy"][side]["value"], 1, scale=100) in page.text
            assert format_interval(Estimate(**task["accuracy"][side]), 1, scale=100) in page.text
        assert format_interval(Estimate(**task["accuracy"]["change"]), 1, scale=100, signed=True) in page.text
    for text in cell["texts"]:
        for side in ("before", "after"):
            assert format_number(text["nll"][side]["value"], 4) in page.text
    for part in [*cell["extraction"]["classes"].values(), *cell["extraction"]["groups"]]:
        if part["n"]:
            assert format_interval(Estimate(**part["exact_match"]["change"]), 1, scale=100, signed=True) in page.text
            assert format_interval(Estimate(**part["logprob"]["change"]), 2, signed=True) in page.text


def test_csv_files_hold_unrounded_numbers(finished_run: Path, cell: dict[str, Any]) -> None:
    written = {row["task"]: row for row in rows(finished_run, "tasks")}
    for task in cell["tasks"]:
        row = written[task["name"]]
        assert int(row["n"]) == task["n"]
        for side in ("before", "after", "change"):
            estimate = task["accuracy"][side]
            ends = [float(row[f"accuracy_{side}{end}"]) for end in ("", "_low", "_high")]
            assert ends == [estimate["value"], estimate["low"], estimate["high"]]
    parts = [*cell["extraction"]["classes"].values(), *cell["extraction"]["groups"]]
    for row, part in zip(rows(finished_run, "extraction"), parts, strict=True):
        assert int(row["n"]) == part["n"]
        if part["n"]:
            flips = [part["flips"][kind] for kind in ("kept", "lost", "gained", "both_wrong")]
            assert [int(row[kind]) for kind in ("kept", "lost", "gained", "neither")] == flips
    assert [int(row["step"]) for row in rows(finished_run, "training")] == cell["training"]["log"]["step"]


def test_the_page_shows_the_samples_of_the_corpus(page: Page, results: dict[str, Any]) -> None:
    (corpus,) = results["corpora"].values()
    for example in corpus["examples"]:
        assert f"sample {example['sample_id']:,} ·" in page.text
        assert example["text"] in page.text


def test_the_page_shows_provenance_and_limits(page: Page, results: dict[str, Any]) -> None:
    assert "What this cannot show" in page.text
    assert "learning_rate: 0.01" in page.text
    for model in results["design"]["models"]:
        assert model["fingerprint"] in page.text
    for stage in results["stages"]:
        assert stage["key"] in page.text
    assert results["versions"]["jax"] in page.text


def test_figures_are_files_and_in_the_page(finished_run: Path) -> None:
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    figures = sorted(path.stem for path in (finished_run / "figures").iterdir())
    assert figures == ["discoverability_llama", "extraction", "tasks", "training"]
    for path in (finished_run / "figures").iterdir():
        svg = path.read_text(encoding="utf-8")
        assert svg in text
        assert "<metadata" not in svg
        assert "dc:date" not in svg


def test_the_same_results_give_the_same_bytes(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    shutil.copy(finished_run / "results.json", folder)
    write_report(folder)
    for part in ("report.html", "figures/*.svg", "tables/*.csv"):
        paths = sorted(finished_run.glob(part))
        assert paths
        for path in paths:
            again = folder / path.relative_to(finished_run)
            assert without_costs(again) == without_costs(path)


def test_sampled_text_is_escaped(results: dict[str, Any], tmp_path: Path) -> None:
    results = copy.deepcopy(results)
    (corpus,) = results["corpora"].values()
    corpus["examples"][0]["text"] = '</p><script>alert("x")</script> & <b>'
    results["title"] = "<i>title</i>"
    json_files.write_json(tmp_path / "results.json", results)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    assert not page.tags & {"b", "i"}
    assert page.scripts == 1
    assert '<script>alert("x")</script> & <b>' in page.text


SCRIPT = "window.executed=1"
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "US$ and C$",
    r"$\frac$",
    "a$b_$c",
    "_hidden",
    "</title><script>alert(1)</script>",
    "x" * 200,
    "tab\there\x1b[31m\x00",
    "日本語 שלום",
]


def write_renamed_report(results: dict[str, Any], folder: Path, name: str) -> Path:
    """Write the report of results in which files and models have names with `name`."""
    (cell,) = results["cells"]
    names = {*(one["name"] for one in (*cell["tasks"], *cell["texts"])), *results["design"]["students"]}
    text = json.dumps(results)
    for old in names:  # longer names may contain it: they change too
        text = text.replace(json.dumps(old)[1:-1], json.dumps(f"{name}{len(old)}")[1:-1])
    folder.mkdir(exist_ok=True)
    json_files.write_json(folder / "results.json", json.loads(text))
    return write_report(folder)


def test_names_are_text_in_a_browser(results: dict[str, Any], tmp_path: Path) -> None:
    """No script of a name runs, nothing is requested, and no width of a screen overflows."""
    scripts = [
        f"<img src=x onerror={SCRIPT}>",
        f"</title></svg><script>{SCRIPT}</script>",
        f'" onmouseover="{SCRIPT}" x="',
    ]
    names = [*HOSTILE, *scripts]
    pages = [write_renamed_report(results, tmp_path / str(i), name) for i, name in enumerate(names)]
    for width in (1400, 400):
        found = load_pages(pages, width)
        assert len(found) == len(names)
        for path, name, page in zip(pages, names, found, strict=True):
            assert page["requests"] == [path.as_uri()]
            assert page["messages"] == []
            assert not page["executed"]
            assert (page["scripts"], page["handlers"], page["brokenLinks"]) == (1, 0, 0)
            assert page["overflow"] == 0, (name, width)
            assert page["figures"]
            assert (
                0 < min(page["figures"]) <= max(page["figures"]) <= max(width, 480)
            )  # on a phone a figure scrolls in its own box


def test_the_explorer_filters_in_a_browser(results: dict[str, Any], finished_run: Path) -> None:
    flips = results["flips"]
    (page,) = load_pages([finished_run / "report.html"], 1400)
    assert page["messages"] == []
    chosen = {name for name, *_ in page["filters"]}
    assert chosen == {name for name in ("task", "change") if len({one[name] for one in flips}) > 1}
    for name, value, shown, said in page["filters"]:
        assert shown == said == sum(value in ("", one[name]) for one in flips)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_in_page_and_figures(results: dict[str, Any], tmp_path: Path, name: str) -> None:
    page = Page(write_renamed_report(results, tmp_path, name).read_text(encoding="utf-8"))
    assert page.open == []
    assert "img" not in page.tags
    assert page.scripts == 1
    shown = re.sub(r"[\x00-\x1f]", "", name)
    assert shown[:20] in re.sub(r"[\x00-\x1f]", "", page.text)
    figures = list((tmp_path / "figures").iterdir())
    assert figures
    for figure in figures:
        ElementTree.parse(figure)  # raises if it is not well-formed
    labels = [element.text for figure in figures for element in ElementTree.parse(figure).iter() if element.text]
    assert any(clean_label(name)[:20].strip() in label for label in labels)


def test_several_treatments_are_compared_in_one_page(results: dict[str, Any], tmp_path: Path) -> None:
    results = copy.deepcopy(results)
    for name in ("cells", "effects"):
        results[name].append({**copy.deepcopy(results[name][0]), "treatment": "weight noise"})
    json_files.write_json(tmp_path / "results.json", results)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    assert "details" in page.tags
    for name in ("damage_llama.svg", "discoverability_llama.svg", "training.svg"):
        assert "weight noise" in (tmp_path / "figures" / name).read_text()
    for name in ("memorization_llama", "log_odds_llama", "texts_llama"):
        assert [row["treatment"] for row in rows(tmp_path, name)] == ["before", "source llama", "weight noise"]
    assert {row["treatment"] for row in rows(tmp_path, "tasks")} == {"source llama", "weight noise"}


@pytest.mark.parametrize("section", ["cells", "effects", "claims", "corpora", "design", "title"])
def test_results_without_a_section_are_refused(results: dict[str, Any], tmp_path: Path, section: str) -> None:
    json_files.write_json(
        tmp_path / "results.json", {name: value for name, value in results.items() if name != section}
    )
    with pytest.raises(InputError, match=f"results.json: '{section}' is missing"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "nothing")
    with pytest.raises(InputError, match="is not the folder of a run or study"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match="is not finished"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(InputError, match="is not of the format 'jax-selftrain results'"):
        write_report(tmp_path)


def test_estimates_are_in_display_units(cell: dict[str, Any]) -> None:
    entry = cell["tasks"][0]["accuracy"]
    for side in ("before", "after", "change"):
        assert parse_estimate(entry[side], "task/").value == 100 * entry[side]["value"]
        assert parse_estimate(entry[side]) == Estimate(**entry[side])


def test_overlap_classes_during_training_are_shown_also_where_cells_have_different_ones(
    results: dict[str, Any],
) -> None:
    changed = copy.deepcopy(results)
    first, second = changed["cells"] = [changed["cells"][0], copy.deepcopy(changed["cells"][0])]
    second["seed"] = first["seed"] + 1
    for cell, parts in ((first, ("held_out", "seen")), (second, ("held_out",))):
        names = ["words/exact_match", *(f"words/exact_match/{part}" for part in parts)]
        measures = [{"name": name, "n": 4, "values": [0.5, 0.25]} for name in names]
        cell["training"]["evaluations"] = {"step": [0, 3], "measures": measures}
    chapter = design_chapters.write_training(changed)
    assert chapter is not None
    svg = chapter.figures[f"class_curves_exact_match_{first['student']}"]
    assert svg.count("held-out: exact match") == svg.count("seen: exact match") == 1
    assert "partial: exact match" not in svg
    (table,) = (table for table in chapter.tables if table.name == "evaluations")
    last = [row["words/exact_match/seen"] for row in csv.DictReader(table.to_csv().splitlines())]
    assert last == ["0.5", "0.25", "", ""]


def test_a_treatment_has_one_color_in_all_figures() -> None:
    treatments = ["source A", "noise", "noise ×3", "real text"]
    alone = assign_styles(treatments, treatments)
    assert len({tuple(style.values()) for style in alone.values()}) == 4
    labels = ["noise ×3", "base", "noise, seed 1, A", "A, source A", "something else"]
    found = assign_styles(labels, treatments)
    assert found["noise ×3"] == alone["noise ×3"]
    assert found["noise, seed 1, A"] == alone["noise"]
    assert found["A, source A"] == alone["source A"]
    assert found["something else"] not in alone.values()
    assert assign_styles(["before"], treatments)["before"] == found["base"]


def test_wide_and_long_tables_are_folded_and_whole_in_the_csv() -> None:
    keys = [f"c{i}" for i in range(25)]
    chapter = Chapter("C")
    chapter.add_table(Table("wide", "Wide", make_columns(*keys), [dict.fromkeys(keys, 1)]))
    chapter.add_table(Table("long", "Long", make_columns("n"), [{"n": i} for i in range(100)]))
    shown, whole, folded = (Page(html) for html in chapter.html)
    assert [html.count("<th ") for html in chapter.html] == [7, 25, 1]
    assert "c6" in shown.text
    assert "c7" not in shown.text
    assert "Wide: all 25 columns" in whole.text
    assert "details" in whole.tags & folded.tags
    assert [len(table.to_csv().splitlines()) for table in chapter.tables] == [2, 101]
    assert chapter.tables[0].to_csv().splitlines()[0] == ",".join(keys)


def test_answers_that_changed_are_shown_with_both_margins(
    results: dict[str, Any], page: Page, finished_run: Path, tmp_path: Path
) -> None:
    """They are those of the stored items of both models."""
    scores = [load_score_result(str(path)) for path in (finished_run / "stages").glob("score-*/score.json")]
    student, base = sorted(scores, key=lambda one: "stages" not in one.result["model"])
    expected = Counter[tuple[str, str, float, float]]()
    for task, kind in (("animals", "log_odds"), ("words", "loglikelihood")):
        before, after = (one.items[task] for one in (base, student))
        for i in np.flatnonzero(before.acc != after.acc):
            way = "lost" if before.acc[i] else "gained"
            expected[task, way, *(float(getattr(one, kind)[i]) for one in (before, after))] += 1
    flips = results["flips"]
    assert Counter((one["task"], one["change"], one["before"], one["after"]) for one in flips) == expected
    assert len(flips) > 3
    assert all(one["context"] in page.text for one in flips)
    json_files.write_json(tmp_path / "results.json", results | {"flips": []})
    assert "Answers that changed" not in Page(write_report(tmp_path).read_text(encoding="utf-8")).text


def test_costs_are_those_of_the_stages(finished_run: Path, page: Page) -> None:
    total, *commands = collect_costs(finished_run)
    files = list((finished_run / "stages").glob("*.seconds.json"))
    assert total["runs"] == len(files) == sum(one["runs"] for one in commands)
    assert total["hours"] == pytest.approx(sum(json_files.read_json(path)["seconds"] for path in files) / 3600)
    (train,) = (one for one in commands if one["stage"] == "train")
    assert train["tokens_per_second"] > 0
    assert "Time of the finished stages" in page.text
    assert "device: cpu" in page.text


def test_no_label_of_a_figure_is_markup(finished_run: Path) -> None:
    """Labels are plain text: matplotlib does not read them as TeX, nor does it write any."""
    for path in (finished_run / "figures").iterdir():
        labels = [element.text for element in ElementTree.parse(path).iter() if element.text and element.text.strip()]
        assert labels
        assert not [label for label in labels if "\\" in label or "mathdefault" in label]


def test_a_command_prints_the_effects_and_the_verdicts(results: dict[str, Any], finished_run: Path) -> None:
    printed = cli.summary("report", ReportConfig(folder=str(finished_run)), None).splitlines()
    assert printed[-1] == f"report: {finished_run / 'report.html'}"
    (effect,) = results["effects"]
    texts = effect["measures"]["text/stories"]
    assert printed[2].startswith(f"{effect['student']}")
    assert format_number(texts["change"]["value"], 4, signed=True) in printed[2]
    many = results | {"effects": [effect] * 43, "claims": [{"name": "a claim", "verdict": "supported"}]}
    lines = format_effects(many).splitlines()
    assert lines[-2:] == ["and 3 more in the report", "supported: a claim"]
    assert len(lines) == 44
