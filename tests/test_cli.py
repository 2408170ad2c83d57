"""The command line: options, help, error sentences and exit codes."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import jax_selftrain
from jax_selftrain import cli, config, errors, hub
from jax_selftrain.config import RunConfig, SampleConfig, yaml_io
from jax_selftrain.config.metadata import Role, roles
from jax_selftrain.io.compilation_cache import enable_compilation_cache

pytestmark = pytest.mark.compat

ROOT = Path(jax_selftrain.__file__).parents[1]


def command(*words: object, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run `jax-selftrain WORDS` in a new process; `code` is run before."""
    start = ["-m", "jax_selftrain"]
    if code:
        start = ["-c", textwrap.dedent(code) + "\nimport sys; from jax_selftrain.cli import main; sys.exit(main())"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *start, *map(str, words)], capture_output=True, text=True, env=env, check=False
    )


def help_flags(name: str) -> list[str]:
    """Return the flags in the help of a command."""
    cls = cli.COMMANDS[name].config_class
    hints = get_type_hints(cls)

    def is_shown(option: str, tp: Any) -> bool:
        section, *rest = option.split(".")
        return not yaml_io.has_sections(tp) and not (rest and Role.SET_BY_STUDY in roles(hints[section])[rest[0]])

    return [yaml_io.flag(option) for option, tp in yaml_io.option_types(cls).items() if is_shown(option, tp)]


def parse_options(name: str, words: list[str]) -> Any:
    return cli.parse_command_line(name, words)[0]


def parse(name: str, line: str) -> Any:
    return parse_options(name, line.split())


@pytest.fixture
def refuse(capsys):
    """Return a function that runs an invalid command and returns its error."""

    def refuse(*words: object, code: int = 2) -> str:
        assert cli.main([str(word) for word in words]) == code
        output, error = capsys.readouterr()
        assert output == ""
        assert error.endswith("\n")
        assert error.count("\n") == 1
        return error.strip()

    return refuse


def test_help_imports_nothing_heavy():
    heavy = {"jax", "jaxlib", "numpy", "transformers", "torch", "flax", "pyarrow", "datasets", "matplotlib"}
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nimport jax_selftrain.cli as cli\n"
            "cli.main(['--help'])\n"
            "try:\n    cli.main(['sample', '--help'])\nexcept SystemExit as error:\n    assert error.code == 0\n"
            f"print('heavy:', sorted({heavy} & set(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "heavy: []"


def test_a_command_does_not_import_torch_and_a_program_of_the_user_can(tiny_model, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "A fox."}\n')
    code = "import atexit, sys; atexit.register(lambda: print(sorted({'torch', 'transformers'} & set(sys.modules))))"
    words = ("import", tmp_path / "texts.jsonl", "--model", tiny_model(), "--out", tmp_path / "corpus")
    run = command(*words, code=code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "['transformers']"
    assert run.stderr == "", "no warning about torch"
    assert hub.open_model(tiny_model()).tokenizer
    from transformers.utils import is_torch_available

    assert is_torch_available() == (find_spec("torch") is not None)


def test_the_overview_lists_every_command_with_its_summary():
    run = command("--help")
    assert run.returncode == 0
    for name, entry in cli.COMMANDS.items():
        assert any(
            line.split() == [name, *(entry.config_class.__doc__ or "").splitlines()[0].split()]
            for line in run.stdout.splitlines()
        ), name
    assert command("--version").stdout.strip() == f"jax-selftrain {jax_selftrain.__version__}"
    assert command().returncode == 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_lists_its_flags_with_their_docstrings(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(name, ["--help"])
    assert stop.value.code == 0
    output, error = capsys.readouterr()
    assert error == ""
    for flag in ["--config", *help_flags(name)]:
        assert re.search(rf"{flag}[ ,]", output)
    assert output.startswith(f"usage: jax-selftrain {name} ")
    assert (cli.COMMANDS[name].config_class.__doc__ or "")[:40] in output
    for shown in cli.COMMANDS[name].positionals:
        assert f"[{shown}]" in output.splitlines()[0]


def test_every_field_has_a_docstring(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit):
            parse_options(name, ["--help"])
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        text = re.sub(r"(--[\w.-]+), --[\w.-]+", r"\1 BOOL", text)
        for flag in help_flags(name):
            after = text.split(f"{flag} ", 1)[1]
            after = after.split("] ", 1)[1] if after.startswith("[") else after.split(" ", 1)[1]
            assert not after.startswith(("(", "--", "╰")), (name, flag, after[:40])


def test_booleans_are_flags():
    assert parse("demo", "--out o").study is False
    assert parse("demo", "--out o --study --seeds 1 2").study is True
    assert parse("plan", "--model m --topology v5e:4x4 --no-compile --search").compile is False
    assert parse("run", "--model m --out o --train.no-decay-embeddings").train.decay_embeddings is False
    assert parse("extract", "--no_greedy_decode --model m --sequences s --out o").greedy_decode is False


def test_a_flag_wins_over_a_boolean_of_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("dry_run: true\nout: o\nmodels: [{name: a, model: m}]\n")
    assert parse_options("study", ["--config", str(tmp_path / "c.yaml")]).dry_run
    assert not parse_options("study", ["--config", str(tmp_path / "c.yaml"), "--no-dry-run"]).dry_run


def test_flags_of_a_section_reach_its_fields():
    run = parse("run", "--model m --out o --sample.samples 100 --train.learning-rate 1e-4 --score.tasks a b")
    assert run == RunConfig(
        model="m",
        out="o",
        sample=SampleConfig(samples=100),
        train=config.TrainConfig(learning_rate=1e-4),
        score=config.ScoreConfig(tasks=("a", "b")),
    )
    assert type(run.sample) is SampleConfig


@pytest.mark.parametrize(
    "words",
    ["a b --format hf", "--format hf a b", "a --format hf b", "--dtype keep a --format hf b", "a --out b --format hf"],
)
def test_positionals_can_be_anywhere(words):
    assert parse("convert", words) == config.ConvertConfig(source="a", out="b", format="hf")


def test_a_positional_is_the_one_value_of_a_list():
    expected = config.CompareConfig(base=("a.json",), student=("b.json",), out="o", margin_task=3.0)
    assert parse("compare", "a.json b.json --out o --margin-task 3") == expected
    several = parse("compare", "a.json --student b.json c.json --out o")
    assert (several.base, several.student) == (("a.json",), ("b.json", "c.json"))


def test_a_file_gives_the_defaults_and_flags_win(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\nout: o\nsamples: 5\ntop-k: 3\nstop_ids: [1]\nstart_id: 4\n")
    file = ["--config", str(tmp_path / "c.yaml")]
    expected = SampleConfig(model="m", out="o", samples=5, top_k=3, stop_ids=(1,), start_id=4)
    assert parse_options("sample", file) == expected
    changed = parse_options("sample", [f"--config={tmp_path / 'c.yaml'}", "--samples", "6", "--start-id", "none"])
    assert changed == SampleConfig(model="m", out="o", samples=6, top_k=3, stop_ids=(1,))
    (tmp_path / "run.yaml").write_text("model: m\ntrain: {learning_rate: 1e-3, steps: 4}\n")
    run = parse_options("run", ["--config", str(tmp_path / "run.yaml"), "--out", "o", "--train.steps", "9"])
    assert (run.train.learning_rate, run.train.steps) == (1e-3, 9)


def test_help_shows_the_defaults_of_the_file(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("samples: 77\n")
    with pytest.raises(SystemExit):
        parse_options("sample", ["--config", str(tmp_path / "c.yaml"), "--help"])
    assert "(default: 77)" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sampel", "jax-selftrain: error: unknown command `sampel`; did you mean `sample`?"),
        ("sample --sampels 3", "jax-selftrain sample: error: unknown option `--sampels`; did you mean `--samples`?"),
        ("sample -n 3", "jax-selftrain sample: error: unknown option `-n`; did you mean `--samples`?"),
        ("sample -z 3", "jax-selftrain sample: error: unknown option `-z`; --help lists all options"),
        ("train --lr 1e-4", "unknown option `--lr`; did you mean `--learning-rate`?"),
        ("run --lr 1e-4", "unknown option `--lr`; did you mean `--train.learning-rate`?"),
        ("study --epochs 2", "unknown option `--epochs`; did you mean `--train.epochs`?"),
        ("train --num-epochs 2", "unknown option `--num-epochs`; did you mean `--epochs`?"),
        ("train --bs 4", "unknown option `--bs`; did you mean `--batch-size`?"),
        ("train --batch 4", "unknown option `--batch`; did you mean `--batch-size`?"),
        ("score -m x", "unknown option `-m`; did you mean `--model`?"),
        ("score --lr 1", "unknown option `--lr`; --help lists all options"),
        ("sample --log-level info", "--log-level: expected one of DEBUG, INFO, WARNING, ERROR, found 'info'"),
        ("--tyro-print-completion", "--tyro-print-completion needs the name of a shell: bash, zsh, fish, tcsh"),
        ("run --learning-rate 3", "unknown option `--learning-rate`; did you mean `--train.learning-rate`?"),
        ("sample --samples many", "--samples: expected a whole number, found 'many'"),
        ("sample --samples 1.5", "--samples: expected a whole number, found '1.5'"),
        ("sample --temperature nan", "--temperature: expected a finite number, found 'nan'"),
        ("sample --preset fspd", "--preset: expected one of replicated, fsdp, tensor, found 'fspd'"),
        ("run --train.packing pack", "--train.packing: expected one of masked, packed, single, found 'pack'"),
        ("sample --stop-ids 1 x", "--stop-ids: expected a whole number, found 'x'"),
        ("sample --samples", "--samples needs a value: a whole number"),
        ("sample --samples --seed 3", "--samples needs a value: a whole number"),
        ("sample --seed 1 --seed 2", "--seed is given twice"),
        ("score --tasks a --tasks b", "--tasks is given twice; give it all its values at once"),
        ("sample --model m", "`out` is required: pass --out, or set `out` in the configuration file"),
        ("sample m --out o", "unexpected argument `m`; options start with `--`"),
        ("convert a b c", "unexpected argument `c`"),
        ("convert a b --source c", "SRC is given twice, as `a` and with --source"),
        ("report", "`folder` is required"),
        ("sample --config", "--config needs a value"),
        ("sample --config --out o", "--config needs a value"),
        ("study --dry-run true", "--dry-run takes no value, found `true`; write --dry-run or --no-dry-run"),
        ("plan --compile=false", "--compile takes no value, found `false`; write --compile or --no-compile"),
        ("run --train.decay-embeddings False", "write --train.decay-embeddings or --train.no-decay-embeddings"),
        ("study --dry-run --no-dry-run", "--dry-run is given twice"),
        ("plan --no-serach", "unknown option `--no-serach`; did you mean `--no-search`?"),
        ("study --models m", "unknown option `--models`"),
        ("sample --config a.yaml --config b.yaml", "--config is given twice"),
        ("sample --config nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_an_invalid_option_is_one_error_sentence(refuse, words, message):
    assert message in refuse(*words.split())


def test_an_invalid_file_is_one_error_sentence(refuse, tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\ntrain:\n  learning_rte: 1e-4\n")
    assert refuse("run", "--config", tmp_path / "c.yaml") == (
        f"jax-selftrain run: error: {tmp_path / 'c.yaml'}: unknown key `train.learning_rte`; "
        "did you mean `train.learning_rate`?"
    )


STAGE = """
    import sys, types
    from jax_selftrain import errors
    stage = types.ModuleType("jax_selftrain.sampling")  # replaces the stage: the command line is under test
    def sample(options):
        raise {error}
    stage.sample = sample
    sys.modules["jax_selftrain.sampling"] = stage
"""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InputError("the disk is full"), 2),
        (errors.UnavailableError("a peer\nwas lost"), 75),
        (errors.Preempted("stopped at step 3; run the same command to go on"), 143),
    ],
)
def test_the_exception_of_a_stage_decides_the_exit_code(error, code):
    run = command("sample", "--model", "m", "--out", "o", code=STAGE.format(error=f"errors.{error!r}"))
    assert run.returncode == code
    assert run.stderr == f"jax-selftrain sample: error: {' '.join(str(error).split())}\n"


def test_an_unexpected_exception_keeps_its_traceback():
    run = command("sample", "--model", "m", "--out", "o", code=STAGE.format(error="RuntimeError('a bug')"))
    assert run.returncode == 1
    assert run.stderr.startswith("Traceback")
    assert "RuntimeError: a bug" in run.stderr


def test_ctrl_c_has_no_traceback():
    interrupt = f"__import__('os').kill(__import__('os').getpid(), {int(signal.SIGINT)})"
    code = STAGE.format(error="SystemExit(1)").replace(
        "raise SystemExit(1)", f"{interrupt}; __import__('time').sleep(9)"
    )
    # a process in the background inherits an ignored SIGINT
    listening = "    import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = command("sample", "--model", "m", "--out", "o", code=f"{listening}\n{code}")
    assert run.returncode == 130
    assert run.stderr == "jax-selftrain sample: interrupted\n"


@pytest.mark.parametrize("words", [["--help"], ["study", "--help"], ["--version"]], ids=" ".join)
def test_a_reader_that_ends_is_no_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "jax_selftrain", *words], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_each_result_is_one_line_of_the_summary():
    measured = {"acc": 0.5125, "acc_stderr": 0.0112, "acc_norm": 0.25, "n": 1234, "interval": [0.1, 0.2]}
    text = cli.summary("score", config.ScoreConfig(out="s.json"), {"tasks": {"blimp": measured}, "texts": {}})
    assert [line.split() for line in text.splitlines()] == [
        ["blimp", "acc", "0.5125", "±", "0.011", "acc_norm", "0.25", "n", "1,234"],
        ["written:", "s.json"],
    ]
    part = {"n": 3, "exact_match": None, "discoverable": {"1@0.5": 1.0}, "logprob": -1.0}
    text = cli.summary("extract", config.ExtractConfig(out="e.json"), {**part, "held_out": part})
    assert [line.split() for line in text.splitlines()] == [
        ["all", "n", "3"],
        ["held_out", "n", "3"],
        ["written:", "e.json"],
    ]
    assert cli.summary("train", config.TrainConfig(out="r"), Path("r")) == "model: r/model"
    assert cli.summary("export", config.ExportConfig(out="x"), Path("x")) == "written: x"


def test_every_command_calls_something_that_exists():
    for entry in cli.COMMANDS.values():
        module, function = entry.function.split(":")
        assert callable(getattr(import_module(module), function))


def test_the_public_functions_are_imported_lazily():
    run = subprocess.run(
        [sys.executable, "-c", "import sys, jax_selftrain\nassert 'jax' not in sys.modules\nprint(dir(jax_selftrain))"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    for name in ("load_model", "sample", "train", "score", "extract", "run"):
        assert f"'{name}'" in run.stdout
        assert callable(getattr(jax_selftrain, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jax_selftrain.nothing


@pytest.mark.nightly
def test_compiled_programs_are_kept_for_the_next_command(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = command(
        *("sample", "--model", tiny_model(), "--out", tmp_path / "corpus", "--samples", 2, "--max-tokens", 4),
        *("--mesh", "data=1"),
    )
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "cache" / "jax_selftrain").iterdir()
    assert any("decode_chunks" in path.name for path in folder.iterdir())


def test_the_cache_of_compiled_programs_is_below_the_cache_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "0")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    enable_compilation_cache()
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent == tmp_path / "cache" / "jax_selftrain"


def test_the_users_cache_folder_is_kept_and_a_read_only_home_is_not_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "chosen")
    enable_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "chosen"
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "cache").write_text("a file where the folder should be")
    enable_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path, capsys):
    name = "\x1b[31m\u202egnp.exe"
    assert cli.main(["report", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "\u202e" not in error
    assert r"\x1b[31m\u202egnp.exe" in error
