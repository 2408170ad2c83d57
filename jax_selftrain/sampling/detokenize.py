"""Text of sampled tokens, and how much it loses.

The tokens stay authoritative: a model draws sequences that its tokenizer would never produce from the text (with
byte-level vocabularies even bytes that are no text), so that text loses information.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def detokenize(tokenizer: Any, tokens: Sequence[np.ndarray], *, stop_ids: Sequence[int] = ()) -> tuple[list[str], int]:
    """Decode samples without special tokens, and count re-encoding mismatches.

    Args:
      tokenizer: from transformers, or None (a model without one): texts are empty.
      tokens: integer vectors, one per sample.
      stop_ids: removed from the end of a sample, even if the tokenizer does not list them as special.

    Returns:
      The texts, and the number of texts whose encoding (special strings as plain text) differs from the sample's tokens
      without stop id and special tokens.
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
