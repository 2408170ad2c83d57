"""Write golden/logits.npz: logits of transformers for every parity case."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from models_factory import write_tiny_hf_model
from parity_cases import CASES, GOLDEN, case_tokens, golden_logits, transformers_logits


def main() -> None:
    """Compute and write all cases."""
    parts: dict[str, Any] = {}
    for name, (family, overrides) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_tiny_hf_model(folder, family, tokenizer=False, **overrides)
            parts[name] = golden_logits(transformers_logits(Path(folder), case_tokens()))
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **parts)
    print(f"{GOLDEN}: {len(parts)} cases, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
