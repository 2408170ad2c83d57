"""Tests of `lm_eval` on several devices."""

import pytest
from harness_sets import answers, assert_equal_answers, hf_backend, our_backend, write_local_tasks
from models_factory import FAMILIES

from jax_selftrain import hub
from jax_selftrain.errors import InputError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_local_tasks(tmp_path_factory.mktemp("local"))


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family == "llama" else pytest.mark.nightly) for family in FAMILIES]
)
def test_local_tasks_get_the_answers_of_the_hf_backend(tiny_model, local, family):
    folder = tiny_model(family)
    specs = [local["tasks"]["my_choices"], local["tasks"]["my_words"]]
    theirs = answers(hf_backend(folder, batch_size=4), specs)
    assert_equal_answers(answers(our_backend(folder), specs), theirs)
    assert_equal_answers(answers(our_backend(folder, "data=2,model=2", batch_tokens=256), specs), theirs)


def test_the_registry_knows_the_model_by_name(tiny_model, local):
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    from jax_selftrain.evals.lm_eval_adapter import HarnessLM

    assert get_model("jax-selftrain") is HarnessLM
    manager = TaskManager(include_defaults=False, include_path=str(local["folder"]))
    folder = tiny_model()
    given = {
        "model": {"model": HarnessLM(hub.load_model(folder, "data=2,model=2"))},
        "string": {
            "model": "jax-selftrain",
            "model_args": f"pretrained={folder},dtype=float32,mesh=data=2:model=2",
        },
        "mapping": {"model": "jax-selftrain", "model_args": {"pretrained": str(folder), "mesh": "data=2,model=2"}},
    }
    found = {
        way: lm_eval.simple_evaluate(
            **options, tasks=["my_choices"], task_manager=manager, bootstrap_iters=0, log_samples=False
        )["results"]
        for way, options in given.items()
    }
    assert found["string"] == found["mapping"] == found["model"]
    assert found["model"]["my_choices"]["sample_len"] == 12
    with pytest.raises(InputError, match="device=cuda cannot be chosen here"):
        HarnessLM.create_from_arg_string(f"pretrained={folder}", {"device": "cuda"})
