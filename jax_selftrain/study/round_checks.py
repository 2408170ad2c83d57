"""What can be known to be wrong with a round before it starts: said at once, not after hours of sampling."""

from __future__ import annotations

import jax

from jax_selftrain import evals, hub, likelihood, sampling, training
from jax_selftrain.config import RunConfig, ScoreConfig, TrainConfig, yaml_io
from jax_selftrain.corpus import open_corpus, parse_mixture
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.errors import InputError
from jax_selftrain.evals.score import check_batch
from jax_selftrain.study.eval_hooks import evaluation_hooks
from jax_selftrain.study.round_config import ROUND_DECIDES, RoundStages, resolve_round


def check_round(config: RunConfig) -> None:
    """Read configs, tokenizers, tasks, texts and sequences of all stages; load no weights and write nothing.

    Raises:
        InputError: the first thing that is missing, unreadable or does not fit.
    """
    yaml_io.require(config, "model", "out")
    _reject_owned_options(config)
    if not (config.score.tasks or config.score.texts or config.extract.sequences):
        raise InputError("nothing to measure: set score.tasks, score.texts or extract.sequences")
    _check_tokenizers(config)
    plan = resolve_round(config)
    sampling.abstract_program(plan.sample, make_mesh(plan.sample.mesh, devices=jax.local_devices()))
    _check_training(plan.train)
    if config.score.tasks or config.score.texts:
        _check_scoring(plan.score_base)
    if config.extract.sequences:
        _check_extraction(plan)


def _reject_owned_options(config: RunConfig) -> None:
    for section, names in ROUND_DECIDES.items():
        for name in names:
            if getattr(getattr(config, section), name):
                top = "source" if (section, name) == ("sample", "model") else "model" if name == "model" else "out"
                raise InputError(f"{section}.{name} is decided by the round; leave it out, and set `{top}` at the top")


def _check_tokenizers(config: RunConfig) -> None:
    hub.model_fingerprint(config.model)
    student = hub.tokenizer_fingerprint(config.model)
    if not config.source:
        return
    hub.model_fingerprint(config.source)
    if hub.tokenizer_fingerprint(config.source) != student:
        raise InputError(
            f"{config.source} and {config.model} have different tokenizers, and a corpus cannot be carried from one to "
            "the other yet; choose a source with the student's tokenizer"
        )


def _check_training(config: TrainConfig) -> None:
    training.check_ranges(config)
    model, _ = hub.read_config(config.model)
    if config.seq_len > model.max_positions:
        raise InputError(
            f"train.seq_len {config.seq_len}: {config.model} has only {model.max_positions} positions; shorten the rows"
        )
    for folder, _ in parse_mixture(config.mixture):
        open_corpus(folder, tokenizer_fingerprint=hub.tokenizer_fingerprint(config.model))
    training.abstract_program(config, make_mesh(config.mesh))
    training.check_hooks(config, evaluation_hooks(config))
    training.check_tracking(config.wandb)


def _check_scoring(config: ScoreConfig) -> None:
    limits = {"limit": config.limit, "text_limit": config.text_limit, "text_max_tokens": config.text_max_tokens}
    check_batch(config.batch_tokens, **limits)
    tasks, texts = evals.load_tasks(config.tasks, config.limit), evals.load_texts(config.texts, config.text_limit)
    evals.paths_by_name(tasks, texts)
    likelihood.scoring_program(config, make_mesh(config.mesh))


def _check_extraction(plan: RoundStages) -> None:
    evals.load_extraction_sets(plan.extract_base)
