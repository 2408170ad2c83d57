"""Two processes load, save, merge and convert together or alone."""

from pathlib import Path

from launcher import launch_code
from model_params import hash_params
from models_factory import tiny_weights, write_tiny_hf_model
from process_group import free_port, wait_for_all

from jax_selftrain import hub
from jax_selftrain.config import ConvertConfig, MergeConfig
from jax_selftrain.io.json_files import read_json
from jax_selftrain.io.manifest import sha256_file

TWO_PROCESSES = """
import sys
from pathlib import Path
from two_processes import main
main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
"""


def test_two_processes_read_half_each_and_save_merge_and_convert_together(tmp_path: Path):
    folder = write_tiny_hf_model(tmp_path / "hf", "gpt_neox", tokenizer=False)
    hub.convert(ConvertConfig(source=str(folder), out=str(tmp_path / "ours")))
    student = write_tiny_hf_model(tmp_path / "student", "gpt_neox", tokenizer=False, seed=1)
    merged = hub.merge(MergeConfig(base=str(folder), student=str(student), weight=0.5, out=str(tmp_path / "one")))
    coordinator = f"localhost:{free_port()}"
    processes = [
        launch_code(TWO_PROCESSES, coordinator, index, tmp_path, JAX_NUM_CPU_DEVICES="4") for index in range(2)
    ]
    codes, errors = wait_for_all(processes)
    assert codes == [0, 0], "\n".join(errors)

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
