"""Tokenizers, and the rule for start and stop ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.import_guard import block_torch_import
from jax_selftrain.io.manifest import hash_json, sha256_file

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
"""Files of a tokenizer; never code."""
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
GENERATION_CONFIG = "generation_config.json"


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


def has_tokenizer(folder: Path) -> bool:
    """Return True if a folder holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def read_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a folder, without downloads or code execution."""
    _require_tokenizer(folder)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in atomic.read_json(settings):
        raise InputError(f"{settings}: auto_map names code, which is never run here; save it as tokenizer.json")
    with block_torch_import():
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file, transformers nearly anything
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: its tokenizer cannot be opened ({reason}); download its files again") from error


def tokenizer_hash(folder: Path) -> str:
    """Compute the SHA-256 (hex) of what turns text into ids and back.

    Settings that do not change ids are ignored: padding, truncation, `tokenizer_config.json`. Start and stop ids are
    recorded with a corpus.
    """
    _require_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        content = atomic.read_json(folder / "tokenizer.json")
        if not isinstance(content, dict):
            raise InputError(f"{folder / 'tokenizer.json'}: is not a tokenizer; download it again")
        return hash_json({k: v for k, v in content.items() if k not in ("padding", "truncation")})
    names = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
    return hash_json({n: sha256_file(folder / n) for n in names if (folder / n).is_file()})


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
    length = None if tokenizer is None else len(tokenizer)
    return SpecialTokens(start, min(stops, default=None) if end is None else end, tuple(sorted(set(stops))), length)


def _ids(value: Any, where: str) -> list[int]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    for token in values:
        if isinstance(token, bool) or not isinstance(token, int):
            raise InputError(f"{where} = {value!r} should be a token id or a list of them")
    return values
