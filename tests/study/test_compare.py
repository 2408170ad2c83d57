"""`compare` against numbers computed by hand and simulated truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_jsonl
from models_factory import tiny_texts, write_tiny_hf_model
from scipy import stats

from jax_selftrain import cli
from jax_selftrain.config import CompareConfig, ScoreConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals import score
from jax_selftrain.evals.item_results import ITEMS, dev_test_split, item_hash
from jax_selftrain.evals.result_files import output_paths
from jax_selftrain.io import json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.rng import make_rng
from jax_selftrain.report import format_comparison
from jax_selftrain.stats import estimators
from jax_selftrain.stats.noninferiority import holm
from jax_selftrain.study import compare

Fabricate = Callable[..., str]


@pytest.fixture
def fabricate(tmp_path: Path) -> Fabricate:
    """`fabricate(name, task=right, …)`: files as `score` writes them."""

    def make(
        name: str,
        *,
        text: np.ndarray | None = None,
        tokens: int = 4,
        clusters: dict[str, list[str]] | None = None,
        **tasks: np.ndarray,
    ) -> str:
        rows: list[tuple[Any, ...]] = []
        for task, right in tasks.items():
            labels = (clusters or {}).get(task, [None] * len(right))
            for doc, (yes, label) in enumerate(zip(right.tolist(), labels, strict=True)):
                odds = 1.0 if yes else -1.0
                item = item_hash(f"{task} {doc}", [" a", " b"])
                rows.append((task, doc, item, label, 2, yes, yes, odds - 5, odds, 1, 2))
        for doc, nats in enumerate([] if text is None else text.tolist()):
            rows.append(("text", doc, item_hash("", [str(doc)]), None, 0, None, None, -nats, None, tokens, 10))
        table = pa.Table.from_arrays(
            [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), ITEMS, strict=True)], schema=ITEMS
        )
        path = tmp_path / f"{name}.json"
        pq.write_table(table, output_paths(str(path), "items.parquet")[1])
        files = {task: hash_json(task) for task in [*tasks, *(["text"] if text is not None else [])]}
        result = {
            "model": name,
            "tasks": {task: {"n": len(right)} for task, right in tasks.items()},
            "texts": {} if text is None else {"text": {"n": len(text)}},
            "fingerprints": {
                "model": hash_json(name),
                "tokenizer": hash_json(tokens),
                "items": hash_json(table.to_pydict()),
                "files": files,
            },
            "versions": {},
        }
        json_files.write_json(path, result)
        return str(path)

    return make


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def call(base: Any, student: Any, **changes: Any) -> dict[str, Any]:
        base, student = ((files,) if isinstance(files, str) else tuple(files) for files in (base, student))
        options: dict[str, Any] = {"out": str(tmp_path / "out.json"), "resamples": 200} | changes
        return compare(CompareConfig(base=base, student=student, **options))

    return call


def answers(n: int, right: int, lost: int = 0, gained: int = 0) -> np.ndarray:
    """Return correct answers [n]: the first `right`, minus `lost`, plus `gained`."""
    yes = np.arange(n) < right
    yes[:lost], yes[right : right + gained] = False, True
    return yes


# ------------------------------------------------------------------ real models


@pytest.fixture(scope="module")
def score_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scores of two models on tasks and texts."""
    folder = tmp_path_factory.mktemp("scored")
    stories = list(tiny_texts(40, seed=5))
    tasks = (
        write_jsonl(
            folder / "choices.jsonl",
            [{"context": s[:40], "choices": [s[40:50], " red lamp"], "answer": 0} for s in stories],
        ),
        write_jsonl(folder / "words.jsonl", [{"context": s[:30], "continuation": s[30:40]} for s in stories]),
    )
    texts = (write_jsonl(folder / "stories.jsonl", [{"text": s} for s in stories[:12]]),)
    for seed, name in enumerate(("base", "student")):
        model = str(write_tiny_hf_model(folder / f"model-{name}", "llama", seed=seed))
        options = {"tasks": tasks, "texts": texts, "out": str(folder / f"{name}.json")}
        score(ScoreConfig(model, **options, batch_tokens=2048, mesh="data=1"))
    return folder


def test_two_models_by_hand(score_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "compared.json"
    words = ["compare", score_folder / "base.json", score_folder / "student.json", "--out", out, "--resamples", 500]
    assert cli.main([str(word) for word in words]) == 0
    shown = capsys.readouterr().out
    result = json_files.read_json(out)
    (pair,) = result["pairs"]
    choices, word = pair["tasks"]
    (stories,) = pair["texts"]

    rows = [pq.read_table(score_folder / f"{who}.requests.parquet").to_pylist() for who in ("base", "student")]
    scores = [np.array([r["loglikelihood"] for r in side if r["task"] == "choices"]).reshape(40, 2) for side in rows]
    right = [side[:, 0] >= side[:, 1] for side in scores]
    assert 0 < right[0].sum() < 40
    assert (right[0] != right[1]).any()
    for key, side in zip(("before", "after"), right, strict=True):
        assert choices["accuracy"][key]["value"] == pytest.approx(side.mean())
    lost, gained = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    assert (choices["flips"]["lost"], choices["flips"]["gained"]) == (lost, gained)
    assert choices["p"] == pytest.approx(stats.binomtest(lost, lost + gained).pvalue)
    b, c = (lost + 1) / 42, (gained + 1) / 42
    half = stats.norm.ppf(0.975) * np.sqrt((b + c - (c - b) ** 2) / 42)
    assert choices["accuracy"]["change"]["low"] == pytest.approx(c - b - half)
    assert choices["accuracy"]["change"]["value"] == pytest.approx((gained - lost) / 40)
    odds = scores[1][:, 0] - scores[1][:, 1] - (scores[0][:, 0] - scores[0][:, 1])
    assert choices["log_odds"]["change"]["value"] == pytest.approx(odds.mean())
    interval = stats.bootstrap((odds,), np.mean, n_resamples=500, rng=make_rng("bootstrap", 0)).confidence_interval
    assert choices["log_odds"]["change"]["low"] == pytest.approx(interval.low)

    nats = [-np.array([r["loglikelihood"] for r in side if r["task"] == "words"]) for side in rows]
    assert word["perplexity"]["before"] == pytest.approx(np.exp(nats[0].mean()))
    assert word["perplexity"]["ratio"]["value"] == pytest.approx(np.exp((nats[1] - nats[0]).mean()))
    assert (
        word["perplexity"]["ratio"]["low"] < word["perplexity"]["ratio"]["value"] < word["perplexity"]["ratio"]["high"]
    )

    measured = [json_files.read_json(score_folder / f"{who}.json")["texts"]["stories"] for who in ("base", "student")]
    assert stories["nll"]["before"]["value"] == pytest.approx(measured[0]["nll"])
    change = measured[1]["bits_per_byte"] - measured[0]["bits_per_byte"]
    assert stories["bits_per_byte"]["change"]["value"] == pytest.approx(change)
    assert stories["perplexity"]["ratio"]["value"] == pytest.approx(
        measured[1]["perplexity"] / measured[0]["perplexity"]
    )
    assert result["declaration"] | {"fingerprint": ""} == {
        "margin_macro": 0.01,
        "margin_task": 0.02,
        "primary": [],
        "split": "all",
        "post_hoc": False,
        "fingerprint": "",
    }
    for word in ("choices", "words", "stories", "one pair of checkpoints", f"written: {out}"):
        assert word in shown
    assert f"{100 * right[0].mean():.1f} %" in shown


def test_a_model_against_itself_has_zero_difference_and_is_preserved(score_folder: Path, run: Any) -> None:
    result = run(str(score_folder / "base.json"), str(score_folder / "base.json"))
    changes: list[dict[str, Any]] = []

    def gather(node: Any) -> None:
        if isinstance(node, dict):
            changes.extend(node[key] for key in ("change", "bootstrap") if key in node)
            for child in node.values():
                gather(child)
        elif isinstance(node, list):
            for child in node:
                gather(child)

    gather(result)
    assert len(changes) >= 6
    assert {change["value"] for change in changes} == {0.0}
    (pair,) = result["pairs"]
    assert pair["identical"]
    for task in pair["tasks"]:
        assert task["accuracy"]["change"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 40}
        assert (task["p"], task["non_inferiority"]["verdict"]) == (1.0, "preserved")
    assert pair["texts"][0]["perplexity"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 12}


def test_the_same_comparison_gives_the_same_bytes(score_folder: Path, run: Any, tmp_path: Path) -> None:
    def once() -> bytes:
        run(str(score_folder / "base.json"), str(score_folder / "student.json"))
        return (tmp_path / "out.json").read_bytes()

    assert once() == once()


# ------------------------------------------------------------------ results whose truth is known


def test_a_task_that_the_base_cannot_do_is_not_preserved(fabricate: Fabricate, run: Any) -> None:
    base = fabricate("base", guessed=answers(2000, 1010), known=answers(2000, 1400))
    students = [
        fabricate(f"student{i}", guessed=answers(2000, 1010, i, 5), known=answers(2000, 1400, 5, i)) for i in range(5)
    ]
    result = run(base, students)
    for pair in result["pairs"]:
        verdicts = {task["name"]: task["non_inferiority"]["verdict_adjusted"] for task in pair["tasks"]}
        assert verdicts == {"guessed": "not eligible", "known": "preserved"}
    assert {task["name"]: task["verdict"] for task in result["recipe"]["tasks"]} == verdicts
    rows = [line.split() for line in format_comparison(result).splitlines() if line.startswith("guessed ")]
    assert rows
    assert {tuple(row[-2:]) for row in rows} == {("not", "eligible")}


def test_tasks_without_results_by_item_are_named(fabricate: Fabricate, run: Any) -> None:
    files = [fabricate(name, known=answers(200, 140)) for name in ("base", "student")]
    for file in files:
        result = json_files.read_json(file)
        result["tasks"]["several_answers"] = {"n": 4, "acc": 0.5}
        result["fingerprints"]["files"]["several_answers"] = hash_json("several_answers")
        json_files.write_json(file, result)
    compared = run(*files)
    assert "no single right answer" in compared["not_compared"]["several_answers"]
    assert "not compared: several_answers" in format_comparison(compared)
    with pytest.raises(InputError, match="--primary-tasks several_answers: cannot be compared"):
        run(*files, primary_tasks=("several_answers",))


def test_a_perplexity_beyond_float64_is_none(fabricate: Fabricate, run: Any) -> None:
    files = [fabricate(name, text=np.array([nats, nats + 1]), tokens=1) for name, nats in (("a", 1000), ("b", 3000))]
    (text,) = run(*files)["pairs"][0]["texts"]
    assert text["perplexity"] == {
        "before": None,
        "after": None,
        "ratio": {"value": None, "low": None, "high": None, "n": 2},
    }
    assert text["nll"]["after"]["value"] == 3000.5


def test_the_three_verdicts_and_the_macro_average(fabricate: Fabricate, run: Any) -> None:
    base = fabricate(
        "base",
        kept=answers(2000, 1400),
        broken=answers(2000, 1400),
        few=answers(100, 80),
        guessed=answers(2000, 1010),
        solved=answers(2000, 1950),
    )
    student = fabricate(
        "student",
        kept=answers(2000, 1400, 20, 10),
        broken=answers(2000, 1400, 120, 10),
        few=answers(100, 80, 2, 2),
        guessed=answers(2000, 1010, 500, 0),
        solved=answers(2000, 1950, 500, 0),
    )
    pair = run(base, student)["pairs"][0]
    tasks = {task["name"]: task for task in pair["tasks"]}
    verdicts = {name: tasks[name]["non_inferiority"]["verdict"] for name in ("kept", "broken", "few")}
    assert verdicts == {"kept": "preserved", "broken": "degraded", "few": "cannot tell"}
    assert "above chance" in tasks["guessed"]["not_eligible"]
    assert "95 %" in tasks["solved"]["not_eligible"]
    macro = pair["macro"]
    assert macro["tasks"] == ["kept", "broken", "few"]  # of the base alone: what the student lost does not matter
    assert macro["before"] == pytest.approx((0.4 + 0.4 + 0.6) / 3)
    assert macro["change"]["value"] == pytest.approx(2 * (-10 / 2000 - 110 / 2000 + 0) / 3)
    parts = [
        estimators.paired_proportion_effect(answers(n, r), answers(n, r, b, c))
        for n, r, b, c in [(2000, 1400, 20, 10), (2000, 1400, 120, 10), (100, 80, 2, 2)]
    ]
    error = 2 * np.sqrt(sum(part.stderr**2 for part in parts)) / 3
    assert macro["non_inferiority"]["lower"] == pytest.approx(
        2 * np.mean([part.adjusted_value for part in parts]) - stats.norm.ppf(0.95) * error
    )
    assert macro["non_inferiority"]["verdict"] == "degraded"


def test_margins_are_points(fabricate: Fabricate, run: Any) -> None:
    base, student = fabricate("base", t=answers(2000, 1400)), fabricate("student", t=answers(2000, 1400, 60, 20))
    strict = run(base, student)["pairs"][0]
    lenient = run(base, student, margin_task=4, margin_macro=7)["pairs"][0]
    for part in (strict, lenient):
        rule, macro = part["tasks"][0]["non_inferiority"], part["macro"]["non_inferiority"]
        assert [2 * rule[end] for end in ("lower", "upper")] == pytest.approx(
            [macro[end] for end in ("lower", "upper")]
        )
    assert strict["tasks"][0]["non_inferiority"]["verdict"] == "cannot tell"
    assert strict["macro"]["non_inferiority"]["verdict"] == "degraded"
    assert (
        lenient["tasks"][0]["non_inferiority"]["verdict"]
        == lenient["macro"]["non_inferiority"]["verdict"]
        == "preserved"
    )


def test_primary_tasks_are_corrected_separately_by_holm(fabricate: Fabricate, run: Any) -> None:
    flips = {"a": (20, 40), "b": (10, 24), "c": (5, 6), "d": (1, 9), "e": (30, 29)}
    base = fabricate("base", **{name: answers(900, 600) for name in flips})
    student = fabricate("student", **{name: answers(900, 600, *moved) for name, moved in flips.items()})
    tasks = run(base, student, primary_tasks=("b", "d"))["pairs"][0]["tasks"]
    p = {name: stats.binomtest(lost, lost + gained).pvalue for name, (lost, gained) in flips.items()}
    found = {task["name"]: task for task in tasks}
    assert {name for name, task in found.items() if task["role"] == "primary"} == {"b", "d"}
    assert [found[name]["p_adjusted"] for name in "bd"] == pytest.approx(holm([p["b"], p["d"]]))
    assert [found[name]["p_adjusted"] for name in "ace"] == pytest.approx(
        stats.false_discovery_control([p[n] for n in "ace"])
    )
    for task in tasks:
        assert task["p"] == pytest.approx(p[task["name"]])


def test_a_verdict_that_fails_after_correction_is_marked(fabricate: Fabricate, run: Any) -> None:
    names = ["a", "b", "c", "d"]
    base = fabricate("base", **{name: answers(500, 350) for name in names})
    student = fabricate("student", a=answers(500, 350, 7, 4), **{name: answers(500, 350, 14, 5) for name in names[1:]})
    result = run(base, student, primary_tasks=tuple(names))
    rule = result["pairs"][0]["tasks"][0]["non_inferiority"]
    assert (rule["verdict"], rule["verdict_adjusted"]) == ("preserved", "cannot tell")
    assert rule["p_preserved_adjusted"] == pytest.approx(4 * rule["p_preserved"])
    assert "preserved (cannot tell after correction)" in format_comparison(result)


def test_the_split_is_by_content(fabricate: Fabricate, run: Any) -> None:
    base, student = fabricate("base", t=answers(600, 400)), fabricate("student", t=answers(600, 400, 30, 10))
    members = np.array([dev_test_split(item_hash(f"t {doc}", [" a", " b"])) for doc in range(600)])
    counts = {}
    for half in ("dev", "test"):
        task = run(base, student, split=half, out=str(Path(base).with_name(f"{half}.json")))["pairs"][0]["tasks"][0]
        inside = members == half
        assert task["n"] == inside.sum()
        assert task["flips"]["lost"] == inside[:30].sum()
        counts[half] = task["n"]
    assert counts["dev"] < counts["test"]
    assert sum(counts.values()) == 600


def test_clusters_widen_intervals(fabricate: Fabricate, run: Any) -> None:
    labels = {"t": [f"entity {i // 20}" for i in range(2000)]}
    base, student = answers(2000, 1400), answers(2000, 1400, 40, 0)  # two whole entities lost
    one = run(fabricate("base", t=base), fabricate("student", t=student))["pairs"][0]["tasks"][0]
    alike = run(fabricate("base", t=base, clusters=labels), fabricate("student", t=student, clusters=labels))
    task = alike["pairs"][0]["tasks"][0]
    assert (one["clusters"], task["clusters"]) == (None, 100)
    assert one["p"] < 1e-9
    assert task["p"] == pytest.approx(0.5)  # two clusters: of four sign vectors, two are as extreme
    assert one["non_inferiority"]["lower"] - 0.01 > task["non_inferiority"]["lower"]
    assert task["log_odds"]["change"]["n"] == 100


def test_other_tokenizers_are_compared_per_byte(fabricate: Fabricate, run: Any) -> None:
    nats = np.random.default_rng(0).gamma(5.0, size=30)
    same = run(fabricate("base", text=nats), fabricate("student", text=nats + 1))["pairs"][0]["texts"][0]
    other = run(fabricate("base", text=nats), fabricate("coarse", text=nats + 1, tokens=3))["pairs"][0]["texts"][0]
    assert same["nll"]["change"]["value"] == pytest.approx(1 / 4)
    assert (other["nll"], other["perplexity"], other["tokens"]) == (None, None, None)
    assert other["bits_per_byte"] == same["bits_per_byte"]
    assert other["bits_per_byte"]["change"]["value"] == pytest.approx(1 / np.log(2) / 10)


# ------------------------------------------------------------------ seeds


@pytest.fixture
def seeds(fabricate: Fabricate) -> Callable[..., tuple[str, list[str]]]:
    """`seeds(lost)`: a base and one student per entry of lost answers."""

    def make(lost: list[int]) -> tuple[str, list[str]]:
        base = fabricate("base", t=answers(1000, 700), u=answers(1000, 500))
        return base, [fabricate(f"s{i}", t=answers(1000, 700, n, 5), u=answers(1000, 500)) for i, n in enumerate(lost)]

    return make


def test_five_seeds_speak_of_the_recipe(seeds: Any, run: Any) -> None:
    lost = [9, 12, 7, 14, 10]
    base, students = seeds(lost)
    result = run(base, students, margin_macro=2)
    recipe = result["recipe"]
    task, macro = recipe["tasks"][0], recipe["macro"]
    changes = (5 - np.array(lost)) / 1000
    test = stats.ttest_1samp(changes, 0)
    assert task["changes"] == pytest.approx(changes)
    assert task["p"] == pytest.approx(test.pvalue)
    assert [task["change"][end] for end in ("low", "high")] == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert task["non_inferiority"]["lower"] == pytest.approx(test.confidence_interval(0.9).low)
    assert (recipe["seeds"], recipe["evidence_level"], task["verdict"]) == (5, "headline", "preserved")
    assert macro["tasks"] == ["t"]  # the base guesses at u
    assert macro["changes"] == pytest.approx(2 * changes)
    assert macro["verdict"] == "preserved"
    assert len(result["pairs"]) == 5
    assert "over 5 seeds (headline)" in format_comparison(result)


def test_equal_seeds_do_not_give_certainty(seeds: Any, run: Any) -> None:
    base, students = seeds([5, 5, 5, 5, 5])
    names = [json_files.read_json(Path(student)) for student in students]
    assert len({one["fingerprints"]["model"] for one in names}) == 5
    task = run(base, students)["recipe"]["tasks"][0]
    assert task["changes"] == [0.0] * 5
    half = stats.t.ppf(0.975, 4) / 1000 / np.sqrt(12 * 5)
    assert (task["change"]["low"], task["change"]["high"]) == (pytest.approx(-half), pytest.approx(half))


def test_three_seeds_are_an_exploration_and_two_are_not(seeds: Any, run: Any) -> None:
    base, students = seeds([9, 12, 7])
    three = run(base, students)["recipe"]
    assert (three["evidence_level"], three["tasks"][0]["verdict"], three["macro"]["verdict"]) == (
        "exploration",
        None,
        None,
    )
    assert three["tasks"][0]["p"] is not None
    result = run(base, students[:2])
    two = result["recipe"]
    assert (two["evidence_level"], two["tasks"][0]["p"], two["tasks"][0]["non_inferiority"]) == ("none", None, None)
    assert two["tasks"][0]["verdict"] is None
    assert "too few for a result" in format_comparison(result)
    assert run(base, students[0])["recipe"] is None


def test_bases_pair_with_students_in_order(fabricate: Fabricate, run: Any) -> None:
    bases = [fabricate(f"b{i}", t=answers(1000, 700 + i)) for i in range(3)]
    students = [fabricate(f"s{i}", t=answers(1000, 700 + i, i, 0)) for i in range(3)]
    recipe = run(bases, students)["recipe"]
    assert recipe["tasks"][0]["changes"] == pytest.approx([0.0, -0.001, -0.002])
    with pytest.raises(InputError, match="2 --base and 3 --student cannot be paired"):
        run(bases[:2], students)
    with pytest.raises(InputError, match=r"s0\.json: is given twice under --student"):
        run(bases[0], [students[0], students[1], students[0]])


def test_bases_against_themselves_are_the_null_over_seeds(fabricate: Fabricate, run: Any) -> None:
    base = fabricate("base", t=answers(1000, 700))
    recipe = run([base] * 5, [base] * 5)["recipe"]
    assert recipe["tasks"][0]["change"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 5}
    assert (recipe["tasks"][0]["p"], recipe["macro"]["verdict"]) == (1.0, "preserved")


# ------------------------------------------------------------------ what was declared


def test_a_later_change_of_the_margin_is_post_hoc(fabricate: Fabricate, run: Any) -> None:
    base, student = fabricate("base", t=answers(500, 350)), fabricate("student", t=answers(500, 350, 9, 3))
    assert not run(base, student)["declaration"]["post_hoc"]
    assert not run(base, student)["declaration"]["post_hoc"]  # the same again
    later = run(base, student, margin_task=5)
    assert later["declaration"]["post_hoc"]
    assert "Post hoc" in format_comparison(later)
    assert run(base, student, margin_task=5)["declaration"]["post_hoc"]
    other = fabricate("other", t=answers(500, 350, 9, 3))
    assert not run(base, other)["declaration"]["post_hoc"]


# ------------------------------------------------------------------ refusals


def test_models_scored_on_different_documents_are_refused(fabricate: Fabricate, run: Any) -> None:
    base = fabricate("base", t=answers(500, 350))
    with pytest.raises(InputError, match=r"short\.json: t has 500 and 400 documents; score both with the same limit"):
        run(base, fabricate("short", t=answers(400, 350)))
    with pytest.raises(InputError, match=r"base\.json: u was not scored, but it was in .*more\.json"):
        run(base, fabricate("more", t=answers(500, 350), u=answers(5, 3)))
    other = Path(fabricate("other", t=answers(500, 350)))
    result = json_files.read_json(other)
    result["fingerprints"]["files"]["t"] = "0" * 64
    json_files.write_json(other, result)
    with pytest.raises(InputError, match=r"t differs \(.*00000000….*\); score both on the same file"):
        run(base, str(other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin_task": 0.0}, "--margin-task 0.0: must be above 0 and at most 100 points"),
        ({"margin_macro": 101.0}, "--margin-macro 101"),
        ({"resamples": 10}, "--resamples 10: "),
        ({"seed": -1}, "--seed -1"),
        ({"primary_tasks": ("tt",)}, "--primary-tasks tt: is not a scored task; did you mean `t`"),
        ({"out": ""}, "`out` is required"),
    ],
)
def test_bad_options_are_refused(fabricate: Fabricate, run: Any, changes: dict[str, Any], message: str) -> None:
    base = fabricate("base", t=answers(500, 350))
    with pytest.raises(InputError, match=message):
        run(base, base, **changes)
    with pytest.raises(InputError, match=r"would overwrite .*base\.json"):
        run(base, base, out=base)


def test_an_empty_split_is_refused(fabricate: Fabricate, run: Any) -> None:
    base = fabricate("base", t=answers(1, 1))
    (half,) = {"dev", "test"} - {dev_test_split(item_hash("t 0", [" a", " b"]))}
    with pytest.raises(InputError, match=f"t: none of its 1 documents is in the {half} split"):
        run(base, base, split=half)


def test_another_kind_of_file_is_not_overwritten(fabricate: Fabricate, run: Any, tmp_path: Path) -> None:
    base = fabricate("base", t=answers(50, 35))
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(InputError, match=r"notes\.json: exists and is not a comparison"):
        run(base, base, out=str(tmp_path / "notes.json"))
    (tmp_path / "notes.json").write_text('{"format": "jax-selftrain comparison"}')
    with pytest.raises(InputError, match=r"notes\.json: is a damaged comparison"):
        run(base, base, out=str(tmp_path / "notes.json"))
