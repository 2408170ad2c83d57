"""Stages by command: their identities, inputs and functions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jax_selftrain import corpus as corpora
from jax_selftrain import evals, hub
from jax_selftrain.config import (
    ArmConfig,
    ExtractConfig,
    ImportCorpusConfig,
    PromptFormat,
    SampleConfig,
    ScoreConfig,
    StudyConfig,
    TrainConfig,
    fill_options,
    yaml_io,
)
from jax_selftrain.config.metadata import Role, fields_with_role, keep_role, shared_overrides
from jax_selftrain.corpus import Corpus, open_corpus, parse_mixture
from jax_selftrain.io import json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.sampling import sample
from jax_selftrain.study.dag import Inputs, Stage
from jax_selftrain.study.eval_hooks import train_with_evals, with_default_evals
from jax_selftrain.study.input_hashes import InputHashes
from jax_selftrain.study.measure_names import AFTER_RELEARNING, AFTER_RELEARNING_H, UNSEEN
from jax_selftrain.study.memorization_contrasts import CONTINUATIONS, make_control_continuations
from jax_selftrain.study.study_model import StudyModel, estimate_cost, model_bytes

_SMALL_BATCH = 24
"""Rows of a batch in the A/A repeat with another batch size."""
_BYTES_PER_TOKEN = 4
"""About this many bytes of text are one token, for estimates."""
_WINDOW = ("protocol", "prefix", "suffix", "offset", "random_offset", "min_overlap", "limit")
"""Options of extraction that decide which tokens of a sequence are its suffix."""
_UNMEASURED = (
    "epochs",
    "best_epoch",
    "max_epochs",
    "checkpoint_every",
    *fields_with_role(TrainConfig, Role.EVALUATION),
)
"""Options of training that a number of steps without evaluation leaves unset."""


class StageFactory:
    """Makes the stages of a study; reads configs, tokenizers and fingerprints."""

    def __init__(self, config: StudyConfig, read_corpus: Callable[[str], Corpus] | None = None) -> None:
        self.config = config
        self.root = Path(config.out).absolute() / "stages"
        self._read_corpus = read_corpus or cache(open_corpus)
        self.hashes = InputHashes(dry_run=config.dry_run)
        self._hash_inputs: dict[str, Callable[[str], str]] = {
            **dict.fromkeys(("base", "untrained_baseline"), lambda ref: hub.open_model(ref).fingerprint),
            **dict.fromkeys(("sequences", "control_sequences"), self.hashes.sequences),
            "duplicate_counts": self.hashes.reference,
        }
        self._models = {model.name: model for model in config.models}
        # Probes extract without decoding and without further inputs.
        unset = keep_role(config.extract, ~Role.INPUT)
        self._probe = replace(unset, sequences=config.extract.sequences, greedy_decode=False, verify=False)
        self.is_scored = bool(config.score.tasks or config.score.texts)
        self.is_extracted = bool(config.extract.sequences)

    def base(self, name: str) -> StudyModel:
        """Return a model of the study as it is before training."""
        model = self._models[name]
        opened, ref = hub.open_model(model.model), model.model
        # A plan needs no weights; revisions have the same config.
        has_weights = opened.has_local_weights or not self.config.dry_run
        fingerprint = opened.fingerprint if has_weights else hash_json([model.model, dict(opened.raw_config)])
        return StudyModel(ref, fingerprint, name, opened.tokenizer_fingerprint, ref, model)

    def folder(self, stage: Stage) -> Path:
        """Return the folder of a stage."""
        return self.root / stage.name

    def read_corpus(self, stage: Stage) -> Corpus:
        """Return the corpus of a finished stage; it is verified once."""
        return self._read_corpus(str(self.folder(stage)))

    def sample(self, source: StudyModel, arm: ArmConfig, seed: int) -> Stage:
        """Sample a corpus, remove benchmark overlap, draw a subset."""
        config, first = self.config, self.config.sample_seed
        sample_seed = seed if first is None else first
        changes = shared_overrides(arm, SampleConfig)
        own = ("stop_ids",) if changes.keys() & {"start_id", "start_text"} else ("stop_ids", "start_id", "start_text")
        changes = {name: getattr(source.options, name) for name in own} | changes
        if source.options.temperature is not None:
            changes = {"temperature": source.options.temperature} | changes
        options = fill_options(config, config.sample, source.ref, source.options, seed=sample_seed, **changes)
        cost = estimate_cost(source, options.samples * options.max_tokens, options.max_tokens, passes=1)
        label = f"sample from {source.label}, seed {sample_seed}"
        sampled = _make_stage("sample", label, sample, options, source.inputs, **cost)
        corpus = replace(
            sampled, run=lambda out: sample(replace(options, out=str(out), extend=self._find_shorter(sampled)))
        )
        text = f"text of {source.label}, seed {seed}"
        audit = replace(config.decontaminate, corpus=str(self.folder(corpus)))
        if audit.tasks or audit.texts:
            inputs: Inputs = {"corpus": corpus, **self.hashes.tasks(audit)}
            label = f"remove benchmark overlap from {text}"
            corpus = _make_stage("decontaminate_tasks", label, evals.decontaminate, audit, inputs, is_collective=False)
        return self.draw_subset(corpus, text, seed)

    def draw_subset(self, corpus: Stage, text: str, seed: int) -> Stage:
        """Draw the study's subset of a corpus, if it has any."""
        options = self.config.subset
        if not (options.tokens or options.bytes):
            return corpus
        options = replace(options, corpus=str(self.folder(corpus)), seed=self.config.sample_seed or 0, subset=seed)
        inputs: Inputs = {"corpus": corpus}
        return _make_stage("subset", f"subset of {text}", corpora.draw_subset, options, inputs, is_collective=False)

    def _find_shorter(self, stage: Stage) -> str:
        """Return the finished corpus that differs in fewer samples alone, or nothing."""
        found = {0: ""}
        for path in self.root.glob("sample-*.json"):
            record = json_files.read_json(path)
            samples = record.get("identity", {}).get("samples", 0)
            fewer = {**stage.record, "identity": {**stage.identity, "samples": samples}}
            folder = path.with_suffix("")
            if samples < stage.identity["samples"] and record.get("key") == hash_json(fewer) and folder.is_dir():
                found[samples] = str(folder)
        return found[max(found)]

    def sample_for(self, student: StudyModel, source: StudyModel, arm: ArmConfig, seed: int) -> Stage:
        """Sample from a source and retokenize the text for a student.

        Tokens are kept where the study or the arm says so and the tokenizers are equal.
        """
        sampled = self.sample(source, arm, seed)
        if (arm.keep_source_tokens or self.config.keep_source_tokens) and source.tokenizer == student.tokenizer:
            return sampled
        stop_id = student.stop_id
        return Stage(
            "retokenize",
            f"retokenize text of {source.label} for {student.label}, seed {seed}",
            {"stop_id": stop_id},
            {"corpus": sampled, "tokenizer": student.tokenizer},
            lambda out: corpora.retokenize(self.read_corpus(sampled), student.tokenizer_ref, out, stop_id=stop_id),
        )

    def import_text(self, student: StudyModel, arm: ArmConfig) -> Stage:
        """Tokenize real text for a student."""
        options = ImportCorpusConfig(source=arm.text, model=student.tokenizer_ref, stop_id=student.stop_id)
        is_hashed = Path(arm.text).is_file() or hub.parse_dataset_split(arm.text) is not None
        text = self.hashes.texts(arm.text) if is_hashed else arm.text  # the name of a data set
        return Stage(
            "import",
            f"import {Path(arm.text).name} for {student.label}",
            {"stop_id": options.stop_id},
            {"text": text, "tokenizer": student.tokenizer},
            lambda out: corpora.import_text(replace(options, out=str(out))),
        )

    def shuffle(self, student: StudyModel, corpus: Stage, seed: int) -> Stage:
        """Shuffle the tokens of every document of a corpus."""
        return Stage(
            "shuffle",
            f"shuffle tokens of {student.label}'s own text, seed {seed}",
            {"seed": seed},
            {"corpus": corpus},
            lambda out: corpora.shuffle(self.read_corpus(corpus), student.tokenizer_ref, out, seed),
        )

    def decontaminate(self, student: StudyModel, corpus: Stage, seed: int, *, size_matched: bool) -> Stage:
        """Remove the documents that overlap with H, or as many others."""
        options = replace(self.config.extract, model=student.tokenizer_ref)
        fingerprint, length = self.hashes.sequences(options.sequences), options.min_overlap

        def make(out: Path) -> object:
            found, _ = evals.load_extraction_sets(options)
            held_out = evals.held_out_half(fingerprint, found.sequence_id)
            source, suffixes = self.read_corpus(corpus), found.tokens[held_out, evals.make_window(options).prefix :]
            if size_matched:
                return corpora.size_matched_control(source, suffixes, out, seed=seed, length=length)
            return corpora.remove_overlapping(source, suffixes, out, length=length)

        return Stage(
            "size_matched" if size_matched else "decontaminate",
            f"{'size-matched control' if size_matched else 'decontaminate'}: {student.label}'s own text, seed {seed}",
            _window_options(options) | ({"seed": seed} if size_matched else {}),
            {"corpus": corpus, "sequences": fingerprint, "tokenizer": student.tokenizer},
            make,
        )

    def train(
        self, start: StudyModel, on: Sequence[Stage], arm: ArmConfig, seed: int, steps: int | None = None
    ) -> StudyModel:
        """Train a model by the study's recipe, changed by an arm.

        The corpora have equal shares of the rows that the recipe's `mixture` leaves; in a `mixture` arm, the first has
        `share`. `seed` orders the rows. With `steps`, train for this number of steps, without evaluation; where several
        numbers of steps are relearned, at a constant rate without warmup, so that a shorter training is the beginning
        of a longer one.
        """
        recipe = with_default_evals(self.config.train, self.config.score, self.config.extract)
        if steps is not None:
            recipe = replace(recipe, steps=steps, **{name: getattr(TrainConfig(), name) for name in _UNMEASURED})
            if len(self.config.memorization.relearn_steps) > 1:
                recipe = replace(recipe, schedule="constant", warmup_ratio=0.0)
        mixture = parse_mixture(recipe.mixture)
        left = 1 - float(sum(part for _, part in mixture))
        shares = [left * (arm.share or 0)] if arm.kind == "mixture" else [left / len(on)] * (len(on) - 1)
        changes = shared_overrides(arm, TrainConfig) | {"corpus": str(self.folder(on[-1])), "seed": seed}
        if arm.epochs is not None:
            changes["steps"] = None
        mixed = (f"{self.folder(one)}={share:.9f}" for one, share in zip(on[:-1], shares, strict=True))
        changes["mixture"] = (*mixed, *recipe.mixture)
        options = fill_options(self.config, recipe, start.ref, start.options, **changes)
        evaluated = [self.hashes.texts(one, options.eval_limit) for one in options.eval_texts]
        evaluated += [self.hashes.reference(file) for file in options.eval_tasks]
        if options.eval_sequences:
            evaluated.append(self.hashes.sequences(options.eval_sequences))
        sampled, subset = self.config.sample, self.config.subset
        tokens = (options.steps or 0) * options.batch_size * options.seq_len
        if options.epochs:
            tokens = options.epochs * (
                subset.tokens or (subset.bytes or 0) // _BYTES_PER_TOKEN or sampled.samples * sampled.max_tokens
            )
        inputs: dict[str, str | Stage] = {"model": start.fingerprint}
        inputs |= {f"corpus {n}": one for n, one in enumerate(on)}
        inputs |= {f"mixture {n}": self._read_corpus(folder).fingerprint for n, (folder, _) in enumerate(mixture)}
        inputs |= {f"eval {n}": fingerprint for n, fingerprint in enumerate(evaluated)}
        cost = estimate_cost(start, tokens, options.seq_len, passes=3) | {"model_bytes": model_bytes(start)}
        label = f"train {start.label} on: {on[-1].label}" + (f" ({arm.name})" if arm.name else "")
        stage = _make_stage("train", label, train_with_evals, options, inputs, **cost)
        own = {"share": arm.share} if arm.kind == "mixture" else {}
        stage = replace(stage, identity={**stage.identity, "mixture": [str(part) for _, part in mixture], **own})
        label = f"{start.label} after {arm.name or 'its own text'}, seed {seed}"
        return replace(start, ref=str(self.folder(stage)), fingerprint=stage, label=label)

    def score(self, model: StudyModel, options: ScoreConfig | None = None) -> Stage:
        """Score a model on the study's tasks and texts, or others."""
        options = fill_options(self.config, options or self.config.score, model.ref, model.options)
        inputs = {**model.inputs, **self.hashes.tasks(options, options.num_fewshot)}
        return _make_stage("score", f"score {model.label}", evals.score, options, inputs)

    def extract(self, model: StudyModel, corpora: Sequence[Stage] = (), base: StudyModel | None = None) -> Stage:
        """Extract the study's sequences, classified by overlap with the corpora.

        The corpora of the recipe's `mixture` count too. `base` is the checkpoint that `verify` compares with; None: the
        model itself.
        """
        options, label = self.config.extract, f"extract from {model.label}"
        if base is not None and options.verify and not options.base:
            options = replace(options, base=base.ref)
        if not corpora:
            return self._extract(model, options, label)
        *mixed, corpus = corpora
        folders = [folder for folder, _ in parse_mixture(self.config.train.mixture)]
        inputs: dict[str, str | Stage] = {"corpus": corpus}
        inputs |= {f"mixed corpus {n}": one for n, one in enumerate(mixed)}
        inputs |= {f"mixture {n}": self._read_corpus(folder).fingerprint for n, folder in enumerate(folders)}
        read = (*(str(self.folder(one)) for one in mixed), *folders)
        return self._extract(model, options, label, inputs, corpus=str(self.folder(corpus)), mixed_corpora=read)

    def extract_aa(self, model: StudyModel) -> dict[str, Stage]:
        """Extract again with another batch size and with another dtype."""
        other = "bfloat16" if (self.config.dtype or self._probe.dtype) == "float32" else "float32"
        tokens = _SMALL_BATCH * (evals.make_window(self._probe).length + 1)
        repeats: dict[str, dict[str, Any]] = {
            f"batch of {_SMALL_BATCH} rows": {"batch_tokens": tokens},
            other: {"dtype": other},
        }
        return {
            name: self._extract(model, self._probe, f"extract from {model.label}, {name}", {"aa_repeat": name}, **one)
            for name, one in repeats.items()
        }

    def extract_probes(self, base: StudyModel, model: StudyModel, seed: int) -> dict[str, Stage]:
        """Extract in other formats, of unseen text, and after relearning."""
        probes, label = self.config.memorization, f"extract from {model.label}"
        found: dict[str, Stage] = {}
        for form in probes.formats:
            changes = format_options(self._probe, form)
            found[form.name] = self._extract(model, self._probe, f"{label}, {form.name}", **changes)
        if probes.unseen_text:
            continuations = self.continue_unseen_text(base)
            changes = {"sequences": str(self.folder(continuations) / CONTINUATIONS)}
            changes |= {"offset": 0, "random_offset": False, "limit": None}
            label = f"extract continuations of unseen text from {model.label}"
            found[UNSEEN] = self._extract(model, self._probe, label, {"sequences": continuations}, **changes)
        if probes.relearn_corpus:
            text = self.import_text(model, ArmConfig("relearning", "text", text=probes.relearn_corpus))
            found |= self._relearn(model, text, seed, AFTER_RELEARNING)
        if probes.relearn_sequences:
            found |= self._relearn(model, self.import_shown_half(base), seed, AFTER_RELEARNING_H)
        return found

    def _relearn(self, model: StudyModel, text: Stage, seed: int, name: str) -> dict[str, Stage]:
        """Extract after short trainings, by name and number of steps."""
        found = {}
        for steps in self.config.memorization.relearn_steps:
            trained = self.train(model, [text], ArmConfig(f"relearning for {steps} steps"), seed, steps)
            found[f"{name} {steps}"] = self._extract(trained, self._probe, f"extract from {trained.label}")
        return found

    def import_shown_half(self, student: StudyModel) -> Stage:
        """Write the sequences of one half of H as a corpus."""
        options = replace(self.config.extract, model=student.tokenizer_ref)
        fingerprint = self.hashes.sequences(options.sequences)

        def make(out: Path) -> object:
            found, _ = evals.load_extraction_sets(options)
            shown, _ = evals.relearned_halves(fingerprint, found.sequence_id)
            return corpora.import_tokens(found.tokens[shown], student.tokenizer_ref, out)

        return Stage(
            "import_sequences",
            f"import one half of H for {student.label}",
            _window_options(options),
            {"sequences": fingerprint, "tokenizer": student.tokenizer},
            make,
        )

    def continue_unseen_text(self, base: StudyModel) -> Stage:
        """Decode a base's greedy continuations of unseen text."""
        options = fill_options(self.config, self.config.extract, base.ref, base.options)
        texts, n = self.config.memorization.unseen_text, self.config.memorization.max_continuations
        return Stage(
            "continue",
            f"continue {Path(texts).name} by {base.label}",
            _window_options(options) | {"sequences": n, "start_token": options.start_token, "dtype": options.dtype},
            base.inputs | {"texts": self.hashes.texts(texts)},
            lambda out: make_control_continuations(options, texts, n, out),
            needs_devices=True,
        )

    def _extract(
        self, model: StudyModel, options: ExtractConfig, label: str, special: Inputs | None = None, **changes: Any
    ) -> Stage:
        options = fill_options(self.config, options, model.ref, model.options, **changes)
        inputs = {**model.inputs, **(special or {})}
        for name, hash_input in self._hash_inputs.items():
            if name not in inputs and (reference := getattr(options, name)):
                inputs[name] = hash_input(reference)
        return _make_stage("extract", label, evals.extract, options, inputs)


def _make_stage(
    command: str, label: str, run: Callable[[Any], object], options: Any, inputs: Inputs, **settings: Any
) -> Stage:
    """Make a stage of a command from the roles of its options."""
    file = f"{command}.json" if fields_with_role(type(options), Role.OUTPUT_FILE) else ""

    def fill(out: Path) -> object:
        return run(replace(options, out=str(out / file)))

    identity = yaml_io.to_dict(options, Role.IDENTITY)
    return Stage(command, label, identity, inputs, fill, **({"is_collective": True} | settings))


def format_options(options: ExtractConfig, form: PromptFormat) -> dict[str, Any]:
    """Return the options of `extract` that a prompt format sets."""
    window = evals.make_window(options)
    lengths = {"protocol": None, "prefix": window.prefix, "suffix": window.suffix}
    return lengths | shared_overrides(form, ExtractConfig)


def _window_options(options: ExtractConfig) -> dict[str, Any]:
    chosen = {name: value for name in ("subsample", "column") if (value := getattr(options, name))}
    return {name: getattr(options, name) for name in _WINDOW} | chosen
