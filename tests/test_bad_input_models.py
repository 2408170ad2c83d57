"""Invalid command lines, models, samples and imports: exit code 2, one sentence with the cause, no output."""

import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bad_input import (
    Case,
    CaseFunction,
    ValidInput,
    Workspace,
    assert_one_error_sentence,
    change_weights,
    flip_byte,
    nan_weight,
    register_case,
    rewrite_json,
)
from launcher import run_code

from jax_selftrain import cli

CASES: list[CaseFunction] = []
case = partial(register_case, CASES)


@case
def unknown_command(p: Workspace) -> Case:
    return ["smaple"], "sample"


@case
def unknown_flag(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--temprature", 1), "--temperature"


@case
def unknown_config_key(p: Workspace) -> Case:
    return [
        "sample",
        "--config",
        p.file("c.yaml", f"model: {p.valid.model}\nout: {p.out}\nmax_token: 8\n"),
    ], "max_tokens"


@case
def wrong_type_in_config(p: Workspace) -> Case:
    return ["sample", "--config", p.file("c.yaml", f"model: {p.valid.model}\nout: {p.out}\nsamples: many\n")], "samples"


@case
def config_is_not_yaml(p: Workspace) -> Case:
    return ["sample", "--config", p.file("c.yaml", "model: [unclosed\n")], "c.yaml"


@case
def missing_config_file(p: Workspace) -> Case:
    return ["sample", "--config", p.folder / "nowhere.yaml"], "nowhere.yaml"


@case
def unset_variable_in_config(p: Workspace) -> Case:
    return ["sample", "--config", p.file("c.yaml", "model: ${NO_SUCH_VARIABLE_HERE}/m\n")], "NO_SUCH_VARIABLE_HERE"


@case
def missing_required_option(p: Workspace) -> Case:
    return ["sample", "--model", p.valid.model], "--out"


@case
def missing_model(p: Workspace) -> Case:
    return p.sample(p.folder / "no-model"), "no-model"


@case
def truncated_safetensors(p: Workspace) -> Case:
    file = p.model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return p.sample(file.parent), "model.safetensors"


@case
def pickle_checkpoint(p: Workspace) -> Case:
    model = p.model()
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    return p.sample(model), "zip container of PyTorch 1.6"


@case
def unknown_architecture(p: Workspace) -> Case:
    model = p.model()
    rewrite_json(model / "config.json", lambda config: config.update(model_type="mamba"))
    return p.sample(model), "mamba"


@case
def unhandled_config_key(p: Workspace) -> Case:
    model = p.model()
    rewrite_json(model / "config.json", lambda config: config.update(mysterious_scaling=2.0))
    return p.sample(model), "mysterious_scaling"


@case
def dynamic_rope(p: Workspace) -> Case:
    model = p.model()
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    rewrite_json(model / "config.json", lambda config: config.update(rope_parameters=rope))
    return p.sample(model), "dynamic"


@case
def damaged_model_config(p: Workspace) -> Case:
    model = p.model()
    (model / "config.json").write_text('{"model_type": "llama", ')
    return p.sample(model), "config.json"


@case
def nan_weights(p: Workspace) -> Case:
    return p.sample(change_weights(p.model(), nan_weight)), "model.norm.weight"


@case
def missing_tensor(p: Workspace) -> Case:
    return p.sample(change_weights(p.model(), lambda w: w.pop("model.norm.weight"))), "model.norm.weight"


@case
def unexpected_tensor(p: Workspace) -> Case:
    return p.sample(change_weights(p.model(), lambda w: w.update(adapter=np.ones(3, np.float32)))), "adapter"


@case
def misshapen_tensor(p: Workspace) -> Case:
    weights = {"model.norm.weight": np.ones(7, np.float32)}
    return p.sample(change_weights(p.model(), lambda w: w.update(weights))), "model.norm.weight"


@case
def model_without_tokenizer(p: Workspace) -> Case:
    model = p.model()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    return ["import", p.valid.texts, "--model", model, "--out", p.out], "tokenizer"


@case
def flipped_byte_in_an_orbax_tree(p: Workspace) -> Case:
    ours = p.folder / "ours"
    assert cli.main(["convert", str(p.valid.model), str(ours)]) == 0
    largest = max((f for f in (ours / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    flip_byte(largest)
    return p.sample(ours), largest.name


@case
def more_devices_than_there_are(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--mesh", "data=512"), "512"


@case
def mesh_larger_than_the_machine(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--mesh", "model=500"), "needs 500 devices"


@case
def temperature_zero(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--temperature", 0), "temperature"


@case
def samples_longer_than_the_model(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--max-tokens", 65), "64"


@case
def stop_id_outside_the_vocabulary(p: Workspace) -> Case:
    return p.sample(p.valid.model, "--stop-ids", 5000), "5000"


@case
def out_is_a_file(p: Workspace) -> Case:
    p.file("out-file", "precious")
    where = ["--model", p.valid.model, "--out", p.folder / "out-file"]
    return ["sample", *where, "--max-tokens", 8, "--samples", 2], "out-file"


@case
def empty_corpus(p: Workspace) -> Case:
    return ["import", p.file("empty.jsonl", ""), "--model", p.valid.model, "--out", p.out], "empty.jsonl"


@case
def malformed_json_line(p: Workspace) -> Case:
    texts = p.file("texts.jsonl", '{"text": "fine"}\n{"text": \n')
    return ["import", texts, "--model", p.valid.model, "--out", p.out], "2"


@case
def merge_of_other_tokenizers(p: Workspace) -> Case:
    model = p.model()
    shutil.copyfile(p.valid.other / "tokenizer.json", model / "tokenizer.json")
    return p.merge(model, 0.5), "has tokenizer"


@case
def merge_of_other_architectures(p: Workspace) -> Case:
    return p.merge(p.valid.other, 0.5), "vocab_size 160"


@case
def merge_with_a_missing_model(p: Workspace) -> Case:
    return p.merge(p.folder / "no-model", 0.5), "no-model"


@case
def merge_with_nan_weights(p: Workspace) -> Case:
    return p.merge(change_weights(p.model(), nan_weight), 0.5), "model.norm.weight"


@case
def merge_with_a_weight_of_nan(p: Workspace) -> Case:
    return p.merge(p.valid.model, "nan"), "--weight"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_invalid_input_is_one_error_sentence(case: CaseFunction, valid: ValidInput, tmp_path: Path, capsys):
    assert_one_error_sentence(case, Workspace(valid, tmp_path), capsys)


def test_another_seed_in_the_same_corpus_folder_is_refused(valid: ValidInput, tmp_path: Path, capsys):
    command = ["sample", "--model", str(valid.model), "--out", str(tmp_path / "out"), "--samples", "4"]
    command += ["--max-tokens", "8"]
    assert cli.main(command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main([*command, "--seed", "1"]) == 2
    assert "seed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


FULL_DISK = """
import resource, sys
sys.dont_write_bytecode = True  # truncated bytecode would break other tests
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from jax_selftrain.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_error_sentence_and_leaves_no_output(valid: ValidInput, tmp_path: Path):
    """A limit on file sizes makes the write of the weights fail."""
    out = tmp_path / "ours"
    done = run_code(FULL_DISK, "convert", valid.model, out, JAX_ENABLE_COMPILATION_CACHE="false")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "ours" in done.stderr.strip().splitlines()[-1]
    assert not out.exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
