"""Tails of the corpora of generations: what repeated self-training loses first.

A model that is trained on its own text loses rare events before frequent ones (Shumailov et al. 2024,
doi:10.1038/s41586-024-07566-y), unless real or earlier text is kept (Gerstgrasser et al. 2024, arXiv:2404.01413).
"""

from typing import Any

from jax_selftrain.config import StudyConfig
from jax_selftrain.corpus.statistics import DISTINCT_TOKENS, tail_statistics
from jax_selftrain.study.dag import Stage
from jax_selftrain.study.design import Design
from jax_selftrain.study.measure_names import name_generations


def measure_tails(config: StudyConfig, design: Design) -> dict[str, dict[str, Any]]:
    """Return `tail_statistics` of each generation's corpus, by its key.

    Rare tokens are those of the first generation. All corpora with one tokenizer have equally many tokens: half of the
    smallest one, because the other half of a first generation defines its rare tokens.
    """
    first: dict[str, tuple[Stage, Stage]] = {}
    found = {(cell.student, cell.treatment, cell.seed): cell.corpus for cell in design.cells}
    for arm in config.arms:
        names = name_generations(arm.name, arm.generations)
        for student, treatment, seed in list(found) if arm.kind == "generations" else ():
            start, corpus = found.get((student, names[0], seed)), found[student, treatment, seed]
            if treatment in names and start is not None and corpus is not None:
                first[corpus.key] = corpus, start
    corpora = {key: design.read_corpus(stage) for key, (stage, _) in first.items()}
    tails = {}
    for key, (_, start) in first.items():
        tokenizer = corpora[key].manifest["tokenizer_fingerprint"]
        sizes = (one.n_tokens for one in corpora.values() if one.manifest["tokenizer_fingerprint"] == tokenizer)
        n = min(DISTINCT_TOKENS, min(sizes) // 2)
        if n:
            tails[key] = tail_statistics(corpora[key], corpora[start.key], n)
    return tails
