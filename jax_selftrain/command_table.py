"""The commands: options, function, example and page of the documentation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jax_selftrain import config


@dataclass(frozen=True)
class Command:
    """A subcommand of `jax-selftrain`."""

    config_class: type
    """Dataclass of its options."""
    function: str
    """`module:name` of the function that takes them."""
    example: str
    """Words of a command line."""
    page: str
    """Page of the documentation."""
    positionals: Mapping[str, str] = field(default_factory=dict)
    """Name in the help and field of each option that can be given without a flag, in order."""


COMMANDS: dict[str, Command] = {
    "demo": Command(config.DemoConfig, "jax_selftrain.experiments.microworld:demo", "--out demo", "docs/study.md"),
    "configs": Command(
        config.ConfigsConfig,
        "jax_selftrain.config.ready_configs:list_or_copy_configs",
        "copy pythia-160m mine.yaml",
        "README.md",
        {"list|copy": "action", "NAME": "name", "DEST": "destination"},
    ),
    "convert": Command(
        config.ConvertConfig,
        "jax_selftrain.hub:convert",
        "EleutherAI/pythia-160m model --format hf",
        "docs/models.md",
        {"SRC": "source", "DST": "out"},
    ),
    "import": Command(
        config.ImportCorpusConfig,
        "jax_selftrain.corpus:import_text",
        "stories.jsonl --model EleutherAI/pythia-160m --out real-text",
        "README.md",
        {"SRC": "source"},
    ),
    "export": Command(
        config.ExportConfig,
        "jax_selftrain.corpus:export_corpus",
        "corpus texts --format jsonl",
        "README.md",
        {"CORPUS": "corpus", "DST": "out"},
    ),
    "sample": Command(
        config.SampleConfig,
        "jax_selftrain.sampling:sample",
        "--model EleutherAI/pythia-160m --out corpus --samples 16384 --max-tokens 1024",
        "docs/sampling.md",
    ),
    "train": Command(
        config.TrainConfig,
        "jax_selftrain.study:train_with_evals",
        "--model EleutherAI/pythia-160m --corpus corpus --out student --learning-rate 6e-5",
        "docs/training.md",
    ),
    "merge": Command(
        config.MergeConfig,
        "jax_selftrain.hub:merge",
        "--base EleutherAI/pythia-160m --student student --weight -0.5 --out away",
        "README.md",
    ),
    "score": Command(
        config.ScoreConfig,
        "jax_selftrain.evals:score",
        "--model student --tasks piqa arc_easy --texts roneneldan/TinyStories:validation --out after.json",
        "docs/scoring.md",
    ),
    "compare": Command(
        config.CompareConfig,
        "jax_selftrain.study:compare",
        "before.json after.json --out comparison.json",
        "docs/comparison.md",
        {"BASE.json": "base", "STUDENT.json": "student"},
    ),
    "extract": Command(
        config.ExtractConfig,
        "jax_selftrain.evals:extract",
        "--model student --sequences memorized.npy --corpus corpus --out extraction.json",
        "docs/extraction.md",
    ),
    "extract-windows": Command(
        config.ExtractWindowsConfig,
        "jax_selftrain.report:extract_windows",
        "--model student --texts book.jsonl --out windows.json",
        "docs/extraction.md",
    ),
    "subset": Command(
        config.SubsetConfig,
        "jax_selftrain.corpus:draw_subset",
        "corpus subset-0 --tokens 5000000 --subset 0",
        "docs/paper.md",
        {"CORPUS": "corpus", "OUT": "out"},
    ),
    "decontaminate": Command(
        config.DecontaminateConfig,
        "jax_selftrain.evals:decontaminate",
        "corpus clean --tasks piqa arc_easy",
        "docs/paper.md",
        {"CORPUS": "corpus", "OUT": "out"},
    ),
    "leakage": Command(
        config.LeakageConfig,
        "jax_selftrain.evals:measure_leakage",
        "--corpus corpus --texts train.jsonl --tokenizer EleutherAI/pythia-160m --out leakage.json",
        "docs/extraction.md",
    ),
    "membership": Command(
        config.MembershipConfig,
        "jax_selftrain.evals:measure_membership",
        "--records after.tokens.parquet --members seen --nonmembers unseen --out membership.json",
        "docs/token_records.md",
    ),
    "token-gap": Command(
        config.TokenGapConfig,
        "jax_selftrain.evals:measure_token_gap",
        "--base before.tokens.parquet --student after.tokens.parquet --out gap.json",
        "docs/token_records.md",
    ),
    "run": Command(
        config.RunConfig,
        "jax_selftrain.study:run",
        "--config configs/pythia-160m.yaml --out runs/pythia-160m",
        "README.md",
    ),
    "study": Command(
        config.StudyConfig,
        "jax_selftrain.study:run_study",
        "--config configs/study-pythia-410m.yaml --out studies/410m --dry-run",
        "docs/study.md",
    ),
    "plan": Command(
        config.PlanConfig,
        "jax_selftrain.planning:plan_memory",
        "--config configs/pythia-1b.yaml --topology v5e:4x4",
        "docs/pods.md",
    ),
    "push": Command(
        config.PushConfig,
        "jax_selftrain.report:push",
        "student org/name --private",
        "docs/models.md",
        {"FOLDER": "folder", "ORG/NAME": "repo"},
    ),
    "report": Command(
        config.ReportConfig,
        "jax_selftrain.report:write_report",
        "runs/pythia-160m",
        "docs/study.md",
        {"DIR": "folder"},
    ),
}

DISTRIBUTED_COMMANDS = ("convert", "sample", "train", "merge", "score", "extract", "extract-windows", "run", "study")
"""Commands that several processes can run together; they also take the flags of `DistributedConfig`."""

CONFIG_FILE, LOG_LEVEL = "config", "log_level"
"""Options of every command that are no part of a configuration."""
