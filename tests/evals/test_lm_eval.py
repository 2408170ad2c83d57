"""Tasks of lm-evaluation-harness with our adapter and with its HF backend."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from harness_sets import (
    CHOICE,
    TOLERANCE,
    answers,
    assert_equal_answers,
    hf_backend,
    our_backend,
    published_sets,
    task,
    write_jsonl,
    write_local_tasks,
    write_pythia_shape,
    write_tasks,
)
from launcher import run_code, run_command
from models_factory import tiny_texts, write_tiny_hf_model

from jax_selftrain import cli, hub
from jax_selftrain.config import CompareConfig, ScoreConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals import score
from jax_selftrain.evals.item_results import REQUESTS, load_score_result
from jax_selftrain.evals.task_names import SUITES, split_names
from jax_selftrain.io import json_files
from jax_selftrain.study import compare

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_local_tasks(tmp_path_factory.mktemp("local"))


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("stories260k", 5),
        pytest.param("stories260k", 12, marks=pytest.mark.nightly),
        pytest.param("pythia-14m", 12, marks=pytest.mark.nightly),
    ],
)
def test_published_sets_get_the_answers_of_the_hf_backend(data_dir, tmp_path, name, limit):
    folder = data_dir / name if name == "stories260k" else write_pythia_shape(data_dir, tmp_path / name)
    sets = published_sets(data_dir, tmp_path / "sets", limit=limit)
    assert len(sets) == 11
    assert_equal_answers(answers(our_backend(folder), sets), answers(hf_backend(folder, batch_size=16), sets))


def test_contexts_of_every_kind_get_the_answers_of_the_hf_backend(tiny_model):
    """Empty, trailing space, initial BOS, longer than the model."""
    folder = tiny_model("llama", max_position_embeddings=64)
    text = next(tiny_texts(1)) * 3
    pairs = [("", " a fox"), ("", "<s> a fox"), ("a big \n", "fox"), ("<s>a big", " fox"), (text, " fox"), ("a", " b")]
    requests = instances("loglikelihood", pairs)
    ours, theirs = our_backend(folder).loglikelihood(requests), hf_backend(folder).loglikelihood(requests)
    np.testing.assert_allclose([a[0] for a in ours], [b[0] for b in theirs], atol=TOLERANCE)
    assert [a[1] for a in ours] == [b[1] for b in theirs]


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_rolling_likelihood_of_texts_longer_than_the_model(tiny_model, family):
    folder = tiny_model(family, max_position_embeddings=64)
    texts = ["a", *(text * repeat for text, repeat in zip(tiny_texts(4), (1, 2, 5, 9), strict=True)), ""]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    ours = our_backend(folder)
    assert len(ours.tok_encode(texts[4])) > 7 * 64
    expected = hf_backend(folder, batch_size=4).loglikelihood_rolling(requests)
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests), expected, atol=TOLERANCE)


def test_rolling_likelihood_of_a_trained_model(data_dir, stories260k):
    texts = [json.loads(line)["text"] for line in (data_dir / "tinystories/heldout.jsonl").read_text().splitlines()[:6]]
    requests = instances("loglikelihood_rolling", [(" ".join(texts),), (texts[0],)])
    ours = our_backend(stories260k)
    assert len(ours.tok_encode(" ".join(texts))) > 2 * ours.max_length
    expected = hf_backend(stories260k).loglikelihood_rolling(requests)
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    "most", [(40, 30, 120), pytest.param((60, 40, 300), marks=pytest.mark.nightly)], ids="{0[2]} tokens".format
)
def test_generation_is_that_of_the_hf_backend(stories260k, most):
    """Stop strings, an end token, a length limit and a truncated prompt."""
    long = "Tom and Sue went to the park. They saw a big dog and a cat. " * 16
    prompts = ["Once upon a time", "Lily had a red ball. She", long, "The sun was hot.\n", "<s>Once", ""]
    options = [
        {"until": [".", "!"], "max_gen_toks": most[0], "do_sample": False},
        {"until": ["\n\n", "Lily"], "max_gen_toks": most[1]},
        {"until": "park", "max_gen_toks": most[2], "temperature": 0.0},
    ]
    pairs = [(prompt, dict(option)) for option in options[:2] for prompt in prompts[:-1]]
    requests = instances("generate_until", [*pairs, *((prompt, dict(options[2])) for prompt in (prompts[0], long))])
    ours = our_backend(stories260k)
    assert len(ours.tok_encode(long)) > ours.max_length - most[2]
    found = ours.generate_until(requests)
    assert found == hf_backend(stories260k, batch_size=1).generate_until(requests)
    assert any(len(ours.tok_encode(text)) > 32 for text in found)
    empty = instances("generate_until", [("", options[0])])  # the HF backend cannot continue nothing
    assert ours.generate_until(empty)[0].startswith("Once upon a time")


def test_sampled_generation_follows_the_seed_and_refuses_what_it_cannot_do(tiny_model):
    lm, other = our_backend(tiny_model(), seed=1), our_backend(tiny_model(), seed=2)
    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 50}
    requests = instances("generate_until", [("Once there", drawn)] * 3)
    texts = lm.generate_until(requests)
    assert len(set(texts)) == 3
    assert texts == lm.generate_until(requests) != other.generate_until(requests)
    with pytest.raises(InputError, match=r"generation with num_beams is not supported; possible are do_sample"):
        lm.generate_until(instances("generate_until", [("a", {"until": [], "num_beams": 4})]))
    neutral = {"until": [], "max_gen_toks": 4, "do_sample": False, "repetition_penalty": 1.0, "num_beams": 1}
    (plain,) = lm.generate_until(instances("generate_until", [("a", {**neutral})]))
    assert plain == lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 4, "until": []})]))[0]
    with pytest.raises(InputError, match="trust_remote_code: code of models is never run"):
        our_backend(tiny_model(), trust_remote_code=True)
    with pytest.raises(InputError, match="nowhere@step1: no such"):
        our_backend("./nowhere", revision="step1", trust_remote_code=False)
    with pytest.raises(InputError, match=r"--temperature 0\.0: must be a finite number above 0"):
        lm.generate_until(instances("generate_until", [("a", {"do_sample": True, "temperature": 0.0})]))
    with pytest.raises(InputError, match="1024 tokens to generate must be fewer than the model's 1024 positions"):
        lm.generate_until(instances("generate_until", [("a", {"max_gen_toks": 1024})]))


def options_for(tmp_path, tiny_model, local, **changes):
    options = {
        "model": str(tiny_model()),
        "tasks": ("my_group", str(local["files"]["choices"]), "my_texts", "my_prompts"),
        "texts": (str(local["files"]["texts"]),),
        "task_folder": str(local["folder"]),
        "out": str(tmp_path / "out" / "scores.json"),
        "mesh": "data=1",
    }
    return ScoreConfig(**(options | changes))


def test_perplexities_beyond_float64_are_none(tmp_path, tiny_model):
    rolling = [
        {"metric": f"{unit}_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        for unit in ("word", "byte")
    ]
    rows = [{"text": "从前有一个小女孩" * 20}, {"text": "住在森林旁边的小木屋里" * 20}]
    columns = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": rolling}
    spec = task("one_word", write_jsonl(tmp_path / "cjk.jsonl", rows), "loglikelihood_rolling", columns)
    options = options_for(tmp_path, tiny_model, {"files": {"choices": "", "texts": ""}, "folder": ""})
    folder = str(write_tasks(tmp_path / "tasks", [spec]))
    found = score(dataclasses.replace(options, tasks=("one_word",), texts=(), task_folder=folder))["tasks"]["one_word"]
    assert found["word_perplexity"] is None
    assert 1 < found["byte_perplexity"] < 1e6


def test_named_tasks_and_local_files_are_in_one_result(tmp_path, tiny_model, local):
    options = options_for(tmp_path, tiny_model, local)
    result = score(options)
    folder = tmp_path / "out"
    assert json_files.read_json(folder / "scores.json") == result
    assert set(result["tasks"]) == {"local_choices", "my_choices", "my_words", "my_texts", "my_prompts"}
    own, named = result["tasks"]["local_choices"], result["tasks"]["my_choices"]
    for metric in ("n", "acc", "acc_norm"):
        assert named[metric] == own[metric]
    assert named["acc_stderr"] == pytest.approx(own["acc_stderr"], rel=1e-12)
    assert set(result["tasks"]["my_words"]) == {"n", "acc", "acc_stderr", "perplexity", "perplexity_stderr"}
    assert result["groups"]["my_group"]["n"] == 17
    words = result["tasks"]["my_words"]
    assert result["groups"]["my_group"]["acc"] == pytest.approx((12 * named["acc"] + 5 * words["acc"]) / 17)
    provenance = result["harness"]
    assert provenance["version"].startswith("0.4.")
    assert provenance["tasks"]["my_choices"]["version"] == 1.0
    assert provenance["tasks"]["my_choices"]["num_fewshot"] == 0

    table = pq.read_table(folder / "scores.requests.parquet")
    assert table.schema.equals(REQUESTS)
    rows = table.to_pylist()
    by_task = {name: [row for row in rows if row["task"] == name] for name in result["tasks"] | result["texts"]}
    assert [(r["doc"], r["choice"]) for r in by_task["my_choices"]] == [(d, c) for d in range(12) for c in (0, 1)]
    for mine, harness in zip(by_task["local_choices"], by_task["my_choices"], strict=True):
        # Both are the same request, which may share its row with others: equal but for rounding.
        same = {"task": "local_choices", "loglikelihood": pytest.approx(mine["loglikelihood"], rel=1e-5)}
        assert mine == {**harness, **same}
    windows = [(row["doc"], row["choice"]) for row in by_task["my_texts"]]
    assert windows == sorted(windows)
    assert max(choice for _, choice in windows) > 0  # a text is longer than the model
    assert not by_task["my_prompts"]
    generations = pq.read_table(folder / "scores.generations.parquet").to_pylist()
    assert [(row["doc"], row["choice"]) for row in generations] == [(d, c) for d in range(4) for c in (0, 1)]
    assert all("." not in row["text"] for row in generations)

    names = [path.name for path in folder.iterdir() if path.name != "scores.timings.json"]
    before = {name: (folder / name).read_bytes() for name in names}
    score(options)
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_items_of_named_tasks_can_be_compared(tmp_path, tiny_model, local):
    options = options_for(tmp_path, tiny_model, local)
    result = score(options)
    scored = load_score_result(options.out)
    assert list(scored.items) == ["local_choices", "local_texts", "my_choices", "my_words", "my_prompts"]
    own, named = scored.items["local_choices"], scored.items["my_choices"]
    for column in ("choices", "acc", "acc_norm", "loglikelihood", "log_odds", "tokens", "bytes"):
        # Both are the same requests, which may share rows with others: equal but for rounding.
        np.testing.assert_allclose(getattr(own, column), getattr(named, column), rtol=1e-5, err_msg=column)
    words = scored.items["my_words"]
    assert words.kind == "last_word"
    assert words.acc.mean() == result["tasks"]["my_words"]["acc"]
    assert len({*named.item_hash, *words.item_hash}) == named.count + words.count


def test_generation_tasks_have_items_with_their_first_metric(tmp_path, tiny_model, local):
    """Half of the targets are what the model generates."""
    prompts = [text[:50] for text in tiny_texts(8, seed=3)]
    until = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    found = our_backend(tiny_model()).generate_until(instances("generate_until", [(text, until) for text in prompts]))
    rows = [{"context": p, "answer": t if i % 2 else "no"} for i, (p, t) in enumerate(zip(prompts, found, strict=True))]
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    file = write_jsonl(tmp_path / "sums.jsonl", rows)
    columns = {"doc_to_text": "{{context}}", "doc_to_target": "{{answer}}", "metric_list": [metric]}
    spec = task("sums", file, "generate_until", columns, generation_kwargs=until, num_fewshot=0)
    folder = write_tasks(tmp_path / "tasks", [spec])
    options = options_for(tmp_path, tiny_model, local, tasks=("sums",), texts=(), task_folder=str(folder))
    result = score(options)
    items = load_score_result(options.out).items["sums"]
    assert items.kind == "generation"
    assert items.acc.tolist() == [False, True] * 4
    assert result["tasks"]["sums"]["exact_match"] == 0.5
    assert items.chance_accuracy is None
    assert len(set(items.item_hash)) == 8
    config = CompareConfig(base=(options.out,), student=(options.out,), out=str(tmp_path / "comparison.json"))
    (entry,) = compare(config)["pairs"][0]["tasks"]
    assert (entry["name"], entry["kind"], entry["accuracy"]["change"]["value"]) == ("sums", "generation", 0)


def test_few_shots_come_before_each_question_and_limits_hold(tmp_path, tiny_model, local):
    none = score(options_for(tmp_path, tiny_model, local, tasks=("my_shots", "my_choices"), texts=(), limit=4))
    two = score(
        options_for(tmp_path, tiny_model, local, tasks=("my_shots", "my_choices"), texts=(), limit=4, num_fewshot=2)
    )
    shots = [result["harness"]["tasks"]["my_shots"] for result in (none, two)]
    assert [one["num_fewshot"] for one in shots] == [0, 2]
    assert shots[0]["requests"] != shots[1]["requests"]
    assert two["harness"]["tasks"]["my_choices"] == none["harness"]["tasks"]["my_choices"]  # its own value is 0
    assert two["tasks"]["my_shots"]["n"] == 4


def test_references_are_files_names_or_suites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "piqa").mkdir()
    given = ["blimp", "piqa", "blimp:x.jsonl", "sciq", "quick", "missing.jsonl", "a/b", "gsm8k@8", "a@b/c"]
    files, names = split_names(given)
    assert files == ["piqa", "blimp:x.jsonl", "missing.jsonl", "a/b", "a@b/c"]
    assert list(names) == ["blimp", "sciq", "lambada_openai", "arc_easy", "piqa", "gsm8k"]
    assert set(names.values()) == {None, 8}
    for wrong in ("gsm8k@eight", "gsm8k@"):
        with pytest.raises(InputError, match=f"task {wrong}: give the number of few-shot examples"):
            split_names([wrong])
    assert split_names(["paper-b"])[1] == {"arc_challenge": 25, "gsm8k": 8, "hellaswag": 5, "minerva_math": 4}
    assert set(split_names(["paper-a"])[1].values()) == {0}
    assert set(split_names(["paper-a@2"])[1].values()) == {2}
    with pytest.raises(InputError, match="gsm8k is requested with 0 and with 8 few-shot examples"):
        split_names(["paper-a", "gsm8k@8"])
    assert SUITES["pythia"] == (
        *("lambada_openai", "piqa", "winogrande", "wsc", "arc_easy", "arc_challenge", "sciq", "logiqa"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_folder": "nowhere"}, "--task-folder nowhere: no such folder"),
        ({"tasks": ("my_group", "my_words")}, "task my_words is requested twice, by my_group and by my_words"),
        ({"tasks": ("unfetched",)}, r"task unfetched: its data set missing/dataset cannot be fetched \(.*\); run once"),
        ({"tasks": ("lost_group",)}, r"task lost: its data files cannot be read \(FileNotFoundError"),
        ({"tasks": ("crooked",)}, r"task crooked cannot be set up \(TypeError: .*doc_to_txt"),
    ],
)
def test_unusable_tasks_are_refused_in_one_sentence(tmp_path, tiny_model, local, changes, message):
    lost = task("lost", tmp_path / "lost.jsonl", "multiple_choice", CHOICE)
    specs = [
        *local["tasks"].values(),
        {"group": "my_group", "task": ["my_choices", "my_words"]},
        {**lost, "task": "unfetched", "dataset_path": "missing/dataset", "dataset_kwargs": {}},
        lost,
        {"group": "lost_group", "task": ["my_choices", "lost"]},
        {**local["tasks"]["my_choices"], "task": "crooked", "doc_to_txt": "{{context}}"},
    ]
    options = {"task_folder": str(write_tasks(tmp_path / "tasks", specs)), "texts": ()} | changes
    with pytest.raises(InputError, match=message):
        score(options_for(tmp_path, tiny_model, local, **options))
    assert not (tmp_path / "out").exists()


def test_a_task_that_executes_code_of_the_model_needs_a_confirmation(tmp_path, tiny_model, local):
    folder = write_tasks(
        tmp_path / "tasks",
        [{**local["tasks"]["my_prompts"], "unsafe_code": True}, {"group": "all", "task": ["my_prompts"]}],
    )
    options = options_for(tmp_path, tiny_model, local, tasks=("all",), texts=(), task_folder=str(folder))
    with pytest.raises(
        InputError, match=r"task my_prompts executes code that the model writes.*--confirm-run-unsafe-code"
    ):
        score(options)
    assert not (tmp_path / "out").exists()
    assert "my_prompts" in score(dataclasses.replace(options, confirm_run_unsafe_code=True))["tasks"]


def test_a_file_and_a_task_of_one_name_are_refused(tmp_path, tiny_model, local):
    file = write_jsonl(tmp_path / "my_words.jsonl", [{"context": "a", "continuation": " b"}])
    with pytest.raises(InputError, match="are both named 'my_words'"):
        score(options_for(tmp_path, tiny_model, local, tasks=(str(file), "my_words"), texts=()))


def test_nan_names_the_request(tiny_model, local):
    from jax_selftrain.evals.lm_eval_adapter import HarnessLM

    model = hub.load_model(tiny_model(), "data=1")
    norm = {"scale": model.params["final_norm"]["scale"] * np.nan}
    broken = dataclasses.replace(model, params={**model.params, "final_norm": norm})
    with pytest.raises(InputError, match="log-likelihood of my_choices, document 0, choice 0 is nan"):
        answers(HarnessLM(broken), [local["tasks"]["my_choices"]])


def test_a_chat_template_is_the_tokenizers_own(tiny_model, monkeypatch):
    lm = our_backend(tiny_model())
    chat = [{"role": "user", "content": "Who?"}]
    with pytest.raises(InputError, match="has no chat template"):
        lm.apply_chat_template(chat)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    assert lm.apply_chat_template(chat) == "[user]Who?"


def test_an_unknown_name_suggests_the_nearest(tmp_path, tiny_model, local):
    with pytest.raises(InputError, match=r"task 'lambada_opanai' is neither .* did you mean `lambada_openai`\?"):
        score(options_for(tmp_path, tiny_model, local, tasks=("lambada_opanai",), task_folder="", texts=()))


@pytest.mark.nightly
def test_tasks_found_by_folder_equal_those_of_the_full_index():
    """A task, groups of tasks, of tags and of other folders' tasks, tags, and a name in quotes."""
    from lm_eval.tasks import TaskManager

    from jax_selftrain.evals.harness_index import make_task_manager, task_members

    whole = TaskManager()

    def files(manager, name):
        entry = manager.task_index[name]
        members = [m for m in task_members(entry) if isinstance(m, str) and m in whole.task_index]
        return [(name, entry.kind, entry.yaml_path), *(file for m in members for file in files(manager, m))]

    names = {name for suite in SUITES for name in split_names([suite])[1]}
    for name in [*names, "leaderboard", "ai2_arc", "mmlu_stem_tasks", "glue", "mmmlu_bn_bd_moral_disputes"]:
        found = make_task_manager([name])
        assert files(found, name) == files(whole, name)
        if name in ("arc_easy", "piqa", "minerva_math"):
            assert len(found.task_index) < len(whole.task_index) / 100


def test_the_command_scores_named_tasks(tmp_path, tiny_model, local):
    """On Python 3.12 in CI this runs without torch."""
    out = tmp_path / "scores.json"
    words = ["score", "--model", str(tiny_model()), "--tasks", "my_group", "my_texts", "my_prompts"]
    words += ["--task-folder", str(local["folder"]), "--out", str(out), "--mesh", "data=1"]
    done = run_command(*words)
    assert done.returncode == 0, done.stderr
    measured = ["my_choices", "my_words", "my_texts", "my_prompts", "my_group"]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*measured, "written:"]


def test_without_the_harness_one_sentence_says_what_to_install(tmp_path, tiny_model, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "jax_selftrain.evals.lm_eval_adapter", raising=False)
    words = ["score", "--model", str(tiny_model()), "--tasks", "piqa", "--out", str(tmp_path / "scores.json")]
    assert cli.main(words) == 2
    assert "pip install 'lm-eval>=0.4.13,<0.5'" in capsys.readouterr().err


def test_local_scoring_and_help_never_import_the_harness(tmp_path, tiny_model, local):
    words = ["score", "--model", str(tiny_model()), "--tasks", str(local["files"]["words"])]
    words += ["--out", str(tmp_path / "scores.json"), "--mesh", "data=1"]
    code = (
        f"import sys\nfrom jax_selftrain import cli\nassert cli.main({words!r}) == cli.main(['--help']) == 0\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'lm_eval']"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr


def test_sciq_and_winogrande_as_published_get_the_answers_of_the_hf_backend(tmp_path):
    """`score` reads the published files; the harness reads them with its own templates."""
    from lm_eval.tasks.winogrande import preprocess_winogrande as winogrande

    stories = list(tiny_texts(40, seed=6))
    sciq = [
        {
            "question": f"{text[:30]}?",
            **{f"distractor{n}": text[20 * n : 20 * n + 9].strip() for n in (1, 2, 3)},
            "correct_answer": text[90:99].strip(),
            "support": " " * (i % 2) + text[40:80] * (i % 3),
        }
        for i, text in enumerate(stories[:20])
    ]
    gaps = [
        {"sentence": f"{text[:30]} _ {text[30:60]}.", "option1": text[60:66], "option2": text[70:79], "answer": answer}
        for text, answer in zip(stories[20:], "12" * 10, strict=True)
    ]
    templates = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/sciq/sciq.yaml").read_text())
    columns = {
        "sciq": {name: value for name, value in templates.items() if name.startswith("doc_to_")},
        "winogrande": {name: getattr(winogrande, name) for name in ("doc_to_text", "doc_to_target", "doc_to_choice")},
    }
    files = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("sciq", sciq), ("winogrande", gaps))
    }
    specs = [task(name, file, "multiple_choice", columns[name]) for name, file in files.items()]
    folder = write_tiny_hf_model(tmp_path / "model", "llama")
    expected, metrics = answers(hf_backend(folder, batch_size=4), specs)
    out = tmp_path / "score.json"
    found = score(ScoreConfig(model=str(folder), tasks=tuple(map(str, files.values())), out=str(out)))["tasks"]
    rows = pq.read_table(out.with_name("score.requests.parquet")).to_pylist()
    assert {(row["task"], row["doc"], row["choice"]) for row in rows} == expected.keys()
    for row in rows:
        loglikelihood, is_greedy = expected[row["task"], row["doc"], row["choice"]]
        assert row["loglikelihood"] == pytest.approx(loglikelihood, abs=TOLERANCE)
        assert row["is_greedy"] == is_greedy
    for name in files:
        assert [found[name][metric] for metric in ("acc", "acc_norm")] == [
            metrics[name][f"{metric},none"] for metric in ("acc", "acc_norm")
        ]
