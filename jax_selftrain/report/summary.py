"""The first screen of the report: design, answers and a caution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.chapters.claims_chapter import describe_claim, describe_evidence
from jax_selftrain.report.formatting import Results
from jax_selftrain.report.page import Summary
from jax_selftrain.report.tables import format_number
from jax_selftrain.stats.noninferiority import HEADLINE
from jax_selftrain.study.measure_names import MAIN_EFFECT, display_scale, main_measure

Card = tuple[str, str, str]
PILOT_SEEDS = 100
"""Seeds below this are for pilots."""


def write_summary(results: Results) -> Summary:
    """Return the first screen."""
    counts = {
        "source": results["design"]["sources"],
        "student": results["design"]["students"],
        "arm": results["config"]["arms"],
        "seed": results["config"]["seeds"],
    }
    parts = [_count(len(members), name) for name, members in counts.items()]
    kind = f"{', '.join(parts)}: {_count(len(results['cells']), 'cell')}."
    cards = [*_claim_cards(results), *_effect_cards(results), *_interaction_cards(results)]
    return Summary(kind, _describe_run(results), cards, _describe_evidence(results))


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _describe_run(results: Results) -> str:
    """Describe sampling and training in one paragraph."""
    train = results["config"]["train"]
    if len(results["cells"]) > 1:
        steps = max((cell["training"]["steps"] for cell in results["cells"] if cell["training"]), default=0)
        return (
            f"Each student was trained for {steps:,} steps of {train['batch_size']:,} rows on text that a source "
            "sampled from the BOS token alone, and was measured before and after."
        )
    (cell,) = results["cells"]
    corpus, training = results["corpora"][cell["corpus"]], cell["training"]
    student = f"<strong>{escape(cell['student'])}</strong>"
    source = student if cell["source"] == cell["student"] else f"<strong>{escape(cell['source'])}</strong>"
    targets = f", {training['targets']:,} target tokens" if training["targets"] else ""
    start = " from random initialization" if train["init"] == "scratch" else ""
    return (
        f"{source} sampled {corpus['samples']:,} texts from the BOS token alone ({_describe_sampling(corpus)}): "
        f"{corpus['tokens']:,} tokens. {student} was trained on them{start}: {training['steps']:,} steps{targets}, "
        f"learning rate {train['learning_rate']:g} ({escape(train['schedule'])}). It was measured before and after."
    )


def _describe_sampling(corpus: Mapping[str, Any]) -> str:
    params = corpus["sampling_params"]
    if params is None:
        return "sampling parameters unknown"
    off = {"top_k": 0, "top_p": 1, "min_p": 0}
    parts = [f"temperature {params['temperature']:g}"]
    parts += [f"{name.replace('_', '-')} {params[name]:g}" for name, value in off.items() if params[name] != value]
    return ", ".join([*parts, f"at most {params['max_tokens']:,} tokens each"])


def _claim_cards(results: Results) -> Iterator[Card]:
    for claim in results["claims"]:
        text = f"Claim: {escape(describe_claim(claim))}. {escape(claim['reason'])}"
        yield f"{claim['name']} ({describe_evidence(claim)})", claim["verdict"], text


def _effect_cards(results: Results) -> Iterator[Card]:
    """Show the main measures of one effect, or one per student."""
    effects = results["effects"]
    if len(effects) == 1:
        (effect,) = effects
        capability = "accuracy" if "accuracy" in effect["measures"] else "task/"
        for name, entry in effect["measures"].items():
            if name.startswith((capability, "text/")) or name == "exact_match":
                yield _effect_card(fmt.format_measure(name), name, entry)
        return
    main = main_measure(results)
    for effect in effects:
        if effect["treatment"] == f"{MAIN_EFFECT}{effect['student']}":
            title = f"{effect['student']}, trained on its own text: {fmt.format_measure(main)}"
            yield _effect_card(title, main, effect["measures"][main])


def _effect_card(title: str, measure: str, entry: Mapping[str, Any]) -> Card:
    change, seeds = fmt.parse_change(entry), entry["change"]["n"]
    levels = [
        format_number(display_scale(measure) * level, fmt.get_decimals(measure))
        for level in (entry["before"], entry["before"] + change.value)
    ]
    over = f"{seeds} seeds" if seeds > 1 else f"{entry['items']:,} items of one pair of checkpoints"
    difference, interval = fmt.format_change(change, measure)
    text = f"{difference}, 95 % interval over {over}: {interval}. {fmt.describe_zero(change)}"
    return title, f'<span class="was">{levels[0]} →</span> {levels[1]}', text


def _interaction_cards(results: Results) -> Iterator[Card]:
    if results["interaction"] is None:
        return
    main = main_measure(results)
    contrast = fmt.parse_estimate(results["interaction"]["measures"][main]["contrast"])
    difference, interval = fmt.format_change(contrast, main)
    text = f"{escape(fmt.format_measure(main))}, 95 % interval over {_count(contrast.n, 'seed')}: {interval}. "
    yield (
        "Home − away: is text of its own lineage better for a student?",
        difference,
        text + fmt.describe_zero(contrast),
    )


def _describe_evidence(results: Results) -> str:
    """Describe the weight of the evidence."""
    seeds, claims = results["config"]["seeds"], results["claims"]
    text = "No claims were declared, so there are no verdicts: all results are exploratory."
    if claims:
        counts = Counter(claim["verdict"] for claim in claims)
        verdicts = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        text = f"{_count(len(claims), 'claim')}: {verdicts}. All other results are exploratory."
    if len(seeds) < HEADLINE:
        text += f" {_count(len(seeds), 'seed')}: a verdict needs {HEADLINE}."
    text = f"<strong>{text}</strong>"
    if len(seeds) == 1:
        text += (
            " Intervals are 95 % over documents, questions or sequences of one pair of checkpoints. The variation over "
            "samples and training order can be larger."
        )
    if len(results["effects"]) == 1:
        text += " There is no control arm: a change is not necessarily the effect of this text."
    return text + (" Seeds below 100 are for pilots." if min(seeds) < PILOT_SEEDS else "")
