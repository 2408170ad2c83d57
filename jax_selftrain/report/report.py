"""Report of a study or a run: page, figures and tables.

`results.json` is the only input: the same results give the same bytes. Each number has its sample size and interval.
The page needs no network and no script.
"""

from __future__ import annotations

from pathlib import Path

from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import read_manifest
from jax_selftrain.report.chapters import capability_chapters, design_chapters, memorization_chapters, training_chapters
from jax_selftrain.report.page import render_page
from jax_selftrain.report.summary import write_summary
from jax_selftrain.study.results import FORMAT, VERSION

CHAPTERS = (
    *(design_chapters.write_claims, design_chapters.write_design),
    *(capability_chapters.write_source_matrix, capability_chapters.write_capability),
    *(capability_chapters.write_perplexity, memorization_chapters.write_decoupling),
    *(memorization_chapters.write_memorization, capability_chapters.write_proxies),
    *(training_chapters.write_training, training_chapters.write_corpora, training_chapters.write_samples),
    *(design_chapters.write_limits, design_chapters.write_provenance),
)


def write_report(folder: atomic.PathLike) -> Path:
    """Write `report.html`, `figures/*.svg` and `tables/*.csv` from `results.json`.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: the folder has no results, or those of another version.
    """
    folder = Path(folder)
    path = folder / "results.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the output folder of `jax-selftrain run` or `study`")
    if not path.exists():
        reason = "is not finished" if (folder / "config.yaml").exists() else "is not the folder of a run or study"
        raise InputError(f"{folder}: {reason} (it has no results.json); run `jax-selftrain run` or `study` first")
    results = read_manifest(path, FORMAT, VERSION, {}, remedy="run the study again in a new folder")
    chapters = [chapter for write in CHAPTERS if (chapter := write(results)) is not None]
    figures = {f"{name}.svg": svg for chapter in chapters for name, svg in chapter.figures.items()}
    tables = {f"{table.name}.csv": table.to_csv() for chapter in chapters for table in chapter.tables}
    for name, files in (("figures", figures), ("tables", tables)):
        with atomic.commit_folder(folder / name, overwrite=True) as temporary:
            for file, text in files.items():
                (temporary / file).write_text(text, encoding="utf-8")
    page = folder / "report.html"
    atomic.write_text(page, render_page(results["title"], write_summary(results), chapters))
    return page
