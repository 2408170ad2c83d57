"""Fingerprints of the files that stages read, each computed once."""

from functools import cache
from pathlib import Path
from typing import Any

from jax_selftrain import evals, hub
from jax_selftrain.config import DecontaminateConfig, ScoreConfig, StudyConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals.lm_eval_tasks import hash_lm_eval_tasks, load_lm_eval_tasks
from jax_selftrain.evals.task_names import split_names
from jax_selftrain.evals.tasks import split_format
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.manifest import sha256_file


class InputHashes:
    """Hashes by content, not path."""

    def __init__(self, *, dry_run: bool = False) -> None:
        self.file, self.sequences = cache(sha256_file), cache(evals.sequences_fingerprint)
        self._harness = cache(self._hash_harness)
        self._dry_run = dry_run

    def reference(self, reference: str) -> str:
        """Hash a file, `LAYOUT:FILE` or folder; return a task name."""
        path = Path(split_format(reference)[1])
        if not path.exists() and reference.startswith(("tfds:", "datasets:")):
            path = Path(reference.partition(":")[2])
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".yaml", ".yml", ".py"))
            return hash_json([self.file(str(file)) for file in files])
        return self.file(str(path)) if path.is_file() else reference

    def tasks(self, options: ScoreConfig | DecontaminateConfig, num_fewshot: int | None = None) -> dict[str, str]:
        """Hash tasks and texts, by name."""
        references = (*options.tasks, *options.texts, *([options.task_folder] if options.task_folder else []))
        found = {f"{n}: {Path(path).name}": self.reference(path) for n, path in enumerate(references)}
        if names := split_names(options.tasks)[1]:
            found["lm-evaluation-harness"] = self._harness(tuple(names.items()), options.task_folder, num_fewshot)
        return found

    def study(self, config: StudyConfig) -> dict[str, str]:
        """Hash all inputs of a study, by option."""
        arms, memorization = config.arms, config.memorization
        references = {f"arms.{arm.name}.text": arm.text for arm in arms}
        references |= {
            f"memorization.{name}": getattr(memorization, name) for name in ("unseen_text", "relearn_corpus")
        }
        found = {option: self.reference(value) for option, value in references.items() if value}
        found |= {f"models.{model.name}.model": hub.open_model(model.model).fingerprint for model in config.models}
        for section in ("score", "decontaminate"):
            options = getattr(config, section)
            hashes = self.tasks(options, getattr(options, "num_fewshot", None))
            found |= {f"{section}.{name}": value for name, value in hashes.items()}
        for name in ("sequences", "control_sequences"):
            if value := getattr(config.extract, name):
                found[f"extract.{name}"] = self.sequences(value)
        return found

    def _hash_harness(self, names: Any, folder: str, num_fewshot: int | None) -> str:
        """Hash harness tasks with their data; a dry run does without data."""
        try:
            return hash_lm_eval_tasks(load_lm_eval_tasks(dict(names), folder=folder, num_fewshot=num_fewshot))
        except InputError:
            if self._dry_run:
                return "unknown"
            raise
