"""Options of all commands as frozen dataclasses.

The docstring of a field is its help text. The name of a field is its flag (`max_tokens`: `--max-tokens`) and its key in
a YAML file. Nothing here imports JAX, so that `jax-selftrain --help` is fast.
"""

from jax_selftrain.config.commands import CompareConfig as CompareConfig
from jax_selftrain.config.commands import ConvertConfig as ConvertConfig
from jax_selftrain.config.commands import ExtractConfig as ExtractConfig
from jax_selftrain.config.commands import ExtractWindowsConfig as ExtractWindowsConfig
from jax_selftrain.config.commands import MergeConfig as MergeConfig
from jax_selftrain.config.commands import Packing as Packing
from jax_selftrain.config.commands import PushConfig as PushConfig
from jax_selftrain.config.commands import Remat as Remat
from jax_selftrain.config.commands import SampleConfig as SampleConfig
from jax_selftrain.config.commands import ScoreConfig as ScoreConfig
from jax_selftrain.config.commands import TrainConfig as TrainConfig
from jax_selftrain.config.corpus_commands import DecontaminateConfig as DecontaminateConfig
from jax_selftrain.config.corpus_commands import ExportConfig as ExportConfig
from jax_selftrain.config.corpus_commands import ImportCorpusConfig as ImportCorpusConfig
from jax_selftrain.config.corpus_commands import LeakageConfig as LeakageConfig
from jax_selftrain.config.corpus_commands import SubsetConfig as SubsetConfig
from jax_selftrain.config.ready_configs import ConfigsConfig as ConfigsConfig
from jax_selftrain.config.record_commands import MembershipConfig as MembershipConfig
from jax_selftrain.config.record_commands import TokenGapConfig as TokenGapConfig
from jax_selftrain.config.study import ArmConfig as ArmConfig
from jax_selftrain.config.study import ClaimConfig as ClaimConfig
from jax_selftrain.config.study import DemoConfig as DemoConfig
from jax_selftrain.config.study import KeepModels as KeepModels
from jax_selftrain.config.study import MemorizationConfig as MemorizationConfig
from jax_selftrain.config.study import ModelConfig as ModelConfig
from jax_selftrain.config.study import PairConfig as PairConfig
from jax_selftrain.config.study import PlanConfig as PlanConfig
from jax_selftrain.config.study import PromptFormat as PromptFormat
from jax_selftrain.config.study import ReportConfig as ReportConfig
from jax_selftrain.config.study import RunConfig as RunConfig
from jax_selftrain.config.study import StudyConfig as StudyConfig
from jax_selftrain.config.study import fill_options as fill_options
