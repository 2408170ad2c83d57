"""First screen of the report: what was done, and what changed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from jax_selftrain.report import figures
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.chapters.design_chapters import describe_claim, describe_evidence
from jax_selftrain.report.formatting import Record, Results, format_interval, format_number, parse_estimate
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.stats.noninferiority import HEADLINE
from jax_selftrain.study.measure_names import MAIN_EFFECT, display_scale, main_measure
from jax_selftrain.study.registration import PILOT_SEEDS

MAX_ROWS = 24
"""Largest number of treatments in the figure of the first screen."""


@dataclass(frozen=True)
class Card:
    """A measure with its change."""

    title: str
    value: str
    """HTML."""
    text: str


@dataclass(frozen=True)
class Verdict:
    """Verdict of a claim."""

    verdict: str
    name: str
    text: str


@dataclass(frozen=True)
class Summary:
    """Content of the first screen."""

    title: str
    kind: str
    paragraphs: list[str]
    """HTML."""
    figure: figures.Svg | None
    figure_html: str
    cards: list[Card]
    verdicts: list[Verdict]
    caution: str
    """HTML."""


def summarize_study(results: Results) -> Summary:
    """Return the content of the first screen."""
    counts = {
        "source": results["design"]["sources"],
        "student": results["design"]["students"],
        "arm": results["config"]["arms"],
        "seed": results["config"]["seeds"],
    }
    parts = [_count(len(members), name) for name, members in counts.items()]
    figure, caption = _plot_overview(results)
    return Summary(
        title=results["title"],
        kind=f"{', '.join(parts)}: {_count(len(results['cells']), 'cell')}.",
        paragraphs=[_describe_run(results), *_describe_outcomes(results)],
        figure=figure,
        figure_html="" if figure is None else fmt.figure_html(figure, caption),
        cards=[*_make_cards(results)],
        verdicts=[*_list_verdicts(results)],
        caution=_describe_evidence(results),
    )


def _plot_overview(results: Results) -> tuple[figures.Svg | None, str]:
    """Plot the main measure by treatment; None for one or many."""
    main, matrix = main_measure(results), fmt.select_matrix(results)
    effects = [one for one in (matrix if len(matrix) > 1 else results["effects"]) if main in one["measures"]]
    if not 1 < len(effects) <= MAX_ROWS:
        return None, ""
    several = len(results["design"]["students"]) > 1
    entries = {
        f"{one['student']}, {one['treatment']}" if several else one["treatment"]: one["measures"][main]
        for one in effects
    }
    styles = figures.assign_styles(entries, fmt.list_treatments(results))
    seeds = len(results["config"]["seeds"])
    over = f"over {seeds} seeds, with a dot for each" if seeds > 1 else "over items, of one pair of checkpoints"
    caption = f"Change of {fmt.format_measure(main)} after training, by treatment, with 95 % intervals {over}."
    return figures.plot_effects("overview", entries, main, styles), caption


def _describe_outcomes(results: Results) -> Iterator[str]:
    """Describe in words what own text and the best other treatment did."""
    main, effects = main_measure(results), results["effects"]
    if len(effects) < 2 or main not in ("accuracy", "log_odds"):
        return
    for student in results["design"]["students"]:
        own = {one["treatment"]: one["measures"] for one in effects if one["student"] == student}
        measures = own.pop(f"{MAIN_EFFECT}{student}", None)
        if measures is None:
            continue
        unit = " points of accuracy, where 0 is chance and 100 is all correct" if main == "accuracy" else " nats"
        text = f"Trained on its own text, <strong>{escape(student)}</strong> changed by {_tell(measures, main)}{unit}"
        if "exact_match" in measures:
            items = measures["exact_match"]["items"]
            text += f"; of {items:,} sequences, the share that it reproduces changed by "
            text += f"{_tell(measures, 'exact_match')} points"
        texts = {cell["treatment"] for cell in results["cells"] if cell["training"] and not cell["identical"]}
        others = [name for name in own if name in texts]
        if others:
            best = max(others, key=lambda name: own[name][main]["change"]["value"])
            text += f". The best of {_count(len(others), 'other treatment')} with text, "
            text += f"{escape(best.removeprefix(MAIN_EFFECT))}: {_tell(own[best], main)}"
        yield text + "."


def _tell(measures: Record, measure: str) -> str:
    """Return a change with its interval."""
    change = fmt.parse_change(measures[measure], measure)
    return f"{format_number(change.value, 1, signed=True)} {format_interval(change, 1, signed=True)}"


def _list_verdicts(results: Results) -> Iterator[Verdict]:
    for claim in results["claims"]:
        text = f"{describe_claim(claim)}; {claim['reason']} ({describe_evidence(claim)})"
        yield Verdict(claim["verdict"], claim["name"], text)


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


def _describe_sampling(corpus: Record) -> str:
    params = corpus["sampling_params"]
    if params is None:
        return "sampling parameters unknown"
    off = {"top_k": 0, "top_p": 1, "min_p": 0}
    parts = [f"temperature {params['temperature']:g}"]
    parts += [f"{name.replace('_', '-')} {params[name]:g}" for name, value in off.items() if params[name] != value]
    return ", ".join([*parts, f"at most {params['max_tokens']:,} tokens each"])


def _make_cards(results: Results) -> Iterator[Card]:
    """Show main measures and relations of source and student."""
    main, effects = main_measure(results), results["effects"]
    if len(effects) == 1:
        measures = effects[0]["measures"]
        capability = "accuracy" if "accuracy" in measures else "task/"
        for name in measures:
            if name.startswith((capability, "text/")) or name == "exact_match":
                yield _effect_card(fmt.format_measure(name), name, measures[name])
    for relation in (results["relations"] or {"contrasts": ()})["contrasts"]:
        if not relation["student"] and main in relation["measures"]:
            contrast = parse_estimate(relation["measures"][main]["contrast"], main)
            difference, text = _describe_change(contrast, main, _count(contrast.n, "seed"))
            title = f"Whose text: {fmt.format_contrast(relation['contrast'])}"
            yield Card(title, difference, f"{fmt.format_measure(main)}, {text}")


def _effect_card(title: str, measure: str, entry: Record) -> Card:
    seeds = entry["change"]["n"]
    before = display_scale(measure) * entry["before"]
    after = display_scale(measure) * (entry["before"] + entry["change"]["value"])
    was, now = (format_number(level, fmt.get_decimals(measure)) for level in (before, after))
    over = f"{seeds} seeds" if seeds > 1 else f"{entry['items']:,} items of one pair of checkpoints"
    difference, text = _describe_change(fmt.parse_change(entry, measure), measure, over)
    return Card(title, f'<span class="was">{was} →</span> {now}', f"{difference}, {text}")


def _describe_change(change: Estimate, measure: str, over: str) -> tuple[str, str]:
    """Return a change in display units, and a sentence about its interval."""
    digits, zero = fmt.get_decimals(measure), ""
    if change.low is not None and change.high is not None:
        zero = "The interval includes zero." if change.low <= 0 <= change.high else "The interval excludes zero."
    interval = format_interval(change, digits, signed=True)
    return format_number(change.value, digits, signed=True), f"95 % interval over {over}: {interval}. {zero}"


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
    return text + (" Seeds 0 to 9 are for pilots." if min(seeds) in PILOT_SEEDS else "")
