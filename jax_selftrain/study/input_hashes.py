"""Fingerprints of the files that stages read, each computed once."""

from collections.abc import Callable
from functools import cache, partial
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
        self._split = cache(partial(hub.DatasetSplit.fingerprint, cached_only=dry_run))
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

    def texts(self, reference: str, limit: int | None = None) -> str:
        """Hash the first `limit` rows of a split, or a file.

        A dry run downloads nothing.
        """
        split = hub.parse_dataset_split(reference)
        return self.reference(reference) if split is None else self._unless_dry_run(partial(self._split, split, limit))

    def tasks(self, options: ScoreConfig | DecontaminateConfig, num_fewshot: int | None = None) -> dict[str, str]:
        """Hash tasks and texts, by name."""
        limit = options.text_limit if isinstance(options, ScoreConfig) else None
        hashes = [(path, self.reference(path)) for path in options.tasks]
        hashes += [(path, self.texts(path, limit)) for path in options.texts]
        hashes += [(path, self.reference(path)) for path in [options.task_folder] if path]
        found = {f"{n}: {Path(path).name}": value for n, (path, value) in enumerate(hashes)}
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
        found = {option: self.texts(value) for option, value in references.items() if value}
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
        """Hash harness tasks with their data."""
        return self._unless_dry_run(
            lambda: hash_lm_eval_tasks(load_lm_eval_tasks(dict(names), folder=folder, num_fewshot=num_fewshot))
        )

    def _unless_dry_run(self, hash_data: Callable[[], str]) -> str:
        """Hash data that a dry run may not have."""
        try:
            return hash_data()
        except InputError:
            if self._dry_run:
                return "unknown"
            raise
