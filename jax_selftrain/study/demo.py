"""The whole story on a CPU in minutes, without any download: a little world, a model that reads it, and one round.

`OUT/world` holds the text, the questions, the probes and a blank Pythia-shaped model (a GPT-NeoX config and a tokenizer
trained on the text); `OUT/reading` the text as a corpus; `OUT/little-pythia` the model after one pass over it. This
base then goes through `study.run` in `OUT` itself: it writes texts from its start token alone, is trained on them, and
is measured before and after. Every part is made by the same functions as a real study, and is as restartable.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jax_selftrain import storage
from jax_selftrain.config import (
    DemoConfig,
    ExtractConfig,
    ImportConfig,
    RunConfig,
    SampleConfig,
    ScoreConfig,
    TrainConfig,
)
from jax_selftrain.corpus import import_text
from jax_selftrain.study.blank import START, is_written, train_tokenizer, write_blank_model, write_jsonl
from jax_selftrain.study.matrix import study
from jax_selftrain.study.microworld import MicroScale, micro_study
from jax_selftrain.study.round import run
from jax_selftrain.study.world import Probe, WorldConfig, make_world
from jax_selftrain.training import train

TITLE = "A model of a little world, trained on its own text"


@dataclass(frozen=True)
class DemoScale:
    """How much is read, written and measured; the defaults fit two CPU cores and a few minutes."""

    world: WorldConfig = field(default_factory=WorldConfig)
    """Its seed is the demo's."""
    vocabulary: int = 640
    width: int = 128
    layers: int = 2
    heads: int = 4
    row: int = 128
    """Loss positions in a training row, and the longest sample."""
    batch: int = 8
    passes: int = 3
    """How often the base reads the text."""
    learning_rate: float = 3e-3
    """Peak rate of the base's training, which falls to a tenth; that tenth is the rate of the self-training."""
    samples: int = 1024
    prefix: int = 16
    suffix: int = 16
    overlap: int = 8
    mesh: str = ""
    """Device mesh; unset: all devices on `data`."""


def demo(config: DemoConfig, scale: DemoScale | None = None, micro: MicroScale | None = None) -> Path:
    """Make the world, train the base on it, and do one self-training round in `config.out`; again: complete it.

    With `config.study`, the crossover study of six models instead (`study.microworld`). `scale` and `micro` are for
    tests.

    Returns:
        The path of the report.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    if config.study:
        _say("writing two little worlds, and teaching them to six small models")
        study(micro_study(Path(config.out), micro or MicroScale(), config.seeds))
        return Path(config.out) / "report.html"
    scale = scale or DemoScale()
    scale = replace(scale, world=replace(scale.world, seed=config.seed))
    out = Path(config.out)
    _say("writing a little world")
    write_world(out / "world", scale)
    _say("teaching it to a small model")
    base = _teach(out, scale)
    _say("one round: sample, train on the samples, measure before and after")
    run(_round(out, base, scale))
    return out / "report.html"


def _teach(out: Path, scale: DemoScale) -> Path:
    blank, reading, base = out / "world" / "blank", out / "reading", out / "little-pythia"
    corpus = import_text(
        ImportConfig(source=str(out / "world" / "documents.jsonl"), model=str(blank), out=str(reading))
    )
    return train(
        TrainConfig(
            model=str(blank),
            corpus=str(reading),
            out=str(base),
            init="scratch",
            steps=round(scale.passes * corpus.n_tokens / (scale.batch * scale.row)),
            batch_size=scale.batch,
            seq_len=scale.row,
            learning_rate=scale.learning_rate,
            schedule="cosine",
            final_learning_rate=scale.learning_rate / 10,
            weight_decay=0.1,
            log_every=10,
            mesh=scale.mesh,
            seed=scale.world.seed,
        )
    )


def _round(out: Path, base: Path, scale: DemoScale) -> RunConfig:
    world = out / "world"
    return RunConfig(
        model=str(base),
        out=str(out),
        title=TITLE,
        mesh=scale.mesh,
        sample=SampleConfig(samples=scale.samples, max_tokens=scale.row, seed=scale.world.seed),
        train=TrainConfig(
            batch_size=scale.batch, seq_len=scale.row, learning_rate=scale.learning_rate / 10, seed=scale.world.seed
        ),
        score=ScoreConfig(
            tasks=tuple(str(world / "tasks" / f"{name}.jsonl") for name in ("facts", "agreement", "sums")),
            texts=(str(world / "heldout.jsonl"),),
        ),
        extract=ExtractConfig(
            sequences=str(world / "probes.jsonl"), prefix=scale.prefix, suffix=scale.suffix, overlap=scale.overlap
        ),
    )


# The world on disk ----------------------------------------------------------------------------------------------


def write_world(folder: Path, scale: DemoScale) -> None:
    """Write the world's text, questions, probes and blank model into `folder`, or find just them there.

    Raises:
        InputError: the folder holds something else.
    """
    wanted = {"format": "jax-selftrain demo", "version": 1, "scale": asdict(scale)}
    if is_written(folder, wanted, "demo"):
        return
    world = make_world(scale.world)
    with storage.commit_folder(folder) as aside:
        write_jsonl(aside / "documents.jsonl", ({"text": text} for text in world.documents))
        write_jsonl(aside / "heldout.jsonl", ({"text": text} for text in world.heldout))
        for name, questions in world.tasks.items():
            write_jsonl(aside / "tasks" / f"{name}.jsonl", (asdict(question) for question in questions))
        tokenizer = train_tokenizer([world], scale.vocabulary)
        write_blank_model(
            aside / "blank",
            tokenizer,
            width=scale.width,
            layers=scale.layers,
            heads=scale.heads,
            positions=2 * scale.row,
        )
        write_jsonl(aside / "probes.jsonl", _sequences(world.probes, tokenizer, scale.prefix + scale.suffix))
        storage.write_json(aside / "world.json", wanted)


def _sequences(probes: Sequence[Probe], tokenizer: Any, length: int) -> Iterable[Mapping[str, Any]]:
    """The extraction set: probes and their twins with the token that stands before them in the text.

    A group is a number of copies; the twins, which stand nowhere, are the last one.
    """
    (start,) = tokenizer.encode(START).ids
    (newline,) = tokenizer.encode("\n").ids
    for shown in (True, False):
        for probe in probes:
            text = probe.text if shown else probe.twin
            tokens = [start if probe.placement == "start" else newline, *tokenizer.encode(text).ids]
            if len(tokens) < length:
                raise ValueError(f"a probe has only {len(tokens)} of {length} tokens: give probes more words")
            group = f"shown {probe.copies}×" if shown else "never shown"
            yield {"tokens": tokens[:length], "group": group, "text": text}


def _say(text: str) -> None:
    """Tell a person at a terminal what is going on."""
    if sys.stderr.isatty():
        print(f"jax-selftrain demo: {text}", file=sys.stderr, flush=True)
