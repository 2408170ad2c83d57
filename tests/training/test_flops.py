"""FLOPs per token of two small models, counted by hand, and MFU."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from jax_selftrain.config import TrainConfig
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.models import DecoderConfig
from jax_selftrain.models.config import RopeConfig
from jax_selftrain.training import train
from jax_selftrain.training.flops import PEAK_FLOPS, flops_per_token, measure_speed, num_matmul_params

NEOX = DecoderConfig(
    vocab_size=100, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=4, intermediate_size=64,
    max_positions=128, norm="layernorm", norm_eps=1e-5, activation="gelu", gated_mlp=False, parallel_residual=True,
    rotary_dim=2, rope=RopeConfig(), qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=None,
    tie_word_embeddings=False,
)  # fmt: skip
GATED = replace(
    NEOX, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, intermediate_size=40, gated_mlp=True, qkv_bias=False,
    out_bias=False, mlp_bias=False, norm="rmsnorm", qk_norm="head", parallel_residual=False, tie_word_embeddings=True,
)  # fmt: skip


def test_a_neox_block_has_four_square_matrices_and_two_wide_ones():
    per_layer = 4 * 16 * 16 + 2 * 16 * 64
    assert num_matmul_params(NEOX) == 3 * per_layer + 16 * 100, "biases, norms and the embedding lookup do not count"
    assert flops_per_token(NEOX, 32) == 6 * (3 * 3072 + 1600) + 12 * 3 * 4 * 4 * 32 == 83_328


def test_a_gated_block_with_grouped_queries_has_narrow_keys_and_three_wide_matrices():
    attention = 16 * 6 * 8 + 2 * 16 * 2 * 8 + 6 * 8 * 16  # q; k and v of two heads; o
    mlp = 3 * 16 * 40
    assert num_matmul_params(GATED) == 2 * (attention + mlp) + 100 * 16, "a tied embedding counts as output projection"
    assert flops_per_token(GATED, 10) == 6 * (2 * 3968 + 1600) + 12 * 2 * 6 * 8 * 10 == 68_736


def test_attention_grows_with_the_row_and_nothing_else_does():
    assert flops_per_token(NEOX, 64) - flops_per_token(NEOX, 32) == 12 * 3 * 16 * 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_and_a_run_in_float32_have_no_mfu(dtype):
    speed = measure_speed(TrainConfig(dtype=dtype, seq_len=32), NEOX, make_mesh("data=1"), 1000.0)
    assert speed == {"tokens_per_second": 1000.0, "flops_per_second": 83_328_000.0}


def test_timings_of_a_run_have_its_throughput(options: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch):
    config = options(steps=3)
    device = make_mesh(config.mesh).devices.flat[0]  # the only one
    for dtype, keys in (("float32", {"flops_per_second"}), ("bfloat16", {"flops_per_second", "mfu"})):
        monkeypatch.setitem(PEAK_FLOPS, device.device_kind, 1e12)
        run = train(replace(config, dtype=dtype, out=f"{config.out}-{dtype}"))
        lines = read_log(run / "timings.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3]
        for line in lines:
            assert set(line) == {"step", "time", "seconds", "tokens_per_second", *keys}
            per_token = line["flops_per_second"] / line["tokens_per_second"]
            assert math.isclose(per_token, 6 * (4 * 32 * 32 + 3 * 32 * 48 + 32 * 320) + 12 * 32 * 48, rel_tol=1e-12)
            assert line.get("mfu", line["flops_per_second"] / 1e12) == pytest.approx(line["flops_per_second"] / 1e12)
        assert "flops_per_second" not in (run / "metrics.jsonl").read_text()
