"""The report of one round: one HTML page that stands alone, its figures, and its tables as CSV.

Everything shown comes from `results.json`, and every number with its n and its interval. The page is the same bytes
for the same results: no date, no path of the round, no random ids. It needs no network, no script, and prints.
"""

from __future__ import annotations

from pathlib import Path

from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.report.study_page import study_page, transfer_chapters
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
    if kind != (FORMAT, VERSION):
        raise InputError(
            f"{folder / 'results.json'}: is not {FORMAT} of version {VERSION}; run the command that made it again"
        )
    written = transfer_chapters(results)
    with atomic.commit_folder(folder / "figures", overwrite=True) as aside:
        for name, svg in (item for chapter in written for item in chapter.figures.items()):
            (aside / f"{name}.svg").write_text(svg, encoding="utf-8")
    with atomic.commit_folder(folder / "tables", overwrite=True) as aside:
        for table in (table for chapter in written for table in chapter.tables):
            (aside / f"{table.name}.csv").write_text(table.to_csv(), encoding="utf-8")
    path = folder / "report.html"
    atomic.write_text(path, study_page(results, written))
    return path
