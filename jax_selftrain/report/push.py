"""Uploads of models and corpora, with their cards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_selftrain import hub
from jax_selftrain.config import PushConfig, yaml_io
from jax_selftrain.corpus import open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.hub.model_folder import model_card
from jax_selftrain.hub.model_ref import MODEL_CARD
from jax_selftrain.report.formatting import format_interval, format_number, parse_estimate
from jax_selftrain.study.results import load_results

_CORPUS_FILES = ("README.md", "corpus.json", "config.yaml", "decontamination.json")


def push(config: PushConfig) -> str:
    """Upload a model folder or a corpus in one commit.

    The repository is created if it does not exist. The card of a model has its measured changes if the model belongs
    to a run or a study.

    Returns:
      The address of the commit.

    Raises:
      InputError: the folder is damaged or neither a model nor a corpus, there is no token, or the upload fails.
    """
    yaml_io.require(config)
    folder = Path(config.folder)
    is_corpus = (folder / "corpus.json").is_file()
    files = _corpus_files(folder) if is_corpus else _model_files(folder)
    return _upload(config, "dataset" if is_corpus else "model", files)


def _corpus_files(folder: Path) -> dict[str, Path | bytes]:
    corpus = open_corpus(folder)
    names = (*_CORPUS_FILES, *(shard["file"] for shard in corpus.manifest["shards"]))
    return {name: folder / name for name in names if (folder / name).is_file()}


def _model_files(folder: Path) -> dict[str, Path | bytes]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a model folder, a run folder or a corpus")
    model = hub.open_model(folder)
    if model.is_orbax or not model.has_weights:
        raise InputError(f"{folder}: has no safetensors weights; convert it first: jax-selftrain convert --format hf")
    model.verify_weights()
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(model.folder.glob("[!.]*")) if path.is_file()}
    if model.manifest:
        files[MODEL_CARD] = describe_model(model).encode()
    return files


def describe_model(model: hub.ModelRef) -> str:
    """Write the card of a model with its measured changes.

    They are in the results of the run or study that holds the model's folder.
    """
    path = next((p for above in model.folder.resolve().parents[:3] if (p := above / "results.json").is_file()), None)
    cells = [] if path is None else load_results(path)["cells"]
    cell = next((cell for cell in cells if cell.get("model") == model.fingerprint), None)
    return model_card(model.manifest, "" if cell is None else _changes_table(cell))


def _changes_table(cell: Mapping[str, Any]) -> str:
    """Write before, after and change of each measure, with 95% intervals."""
    lines = ["## Measured changes", "", f"Student {cell['student']}, {cell['treatment']}, seed {cell['seed']}; with "]
    lines += ["95% intervals.", "", "| measure | before | after | change | n |", "|---|---|---|---|---|"]
    for name, sides in cell["measures"].items():
        found = [parse_estimate(sides[side], name) for side in ("before", "after", "change")]
        shown = [f"{format_number(one.value)} {format_interval(one)}" for one in found]
        lines.append(f"| {name} | {' | '.join(shown)} | {found[-1].n:,} |")
    return "\n".join(lines)


def _upload(config: PushConfig, kind: str, files: Mapping[str, Path | bytes]) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set; unset it to upload")
    if not get_token():
        raise InputError("there is no token of the Hugging Face hub; set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi()
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        api.create_repo(config.repo, repo_type=kind, private=config.private, exist_ok=True)
        if config.revision:
            api.create_branch(config.repo, branch=config.revision, repo_type=kind, exist_ok=True)
        commit = api.create_commit(
            config.repo,
            operations,
            commit_message=f"Upload {Path(config.folder).name or kind} with jax-selftrain",
            repo_type=kind,
            revision=config.revision or None,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"{config.repo}: the upload to the Hugging Face hub failed ({' '.join(str(error).split())[:200]}); check "
            "the name, the rights of the token and the network"
        ) from error
    return commit.commit_url
