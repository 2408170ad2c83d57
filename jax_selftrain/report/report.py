"""Report of a study or a run: page, figures and tables.

`results.json` is the only input: the same results give the same bytes. Each number has its sample size and interval.
The page needs no network and no script.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.hub.model_ref import MANIFEST, MODEL_CARD
from jax_selftrain.io import atomic
from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.chapters import (
    capability_chapters,
    design_chapters,
    generation_chapters,
    memorization_chapters,
)
from jax_selftrain.report.chapters.design_chapters import describe_claim, describe_evidence
from jax_selftrain.report.formatting import Chapter, Record, Results, format_interval, format_number, parse_estimate
from jax_selftrain.report.push import describe_model
from jax_selftrain.stats.estimators import Estimate
from jax_selftrain.stats.noninferiority import HEADLINE
from jax_selftrain.study.measure_names import MAIN_EFFECT, display_scale, main_measure
from jax_selftrain.study.registration import PILOT_SEEDS
from jax_selftrain.study.results import load_results

Card = tuple[str, str, str]
"""Title (plain text), value and sentence of an answer (HTML)."""
CHAPTERS = (
    *(design_chapters.write_claims, design_chapters.write_design),
    *(capability_chapters.write_source_matrix, capability_chapters.write_capability),
    *(capability_chapters.write_perplexity, memorization_chapters.write_decoupling),
    *(memorization_chapters.write_memorization, capability_chapters.write_proxies),
    *(capability_chapters.write_response_surface, generation_chapters.write_generations),
    *(design_chapters.write_training, design_chapters.write_corpora, design_chapters.write_samples),
    *(design_chapters.write_limits, design_chapters.write_provenance),
)


def write_report(folder: atomic.PathLike) -> Path:
    """Write `report.html`, `figures/*.svg` and `tables/*.csv` from `results.json`.

    The card of a run's model gets its measured changes.

    Returns the path of `report.html`. Raises InputError if the folder has no results, or those of another version.
    """
    folder = Path(folder)
    path = folder / "results.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the output folder of `jax-selftrain run` or `study`")
    if not path.exists():
        reason = "is not finished" if (folder / "config.yaml").exists() else "is not the folder of a run or study"
        raise InputError(f"{folder}: {reason} (it has no results.json); run `jax-selftrain run` or `study` first")
    results = load_results(path)
    try:
        chapters = [chapter for write in CHAPTERS if (chapter := write(results)) is not None]
        summary = _write_summary(results)
    except KeyError as error:
        raise InputError(
            f"{path}: {error} is missing, so it is damaged; run the study again in a new folder"
        ) from error
    figures = {f"{name}.svg": svg for chapter in chapters for name, svg in chapter.figures.items()}
    tables = {f"{table.name}.csv": table.to_csv() for chapter in chapters for table in chapter.tables}
    for name, texts in (("figures", figures), ("tables", tables)):
        with atomic.commit_folder(folder / name, overwrite=True) as temporary:
            for file, text in texts.items():
                (temporary / file).write_text(text, encoding="utf-8")
    page = folder / "report.html"
    atomic.write_text(page, _render_page(results["title"], summary, chapters))
    if (folder / "model" / MANIFEST).is_file():
        atomic.write_text(folder / "model" / MODEL_CARD, describe_model(hub.open_model(folder / "model")))
    return page


def _render_page(title: str, summary: str, chapters: Sequence[Chapter]) -> str:
    """Return the whole page as HTML."""
    style = files("jax_selftrain.report").joinpath("report.css").read_text(encoding="utf-8")
    parts = [(escape(chapter.title), "\n".join(chapter.html)) for chapter in chapters]
    body = "\n".join(f"<section>\n<h2>{title}</h2>\n{html}\n</section>" for title, html in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{summary}\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _write_summary(results: Results) -> str:
    """Return the first screen as HTML."""
    counts = {
        "source": results["design"]["sources"],
        "student": results["design"]["students"],
        "arm": results["config"]["arms"],
        "seed": results["config"]["seeds"],
    }
    parts = [_count(len(members), name) for name, members in counts.items()]
    kind = f"{', '.join(parts)}: {_count(len(results['cells']), 'cell')}."
    cards = "\n".join(
        f'<div class="card"><h3>{escape(title)}</h3>\n<p class="values">{values}</p>\n<p>{text}</p></div>'
        for title, values, text in _make_cards(results)
    )
    return (
        f'<header>\n<h1>{escape(results["title"])}</h1>\n<p class="kind">{kind}</p>\n'
        f'<p class="lead">{_describe_run(results)}</p>\n</header>\n<div class="cards">\n{cards}\n</div>\n'
        f'<p class="caution">{_describe_evidence(results)}</p>'
    )


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
    """Show claims, main measures and relations of source and student."""
    for claim in results["claims"]:
        text = f"Claim: {escape(describe_claim(claim))}. {escape(claim['reason'])}"
        yield f"{claim['name']} ({describe_evidence(claim)})", claim["verdict"], text
    main, effects = main_measure(results), results["effects"]
    if len(effects) == 1:
        measures = effects[0]["measures"]
        capability = "accuracy" if "accuracy" in measures else "task/"
        for name in measures:
            if name.startswith((capability, "text/")) or name == "exact_match":
                yield _effect_card(fmt.format_measure(name), name, measures[name])
    for effect in effects if len(effects) > 1 else ():
        if effect["treatment"] == f"{MAIN_EFFECT}{effect['student']}":
            title = f"{effect['student']}, trained on its own text: {fmt.format_measure(main)}"
            yield _effect_card(title, main, effect["measures"][main])
    for relation in (results["relations"] or {"contrasts": ()})["contrasts"]:
        if not relation["student"] and main in relation["measures"]:
            contrast = parse_estimate(relation["measures"][main]["contrast"], main)
            difference, text = _describe_change(contrast, main, _count(contrast.n, "seed"))
            title = f"Whose text: {fmt.format_contrast(relation['contrast'])}"
            yield title, difference, f"{escape(fmt.format_measure(main))}, {text}"


def _effect_card(title: str, measure: str, entry: Record) -> Card:
    seeds = entry["change"]["n"]
    before = display_scale(measure) * entry["before"]
    after = display_scale(measure) * (entry["before"] + entry["change"]["value"])
    was, now = (format_number(level, fmt.get_decimals(measure)) for level in (before, after))
    over = f"{seeds} seeds" if seeds > 1 else f"{entry['items']:,} items of one pair of checkpoints"
    difference, text = _describe_change(fmt.parse_change(entry, measure), measure, over)
    return title, f'<span class="was">{was} →</span> {now}', f"{difference}, {text}"


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
