"""The micro-world: two worlds and six small models whose whole history is known, for a study of who learns from whom.

| model | reads | what it is |
|---|---|---|
| A1 | world A | a small Pythia |
| A2 | world A | another size |
| A1′ | world A | A1 with other first weights and another order |
| B1 | world B | as A1; its world shares A's grammar and arithmetic and has other people, facts and probes |
| S | worlds A and B | larger, more text |
| C1 | world A | another tokenizer and architecture (Llama) |

All are trained from scratch by `training` itself. A1, B1 and C1 are the students. The panel asks for facts (and facts
behind facts) of each world, agreement and sums; the extraction set holds the probes of each world as text, by how often
they were shown, and their twins that no model ever saw. `CROSSOVER` is that study; `ROUND` is A1 alone with the arms
that tell what its own text does from what any training does.
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
"""Arms that claims speak of."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that is to be trained from scratch."""

    name: str
    worlds: str
    """`A`, `B`, or `AB`."""
    family: Literal["gpt_neox", "llama"] = "gpt_neox"
    tokenizer: str = "AB"
    """Trained on the text of these worlds: `AB` is everybody's but C1's."""
    width: int = 128
    layers: int = 2
    heads: int = 4
    epochs: float = 1.3
    seed: int = 0

    @property
    def lineage(self) -> str:
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
    """How much is read, written and measured."""

    title: str
    world: WorldConfig
    readers: tuple[ModelSpec, ...]
    students: tuple[str, ...]
    sources: tuple[str, ...]
    claims: tuple[ClaimConfig, ...] = ()
    """What is claimed before anything is run; judged where there are five seeds."""
    vocabulary: int = 640
    row: int = 128
    """Loss positions in a training row, and the longest sample."""
    batch: int = 4
    learning_rate: float = 3e-3
    """Peak rate of the bases' training, which falls to a quarter; with that quarter the self-training goes on."""
    samples: int = 2304
    steps: int = 120
    eval_every: int = 40
    eval_limit: int = 120
    """Questions, documents and sequences of each file that are measured on the way."""
    prefix: int = 24
    suffix: int = 8
    overlap: int = 8
    mesh: str = ""

    @property
    def world_ids(self) -> str:
        """The worlds that somebody reads."""
        return "".join(sorted({mark for reader in self.readers for mark in reader.worlds}))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the task files: what all worlds share, then what each has for itself."""
        own = ("facts", "two_hop") if self.world.two_hop else ("facts",)
        return ("agreement", "sums", *(f"{task}_{mark}" for task in own for mark in self.world_ids))


ROUND_SCALE = MicroScale(
    title="A model of a little world, trained on its own text",
    world=WorldConfig(),
    readers=(ModelSpec("A1", "A", tokenizer="A", epochs=2.1),),
    students=("A1",),
    sources=("A1",),
)
CROSSOVER_SCALE = MicroScale(
    title="Six models of two little worlds: whose text can they learn from?",
    world=WorldConfig(
        people=170, two_hop=True, agreement_lines=8_000, sum_lines=30_000, probes_per_level=100, probe_words=10
    ),
    readers=MODELS,
    students=("A1", "B1", "C1"),
    sources=tuple(reader.name for reader in MODELS),
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
    """Write the worlds into `out/world`, train the bases in `out/bases`, and return the study on them.

    Run again, it finds what is there. Raises InputError where `out` holds something else.
    """
    folder = out / "world"
    write_worlds(folder, scale)
    bases = {reader.name: _pretrain(out / "bases", folder, reader, scale) for reader in scale.readers}
    run_all(out / "bases", [stage for stages in bases.values() for stage in stages])
    models = tuple(
        ModelConfig(
            name=reader.name,
            model=str(out / "bases" / bases[reader.name][-1].name),
            lineage=reader.lineage,
            data=" and ".join(f"world {world}" for world in reader.worlds),
            data_order=f"seed {reader.seed}",
            initialization=f"seed {reader.seed}",
            tokenizer=f"of {' and '.join(reader.tokenizer)}",
            architecture={"gpt_neox": "GPT-NeoX", "llama": "Llama"}[reader.family],
            size=f"D {reader.width}, L {reader.layers}",
        )
        for reader in scale.readers
    )
    reads = {reader.name: reader.worlds for reader in scale.readers}
    arms = [
        ArmConfig("learning rate 0", learning_rate=0.0),
        ArmConfig(SHUFFLED, "shuffled"),
        ArmConfig(NOISE, "noise"),
        ArmConfig("weight noise ×4", "noise", weight=4.0),
    ]
    real: list[str] = []
    for world in scale.world_ids:
        readers = tuple(name for name in scale.students if reads[name] == world)
        if readers:
            text = str(folder / world / "more.jsonl")
            real.append(f"real text of world {world}")
            arms.append(ArmConfig(real[-1], "text", students=readers, text=text))
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
        sample=SampleConfig(samples=scale.samples, max_tokens=scale.row),
        train=TrainConfig(
            steps=scale.steps,
            batch_size=scale.batch,
            seq_len=scale.row,
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
            min_overlap=scale.overlap,
            greedy_decode=False,
        ),
    )


# The worlds on disk ---------------------------------------------------------------------------------------------


def worlds_of(config: WorldConfig) -> dict[str, World]:
    """Worlds A and B: one grammar and one arithmetic, two peoples."""
    items = config.seed if config.items_seed is None else config.items_seed
    return {
        "A": make_world(replace(config, items_seed=items)),
        "B": make_world(replace(config, seed=config.seed + 1_000_003, items_seed=items)),
    }


def write_worlds(folder: Path, scale: MicroScale) -> None:
    """Write texts, questions, probes and blank models into `folder`, or find just them there.

    Raises:
        InputError: the folder holds something else.
    """
    wanted = {"format": "jax-selftrain micro-world", "version": 2, "scale": asdict(scale)}
    if is_up_to_date(folder, wanted, "micro-world"):
        return
    worlds = {mark: world for mark, world in worlds_of(scale.world).items() if mark in scale.world_ids}
    with atomic.commit_folder(folder) as aside:
        for name, world in worlds.items():
            write_jsonl(aside / name / "documents.jsonl", _rows(world.documents))
            write_jsonl(aside / name / f"heldout_{name}.jsonl", _rows(world.heldout))
            write_jsonl(aside / name / "more.jsonl", _rows(world.extra_text))
        if any(reader.worlds == "AB" for reader in scale.readers):
            mixed = _interleave(worlds["A"].documents, worlds["B"].documents)
            write_jsonl(aside / "AB" / "documents.jsonl", _rows(mixed))
        for task in scale.tasks:
            kind, _, mark = task.rpartition("_") if task[-1] in scale.world_ids else (task, "", scale.world_ids[0])
            write_jsonl(aside / "tasks" / f"{task}.jsonl", map(asdict, worlds[mark].tasks[kind]))
        write_jsonl(aside / "probes.jsonl", _probes(worlds))
        tokenizers = {
            marks: train_tokenizer([worlds[mark] for mark in marks], scale.vocabulary)
            for marks in dict.fromkeys(reader.tokenizer for reader in scale.readers)
        }
        for reader in scale.readers:
            write_untrained_model(
                aside / "blank" / reader.name,
                tokenizers[reader.tokenizer],
                family=reader.family,
                width=reader.width,
                layers=reader.layers,
                heads=reader.heads,
                positions=2 * scale.row,
            )
        atomic.write_json(aside / "world.json", wanted)


def _rows(texts: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    return ({"text": text} for text in texts)


def _interleave(one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    for pair in zip(one, other, strict=False):
        yield from pair


def _probes(worlds: Mapping[str, World]) -> list[Mapping[str, Any]]:
    """The extraction set, as text: each probe and each twin after what stands before it in a document.

    That is the start, or the start and a line: a sum of the held-out text, short, so that the prefix ends well inside
    the probe. A group is a number of copies in
    a world. The order is random, so that the first few are as good as any.
    """
    found: list[Mapping[str, Any]] = []
    for shown in (True, False):
        for name, world in worlds.items():
            lines = itertools.cycle(line for text in world.heldout for line in text.split("\n") if " = " in line)
            for probe, line in zip(world.probes, lines, strict=False):
                group = f"{name}, shown {probe.repetitions}×" if shown else f"{name}, never shown"
                before = BOS_TOKEN if probe.placement == "start" else f"{BOS_TOKEN}{line}\n"
                found.append({"text": before + (probe.text if shown else probe.counterfactual), "group": group})
    random.Random(f"jax_selftrain probes of {' '.join(worlds)}").shuffle(found)
    return found


# The bases ------------------------------------------------------------------------------------------------------


def _pretrain(root: Path, world: Path, reader: ModelSpec, scale: MicroScale) -> tuple[Stage, Stage]:
    """The stages that make a base: its text in its tokens, and its training."""
    blank, text = world / "blank" / reader.name, world / reader.worlds / "documents.jsonl"
    marks = {"text": sha256_file(text), "tokenizer": sha256_file(blank / "tokenizer.json")}
    reading = Stage(
        "import",
        f"the text of world {reader.worlds} in the tokens of {reader.name}",
        {},
        marks,
        lambda out: import_text(ImportCorpusConfig(source=str(text), model=str(blank), out=str(out))),
    )

    def teach(out: Path) -> object:
        corpus = open_corpus(root / reading.name)
        steps = max(1, round(reader.epochs * corpus.n_tokens / (scale.batch * scale.row)))
        return train(
            TrainConfig(
                model=str(blank),
                corpus=str(corpus.folder),
                out=str(out),
                init="scratch",
                steps=steps,
                batch_size=scale.batch,
                seq_len=scale.row,
                learning_rate=scale.learning_rate,
                schedule="cosine",
                final_learning_rate=scale.learning_rate / 4,
                weight_decay=0.1,
                log_every=10,
                mesh=scale.mesh,
                seed=reader.seed,
            )
        )

    recipe = {**asdict(reader), "batch": scale.batch, "row": scale.row, "learning_rate": scale.learning_rate}
    inputs: dict[str, str | Stage] = {"corpus": reading, "blank": sha256_file(blank / "config.json")}
    return reading, Stage("teach", f"teach {reader.name}", recipe, inputs, teach)
