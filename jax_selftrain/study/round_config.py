"""The options of each stage of a round, with the round's models, folders, mesh and type filled in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax_selftrain import evals
from jax_selftrain.config import ExtractConfig, RunConfig, SampleConfig, ScoreConfig, TrainConfig

ROUND_DECIDES = {
    "sample": ("model", "out"),
    "train": ("model", "corpus", "out"),
    "score": ("model", "out"),
    "extract": ("model", "corpus", "out"),
}
"""Options of the stages that are the round's: setting them in its configuration is an error."""


@dataclass(frozen=True)
class RoundStages:
    """What every stage of one round is called with."""

    sample: SampleConfig
    train: TrainConfig
    score_base: ScoreConfig
    score_student: ScoreConfig
    extract_base: ExtractConfig
    extract_student: ExtractConfig


def resolve_round(config: RunConfig) -> RoundStages:
    """Hand the round's options down to its stages; a stage's own mesh wins over the round's, the round's dtype wins.

    Where training evaluates on the way and names nothing to evaluate, it measures what the round measures.
    """
    out = Path(config.out)

    def shared(section: Any) -> dict[str, Any]:
        return {"mesh": section.mesh or config.mesh, "dtype": config.dtype or section.dtype}

    base, student, corpus = config.model, str(out / "train"), str(out / "corpus")
    score, extract = replace(config.score, **shared(config.score)), replace(config.extract, **shared(config.extract))
    train = replace(config.train, model=base, corpus=corpus, out=student, **shared(config.train))
    train = with_default_evals(train, score, extract)
    return RoundStages(
        sample=replace(config.sample, model=config.source or base, out=corpus, **shared(config.sample)),
        train=train,
        score_base=replace(score, model=base, out=str(out / "score" / "base.json")),
        score_student=replace(score, model=student, out=str(out / "score" / "student.json")),
        extract_base=replace(extract, model=base, corpus=corpus, out=str(out / "extract" / "base.json")),
        extract_student=replace(
            extract,
            model=student,
            corpus=corpus,
            out=str(out / "extract" / "student.json"),
            base=extract.base or (base if extract.verify else ""),
        ),
    )


def with_default_evals(train: TrainConfig, score: ScoreConfig, extract: ExtractConfig) -> TrainConfig:
    """The training options, measuring what is measured afterwards if they evaluate but name nothing to evaluate."""
    if train.eval_every is None or train.eval_texts or train.eval_tasks or train.eval_sequences:
        return train
    window = evals.make_window(extract)
    return replace(
        train,
        eval_texts=score.texts,
        eval_tasks=score.tasks,
        eval_sequences=extract.sequences,
        eval_prefix=window.prefix,
        eval_suffix=window.suffix,
    )
