"""Chapters on limits, methods, costs and provenance."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

import yaml

from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Chapter, Column, Results, Table, make_columns
from jax_selftrain.study.costs import collect_costs, read_machine

BIBTEX = """\
@misc{notallsyntheticdata2026,
  title         = {Not All Synthetic Data Is Yours to Learn From},
  year          = {2026},
  eprint        = {2605.31126},
  archiveprefix = {arXiv},
}
@software{jax_selftrain,
  title   = {jax-selftrain: self-training of language models on text that they sample themselves},
  version = {%s},
  year    = {2026},
}"""


def write_limits(results: Results) -> Chapter:
    """Return the chapter on what the results cannot show."""
    applies = {
        "always": True,
        "one_seed": len(results["config"]["seeds"]) == 1,
        "one_treatment": len(results["effects"]) == 1,
        "extraction": bool(results["cells"][0]["extraction"]),
    }
    sentences = [sentence for name, members in fmt.NOTES["limits"].items() if applies[name] for sentence in members]
    items = "\n".join(f"<li>{sentence}</li>" for sentence in sentences)
    return Chapter("What this cannot show", [f"<ul>\n{items}\n</ul>"])


def write_methods(results: Results) -> Chapter:
    """Return a paragraph on the methods and BibTeX entries, to paste."""
    config, design = results["config"], results["design"]
    train, seeds = config["train"], config["seeds"]
    sampled = [one for one in results["corpora"].values() if one["sampling_params"] is not None]
    parts = []
    if sampled:
        params, counts = sampled[0]["sampling_params"], sorted({one["samples"] for one in sampled})
        size = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
        parts.append(
            f"Each of {len(design['sources'])} source models generated corpora of {size} samples from the BOS token "
            f"alone (temperature {params['temperature']:g}, at most {params['max_tokens']:,} tokens)."
        )
    steps = sorted({cell["training"]["steps"] for cell in results["cells"] if cell["training"]})
    if steps:
        span = " to ".join(f"{count:,}" for count in dict.fromkeys((steps[0], steps[-1])))
        parts.append(
            f"Students were trained for {span} steps of {train['batch_size']:,} rows of {train['seq_len']:,} tokens "
            f"with AdamW (learning rate {train['learning_rate']:g}, {train['schedule']} schedule, weight decay "
            f"{train['weight_decay']:g}, gradient norm clipped at {train['clip_norm'] or 'no bound'})."
        )
    parts.append(fmt.NOTES["methods"].format(seeds=len(seeds), plural="s" * (len(seeds) > 1)))
    version = results["versions"]["jax_selftrain"]
    chapter = Chapter("Methods and citation")
    chapter.html.append(f"<p>{escape(' '.join(parts))} Computed with jax-selftrain {escape(version)}.</p>")
    chapter.html.append(f"<pre>{escape(BIBTEX % version)}</pre>")
    return chapter


def write_costs(folder: Path) -> Iterator[Chapter]:
    """Yield the chapter on time and machine, if the stages are there."""
    records = collect_costs(folder)
    if not records:
        return
    chapter = Chapter("Cost")
    columns = [
        *make_columns("stage", "runs"),
        Column("hours", digits=3),
        Column("tokens_per_second", "tokens per second", 0),
        Column("mfu", "MFU (%)", 1, 100),
        Column("chip_hours", "chip-hours", 3),
    ]
    chapter.add_table(Table("cost", "Time of the finished stages", columns, records))
    machine = "; ".join(f"{name}: {value}" for name, value in read_machine(folder).items())
    chapter.add_note(fmt.NOTES["cost"] + (f" Last training: {machine}." if machine else ""))
    chapter.tables.clear()  # no CSV: it would differ between equal studies
    yield chapter


def write_provenance(results: Results) -> Chapter:
    """Return the chapter on configuration, models, stages and versions."""
    options = {key: value for key, value in results["config"].items() if key != "models"}
    config = yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=100)
    chapter = Chapter(
        "Provenance", [f"<details><summary>Configuration</summary>\n<pre>{escape(config)}</pre>\n</details>"]
    )
    versions = [{"package": name, "version": version} for name, version in results["versions"].items()]
    chapter.add_table(Table("versions", "Versions", make_columns("package", "version"), versions))
    columns = [Column("model", path=("name",)), Column("sha256", "SHA-256", path=("fingerprint",))]
    chapter.add_table(Table("fingerprints", "Models", columns, results["design"]["models"]))
    columns = [Column("stage", path=("label",)), Column("key")]
    chapter.add_table(Table("stages", "Stages and their keys", columns, results["stages"]), folded=True)
    return chapter
