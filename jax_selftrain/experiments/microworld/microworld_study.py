"""The demo: a study of small models on a CPU.

`OUT/world` holds texts, tasks, probes and untrained models, and `OUT/bases` the pretrained models. The rest of `OUT`
is a study with control arms. All parts resume like any study.
"""

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jax_selftrain.config import (
    ArmConfig,
    DemoConfig,
    ImportCorpusConfig,
    ModelConfig,
    ScoreConfig,
    StudyConfig,
    TrainConfig,
    yaml_io,
)
from jax_selftrain.corpus import import_text, open_corpus
from jax_selftrain.distributed.progress import log_line
from jax_selftrain.errors import InputError
from jax_selftrain.experiments.microworld.lines_and_questions import World, WorldConfig
from jax_selftrain.experiments.microworld.world import BOS_TOKEN, make_world, train_tokenizer, write_untrained_model
from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.jsonl import write_jsonl
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.report import write_report
from jax_selftrain.study.dag import Stage, run_all
from jax_selftrain.study.run_study import run_study
from jax_selftrain.training import train

VERSION = 4
"""Version of the files of `OUT/world`."""
POSITIVE_CONTROL = "real text"
"""Name of the arms that are positive controls."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that is pretrained from random initialization."""

    name: str = ""
    worlds: str = "A"
    """Training data: `A`, `B`, or `AB`."""
    family: Literal["gpt_neox", "llama"] = "gpt_neox"
    tokenizer: str = "AB"
    """Worlds whose text the tokenizer is trained on."""
    width: int = 128
    layers: int = 2
    heads: int = 4
    epochs: float = 1.3
    seed: int = 0


@dataclass(frozen=True)
class MicroScale:
    """Worlds, models and study of an experiment, as in `one_model.yaml`."""

    world: WorldConfig = field(default_factory=WorldConfig)
    models: tuple[ModelSpec, ...] = ()
    study: StudyConfig = field(default_factory=StudyConfig)
    """The study, without models and files; the `text` of an arm is a file of each world's folder."""
    vocab_size: int = 640
    temperatures: tuple[float, ...] = ()
    """Further temperatures of each source, as sources of their own."""

    @property
    def world_ids(self) -> str:
        """Worlds in the training data of some model."""
        return "".join(sorted({world for model in self.models for world in model.worlds}))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the task files: shared ones, then those of each world."""
        own = ("facts", "two_hop") if self.world.two_hop else ("facts",)
        return ("agreement", "sums", *(f"{task}_{world}" for task in own for world in self.world_ids))


ONE_MODEL_SCALE, CROSSOVER_SCALE = (
    yaml_io.load(MicroScale, Path(__file__).with_name(name)) for name in ("one_model.yaml", "crossover.yaml")
)


def demo(config: DemoConfig, scale: MicroScale | None = None) -> Path:
    """Pretrain small models, and run and report a study of them.

    Args:
        config: the demo; `config.study` selects the crossover study of six models.
        scale: sizes for tests.

    Returns the path of the report. Raises InputError if options conflict, or the folder has other content or cannot be
    written.
    """
    if config.temperatures and not config.study:
        raise InputError("--temperatures adds sources to the study of six models; add --study")
    scale = scale or (CROSSOVER_SCALE if config.study else ONE_MODEL_SCALE)
    scale = replace(scale, world=replace(scale.world, seed=config.seed))
    count = len(scale.models)
    log_line(f"writing a micro-world and pretraining {count} model{'s' * (count > 1)}")
    if config.temperatures:
        scale = add_temperatures(scale, config.temperatures)
    study = _prepare_study(Path(config.out), scale, config.seeds if config.study else (config.seed,))
    return write_report(run_study(study))


def add_temperatures(scale: MicroScale, temperatures: Sequence[float]) -> MicroScale:
    """Add each source at other temperatures, without arms and claims."""
    names = scale.study.sources
    sources = (*names, *(format_source(name, one) for name in names for one in temperatures))
    study = replace(scale.study, sources=sources, arms=(), claims=(), negative_controls=())
    return replace(scale, study=study, temperatures=tuple(temperatures))


def format_source(model: str, temperature: float) -> str:
    """Return the name of a model at another temperature."""
    return f"{model} at {temperature:g}"


def _prepare_study(out: Path, scale: MicroScale, seeds: Sequence[int]) -> StudyConfig:
    """Write `out/world`, pretrain the bases in `out/bases`, and return the study."""
    write_worlds(out / "world", scale)
    bases = {model.name: _pretrain(out / "bases", out / "world", model, scale) for model in scale.models}
    run_all(out / "bases", [stage for stages in bases.values() for stage in stages])
    return make_study(out, scale, seeds, {name: out / "bases" / stages[-1].name for name, stages in bases.items()})


def make_study(out: Path, scale: MicroScale, seeds: Sequence[int], bases: Mapping[str, Path]) -> StudyConfig:
    """Return the study of models, by name, with the files of `out/world`."""
    folder = out / "world"
    models = tuple(
        ModelConfig(
            name=model.name,
            model=str(bases[model.name]),
            lineage="C" if model.family == "llama" else model.worlds,
            family=model.family,
            damage_text=f"heldout_{model.worlds[0]}",
            data=" and ".join(f"world {world}" for world in model.worlds),
            data_order=f"seed {model.seed}",
            initialization=f"seed {model.seed}",
            tokenizer=f"of {' and '.join(model.tokenizer)}",
            architecture={"gpt_neox": "GPT-NeoX", "llama": "Llama"}[model.family],
            size=f"D {model.width}, L {model.layers}",
        )
        for model in scale.models
    )
    models += tuple(
        replace(model, name=format_source(model.name, one), temperature=one, score=False)
        for model in models
        for one in scale.temperatures
    )
    arms = tuple(_fill_worlds(scale, folder))
    return replace(
        scale.study,
        out=str(out),
        models=models,
        arms=arms,
        positive_controls=tuple(arm.name for arm in arms if arm.name.startswith(POSITIVE_CONTROL)),
        seeds=tuple(seeds),
        score=ScoreConfig(
            tasks=tuple(str(folder / "tasks" / f"{name}.jsonl") for name in scale.tasks),
            texts=tuple(str(folder / world / f"heldout_{world}.jsonl") for world in scale.world_ids),
        ),
        extract=replace(scale.study.extract, sequences=str(folder / "probes.jsonl")),
    )


def _fill_worlds(scale: MicroScale, folder: Path) -> Iterator[ArmConfig]:
    """Yield the arms, with an arm of real text for each world.

    Its students were pretrained on that world, and its `text` is a file of the world's folder.
    """
    data = {model.name: model.worlds for model in scale.models}
    for arm in scale.study.arms:
        if not arm.text:
            yield arm
            continue
        for world in scale.world_ids:
            students = tuple(name for name in arm.students or scale.study.students if data[name] == world)
            if students:
                text = str(folder / world / arm.text)
                yield replace(arm, name=f"{arm.name} of world {world}", students=students, text=text)


def make_worlds(config: WorldConfig) -> dict[str, World]:
    """Make worlds A and B, with the same grammar and other people."""
    items = config.seed if config.items_seed is None else config.items_seed
    return {
        "A": make_world(replace(config, items_seed=items)),
        "B": make_world(replace(config, seed=config.seed + 1_000_003, items_seed=items)),
    }


def write_worlds(folder: Path, scale: MicroScale) -> None:
    """Write texts, tasks, probes and untrained models, unless the folder has them.

    Raises InputError if the folder has other content.
    """
    positions = 2 * scale.study.train.seq_len
    spec = {
        "format": "jax-selftrain micro-world",
        "version": VERSION,
        "world": asdict(scale.world),
        "models": [asdict(model) for model in scale.models],
        "vocab_size": scale.vocab_size,
        "positions": positions,
    }
    if folder.exists():
        if not (folder / "world.json").exists():
            raise InputError(f"{folder}: exists but is not a micro-world; choose another --out")
        # A JSON round trip turns tuples into lists.
        if json_files.read_json(folder / "world.json") != json.loads(json.dumps(spec)):
            raise InputError(f"{folder}: is another micro-world (another seed or version); choose another --out")
        return
    worlds = {name: world for name, world in make_worlds(scale.world).items() if name in scale.world_ids}
    with atomic.commit_folder(folder) as temporary:
        for name, world in worlds.items():
            write_jsonl(temporary / name / "documents.jsonl", _rows(world.documents))
            write_jsonl(temporary / name / f"heldout_{name}.jsonl", _rows(world.heldout))
            write_jsonl(temporary / name / "more.jsonl", _rows(world.extra_text))
        if any(model.worlds == "AB" for model in scale.models):
            mixed = itertools.chain.from_iterable(zip(worlds["A"].documents, worlds["B"].documents, strict=False))
            write_jsonl(temporary / "AB" / "documents.jsonl", _rows(mixed))
        for task in scale.tasks:
            kind, _, name = task.rpartition("_") if task[-1] in scale.world_ids else (task, "", scale.world_ids[0])
            write_jsonl(temporary / "tasks" / f"{task}.jsonl", map(asdict, worlds[name].tasks[kind]))
        write_jsonl(temporary / "probes.jsonl", _make_extraction_set(worlds))
        tokenizers = {
            names: train_tokenizer([worlds[name] for name in names], scale.vocab_size)
            for names in dict.fromkeys(model.tokenizer for model in scale.models)
        }
        for model in scale.models:
            write_untrained_model(
                temporary / "untrained" / model.name,
                tokenizers[model.tokenizer],
                positions=positions,
                **{key: getattr(model, key) for key in ("family", "width", "layers", "heads")},
            )
        json_files.write_json(temporary / "world.json", spec)


def _rows(texts: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    return ({"text": text} for text in texts)


def _make_extraction_set(worlds: Mapping[str, World]) -> list[Mapping[str, Any]]:
    """Return probes and counterfactuals with the text before them.

    That text is BOS, or BOS and a short line of held-out text, so that the prefix ends inside the probe. A group is a
    number of copies in a world. The order is random, for evaluations on the first rows.
    """
    rows: list[Mapping[str, Any]] = []
    for shown in (True, False):
        for name, world in worlds.items():
            lines = itertools.cycle(line for text in world.heldout for line in text.split("\n") if " = " in line)
            for probe, line in zip(world.probes, lines, strict=False):
                group = f"{name}, shown {probe.repetitions}×" if shown else f"{name}, never shown"
                before = BOS_TOKEN if probe.placement == "start" else f"{BOS_TOKEN}{line}\n"
                rows.append({"text": before + (probe.text if shown else probe.counterfactual), "group": group})
    random.Random(f"jax_selftrain probes of {' '.join(worlds)}").shuffle(rows)
    return rows


def _pretrain(root: Path, folder: Path, model: ModelSpec, scale: MicroScale) -> tuple[Stage, Stage]:
    """Return the stages of a base: its tokenized text, and its training."""
    untrained, text = folder / "untrained" / model.name, folder / model.worlds / "documents.jsonl"
    tokenized = Stage(
        "import",
        f"tokenize world {model.worlds} for {model.name}",
        {},
        {"text": sha256_file(text), "tokenizer": sha256_file(untrained / "tokenizer.json")},
        lambda out: import_text(ImportCorpusConfig(source=str(text), model=str(untrained), out=str(out))),
    )

    options = TrainConfig(
        model=str(untrained),
        init="scratch",
        batch_size=scale.study.train.batch_size,
        seq_len=scale.study.train.seq_len,
        learning_rate=4 * scale.study.train.learning_rate,
        schedule="cosine",
        final_learning_rate=scale.study.train.learning_rate,
        weight_decay=0.1,
        log_every=10,
        mesh=scale.study.mesh,
        seed=model.seed,
    )

    def pretrain(out: Path) -> object:
        corpus = open_corpus(root / tokenized.name)
        steps = max(1, round(model.epochs * corpus.n_tokens / (options.batch_size * options.seq_len)))
        return train(replace(options, corpus=str(corpus.folder), out=str(out), steps=steps))

    sizes = {key: getattr(options, key) for key in ("batch_size", "seq_len", "learning_rate")}
    inputs: dict[str, str | Stage] = {"corpus": tokenized, "model": sha256_file(untrained / "config.json")}
    return tokenized, Stage("pretrain", f"pretrain {model.name}", {**asdict(model), **sizes}, inputs, pretrain)
