"""Tokenizers, and the rule for start and stop ids."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError, library_errors_as_input_errors
from jax_selftrain.io import json_files
from jax_selftrain.io.import_guard import block_torch_import
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.manifest import sha256_file

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
"""Files of a tokenizer; never code."""
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_MAX_EXPANSION = 1_000
"""Largest growth of a text by a normalizer; those of published models are below 10."""


@dataclass(frozen=True)
class SpecialTokens:
    """Start and stop ids, and the number of ids of the tokenizer."""

    bos_token_id: int | None
    """Start id: the tokenizer's BOS, else the config's, else EOS."""
    eos_token_id: int | None
    """The id that ends a text: the tokenizer's EOS, else the least stop id."""
    eos_token_ids: tuple[int, ...]
    """Stop ids: the union of EOS of tokenizer, config and generation config, ascending."""
    tokenizer_length: int | None
    """Ids from here on are padding rows of the embedding and are never sampled; None without a tokenizer."""
    unused_ids: tuple[int, ...] = ()
    """Smaller ids that are no token, ascending; they are never sampled either."""


def has_tokenizer(folder: Path) -> bool:
    """Return True if a folder holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def read_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a folder, without downloads or code execution."""
    _require_tokenizer(folder)
    is_sentencepiece = any((folder / name).is_file() for name in _SENTENCEPIECE)
    if is_sentencepiece and not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise InputError(
            f"{folder}: has {_SENTENCEPIECE[0]} without tokenizer.json, which needs the package sentencepiece; "
            "pip install sentencepiece protobuf"
        )
    with block_torch_import():
        from transformers import AutoTokenizer

    with library_errors_as_input_errors(f"{folder}: its tokenizer cannot be opened", "download its files again"):
        _check_json_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer(tokenizer.decode([len(tokenizer) // 2]))  # some errors of a pipeline show with a text only
    return tokenizer


def _check_json_files(folder: Path) -> None:
    """Refuse files that are no JSON, and normalizers that expand texts."""
    for name in (CONFIG, "tokenizer_config.json", "tokenizer.json"):
        content = json_files.read_json(folder / name) if (folder / name).is_file() else {}
        if not isinstance(content, dict):
            raise InputError(f"{folder / name}: is not a JSON object; download it again")
        if name == "tokenizer_config.json" and "auto_map" in content:
            raise InputError(f"{folder / name}: auto_map names code, which is never run; save it as tokenizer.json")
    growth = math.prod(map(_expansion, _flatten_steps(content.get("normalizer"))))
    if growth > _MAX_EXPANSION:
        raise InputError(f"{folder / name}: its normalizer makes a text {growth:,.0f} times as long; use another one")


def _expansion(step: Mapping[str, Any]) -> float:
    """Return the largest growth of a text by a `Replace` step."""
    pattern, content = step.get("pattern"), step.get("content")
    if step.get("type") != "Replace" or not isinstance(pattern, dict) or not isinstance(content, str):
        return 1.0
    return max(1.0, len(content) / max(1, len(str(pattern.get("String", "")))))


def tokenizer_hash(folder: Path, tokenizer: Any) -> str:
    """Compute the SHA-256 (hex) of what turns text into ids and back.

    The hash is that of the opened tokenizer, without settings that do not change ids (`canonical_pipeline`). It is the
    same whichever version or class of transformers saved the files. Start and stop ids are recorded with a corpus.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hash_json(canonical_pipeline(json.loads(backend.to_str())))
    names = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
    return hash_json({n: sha256_file(folder / n) for n in names if (folder / n).is_file()})


def canonical_pipeline(content: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce the content of a tokenizer.json to what determines ids.

    Padding, truncation and offsets are dropped. Merges become pairs, empty affixes null, and sequences flat lists.
    """
    model = dict(content["model"])
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if affix in model:
            model[affix] = model[affix] or None
    special = [step for step in map(_template_ids, _flatten_steps(content.get("post_processor"))) if step]
    return {
        "model": model,
        "added_tokens": sorted(content.get("added_tokens") or (), key=lambda token: token["id"]),
        "normalizer": _flatten_steps(content.get("normalizer")),
        "pre_tokenizer": _flatten_steps(content.get("pre_tokenizer")),
        "post_processor": special,
        "decoder": [
            {"type": "ByteLevel"} if step["type"] == "ByteLevel" else step
            for step in _flatten_steps(content.get("decoder"))
        ],
    }


def _flatten_steps(step: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """List the steps of a sequence, without `trim_offsets`."""
    if not step:
        return []
    if step["type"] == "Sequence":
        (nested,) = (value for value in step.values() if isinstance(value, list))
        return [flat for inner in nested for flat in _flatten_steps(inner)]
    return [{key: value for key, value in step.items() if key != "trim_offsets"}]


def _template_ids(step: Mapping[str, Any]) -> Any:
    """Return the template of a text in ids; other steps unchanged."""
    if step["type"] == "ByteLevel":  # changes offsets alone
        return None
    if step["type"] != "TemplateProcessing":
        return step
    template = [
        step["special_tokens"][piece["SpecialToken"]["id"]]["ids"] if "SpecialToken" in piece else "text"
        for piece in step["single"]
    ]
    return None if template == ["text"] else template


def _require_tokenizer(folder: Path) -> None:
    if not has_tokenizer(folder):
        raise InputError(f"{folder}: holds no tokenizer ({', '.join(_VOCABULARIES)}); copy its files there")


def resolve_special_tokens(
    raw: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Any, *, vocab_size: int, where: str
) -> SpecialTokens:
    """Determine start and stop ids from all files that name them.

    `raw` is the content of config.json, `where` names the model in messages. Ids beyond `vocab_size` are refused.
    """
    named = {
        "tokenizer": (getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)),
        "config.json": (raw.get("bos_token_id"), raw.get("eos_token_id")),
        GENERATION_CONFIG: (None, generation.get("eos_token_id")),
    }
    starts = [token for source, (bos, _) in named.items() for token in _ids(bos, f"{where}: {source}: bos_token_id")]
    stops = [token for source, (_, eos) in named.items() for token in _ids(eos, f"{where}: {source}: eos_token_id")]
    start = next(iter([*starts, *stops]), None)
    for token in stops if start is None else [start, *stops]:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"{where}: id {token} is not below {vocab_size}; tokenizer and model do not belong together"
            )
    end = getattr(tokenizer, "eos_token_id", None)
    end = min(stops, default=None) if end is None else end
    length, unused = (None, ()) if tokenizer is None else vocabulary_range(tokenizer)
    return SpecialTokens(start, end, tuple(sorted(set(stops))), length, unused)


def vocabulary_range(tokenizer: Any) -> tuple[int, tuple[int, ...]]:
    """Return the largest id + 1, and the unused ids below it.

    `len(tokenizer)` counts tokens, which is less if the ids have holes.
    """
    ids = set(tokenizer.get_vocab().values())
    length = max(ids, default=-1) + 1
    return length, tuple(sorted(set(range(length)) - ids))


def _ids(value: Any, where: str) -> list[int]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    for token in values:
        if isinstance(token, bool) or not isinstance(token, int):
            raise InputError(f"{where} = {value!r} should be a token id or a list of them")
    return values
