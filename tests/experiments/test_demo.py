"""A small demo pretrains a model, runs a study, and resumes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from extraction_reference import classify_overlap, compute_log_pz, longest_runs

from jax_selftrain import load_model
from jax_selftrain.config import ArmConfig, DemoConfig, StudyConfig, yaml_io
from jax_selftrain.corpus import open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.evals.extraction import CLASSES
from jax_selftrain.experiments.microworld import demo
from jax_selftrain.experiments.microworld.lines_and_questions import WorldConfig
from jax_selftrain.experiments.microworld.microworld_study import ONE_MODEL_SCALE, ModelSpec, write_worlds
from jax_selftrain.hub import open_model
from jax_selftrain.io import json_files
from jax_selftrain.io.manifest import folder_manifest
from jax_selftrain.study.design import make_design

TINY = replace(
    ONE_MODEL_SCALE,
    world=WorldConfig(
        people=14, probe_copies=(1, 2, 8), probes_per_level=4, agreement_lines=400, sum_lines=400, largest_addend=29,
        items_per_task=40, heldout_documents=40,
    ),
    models=(ModelSpec("A1", "A", tokenizer="A", width=32, layers=1, heads=2),),
    vocab_size=400,
    study=replace(
        ONE_MODEL_SCALE.study,
        mesh="data=1",
        sample=replace(ONE_MODEL_SCALE.study.sample, samples=48),
        train=replace(ONE_MODEL_SCALE.study.train, steps=2, eval_every=1, eval_limit=10),
    ),
)  # fmt: skip
EXTRACT = TINY.study.extract
assert EXTRACT.prefix is not None
assert EXTRACT.suffix is not None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert demo(DemoConfig(out=str(out), seed=0), TINY) == out / "report.html"
    return out


def only(folder: Path, pattern: str) -> Path:
    (found,) = (path for path in folder.glob(pattern) if path.is_dir())
    return found


def test_the_demo_reports_all_arms(made: Path) -> None:
    results = json_files.read_json(made / "results.json")
    treatments = [cell["treatment"] for cell in results["cells"]]
    assert treatments[:3] == ["source A1", "learning rate 0", "shuffled tokens"]
    assert treatments[3:] == ["weight noise", "matched noise", "weight noise ×4", "real text of world A"]
    for cell in results["cells"]:
        assert [task["name"] for task in cell["tasks"]] == ["agreement", "sums", "facts_A"]
        groups = [group["name"] for group in cell["extraction"]["groups"]]
        assert set(groups) == {"A, shown 1×", "A, shown 2×", "A, shown 8×", "A, never shown"}
    page = (made / "report.html").read_text(encoding="utf-8")
    assert "A model of a micro-world" in page
    assert "all results are exploratory" in page
    trajectories = (made / "figures" / "trajectories_A1.svg").read_text(encoding="utf-8")
    assert all(
        treatment in trajectories for treatment in treatments if "noise" not in treatment
    )  # weight noise is not trained
    assert all(treatment in (made / "figures" / "damage_A1.svg").read_text() for treatment in treatments)


def test_overlap_classes_of_the_configured_threshold_are_in_the_threshold_table(made: Path) -> None:
    """A suffix of eight tokens has one threshold, which is the demo's."""
    assert EXTRACT.min_overlap == EXTRACT.suffix == 8
    for cell in json_files.read_json(made / "results.json")["cells"]:
        if cell["corpus"]:
            found = {part["class"]: part["n"] for part in cell["extraction"]["thresholds"]}
            assert {part["threshold"] for part in cell["extraction"]["thresholds"]} == {8}
            assert found == {name: cell["extraction"]["classes"][name]["n"] for name in CLASSES}
    assert (made / "tables" / "thresholds.csv").exists()


def test_learning_rate_0_changes_nothing(made: Path) -> None:
    cells = {cell["treatment"]: cell for cell in json_files.read_json(made / "results.json")["cells"]}
    assert [name for name, cell in cells.items() if cell["identical"]] == ["learning rate 0"]
    assert {measure["change"]["value"] for measure in cells["learning rate 0"]["measures"].values()} == {0.0}


def test_pretraining_lowers_the_loss(made: Path) -> None:
    lines = (only(made / "bases", "pretrain-*") / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.5


def test_a_second_start_repeats_no_work(made: Path) -> None:
    patterns = ("world/**/*", "bases/*/*.parquet", "bases/*/model/**/*", "stages/*/*")
    written = {path: path.stat().st_mtime_ns for pattern in patterns for path in made.glob(pattern)}
    page = (made / "report.html").read_bytes()
    demo(DemoConfig(out=str(made), seed=0), TINY)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (made / "report.html").read_bytes() == page


def test_another_seed_needs_another_folder(made: Path) -> None:
    with pytest.raises(InputError, match="another micro-world"):
        demo(DemoConfig(out=str(made), seed=1), TINY)


def test_a_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    with pytest.raises(InputError, match="is not a micro-world"):
        demo(DemoConfig(out=str(tmp_path)), TINY)


def test_sequences_occur_in_the_corpus_as_often_as_their_group_says(made: Path) -> None:
    corpus = open_corpus(only(made / "bases", "import-*"))
    tokenizer = open_model(made / "world" / "untrained" / "A1").tokenizer
    documents = [np.array([corpus.start_id, *document.tokens]) for document in corpus.iter_samples()]
    rows = [json.loads(line) for line in (made / "world" / "probes.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        tokens = tokenizer.encode(row["text"], add_special_tokens=False)
        assert tokens[0] == corpus.start_id
        line, _, inside = row["text"].partition("\n")
        # A probe at the start of a document has BOS before it; the others follow a line.
        passage = tokenizer.encode("\n" + inside, add_special_tokens=False) if inside else tokens
        assert tokens[-len(passage) :] == passage
        assert len(tokens) >= EXTRACT.prefix + EXTRACT.suffix
        count = sum(
            np.array_equal(document[at : at + len(passage)], passage)
            for document in documents
            for at in range(len(document) - len(passage) + 1)
        )
        assert row["group"] == (f"A, shown {count}×" if count else "A, never shown")
        assert line.startswith("<|endoftext|>")
    assert Counter(row["group"] for row in rows)["A, never shown"] == len(rows) / 2


def test_the_base_is_a_small_pythia(made: Path) -> None:
    base = only(made / "bases", "pretrain-*")
    config, raw = open_model(base).config, open_model(base).raw_config
    tokenizer = open_model(base).tokenizer
    assert raw["model_type"] == "gpt_neox"
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (1, 32, len(tokenizer))
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == raw["bos_token_id"] == 0
    assert tokenizer.decode(tokenizer.encode("Mira works: 12 + 7 = 19.")) == "Mira works: 12 + 7 = 19."
    digits = tokenizer.tokenize("27 + 305")
    assert [token for token in digits if token.strip("Ġ+")] == ["2", "7", "3", "0", "5"]


def test_the_same_seed_writes_the_same_files(made: Path, tmp_path: Path) -> None:
    write_worlds(tmp_path / "world", replace(TINY, world=replace(TINY.world, seed=0)))
    assert folder_manifest(tmp_path / "world") == folder_manifest(made / "world")


def test_overlap_classes_and_p_z_equal_plain_python_and_transformers(made: Path, tmp_path: Path) -> None:
    design = make_design(yaml_io.load(StudyConfig, made / "config.yaml"))
    cell = next(cell for cell in design.cells if cell.treatment == "source A1")
    assert cell.corpus is not None
    assert cell.train is not None
    assert cell.extract is not None
    student = load_model(str(design.folder(cell.train)), "data=1")
    tokenizer = open_model(made / "world" / "untrained" / "A1").tokenizer
    lines = (made / "world" / "probes.jsonl").read_text().splitlines()
    n = EXTRACT.prefix + EXTRACT.suffix
    rows = [tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)[:n] for line in lines]
    documents = [sample.tokens.tolist() for sample in open_corpus(design.folder(cell.corpus)).iter_samples()]
    found = pq.read_table(design.folder(cell.extract) / "extract.sequences.parquet").to_pydict()
    runs = longest_runs([row[EXTRACT.prefix :] for row in rows], documents)
    classes = [classify_overlap(run, EXTRACT.suffix, EXTRACT.min_overlap) for run in runs]
    assert found["class"] == classes
    student.save_pretrained(tmp_path / "export")
    logprobs, exact = compute_log_pz(tmp_path / "export", np.array(rows), EXTRACT.prefix)
    np.testing.assert_allclose(found["logprob"], logprobs, atol=1e-3)
    np.testing.assert_array_equal(found["exact_match"], exact)


def test_log_odds_are_means_over_questions(made: Path) -> None:
    design = make_design(yaml_io.load(StudyConfig, made / "config.yaml"))
    cells = json_files.read_json(made / "results.json")["cells"]
    for stages, cell in zip(design.cells, cells, strict=True):
        assert stages.score is not None
        table = pq.read_table(design.folder(stages.score) / "score.items.parquet").to_pandas()
        means = table.groupby("task")["log_odds"].mean()
        for task in cell["tasks"]:
            assert cell["measures"][f"log_odds/{task['name']}"]["after"]["value"] == pytest.approx(means[task["name"]])
        eligible = [task["name"] for task in cell["tasks"] if task["not_eligible"] is None]
        assert ("log_odds" in cell["measures"]) == bool(eligible)
        if eligible:
            assert cell["measures"]["log_odds"]["after"]["value"] == pytest.approx(means[eligible].mean())


@pytest.mark.nightly
def test_the_goldfish_loss_makes_a_model_forget_and_keeps_its_capability(tmp_path: Path) -> None:
    """The control that must forget, in the world of the demo at full size."""
    arm = ArmConfig("pretraining corpus", "text", text="documents.jsonl", epochs=2)
    goldfish = replace(arm, name="goldfish loss", goldfish_k=2)
    study = replace(ONE_MODEL_SCALE.study, arms=(arm, goldfish), negative_controls=(), mesh="data=1")
    demo(DemoConfig(out=str(tmp_path / "out"), seed=0), replace(ONE_MODEL_SCALE, study=study))
    results = json_files.read_json(tmp_path / "out" / "results.json")
    changes = {
        effect["treatment"].removesuffix(" of world A"): {
            name: effect["measures"][name]["change"]["value"] for name in ("exact_match", "accuracy")
        }
        for effect in results["effects"]
    }
    assert changes["pretraining corpus"]["exact_match"] > 0
    assert changes["goldfish loss"]["exact_match"] < -0.15  # of 0.28
    assert changes["goldfish loss"]["accuracy"] > -0.01  # the margin of non-inferiority
