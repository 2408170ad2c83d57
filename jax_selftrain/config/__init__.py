"""Every knob, as frozen dataclasses, to be read like the lab notebook: of each stage, then of what is made of them.

A field's docstring is its `--help` text; a field's name is its flag (`max_tokens` ↔ `--max-tokens`) and its key in
a YAML file. `jax_selftrain.settings` reads and writes these strictly. Nothing here imports JAX, so that
`jax-selftrain --help` answers at once.
"""

from jax_selftrain.config.commands import (
    CompareConfig,
    ConvertConfig,
    DType,
    ExportConfig,
    ExtractConfig,
    ImportCorpusConfig,
    LeakageConfig,
    MergeConfig,
    Packing,
    Preset,
    Remat,
    SampleConfig,
    Schedule,
    ScoreConfig,
    TrainConfig,
)
from jax_selftrain.config.study import (
    ArmConfig,
    ClaimConfig,
    DemoConfig,
    MemorizationConfig,
    ModelConfig,
    PlanConfig,
    PromptFormat,
    ReportConfig,
    RunConfig,
    StudyConfig,
)

__all__ = [
    "ArmConfig",
    "ClaimConfig",
    "CompareConfig",
    "ConvertConfig",
    "DType",
    "DemoConfig",
    "ExportConfig",
    "ExtractConfig",
    "ImportCorpusConfig",
    "LeakageConfig",
    "MemorizationConfig",
    "MergeConfig",
    "ModelConfig",
    "Packing",
    "PlanConfig",
    "Preset",
    "PromptFormat",
    "Remat",
    "ReportConfig",
    "RunConfig",
    "SampleConfig",
    "Schedule",
    "ScoreConfig",
    "StudyConfig",
    "TrainConfig",
]
