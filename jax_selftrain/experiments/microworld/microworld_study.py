"""A study of six small models of two micro-worlds.

| model | trained on | description |
|---|---|---|
| A1 | world A | a small Pythia |
| A2 | world A | another size |
| A1′ | world A | another initialization and data order |
| B1 | world B | as A1; the worlds share grammar and arithmetic, and differ in people, facts and probes |
| S | worlds A and B | larger, with more text |
| C1 | world A | another tokenizer and architecture (Llama) |

`CROSSOVER_SCALE` is the study of all six with students A1, B1 and C1; `ONE_MODEL_SCALE` is A1 alone with control arms.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jax_selftrain.config import (
    ArmConfig,
    ClaimConfig,
    ExtractConfig,
    ImportCorpusConfig,
    ModelConfig,
    SampleConfig,
    ScoreConfig,
    StudyConfig,
    TrainConfig,
)
from jax_selftrain.corpus import import_text, open_corpus
from jax_selftrain.experiments.microworld.untrained_model import (
    BOS_TOKEN,
    is_up_to_date,
    train_tokenizer,
    write_untrained_model,
)
from jax_selftrain.experiments.microworld.world import make_world
from jax_selftrain.experiments.microworld.world_types import World, WorldConfig
from jax_selftrain.io import atomic
from jax_selftrain.io.jsonl import write_jsonl
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.study.dag import Stage, run_all
from jax_selftrain.study.measure_names import MAIN_EFFECT
from jax_selftrain.study.preregistration import INTERACTION
from jax_selftrain.training import train

SHUFFLED, NOISE = "shuffled tokens", "weight noise"
"""Names of arms."""
VERSION = 2
"""Version of the files of `OUT/world`."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that is pretrained from random initialization."""

    name: str
    worlds: str
    """Training data: `A`, `B`, or `AB`."""
    family: Literal["gpt_neox", "llama"] = "gpt_neox"
    tokenizer: str = "AB"
    """Worlds whose text the tokenizer is trained on."""
    width: int = 128
    layers: int = 2
    heads: int = 4
    epochs: float = 1.3
    seed: int = 0

    @property
    def lineage(self) -> str:
        """Lineage in the study's design."""
        return "C" if self.family == "llama" else self.worlds


MODELS = (
    ModelSpec("A1", "A"),
    ModelSpec("A2", "A", width=96, layers=3),
    ModelSpec("A1′", "A", seed=1),
    ModelSpec("B1", "B"),
    ModelSpec("S", "AB", width=160, layers=3, epochs=0.9),
    ModelSpec("C1", "A", family="llama", tokenizer="A"),
)


@dataclass(frozen=True)
class MicroScale:
    """Models, sizes and measurements of a micro-world study."""

    title: str
    world: WorldConfig
    models: tuple[ModelSpec, ...]
    students: tuple[str, ...]
    sources: tuple[str, ...]
    claims: tuple[ClaimConfig, ...] = ()
    """Claims that are declared before the first run."""
    vocab_size: int = 640
    seq_len: int = 128
    """Row length in training, and the longest sample."""
    batch_size: int = 4
    learning_rate: float = 3e-3
    """Peak learning rate of pretraining, which decays to a quarter; self-training uses that quarter."""
    samples: int = 2304
    steps: int = 120
    eval_every: int = 40
    eval_limit: int = 120
    """Questions, documents and sequences of each file in evaluations during training."""
    prefix: int = 24
    suffix: int = 8
    min_overlap: int = 8
    mesh: str = ""

    @property
    def world_ids(self) -> str:
        """Worlds in the training data of some model."""
        return "".join(sorted({world for model in self.models for world in model.worlds}))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the task files: shared ones, then those of each world."""
        own = ("facts", "two_hop") if self.world.two_hop else ("facts",)
        return ("agreement", "sums", *(f"{task}_{world}" for task in own for world in self.world_ids))


ONE_MODEL_SCALE = MicroScale(
    title="A model of a micro-world, trained on its own text",
    world=WorldConfig(),
    models=(ModelSpec("A1", "A", tokenizer="A", epochs=2.1),),
    students=("A1",),
    sources=("A1",),
)
CROSSOVER_SCALE = MicroScale(
    title="Six models of two micro-worlds: whose text can they learn from?",
    world=WorldConfig(
        people=170, two_hop=True, agreement_lines=8_000, sum_lines=30_000, probes_per_level=100, probe_words=10
    ),
    models=MODELS,
    students=("A1", "B1", "C1"),
    sources=tuple(model.name for model in MODELS),
    claims=(
        ClaimConfig("its own kind's text suits a model better", INTERACTION),
        ClaimConfig("its own text keeps what A1 can do", f"{MAIN_EFFECT}A1", "A1", direction="preserves", margin=0.02),
        ClaimConfig(
            "its own text takes more of A1's memory than noise does",
            f"{MAIN_EFFECT}A1",
            "A1",
            comparator=NOISE,
            measure="pz",
            direction="lowers",
        ),
    ),
    prefix=20,
    steps=80,
    samples=1536,
)


def prepare_study(out: Path, scale: MicroScale, seeds: Sequence[int]) -> StudyConfig:
    """Write `out/world`, pretrain the bases in `out/bases`, and return the study.

    Finished parts are kept. Raises InputError if `out` has other content.
    """
    folder = out / "world"
    write_worlds(folder, scale)
    bases = {model.name: _pretrain(out / "bases", folder, model, scale) for model in scale.models}
    run_all(out / "bases", [stage for stages in bases.values() for stage in stages])
    models = tuple(
        ModelConfig(
            name=model.name,
            model=str(out / "bases" / bases[model.name][-1].name),
            lineage=model.lineage,
            data=" and ".join(f"world {world}" for world in model.worlds),
            data_order=f"seed {model.seed}",
            initialization=f"seed {model.seed}",
            tokenizer=f"of {' and '.join(model.tokenizer)}",
            architecture={"gpt_neox": "GPT-NeoX", "llama": "Llama"}[model.family],
            size=f"D {model.width}, L {model.layers}",
        )
        for model in scale.models
    )
    data = {model.name: model.worlds for model in scale.models}
    arms = [
        ArmConfig("learning rate 0", learning_rate=0.0),
        ArmConfig(SHUFFLED, "shuffled"),
        ArmConfig(NOISE, "noise"),
        ArmConfig("weight noise ×4", "noise", weight=4.0),
    ]
    real: list[str] = []
    for world in scale.world_ids:
        students = tuple(name for name in scale.students if data[name] == world)
        if students:
            text = str(folder / world / "more.jsonl")
            real.append(f"real text of world {world}")
            arms.append(ArmConfig(real[-1], "text", students=students, text=text))
    return StudyConfig(
        out=str(out),
        title=scale.title,
        models=models,
        students=scale.students,
        sources=scale.sources,
        arms=tuple(arms),
        claims=scale.claims,
        positive_controls=tuple(real),
        negative_controls=(SHUFFLED,),
        seeds=tuple(seeds),
        mesh=scale.mesh,
        sample=SampleConfig(samples=scale.samples, max_tokens=scale.seq_len),
        train=TrainConfig(
            steps=scale.steps,
            batch_size=scale.batch_size,
            seq_len=scale.seq_len,
            learning_rate=scale.learning_rate / 4,
            eval_every=scale.eval_every,
            eval_limit=scale.eval_limit,
            max_epochs=1.0,
        ),
        score=ScoreConfig(
            tasks=tuple(str(folder / "tasks" / f"{name}.jsonl") for name in scale.tasks),
            texts=tuple(str(folder / world / f"heldout_{world}.jsonl") for world in scale.world_ids),
        ),
        extract=ExtractConfig(
            sequences=str(folder / "probes.jsonl"),
            prefix=scale.prefix,
            suffix=scale.suffix,
            min_overlap=scale.min_overlap,
            greedy_decode=False,
        ),
    )


# Worlds on disk -------------------------------------------------------------------------------------------------


def make_worlds(config: WorldConfig) -> dict[str, World]:
    """Make worlds A and B, with the same grammar and other people."""
    items = config.seed if config.items_seed is None else config.items_seed
    return {
        "A": make_world(replace(config, items_seed=items)),
        "B": make_world(replace(config, seed=config.seed + 1_000_003, items_seed=items)),
    }


def write_worlds(folder: Path, scale: MicroScale) -> None:
    """Write texts, tasks, probes and untrained models, unless the folder has them.

    Raises:
        InputError: the folder has other content.
    """
    spec = {"format": "jax-selftrain micro-world", "version": VERSION, "scale": asdict(scale)}
    if is_up_to_date(folder, spec):
        return
    worlds = {name: world for name, world in make_worlds(scale.world).items() if name in scale.world_ids}
    with atomic.commit_folder(folder) as temporary:
        for name, world in worlds.items():
            write_jsonl(temporary / name / "documents.jsonl", _rows(world.documents))
            write_jsonl(temporary / name / f"heldout_{name}.jsonl", _rows(world.heldout))
            write_jsonl(temporary / name / "more.jsonl", _rows(world.extra_text))
        if any(model.worlds == "AB" for model in scale.models):
            mixed = _interleave(worlds["A"].documents, worlds["B"].documents)
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
                family=model.family,
                width=model.width,
                layers=model.layers,
                heads=model.heads,
                positions=2 * scale.seq_len,
            )
        atomic.write_json(temporary / "world.json", spec)


def _rows(texts: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    return ({"text": text} for text in texts)


def _interleave(one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    for pair in zip(one, other, strict=False):
        yield from pair


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


# Bases ----------------------------------------------------------------------------------------------------------


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

    def pretrain(out: Path) -> object:
        corpus = open_corpus(root / tokenized.name)
        steps = max(1, round(model.epochs * corpus.n_tokens / (scale.batch_size * scale.seq_len)))
        return train(
            TrainConfig(
                model=str(untrained),
                corpus=str(corpus.folder),
                out=str(out),
                init="scratch",
                steps=steps,
                batch_size=scale.batch_size,
                seq_len=scale.seq_len,
                learning_rate=scale.learning_rate,
                schedule="cosine",
                final_learning_rate=scale.learning_rate / 4,
                weight_decay=0.1,
                log_every=10,
                mesh=scale.mesh,
                seed=model.seed,
            )
        )

    sizes = {"batch_size": scale.batch_size, "seq_len": scale.seq_len, "learning_rate": scale.learning_rate}
    inputs: dict[str, str | Stage] = {"corpus": tokenized, "model": sha256_file(untrained / "config.json")}
    return tokenized, Stage("pretrain", f"pretrain {model.name}", {**asdict(model), **sizes}, inputs, pretrain)
