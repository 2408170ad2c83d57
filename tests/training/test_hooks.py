"""Evaluations during training: each is recorded once per step and survives interruptions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from model_params import param_bytes
from training_runs import EVALUATED, Interruption, curve, first_scale, interrupt, measuring

from jax_selftrain.config import TrainConfig
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.io import json_files
from jax_selftrain.training import Hook, train
from jax_selftrain.training.checkpoints import steps_to_keep

Options = Callable[..., TrainConfig]


def list_saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def test_the_curve_has_a_line_before_the_first_step_every_eval_and_after_the_last(options: Options):
    run = train(options(**EVALUATED, steps=5), hooks=[measuring(first_scale)])
    assert [line["step"] for line in curve(run)] == [0, 2, 4, 5]
    assert {tuple(line) for line in curve(run)} == {("step", "probe/nll")}
    assert len({line["probe/nll"] for line in curve(run)}) == 4, "each from the model of its own step"
    assert json_files.read_json(run / "run.json")["evaluation"]["measured"] == [{"probe": "as it is"}]


def test_a_run_by_epochs_evaluates_and_saves_at_the_end_of_each(options: Options):
    """Interrupted within an epoch, it ends with the same bytes."""
    by_epochs = {"steps": None, "epochs": 3, "checkpoint_every": None, "keep": 9, "eval_texts": ("of a hook.jsonl",)}
    hook = measuring(first_scale, every=None, each_epoch=True)
    whole = options(**by_epochs, batch_size=3)
    run = train(whole, hooks=[hook])
    record = json_files.read_json(run / "run.json")
    ends = [-(-record["rows"] * (epoch + 1) // 3) for epoch in range(3)]
    assert ends[1] - ends[0] > 2
    assert (record["steps"], record["corpus"]["epochs"]) == (ends[-1], pytest.approx(3, abs=3 / record["rows"]))
    assert [line["step"] for line in curve(run)] == [0, *ends]
    assert list_saved_steps(run) == ends
    broken = replace(whole, out=f"{whole.out} 2")
    with pytest.raises(Interruption):
        train(broken, hooks=[hook, Hook(interrupt, steps=(ends[0] + 2,))])
    again = train(broken, hooks=[hook])
    assert param_bytes(again) == param_bytes(run)
    assert (again / "curve.jsonl").read_bytes() == (run / "curve.jsonl").read_bytes()
    with pytest.raises(InputError, match="started with --epochs 3, not 4"):
        train(replace(broken, epochs=4), hooks=[hook])
    with pytest.raises(InputError, match="--steps and --epochs exclude each other"):
        train(replace(broken, steps=4), hooks=[hook])


ON_DEV = {"steps": None, "epochs": 3, "batch_size": 6, "eval_tasks": ("of a hook.jsonl",), "eval_split": "dev"}


@pytest.mark.parametrize("best", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_the_best_epoch_on_dev_items_may_be_the_result(options: Options, best: int):
    """Interrupted after that epoch, with one checkpoint to keep."""
    config = options(**ON_DEV, best_epoch=True, keep=1, keep_every=None, checkpoint_every=3)
    all_kept = options(**ON_DEV, keep=99, checkpoint_every=None, out=f"{config.out} all")
    ends: list[int] = []

    def accuracy(step: int, model: LoadedModel) -> dict[str, float]:
        if step and step not in ends:
            ends.append(step)
        return (
            {"one/acc": 1.0 if ends.index(step) + 1 >= best else 0.5, "other/acc": 0.5}
            if step
            else {
                "one/acc": 1.0,
                "other/acc": 1.0,
            }
        )

    hook = measuring(accuracy, every=None, each_epoch=True, metric_names=("one/acc", "other/acc"))
    whole = train(all_kept, hooks=[hook])
    with pytest.raises(Interruption):
        train(config, hooks=[hook, Hook(interrupt, steps=(ends[best - 1] + 3,))])
    run = train(config, hooks=[hook])
    assert set(list_saved_steps(run)) == {ends[best - 1], ends[-1]}
    assert json_files.read_json(run / "model" / "selftrain.json")["metadata"]["step"] == ends[best - 1]
    assert param_bytes(run) == param_bytes(whole / "checkpoints" / f"{ends[best - 1]:06d}" / "model")
    assert param_bytes(run) != param_bytes(whole)


def test_hooks_of_the_same_step_share_a_line_and_not_a_name(options: Options):
    one = Hook(lambda step, model: {"a": 1.0}, steps=(1, 2))
    two = Hook(lambda step, model: {"b": 2.0}, steps=(2,))
    run = train(options(steps=2), hooks=[one, two, Hook(lambda step, model: None, steps=(1,))])
    assert curve(run) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 1.0, "b": 2.0}]
    with pytest.raises(ValueError, match="two hooks measure 'a'"):
        train(options(steps=2, out=str(run) + "2"), hooks=[one, one])


def test_a_measure_that_is_not_finite_is_refused(options: Options):
    with pytest.raises(InputError, match="probe is nan after step 1"):
        train(options(), hooks=[Hook(lambda step, model: {"probe": float("nan")}, steps=(1,))])


@pytest.mark.parametrize("step", [0, 3, 4, 6])
def test_interrupted_run_has_the_bytes_of_an_undisturbed_curve(step: int, options: Options, evaluated_run: Path):
    config = options(**EVALUATED)
    with pytest.raises(Interruption):
        train(config, hooks=[measuring(first_scale), Hook(interrupt, steps=(step,))])
    run = train(config, hooks=[measuring(first_scale)])
    assert (run / "curve.jsonl").read_bytes() == (evaluated_run / "curve.jsonl").read_bytes()
    assert param_bytes(run) == param_bytes(evaluated_run)


def test_lines_after_the_restored_step_are_dropped_even_if_the_last_is_torn(options: Options):
    config = options(**EVALUATED)

    def tear(step: int, model: LoadedModel) -> None:
        with (Path(config.out) / "curve.jsonl").open("a") as file:
            file.write('{"step": 5, "probe/nll": 1.0}\n{"step": 6, "pro')
        raise Interruption

    with pytest.raises(Interruption):
        train(config, hooks=[measuring(first_scale), Hook(tear, steps=(5,))])
    assert [line["step"] for line in curve(train(config, hooks=[measuring(first_scale)]))] == [0, 2, 4, 6]


def test_a_resumed_run_must_measure_the_same(options: Options):
    config = options(**EVALUATED)
    train(config, hooks=[measuring(first_scale)])
    with pytest.raises(InputError, match="started with another evaluation"):
        train(config, hooks=[measuring(first_scale, measured={"probe": "another"})])
    with pytest.raises(InputError, match="started with --eval-every 2, not 3"):
        train(options(**{**EVALUATED, "eval_every": 3}), hooks=[measuring(first_scale)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_texts": ("a.jsonl",)}, "--eval-texts needs --eval-every"),
        ({"eval_limit": 3}, "--eval-limit needs --eval-every"),
        ({"eval_split": "dev"}, "--eval-split dev: needs --eval-texts or --eval-tasks"),
        ({"eval_every": 2}, "--eval-every 2: nothing to evaluate"),
        ({**EVALUATED, "eval_every": 0}, "--eval-every 0: must be at least 1"),
        ({**ON_DEV, "best_epoch": True, "eval_split": "all"}, "--best-epoch is chosen on dev items; it needs --epochs"),
        ({**ON_DEV, "best_epoch": True, "eval_every": 2}, "--best-epoch needs an evaluation after each epoch"),
        ({"keep_every": 0}, "--keep-every 0: must be at least 1"),
    ],
)
def test_inconsistent_evaluation_options_are_refused(change: dict, message: str, options: Options):
    config = options(**change)
    with pytest.raises(InputError, match=message) as caught:
        train(config, hooks=[measuring(first_scale)])
    assert "\n" not in str(caught.value)
    assert not Path(config.out).exists()


def test_an_evaluation_without_a_hook_is_refused(options: Options):
    with pytest.raises(InputError, match="nothing measures"):
        train(options(**EVALUATED))


# ---------------------------------------------------------------- permanent checkpoints


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [(2, None, {10, 12}), (1, 4, {4, 8, 12}), (2, 5, {10, 12}), (20, None, {0, 2, 4, 6, 8, 10, 12})],
)
def test_latest_and_permanent_checkpoints_are_kept(keep: int, keep_every: int | None, kept: set[int]):
    assert steps_to_keep([0, 2, 4, 6, 8, 10, 12], keep, keep_every) == kept


def test_every_keep_every_th_checkpoint_is_permanent(options: Options):
    run = train(options(steps=9, checkpoint_every=4, keep_every=3, keep=1))
    assert list_saved_steps(run) == [3, 6, 9], "3 and 9 are no multiples of 4: they are saved to be kept"
