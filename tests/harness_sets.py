"""lm-evaluation-harness tasks over local files, with the harness's own prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from models_factory import write_tiny_hf_model

CHOICE = {"doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
LAST_WORD = {"doc_to_text": "{{context}}", "doc_to_target": "{{continuation}}"}

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
