"""Checks of arms and of memorization measurements before a study starts."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from jax_selftrain import evals, hub
from jax_selftrain.config import ArmConfig, ExtractConfig, StudyConfig
from jax_selftrain.config.metadata import applicable_kinds, shared_overrides
from jax_selftrain.errors import InputError
from jax_selftrain.evals.sequence_files import holds_text
from jax_selftrain.evals.sequences import ExtractionSet
from jax_selftrain.study.measure_names import AFTER_RELEARNING, MAIN_EFFECT, UNSEEN
from jax_selftrain.study.preregistration import refuse_first


def check_arm(arm: ArmConfig, config: StudyConfig) -> None:
    """Refuse options that an arm cannot have. Raises InputError."""
    kind, weight = arm.kind, arm.weight
    halves, noise = kind in ("decontaminated", "size_matched"), 1.0 if weight is None else weight
    has_text, is_mixed = kind in ("text", "mixture"), kind == "mixture"
    problems = {
        f"names of main cells begin with {MAIN_EFFECT!r}; choose another name": arm.name.startswith(MAIN_EFFECT),
        "`text` names the file of an arm of kind `text` or `mixture`, and of no other kind": has_text != bool(arm.text),
        f"`share` is {arm.share}; a mixture needs a share of real text above 0 and below 1": is_mixed
        and not 0 < (arm.share or 0) < 1,
        "a mixture is trained for as many steps as own text; set train.steps instead of train.epochs": is_mixed
        and config.train.epochs is not None,
        "an arm of kind `extrapolate` needs its `weight`": kind == "extrapolate" and weight is None,
        f"the weight of noise is {weight}; it must be a positive number": kind == "noise" and not 0 < noise < math.inf,
        f"kind `{kind}` needs extract.sequences; half of them are held out": halves and not config.extract.sequences,
    }
    for field in fields(arm):
        kinds = applicable_kinds(ArmConfig, field.name) or (kind,)
        problem = f"`{field.name}` does not apply to an arm of kind `{kind}`; remove it"
        problems[problem] = kind not in kinds and getattr(arm, field.name) != field.default
    refuse_first(f"arms: {arm.name}", problems)


def check_memorization(config: StudyConfig) -> None:
    """Refuse incomplete or conflicting measurements of memorization. Raises InputError."""
    options, default = config.memorization, StudyConfig().memorization
    if not config.extract.sequences:
        if replace(options, aa_repeat=default.aa_repeat) != default:
            raise InputError("memorization: needs extract.sequences; set it, or leave the section out")
        return
    names = [form.name for form in options.formats]
    for form in options.formats:
        if not form.name or names.count(form.name) > 1 or form.name.startswith((AFTER_RELEARNING, UNSEEN)):
            raise InputError(f"memorization.formats: each needs a unique `name` ({form.name or 'one has none'})")
        if not shared_overrides(form, ExtractConfig):
            changeable = ", ".join(field.name for field in fields(form) if field.name != "name")
            raise InputError(f"memorization.formats: {form.name}: changes nothing; set one of {changeable}")
    evals.load_texts(readable_texts(config, [options.unseen_text] if options.unseen_text else []))
    if not options.relearn_steps or len({*options.relearn_steps}) < len(options.relearn_steps):
        raise InputError(f"memorization.relearn_steps {list(options.relearn_steps)}: give each number of steps once")
    if options.relearn_corpus.endswith(".jsonl") and not Path(options.relearn_corpus).is_file():
        raise InputError(f"memorization.relearn_corpus {options.relearn_corpus}: no such file")


def readable_texts(config: StudyConfig, texts: Sequence[str]) -> list[str]:
    """Return the texts to check: a dry run downloads no data sets."""
    return [text for text in texts if not (config.dry_run and hub.parse_dataset_split(text))]


def require_text(extract: ExtractConfig) -> None:
    """Refuse token ids, which are different texts to different tokenizers.

    Raises InputError.
    """
    if not holds_text(extract.sequences, extract.column):
        raise InputError(
            f"extract.sequences {extract.sequences}: the students have different tokenizers, for which token ids are "
            "different texts; give a set with `text`"
        )


def check_relearned_half(config: StudyConfig, found: ExtractionSet) -> None:
    """Refuse a set that is too small to divide H. Raises InputError."""
    if config.memorization.relearn_sequences:
        fingerprint = evals.sequences_fingerprint(config.extract.sequences)
        if not all(half.any() for half in evals.relearned_halves(fingerprint, found.sequence_id)):
            raise InputError(
                f"memorization.relearn_sequences: {config.extract.sequences} has only {len(found.tokens)} sequences, "
                "too few for two halves of H; give more"
            )
