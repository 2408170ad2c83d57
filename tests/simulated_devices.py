"""Eight simulated CPU devices for the tests of a module.

Programs over several CPU devices are not cached between runs (`mesh_context`), and these tests compile longer than they
compute. They compile with few optimizations, unless JAX_SELFTRAIN_TEST_OPTIMIZED is set.

The conftest of a folder imports the fixture; it applies to each module of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import jax.extend
import pytest

DEVICES = 8


def set_device_count(count: int) -> None:
    """Restart JAX's CPU backend, which invalidates existing arrays."""
    jax.extend.backend.clear_backends()
    jax.config.update("jax_num_cpu_devices", count)
    os.environ["JAX_NUM_CPU_DEVICES"] = str(count)  # of the commands that tests start


def set_optimizations(enabled: bool) -> None:
    """Choose how XLA compiles in this process and in the commands that tests start."""
    jax.config.update("jax_disable_most_optimizations", not enabled)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not enabled))


@pytest.fixture(scope="module", autouse=True)
def eight_devices() -> Iterator[None]:
    before = jax.device_count()
    if before != DEVICES:
        set_device_count(DEVICES)
    if "JAX_SELFTRAIN_TEST_OPTIMIZED" not in os.environ:
        set_optimizations(False)
    yield
    set_optimizations(True)
    if before != DEVICES:
        set_device_count(before)
