"""Options of all commands as frozen dataclasses.

The docstring of a field is its help text. The name of a field is its flag (`max_tokens`: `--max-tokens`) and its key in
a YAML file. Nothing here imports JAX, so that `jax-selftrain --help` is fast.
"""

from jax_selftrain.config.commands import (
    CompareConfig,
    ConvertConfig,
    ExportConfig,
    ExtractConfig,
    ImportCorpusConfig,
    LeakageConfig,
    MergeConfig,
    Packing,
    Remat,
    SampleConfig,
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
    common_options,
)

__all__ = [
    "ArmConfig",
    "ClaimConfig",
    "CompareConfig",
    "ConvertConfig",
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
    "PromptFormat",
    "Remat",
    "ReportConfig",
    "RunConfig",
    "SampleConfig",
    "ScoreConfig",
    "StudyConfig",
    "TrainConfig",
    "common_options",
]
