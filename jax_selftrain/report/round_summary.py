"""The first screen of the report, in words: what was run, what changed, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jax_selftrain.report.tables import interval, number
from jax_selftrain.stats.estimators import Estimate

Results = Mapping[str, Any]


@dataclass(frozen=True)
class StatCard:
    """One answer: before → after, then effect, interval and n in a sentence. `values` and `text` are HTML."""

    title: str
    values: str
    text: str


def run_summary(results: Results) -> str:
    """One paragraph (HTML): who wrote what, and who was trained on it how."""
    base, source, corpus = results["base"], results["source"], results["corpus"]
    training, options, policy = results["training"], results["config"]["train"], corpus["policy"]
    student = f"<strong>{escape(_name(base['ref']))}</strong> ({base['parameters']:,} parameters)"
    wrote = f"wrote {corpus['samples']:,} texts from its start token alone"
    if source["is_base"]:
        opening, then = f"{student} {wrote}", "It was then trained on them"
    else:
        opening = f"<strong>{escape(_name(source['ref']))}</strong> {wrote}"
        then = f"{student} was then trained on them"
    policy_words = [f"temperature {policy['temperature']:g}", *_truncation(policy)]
    targets = f", {training['targets']:,} predicted tokens" if training["targets"] else ""
    beginning = " from a fresh initialization" if options["init"] == "scratch" else ""
    return (
        f"{opening} ({', '.join(policy_words)}, at most {policy['max_tokens']:,} tokens each): {corpus['tokens']:,} "
        f"tokens in all. {then}{beginning}: {training['steps']:,} steps{targets}, learning rate "
        f"{options['learning_rate']:g} ({options['schedule']}).{_early_stopping(training)} Below, the model before and "
        "after that."
    )


def _early_stopping(training: Mapping[str, Any]) -> str:
    early = training.get("early_stopping")
    if not early:
        return ""
    return (
        f" It stopped after {early['trained_steps']:,} steps, and the model is that of step {early['best_step']:,}, "
        f"the best by {escape(early['metric'])}."
    )


def cards(results: Results) -> list[StatCard]:
    """The answers: text, capability, memorization, as far as they were measured."""
    found = [_text_card(text) for text in results["texts"]]
    if (card := _capability_card(results)) is not None:
        found.append(card)
    if results["extraction"]:
        found.append(_extraction_card(results["extraction"]))
    return found


def caveat(results: Results) -> str:
    """What the numbers of one round are worth (HTML)."""
    identical = " <strong>Every measured number is exactly the same before and after.</strong>"
    return (
        "<strong>One pair of checkpoints, one seed: exploratory, no verdict.</strong> Intervals are 95 % and say how a "
        "difference would vary over other documents, questions or sequences of the same kind. They do not say how it "
        "would vary over other samples and another order of training, which can be more. There is no control arm here: "
        f"a change is not yet the effect of training on <em>this</em> text.{identical if results['identical'] else ''}"
    )


def limitations(results: Results) -> list[str]:
    """The limits of one round, as sentences (HTML)."""
    extraction = results["extraction"]
    sentences = [
        "<strong>Whether a recipe works.</strong> That takes several seeds, each with a corpus and an order of its "
        "own, and their paired differences; item-level tests such as McNemar's call differences between two seeds of "
        "the same recipe significant far too often.",
        "<strong>What caused a change.</strong> Training on any text moves a model. It takes control arms at equal "
        "steps and learning rate: real text, shuffled text, weight noise of the same size, a sign-flipped loss.",
        "<strong>That nothing changed.</strong> An interval that includes zero is no evidence of absence; preservation "
        "needs a margin fixed beforehand (<code>jax-selftrain compare</code>).",
        "<strong>Whose text is best.</strong> One source and one student cannot tell a source that suits this student "
        "from one that is simply better.",
    ]
    if results["tasks"]:
        sentences.append(
            "<strong>Capability in general.</strong> These tasks only; and where items share a template or an entity, "
            "their effective number is smaller than n."
        )
    if extraction:
        sentences.append(
            "<strong>Forgetting.</strong> Greedy exact match measures how fragile a path is, too: noise in the weights "
            "also breaks it. A fall of exact match counts as forgetting only beside control arms at equal damage and "
            "with p<sub>z</sub> falling as well. p<sub>z</sub> is the probability of one tokenization of the text."
        )
        sentences.append(
            "<strong>The effect of being in the corpus.</strong> Held-out, partial and seen are selected by what the "
            "model wrote; the causal effect needs a random assignment or swapped corpora."
        )
    return sentences


def _text_card(text: Mapping[str, Any]) -> StatCard:
    before, after, change = (_estimate(text["nll"][key]) for key in ("before", "after", "change"))
    perplexity = f"perplexity {number(math.exp(before.value))} → {number(math.exp(after.value))}"
    return StatCard(
        f"Text: {text['name']}",
        _values(number(before.value), number(after.value), "nats per token"),
        f"{_describe_change(change, 'Lower', 'Higher', 4, 'nats')}, n = {text['documents']:,} documents; {perplexity}. "
        f"{_zero(change)}",
    )


def _capability_card(results: Results) -> StatCard | None:
    tasks, macro = results["tasks"], results["macro"]
    if not tasks:
        return None
    if macro:
        title, accuracy, n = f"Accuracy, average of {len(tasks)} tasks", macro["accuracy"], macro["n"]
    else:
        (task,) = tasks
        title, accuracy, n = f"Accuracy: {task['name']}", task["accuracy"], task["n"]
    before, after, change = (_estimate(accuracy[key]) for key in ("before", "after", "change"))
    return StatCard(
        title,
        _values(number(before.value, 1, scale=100), number(after.value, 1, scale=100), "%"),
        f"{_describe_change(change, 'Down', 'Up', 2, 'points', scale=100)}, n = {n:,} questions. {_zero(change)}",
    )


def _extraction_card(found: Mapping[str, Any]) -> StatCard:
    part = found["classes"]["all"]
    before, after, change = (_estimate(part["exact_match"][key]) for key in ("before", "after", "change"))
    flips = part["flips"]
    logprob = _estimate(part["logprob"]["change"])
    return StatCard(
        f"Reproduced word for word ({found['prefix']} tokens given, {found['suffix']} asked)",
        _values(number(before.value, 1, scale=100), number(after.value, 1, scale=100), "%"),
        f"{_describe_change(change, 'Down', 'Up', 1, 'points', scale=100)}, n = {part['n']:,} sequences: {flips['kept']:,} kept, "
        f"{flips['lost']:,} lost, {flips['gained']:,} gained, {flips['never']:,} never. {_zero(change)} "
        f"Mean log p<sub>z</sub>: {number(logprob.value, 2, signed=True)} {interval(logprob, 2, signed=True)}.",
    )


def _values(before: str, after: str, unit: str) -> str:
    return f'<span class="was">{before} →</span> {after} <span class="unit">{unit}</span>'


def _describe_change(
    change: Estimate, decrease_word: str, increase_word: str, digits: int, unit: str, *, scale: float = 1.0
) -> str:
    """`Up by 1.2 points [+0.3, +2.1]`: direction, size and interval."""
    size = number(abs(change.value), digits, scale=scale)
    ends = interval(change, digits, scale=scale, signed=True)
    if change.value == 0:
        return f"Changed by exactly {size} {unit} {ends}"
    return f"{decrease_word if change.value < 0 else increase_word} by {size} {unit} {ends}"


def _zero(change: Estimate) -> str:
    if change.low is None or change.high is None:
        return ""
    inside = change.low <= 0 <= change.high
    return "The interval includes zero." if inside else "The interval excludes zero."


def _truncation(policy: Mapping[str, Any]) -> list[str]:
    off = {"top_k": 0, "top_p": 1, "min_p": 0}
    return [f"{name.replace('_', '-')} {policy[name]:g}" for name, value in off.items() if policy[name] != value]


def _estimate(entry: Mapping[str, Any]) -> Estimate:
    return Estimate(entry["value"], entry["low"], entry["high"], entry["n"])


def _name(ref: str) -> str:
    return Path(ref).name
