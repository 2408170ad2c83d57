"""Text of sampled tokens, and whether it would be read back as the same tokens.

Tokens are what was drawn and stay authoritative: a model draws sequences that its tokenizer would never make from the
text (and, with byte-level vocabularies, bytes that are no text at all), so that text is a view with losses. How many
samples lose something is counted, since everything that travels by text loses it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def detokenize(tokenizer: Any, tokens: Sequence[np.ndarray], *, stop_ids: Sequence[int] = ()) -> tuple[list[str], int]:
    """Text of each sample, special tokens left out.

    Args:
      tokenizer: of transformers, or None (a model without one): texts are then empty.
      tokens: N integer vectors.
      stop_ids: left out of the text where they end a sample, also if the tokenizer does not call them special.

    Returns:
      N texts, and how many of them encode (special strings read as plain text) to other tokens than they came from,
      stop id and special tokens aside.
    """
    if tokenizer is None:
        return [""] * len(tokens), 0
    special = set(tokenizer.all_special_ids)
    kept = []
    for row in tokens:
        ids = row.tolist()
        if ids and ids[-1] in stop_ids:
            ids.pop()
        kept.append([token for token in ids if token not in special])
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in kept]
    again = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return texts, sum(before != after for before, after in zip(kept, again, strict=True))
