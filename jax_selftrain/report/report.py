"""The report of one round: one HTML page that stands alone, its figures, and its tables as CSV.

Everything shown comes from `results.json`, and every number with its n and its interval. The page is the same bytes
for the same results: no date, no path of the round, no random ids. It needs no network, no script, and prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.report.page import Chapter, render_page
from jax_selftrain.report.round_chapters import round_chapters
from jax_selftrain.report.round_summary import cards, caveat, run_summary
from jax_selftrain.report.study_page import study_page, transfer_chapters
from jax_selftrain.study import study_results
from jax_selftrain.study.results import FORMAT, VERSION


def write_report(folder: atomic.PathLike) -> Path:
    """Write `report.html`, `figures/*.svg` and `tables/*.csv` into the folder of a finished round or study.

    They are made from its `results.json` and nothing else.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: the folder is neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that `jax-selftrain run` or `study` filled")
    if not (folder / "results.json").exists():
        if (folder / "stages").is_dir():
            command, what = "study" if any((folder / "stages").glob("*-*.json")) else "run", "is not finished"
        else:
            command, what = "run", "is not finished" if (folder / "config.yaml").exists() else "is not a round"
        raise InputError(f"{folder}: {what} (it has no results.json); run `jax-selftrain {command}` for it first")
    results = atomic.read_json(folder / "results.json")
    kind = (results.get("format"), results.get("version")) if isinstance(results, dict) else None
    if kind == (study_results.FORMAT, study_results.VERSION):
        written = transfer_chapters(results)
        page = study_page
    elif kind == (FORMAT, VERSION):
        written, page = round_chapters(results), round_page
    else:
        raise InputError(f"{folder / 'results.json'}: not the results of a round by this version; run the round again")
    with atomic.commit_folder(folder / "figures", overwrite=True) as aside:
        for name, svg in (item for chapter in written for item in chapter.figures.items()):
            (aside / f"{name}.svg").write_text(svg, encoding="utf-8")
    with atomic.commit_folder(folder / "tables", overwrite=True) as aside:
        for table in (table for chapter in written for table in chapter.tables):
            (aside / f"{table.name}.csv").write_text(table.to_csv(), encoding="utf-8")
    path = folder / "report.html"
    atomic.write_text(path, page(results, written))
    return path


def round_page(results: Mapping[str, Any], written: Sequence[Chapter]) -> str:
    """The HTML of a round's report."""
    boxes = "\n".join(
        f'<div class="card"><h3>{escape(card.title)}</h3>\n'
        f'<p class="values">{card.values}</p>\n<p>{card.text}</p></div>'
        for card in cards(results)
    )
    opening = f'<div class="cards">\n{boxes}\n</div>\n<p class="caution">{caveat(results)}</p>'
    kind, lead = "One self-training round, before and after.", run_summary(results)
    return render_page(results["title"], kind, lead, opening, written)
