"""Report of a study or a run: page, figures and tables.

`results.json` is the input: the same results give the same bytes, except for the costs, which the stages recorded. Each
number has its sample size and interval. The page needs no network; its script only filters and unfolds.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.hub.model_ref import MANIFEST, MODEL_CARD
from jax_selftrain.io import atomic
from jax_selftrain.report.chapters import (
    capability_chapters,
    design_chapters,
    generation_chapters,
    item_chapters,
    memorization_chapters,
    provenance_chapters,
)
from jax_selftrain.report.formatting import Chapter
from jax_selftrain.report.push import describe_model
from jax_selftrain.report.summary import Summary, summarize_study
from jax_selftrain.study.results import load_results

CHAPTERS = (
    *(design_chapters.write_claims, capability_chapters.write_source_matrix, capability_chapters.write_capability),
    *(capability_chapters.write_perplexity, memorization_chapters.write_decoupling),
    *(memorization_chapters.write_memorization, item_chapters.write_flips, item_chapters.write_samples),
    *(capability_chapters.write_proxies, capability_chapters.write_response_surface),
    *(generation_chapters.write_generations, design_chapters.write_design, design_chapters.write_training),
    *(design_chapters.write_corpora, provenance_chapters.write_limits, provenance_chapters.write_methods),
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
        chapters += [*provenance_chapters.write_costs(folder), provenance_chapters.write_provenance(results)]
        summary = summarize_study(results)
    except KeyError as error:
        raise InputError(
            f"{path}: {error} is missing, so it is damaged; run the study again in a new folder"
        ) from error
    figures = {f"{name}.svg": svg for chapter in chapters for name, svg in chapter.figures.items()}
    if summary.figure is not None:
        figures[f"{summary.figure[0]}.svg"] = summary.figure[1]
    tables = {f"{table.name}.csv": table.to_csv() for chapter in chapters for table in chapter.tables}
    for name, texts in (("figures", figures), ("tables", tables)):
        with atomic.commit_folder(folder / name, overwrite=True) as temporary:
            for file, text in texts.items():
                (temporary / file).write_text(text, encoding="utf-8")
    page = folder / "report.html"
    atomic.write_text(page, _render_page(summary, chapters))
    if (folder / "model" / MANIFEST).is_file():
        atomic.write_text(folder / "model" / MODEL_CARD, describe_model(hub.open_model(folder / "model")))
    return page


def _render_page(summary: Summary, chapters: Sequence[Chapter]) -> str:
    """Return the whole page as HTML.

    A content security policy allows no script but that of the page, and no request.
    """
    read = files("jax_selftrain.report").joinpath
    script = read("page.js").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        read("page.html.jinja").read_text(encoding="utf-8")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(
        style=read("report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        summary=summary,
        chapters=chapters,
    )
