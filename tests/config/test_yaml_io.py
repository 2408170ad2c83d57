"""Configurations are read strictly and survive a round trip through YAML."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_selftrain import config
from jax_selftrain.config import SampleConfig, yaml_io
from jax_selftrain.errors import InputError

pytestmark = pytest.mark.compat


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"


@dataclass(frozen=True)
class Recipe:
    name: str = "x"
    steps: int | None = None
    shuffle: bool = True
    tasks: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    level: Literal[1, 2] | None = None
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=5e-4))


@pytest.fixture
def read(tmp_path):
    def read(text: str, cls: type = Recipe, **options):
        (tmp_path / "recipe.yaml").write_text(text)
        return yaml_io.load(cls, tmp_path / "recipe.yaml", **options)

    return read


def test_missing_keys_keep_their_defaults(read):
    recipe = read("name: a\ntasks: [b, c]\noptimizer:\n  schedule: cosine\n")
    assert recipe == Recipe(name="a", tasks=("b", "c"), optimizer=Optimizer(learning_rate=5e-4, schedule="cosine"))
    assert read("") == Recipe()


def test_keys_may_be_hyphenated_like_flags(read):
    assert read("stop-ids: [1, 2]\noptimizer:\n  learning-rate: 2\n") == Recipe(
        stop_ids=(1, 2), optimizer=Optimizer(learning_rate=2.0)
    )


@pytest.mark.parametrize("spelling", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "'1e-4'", "+1e-4"])
def test_every_spelling_of_a_number_is_a_float(read, spelling):
    value = read(f"learning_rate: {spelling}", Optimizer).learning_rate
    assert type(value) is float
    assert value == 1e-4


def test_an_integer_is_converted_to_a_float(read):
    value = read("learning_rate: 1", Optimizer).learning_rate
    assert type(value) is float


def test_a_list_of_one_number_is_written_and_read_as_the_number(read, tmp_path):
    both = [
        read(f"memorization:\n  relearn_steps: {steps}\n", config.StudyConfig) for steps in ("10", "[10]", "[1, 3]")
    ]
    assert [study.memorization.relearn_steps for study in both] == [(10,), (10,), (1, 3)]
    assert [yaml_io.to_dict(study)["memorization"]["relearn_steps"] for study in both] == [10, 10, [1, 3]]
    with pytest.raises(InputError, match="relearn_steps`\\[0\\]: expected a whole number, found 'many'"):
        read("memorization:\n  relearn_steps: many\n", config.StudyConfig)


def test_null_unsets_an_optional_value(read):
    assert read("steps: null\nstop_ids: ~\nlevel: null") == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: a", "unknown key `nmae`; did you mean `name`?"),
        (
            "optimizer:\n  learning_rte: 1",
            "unknown key `optimizer.learning_rte`; did you mean `optimizer.learning_rate`?",
        ),
        ("learning_rate: 1", "unknown key `learning_rate`; did you mean `optimizer.learning_rate`?"),
        ("qqqq: 1", "unknown key `qqqq`; known here: name, steps, shuffle"),
        ("steps: true", "`steps`: expected a whole number or null, found the truth value true"),
        ("steps: 3.0", "`steps`: expected a whole number or null, found 3.0"),
        ("steps: '3'", "`steps`: expected a whole number or null, found '3'"),
        ("shuffle: 1", "`shuffle`: expected true or false, found 1"),
        ("name: 70", "`name`: expected text, found 70; put it in quotes"),
        ("name: no", "`name`: expected text, found the truth value false; put it in quotes"),
        ("name: null", "`name`: expected text, found nothing"),
        ("tasks: a", "`tasks`: expected a list, each entry text, found 'a'"),
        ("tasks: [a, 1]", "`tasks`[1]: expected text, found 1"),
        ("stop_ids: [1, true]", "`stop_ids`[1]: expected a whole number, found the truth value true"),
        ("level: 3", "`level`: expected one of 1, 2 or null, found 3"),
        ("level: true", "`level`: expected one of 1, 2 or null, found the truth value true"),
        ("optimizer: 3", "expected a section of keys and values at `optimizer`, found 3"),
        ("optimizer:", "expected a section of keys and values at `optimizer`, found nothing"),
        ("optimizer:\n  learning_rate: .nan", "`optimizer.learning_rate`: expected a finite number, found nan"),
        ("optimizer:\n  learning_rate: .inf", "expected a finite number, found inf"),
        ("optimizer:\n  learning_rate: fast", "expected a finite number, found 'fast'"),
        ("optimizer:\n  learning_rate: true", "expected a finite number, found the truth value true"),
        ("optimizer:\n  schedule: cosin", "expected one of constant, cosine, found 'cosin'"),
        ("- a\n- b", "expected a section of keys and values at the top level, found ['a', 'b']"),
        ("name: a\nname: b", "line 2: the key `name` is given twice"),
        ("stop_ids: [1]\nstop-ids: [2]", "`stop_ids` is set twice"),
        ("3: a", "line 1: the key 3 is not text"),
        ("name: [", "line 1: expected the node content, but found '<stream end>'"),
        ("name: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("name: ${JAX_SELFTRAIN_TEST_UNSET}/x", "the environment variable JAX_SELFTRAIN_TEST_UNSET is not set"),
    ],
)
def test_an_invalid_file_is_one_error_sentence_with_its_position(read, tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        read(text)
    assert str(caught.value).startswith(str(tmp_path / "recipe.yaml"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        yaml_io.load(Recipe, tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        yaml_io.load(Recipe, tmp_path)
    for number, text in enumerate(("name: " + "[" * 5000, "name: 2026-02-30", "name: " + "1" * 5000)):
        (tmp_path / f"odd{number}.yaml").write_text(text)
        with pytest.raises(InputError, match=rf"odd{number}\.yaml: "):
            yaml_io.load(Recipe, tmp_path / f"odd{number}.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.yaml: not UTF-8 text"):
        yaml_io.load(Recipe, tmp_path / "binary.yaml")


def test_environment_variables_are_values_never_structure(read, monkeypatch):
    monkeypatch.setenv("TEST_DATA", "/data")
    monkeypatch.setenv("TEST_STEPS", "30")
    monkeypatch.setenv("TEST_TRICK", "a\nsteps: 5")
    recipe = read("name: ${TEST_TRICK}\ntasks: ['${TEST_DATA}/a.jsonl', '$${TEST_DATA}']\nsteps: ${TEST_STEPS}\n")
    assert recipe == Recipe(name="a\nsteps: 5", tasks=("/data/a.jsonl", "${TEST_DATA}"), steps=30)
    with pytest.raises(InputError, match="`steps`: expected a whole number"):
        read("steps: '${TEST_STEPS}'")


def test_require_names_the_flag():
    yaml_io.require(config.SampleConfig(model="m", out="o"), "model", "out")
    with pytest.raises(InputError, match=r"`stop_ids` is required: pass --stop-ids, or set `stop_ids` in"):
        yaml_io.require(Recipe(), "name", "stop_ids")
    with pytest.raises(InputError, match="`tasks` is required"):
        yaml_io.require(config.ScoreConfig(), "tasks")


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12) | st.sampled_from(
    ["no", "1e-4", "${X}", "$${X}", "${", "null", "0x1", "a: b", "- a", "#", "2024-01-01", "'", '"', " a", "~", "="]
)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        Recipe,
        name=words,
        steps=st.none() | st.integers(0, 10**12),
        shuffle=st.booleans(),
        tasks=st.lists(words, max_size=3).map(tuple),
        stop_ids=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
        level=st.sampled_from([None, 1, 2]),
        optimizer=st.builds(Optimizer, learning_rate=numbers),
    )
)
def test_load_returns_what_save_wrote(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    yaml_io.save(path, recipe)
    assert yaml_io.load(Recipe, path) == recipe
    assert yaml_io.from_dict(Recipe, yaml_io.to_dict(recipe), where="dict") == recipe


@pytest.mark.parametrize(
    "cls", [value for value in vars(config).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
)
def test_every_configuration_of_the_package_survives_yaml(tmp_path, cls):
    yaml_io.save(tmp_path / "c.yaml", cls())
    assert yaml_io.load(cls, tmp_path / "c.yaml") == cls()


def test_options_of_sections_have_flags():
    types = {yaml_io.flag(name): tp for name, tp in yaml_io.option_types(config.RunConfig).items()}
    assert {"--model", "--train.learning-rate", "--score.tasks", "--extract.sequences"} <= set(types)
    assert "--train" not in types
    assert yaml_io.is_sequence(types["--score.tasks"])
    assert yaml_io.is_sequence(types["--sample.stop-ids"])
    assert not yaml_io.is_sequence(types["--sample.seed"])
    assert yaml_io.has_sections(yaml_io.option_types(config.StudyConfig)["models"])
    assert yaml_io.negated_flag("train.decay_embeddings") == "--train.no-decay-embeddings"


def test_words_are_parsed_by_the_type_of_the_field():
    def parse(tp: object, *given_words: str) -> object:
        return yaml_io.parse_value(tp, given_words, where="--flag")

    assert parse(int, "-5") == -5
    assert parse(float, "1e-4") == 1e-4
    assert parse(str, "1e-4") == "1e-4"
    assert parse(int | None, "none") is None
    assert parse(str, "none") == "none"
    assert parse(Literal[1, 2], "2") == 2
    assert parse(tuple[int, ...], "1", "2") == (1, 2)
    assert parse(tuple[int, ...] | None) == ()
    for tp, word in [(int, "1.5"), (int, "1e3"), (float, "nan"), (float, "x"), (Literal["a"], "b")]:
        with pytest.raises(InputError, match=r"^--flag: expected"):
            parse(tp, word)


def test_few_shot_counts_may_be_sections(read):
    text = "tasks: [piqa, {name: arc_challenge, num_fewshot: 25}, {num_fewshot: 0, name: gsm8k}]"
    for cls in (config.ScoreConfig, config.DecontaminateConfig):
        assert read(text, cls).tasks == ("piqa", "arc_challenge@25", "gsm8k@0")
    for entry in ("{name: piqa}", "{name: piqa, fewshot: 3}", "{}"):
        with pytest.raises(InputError, match=r"`tasks`: an entry is text, or a section with `name` and `num_fewshot`"):
            read(f"tasks: [{entry}]", config.ScoreConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": "10"}, "--samples: expected a whole number, found '10'"),
        ({"samples": True}, "--samples: expected a whole number"),
        ({"temperature": float("nan")}, "--temperature: expected a finite number"),
        ({"stop_ids": 2}, "--stop-ids: expected a list"),
        ({"stop_ids": ["2"]}, r"--stop-ids\[0\]: expected a whole number"),
        ({"dtype": "bf16"}, "--dtype: expected one of"),
    ],
)
def test_configs_made_in_python_are_checked_with_the_same_sentences(changes: dict[str, Any], message: str) -> None:
    config = SampleConfig(model="m", out="o", **changes)
    with pytest.raises(InputError, match=message):
        yaml_io.require(config)


def test_paths_are_accepted_in_python(tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": tmp_path, "out": tmp_path / "o", "stop_ids": [2]}
    yaml_io.require(SampleConfig(**options))
