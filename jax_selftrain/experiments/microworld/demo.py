"""The whole story on a CPU in minutes, without any download: a little world, models that read it, and a study of them.

`OUT/world` holds the texts, the questions, the probes and blank models; `OUT/bases` the models after reading; the rest
is a study (`study.matrix`) like any other: a base writes texts from its start token alone, is trained on them, and is
measured before, on the way and after, with control arms beside it. Every part is as restartable as a real study.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from jax_selftrain.config import DemoConfig
from jax_selftrain.experiments.microworld.microworld_study import (
    CROSSOVER_SCALE,
    ROUND_SCALE,
    MicroScale,
    prepare_study,
)
from jax_selftrain.report import write_report
from jax_selftrain.study.run_study import run_study


def demo(config: DemoConfig, scale: MicroScale | None = None) -> Path:
    """Make the world, train the base on it, and do one self-training round with its arms in `config.out`.

    With `config.study`, the crossover study of six models instead. Run again, it completes what is there. `scale` is
    for tests.

    Returns:
        The path of the report.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    scale = scale or (CROSSOVER_SCALE if config.study else ROUND_SCALE)
    scale = replace(scale, world=replace(scale.world, seed=config.seed))
    if sys.stderr.isatty():
        count = len(scale.readers)
        print(
            f"jax-selftrain demo: writing a little world, and teaching it to {count} small model{'s' * (count > 1)}",
            file=sys.stderr,
            flush=True,
        )
    study = prepare_study(Path(config.out), scale, config.seeds if config.study else (config.seed,))
    return write_report(run_study(study))
