"""Tests of `lm_eval` on several devices."""

import pytest
from harness_sets import CHOICE, LAST_WORD, task, write_jsonl, write_tasks
from models_factory import tiny_texts

from jax_selftrain import hub
from jax_selftrain.errors import InputError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


TOLERANCE = 1e-3  # nats per request, in fp32: the harness's parity that the project promises


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Small tasks of every kind: YAML files and their data files."""
    folder = tmp_path_factory.mktemp("local")
    stories = list(tiny_texts(12, seed=5))
    choices = [
        {"context": text[:40], "choices": [text[40:60], " red lamp"], "answer": i % 2} for i, text in enumerate(stories)
    ]
    words = [{"context": text[:40], "continuation": text[40:50]} for text in stories[:5]]
    texts = [{"text": text * repeat} for repeat, text in zip((1, 9, 30), stories, strict=False)]
    prompts = [{"context": text[:length]} for length, text in zip((20, 90, 55, 1), stories, strict=False)]
    files = {
        name: write_jsonl(folder / f"local_{name}.jsonl", rows)
        for name, rows in {"choices": choices, "words": words, "texts": texts, "prompts": prompts}.items()
    }
    plain = {"target_delimiter": "", "num_fewshot": 0}
    generation = {"until": [".", "\n\n"], "max_gen_toks": 24, "do_sample": False}
    rolling = [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]
    tasks = [
        task("my_choices", files["choices"], "multiple_choice", CHOICE, **plain),
        task("my_words", files["words"], "loglikelihood", LAST_WORD, **plain),
        task("my_shots", files["choices"], "multiple_choice", CHOICE, target_delimiter="", fewshot_split="test"),
        task(
            "my_texts",
            files["texts"],
            "loglikelihood_rolling",
            {"doc_to_text": "", "doc_to_target": "{{text}}"},
            metric_list=rolling,
        ),
        task(
            "my_prompts",
            files["prompts"],
            "generate_until",
            {"doc_to_text": "{{context}}", "doc_to_target": ""},
            generation_kwargs=generation,
            repeats=2,
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        ),
    ]
    group = {
        "group": "my_group",
        "task": ["my_choices", "my_words"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2.0},
    }
    return {
        "folder": write_tasks(folder / "tasks", [*tasks, group]),
        "files": files,
        "tasks": {t["task"]: t for t in tasks},
    }


def answers(lm, specs, limit=None):
    """Return {(task, document, choice): answer} and {task: metrics}."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([dict(spec) for spec in specs])
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=0)
    found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    given = {(i.task_name, i.doc_id, i.idx): i.resps[0] for one in loaded["tasks"].values() for i in one.instances}
    return given, found["results"]


def hf_backend(folder, **options):
    pytest.importorskip("torch", reason="the harness's own backend needs torch")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", **options)


def our_backend(folder, mesh="data=1", **options):
    from jax_selftrain.evals.lm_eval_adapter import HarnessLM

    return HarnessLM(str(folder), mesh=mesh, **options)


def assert_equal_answers(ours, theirs):
    (given, metrics), (expected, their_metrics) = ours, theirs
    assert given.keys() == expected.keys()
    assert max(abs(given[key][0] - expected[key][0]) for key in given) < TOLERANCE
    assert [given[key][1] for key in given] == [expected[key][1] for key in given]
    for name, values in metrics.items():
        for metric in ("acc,none", "acc_norm,none"):
            assert values.get(metric) == their_metrics[name].get(metric)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
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
