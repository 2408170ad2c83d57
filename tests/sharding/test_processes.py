"""Two processes load, save, merge and convert together or alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from models_factory import tiny_weights, write_tiny_hf_model
from params_hash import hash_params

from jax_selftrain import hub
from jax_selftrain.config import ConvertConfig, MergeConfig
from jax_selftrain.io.atomic import read_json
from jax_selftrain.io.manifest import sha256_file


def test_two_processes_read_half_each_and_save_merge_and_convert_together(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path / "hf", "gpt_neox", tokenizer=False)
    hub.convert(ConvertConfig(source=str(folder), out=str(tmp_path / "ours")))
    student = write_tiny_hf_model(tmp_path / "student", "gpt_neox", tokenizer=False, seed=1)
    merged = hub.merge(MergeConfig(base=str(folder), student=str(student), weight=0.5, out=str(tmp_path / "one")))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    script = Path(__file__).with_name("two_processes.py")
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]),
    }
    command = [sys.executable, str(script), coordinator]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    expected = hash_params(hub.load_model(folder, "data=1").params)
    total = sum(value.nbytes for value in tiny_weights(read_json(folder / "config.json")).values())
    for index in range(2):
        seen = read_json(tmp_path / f"seen-{index}.json")
        assert seen["devices"] == 8
        assert seen["fingerprint"] == seen["restored"] == expected
        # fsdp divides everything that has a width; biases of heads and MLP are divided over `model`, within a process.
        assert total / 2 <= seen["read"] < total / 2 + 0.02 * total
        assert "already exists" in seen["refused"]
        assert seen["merged"] == hub.open_model(merged).fingerprint
    assert read_json(tmp_path / "seen-1.json")["alone"] == expected
    assert hash_params(hub.load_model(tmp_path / "together", "data=1").params) == expected
    assert hash_params(hub.load_model(tmp_path / "converted", "data=1").params) == expected
    assert sha256_file(tmp_path / "exported" / "model.safetensors") == sha256_file(folder / "model.safetensors")
