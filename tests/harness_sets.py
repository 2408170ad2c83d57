"""lm-evaluation-harness tasks over local files, with the harness's own prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from models_factory import tiny_texts, write_tiny_hf_model

CHOICE = {"doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
LAST_WORD = {"doc_to_text": "{{context}}", "doc_to_target": "{{continuation}}"}

TOLERANCE = 1e-3  # nats per request, in fp32: the harness's parity that the project promises

_METRICS = {
    "acc": {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    "acc_norm": {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    "perplexity": {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
}


def task(name: str, file: Path, kind: str, columns: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the YAML content of a task over one JSONL file."""
    metrics = {"multiple_choice": ["acc", "acc_norm"], "loglikelihood": ["perplexity", "acc"]}.get(kind)
    listed = {} if metrics is None else {"metric_list": [_METRICS[metric] for metric in metrics]}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")},
        "test_split": "test",
        "output_type": kind,
        "metadata": {"version": 1.0},
        **listed,
        **columns,
        **more,
    }


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_tasks(folder: Path, tasks: Sequence[Mapping[str, Any]]) -> Path:
    """Write a folder for `--task-folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for spec in tasks:
        (folder / f"{spec.get('group') or spec['task']}.yaml").write_text(yaml.safe_dump(dict(spec), sort_keys=False))
    return folder


def published_sets(
    data: Path, folder: Path, limit: int | None = None, fits: Callable[[str], bool] = lambda text: True
) -> list[dict[str, Any]]:
    """Return tasks over LAMBADA, PIQA, ARC-Easy and eight BLiMP sets.

    PIQA's questions whose choices do not fit the model are removed.
    """

    def rows(file: str) -> list[dict[str, Any]]:
        lines = (data / "benchmarks" / file).read_text().splitlines()
        return [json.loads(line) for line in lines[:limit]]

    def made(name: str, found: Sequence[Mapping[str, Any]], kind: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        return task(name, write_jsonl(folder / f"{name}.jsonl", found), kind, columns)

    labels = (data / "benchmarks/piqa_valid-labels.lst").read_text().split()
    piqa = [row | {"label": int(label)} for row, label in zip(rows("piqa_valid.jsonl"), labels, strict=False)]
    piqa = [row for row in piqa if fits(f" {row['sol1']}") and fits(f" {row['sol2']}")]
    last_word = {
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    }
    piqa_columns = {
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "doc_to_target": "label",
    }
    arc_columns = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
    pairs = {"doc_to_text": "", "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "doc_to_target": 0}
    sets = [
        made("lambada", rows("lambada_test.jsonl"), "loglikelihood", last_word),
        made("piqa", piqa, "multiple_choice", piqa_columns),
        made("arc_easy", rows("arc_easy_test.jsonl"), "multiple_choice", arc_columns),
    ]
    for file in sorted((data / "benchmarks/blimp").glob("*.jsonl")):
        sets.append(made(f"blimp_{file.stem}", rows(f"blimp/{file.name}"), "multiple_choice", pairs))
    return sets


def write_pythia_shape(data: Path, folder: Path) -> Path:
    """Write a random Pythia-14m with Pythia's tokenizer."""
    write_tiny_hf_model(
        folder,
        "gpt_neox",
        vocab_size=50304,
        tokenizer=False,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((data / "pythia-tokenizer" / name).read_bytes())
    return folder


def write_local_tasks(folder: Path) -> dict[str, Any]:
    """Small tasks of every kind: YAML files and their data files."""
    stories = list(tiny_texts(12, seed=5))
    choices = [
        {"context": text[:40], "choices": [text[40:60], " red lamp"], "answer": i % 2} for i, text in enumerate(stories)
    ]
    words = [{"context": text[:40], "continuation": text[40:50]} for text in stories[:5]]
    texts = [{"text": text * repeat} for repeat, text in zip((1, 9, 30), stories, strict=False)]
    prompts = [{"context": text[:length]} for length, text in zip((20, 90, 55, 1), stories, strict=False)]
    files = {
        name: write_jsonl(folder / f"local_{name}.jsonl", rows)
        for name, rows in {"choices": choices, "words": words, "texts": texts, "prompts": prompts}.items()
    }
    plain = {"target_delimiter": "", "num_fewshot": 0}
    generation = {"until": [".", "\n\n"], "max_gen_toks": 24, "do_sample": False}
    rolling = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    tasks = [
        task("my_choices", files["choices"], "multiple_choice", CHOICE, **plain),
        task("my_words", files["words"], "loglikelihood", LAST_WORD, **plain),
        task("my_shots", files["choices"], "multiple_choice", CHOICE, target_delimiter="", fewshot_split="test"),
        task(
            "my_texts",
            files["texts"],
            "loglikelihood_rolling",
            {"doc_to_text": "", "doc_to_target": "{{text}}"},
            metric_list=rolling,
        ),
        task(
            "my_prompts",
            files["prompts"],
            "generate_until",
            {"doc_to_text": "{{context}}", "doc_to_target": ""},
            generation_kwargs=generation,
            repeats=2,
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        ),
    ]
    group = {
        "group": "my_group",
        "task": ["my_choices", "my_words"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2.0},
    }
    return {
        "folder": write_tasks(folder / "tasks", [*tasks, group]),
        "files": files,
        "tasks": {t["task"]: t for t in tasks},
    }


def answers(lm, specs, limit=None):
    """Return {(task, document, choice): answer} and {task: metrics}."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([dict(spec) for spec in specs])
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=0)
    found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    given = {(i.task_name, i.doc_id, i.idx): i.resps[0] for one in loaded["tasks"].values() for i in one.instances}
    return given, found["results"]


def hf_backend(folder, **options):
    pytest.importorskip("torch", reason="the harness's own backend needs torch")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", **options)


def our_backend(folder, mesh="data=1", **options):
    from jax_selftrain.evals.lm_eval_adapter import HarnessLM

    return HarnessLM(str(folder), mesh=mesh, **options)


def assert_equal_answers(ours, theirs):
    (given, metrics), (expected, their_metrics) = ours, theirs
    assert given.keys() == expected.keys()
    assert max(abs(given[key][0] - expected[key][0]) for key in given) < TOLERANCE
    assert [given[key][1] for key in given] == [expected[key][1] for key in given]
    for name, values in metrics.items():
        for metric in ("acc,none", "acc_norm,none"):
            assert values.get(metric) == their_metrics[name].get(metric)
