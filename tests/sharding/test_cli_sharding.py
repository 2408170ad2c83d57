"""Tests of `cli` on several devices."""

from typing import Any

from jax_selftrain import cli
from jax_selftrain.config import SampleConfig


def parse(name: str, line: str) -> Any:
    return cli.parse_command_line(name, line.split())[0]


def test_flags_reach_the_fields():
    assert parse("sample", "--model m --out=o --samples 3 --top-p .5 --stop-ids 1 2 --start-id -5") == (
        SampleConfig(model="m", out="o", samples=3, top_p=0.5, stop_ids=(1, 2), start_id=-5)
    )
    assert type(parse("sample", "--model m --out o")) is SampleConfig
    meshed = parse("sample", "--model m --out o --mesh data=4,model=2 --max_tokens 7 --dtype=bfloat16")
    assert (meshed.mesh, meshed.max_tokens, meshed.dtype) == ("data=4,model=2", 7, "bfloat16")


def test_a_mesh_that_does_not_divide_the_model_is_one_error_sentence(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    words = f"sample --model {tiny_model()} --out {out} --samples 1 --max-tokens 4 --mesh model=5"
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "model can be 1, 2" in error
    assert not out.exists()
