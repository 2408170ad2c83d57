"""The demo: a micro-world study on a CPU, without any download.

`OUT/world` holds texts, tasks, probes and untrained models, and `OUT/bases` the pretrained models. The rest of `OUT`
is a study with control arms. All parts resume like any study.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from jax_selftrain.config import DemoConfig
from jax_selftrain.experiments.microworld.microworld_study import (
    CROSSOVER_SCALE,
    ONE_MODEL_SCALE,
    MicroScale,
    prepare_study,
)
from jax_selftrain.report import write_report
from jax_selftrain.study.run_study import run_study


def demo(config: DemoConfig, scale: MicroScale | None = None) -> Path:
    """Pretrain small models, and run and report a study of them.

    Args:
        config: the demo; `config.study` selects the crossover study of six models.
        scale: sizes for tests.

    Returns:
        The path of the report.

    Raises:
        InputError: the folder has other content, or cannot be written.
    """
    scale = scale or (CROSSOVER_SCALE if config.study else ONE_MODEL_SCALE)
    scale = replace(scale, world=replace(scale.world, seed=config.seed))
    if sys.stderr.isatty():
        count = len(scale.models)
        text = f"jax-selftrain demo: writing a micro-world and pretraining {count} model{'s' * (count > 1)}"
        print(text, file=sys.stderr, flush=True)
    study = prepare_study(Path(config.out), scale, config.seeds if config.study else (config.seed,))
    return write_report(run_study(study))
