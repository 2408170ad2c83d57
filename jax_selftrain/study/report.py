"""The report of one round: one HTML page that stands alone, its figures, and its tables as CSV.

Everything shown comes from `results.json`, and every number with its n and its interval. The page is the same bytes
for the same results: no date, no path of the round, no random ids. It needs no network, no script, and prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from jax_selftrain import storage
from jax_selftrain.errors import InputError
from jax_selftrain.study.chapters import chapters
from jax_selftrain.study.page import Chapter
from jax_selftrain.study.results import FORMAT, VERSION
from jax_selftrain.study.summary import cards, caution, what_was_run


def report(folder: storage.PathLike) -> Path:
    """Write `report.html`, `figures/*.svg` and `tables/*.csv` into a finished round's folder, from its `results.json`.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: the folder is not a finished round.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that `jax-selftrain run` filled")
    if not (folder / "results.json").exists():
        what = "is not finished" if (folder / "config.yaml").exists() else "is not a round"
        raise InputError(f"{folder}: {what} (it has no results.json); run `jax-selftrain run` for it first")
    results = storage.read_json(folder / "results.json")
    if not isinstance(results, dict) or (results.get("format"), results.get("version")) != (FORMAT, VERSION):
        raise InputError(f"{folder / 'results.json'}: not the results of a round by this version; run the round again")
    written = chapters(results)
    with storage.commit_folder(folder / "figures", replace=True) as aside:
        for name, svg in (item for chapter in written for item in chapter.figures.items()):
            (aside / f"{name}.svg").write_text(svg, encoding="utf-8")
    with storage.commit_folder(folder / "tables", replace=True) as aside:
        for table in (table for chapter in written for table in chapter.tables):
            (aside / f"{table.name}.csv").write_text(table.to_csv(), encoding="utf-8")
    path = folder / "report.html"
    storage.write_text(path, _page(results, written))
    return path


def _page(results: Mapping[str, Any], written: Sequence[Chapter]) -> str:
    style = files("jax_selftrain.study").joinpath("report.css").read_text(encoding="utf-8")
    title = escape(results["title"])
    boxes = "\n".join(
        f'<div class="card"><h3>{escape(card.title)}</h3>\n'
        f'<p class="values">{card.values}</p>\n<p>{card.text}</p></div>'
        for card in cards(results)
    )
    body = "\n".join(f"<section>\n<h2>{escape(one.title)}</h2>\n{one.html}\n</section>" for one in written)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n<header>\n<h1>{title}</h1>\n"
        '<p class="kind">One self-training round, before and after.</p>\n'
        f'<p class="lead">{what_was_run(results)}</p>\n</header>\n<div class="cards">\n{boxes}\n</div>\n'
        f'<p class="caution">{caution(results)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )
