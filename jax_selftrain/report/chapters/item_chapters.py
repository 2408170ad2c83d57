"""Chapters on texts: questions whose answer changed, and samples."""

from html import escape

from jax_selftrain.report import formatting as fmt
from jax_selftrain.report.formatting import Chapter, Record, Results
from jax_selftrain.study.measure_names import MAIN_EFFECT

CHANGES = {"lost": "right → wrong", "gained": "wrong → right"}


def write_flips(results: Results) -> Chapter | None:
    """Return the chapter on changed answers; None without task files."""
    flips = results.get("flips", ())
    if not flips:
        return None
    chapter = Chapter("Answers that changed")
    fields = {
        "student": {one["student"]: one["student"] for one in flips},
        "task": {one["task"]: one["task"] for one in flips},
        "change": CHANGES,
    }
    selects = "\n".join(
        f'<label>{name} <select name="{name}"><option value="">all</option>'
        + "".join(f'<option value="{escape(value)}">{escape(label)}</option>' for value, label in values.items())
        + "</select></label>"
        for name, values in fields.items()
        if len(values) > 1
    )
    items = "\n".join(map(_describe_flip, flips))
    chapter.html.append(
        f'<div class="explorer">\n<p class="controls" hidden>{selects} <span><output></output> of {len(flips):,} shown'
        f'</span></p>\n<div class="items" tabindex="0">\n{items}\n</div>\n</div>'
    )
    chapter.add_note(fmt.NOTES["flips"])
    return chapter


def _describe_flip(flip: Record) -> str:
    before, after = (fmt.format_number(flip[side], 2, signed=True) for side in ("before", "after"))
    right = ' class="right"'
    choices = "".join(
        f"<li{right * (i == flip['answer'])}>{escape(choice)}</li>" for i, choice in enumerate(flip["choices"])
    )
    data = " ".join(f'data-{name}="{escape(flip[name])}"' for name in ("student", "task", "change"))
    return (
        f'<div class="item" {data}><p class="label">{escape(flip["task"])} · {escape(flip["student"])}, seed '
        f"{flip['seed']} · {CHANGES[flip['change']]} · margin {before} → {after} nats</p>\n"
        f'<p class="words">{escape(flip["context"])}</p>\n<ol>{choices}</ol></div>'
    )


def write_samples(results: Results) -> Chapter:
    """Return the chapter on random samples; own text comes first."""
    own = {
        cell["corpus"]: f"Written by {cell['student']}, seed {cell['seed']}"
        for cell in results["cells"]
        if cell["treatment"] == f"{MAIN_EFFECT}{cell['student']}"
    }
    corpora = sorted(results["corpora"].items(), key=lambda one: one[0] not in own)
    chapter = Chapter("Random samples")
    chapter.add_note("Chosen by a hash of the seed and the sample ids.")
    for number, (key, corpus) in enumerate(corpora):
        texts = "\n".join(
            f'<div class="sample"><p class="label">{_describe_sample(sample)}</p>\n'
            f'<p class="words">{escape(sample["text"]) or "<em>(no text)</em>"}</p></div>'
            for sample in corpus["examples"]
        )
        label = escape(own.get(key, corpus["label"]))
        if number:
            chapter.html.append(f"<details><summary>{label}</summary>\n{texts}\n</details>")
        else:
            chapter.html.append(f"<h3>{label}</h3>\n{texts}")
    return chapter


def _describe_sample(sample: Record) -> str:
    parts = [f"sample {sample['sample_id']:,}", f"{sample['tokens']:,} tokens"]
    if sample["finish_reason"]:
        parts.append("ended by a stop token" if sample["finish_reason"] == "stop" else "cut at the length limit")
    if sample["logprob"] is not None and sample["tokens"]:
        parts.append(f"{fmt.format_number(-sample['logprob'] / sample['tokens'])} nats per token")
    return " · ".join(parts)
