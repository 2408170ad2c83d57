"""Membership scores equal the papers' formulas; AUC equals the comparison of all pairs of exact likelihoods."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy
from corpus_factory import write_jsonl
from models_factory import tiny_config, tiny_weights, write_safetensors, write_tiny_tokenizer
from records_factory import full_logit_scores, membership_scores, pairwise_auc, write_records
from sklearn.metrics import roc_auc_score, roc_curve

from jax_selftrain import hub
from jax_selftrain.config import ExtractConfig, MembershipConfig, ScoreConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals import extract, measure_membership, score
from jax_selftrain.evals.membership import score_membership
from jax_selftrain.evals.token_records import load_records
from jax_selftrain.io import json_files
from jax_selftrain.stats.roc import roc_auc, stratified_bootstrap, tpr_at_low_fpr

VOCAB, LENGTH = 128, 17


def draw_documents(rng: np.random.Generator, n: int) -> list[dict]:
    documents = []
    for size in rng.integers(1, 30, n).tolist():
        pieces = ["".join(rng.choice(list("abc é"), 3)) for _ in range(size)]
        scores = {"mean_logprob": -3 * rng.random(size), "std_logprob": rng.random(size) + 0.1}
        documents.append({"pieces": pieces, "logprob": -5 * rng.random(size), **scores})
    return documents


@pytest.fixture
def options(tmp_path):
    return partial(MembershipConfig, members="in", nonmembers="out", out=str(tmp_path / "m.json"), resamples=200)


def test_scores_of_each_document_equal_the_formulas_of_the_papers(tmp_path, options):
    rng = np.random.default_rng(0)
    sets = {"in": draw_documents(rng, 20), "other": draw_documents(rng, 2), "out": draw_documents(rng, 30)}
    records = write_records(tmp_path / "a.parquet", sets)
    own = {name: [one | {"logprob": one["logprob"] - rng.random()} for one in rows] for name, rows in sets.items()}
    reference = write_records(tmp_path / "b.parquet", own, "another")
    result = measure_membership(options(records=str(records), reference=str(reference), k=30.0))
    assert json_files.read_json(tmp_path / "m.json") == result
    assert [result[side]["documents"] for side in ("members", "nonmembers")] == [20, 30]
    rows = pq.read_table(tmp_path / "m.documents.parquet").to_pylist()
    assert [row["is_member"] for row in rows] == [True] * 20 + [False] * 30
    stored = {(row["set"], row["document"]): row for row in pq.read_table(records).to_pylist()}
    others = {(row["set"], row["document"]): row for row in pq.read_table(reference).to_pylist()}
    for row in rows:
        key = row["set"], row["document"]
        expected = membership_scores(stored[key]["text"], stored[key], 30)
        expected["reference"] = expected["loss"] - np.mean(others[key]["logprob"], dtype=np.float64)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name  # NumPy and Python add in other orders
    labels = [row["is_member"] for row in rows]
    for name, found in result["scores"].items():
        values = [row[name] for row in rows]
        assert found["auc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
        fpr, tpr, _ = roc_curve(labels, values, drop_intermediate=False)
        assert found["tpr_at_1pct_fpr"] == pytest.approx(tpr[fpr <= 0.01].max(), abs=1e-12)
        for measure in ("auc", "tpr_at_1pct_fpr"):
            low, high = found[f"{measure}_interval"]
            assert low <= found[measure] <= high


def test_a_deterministic_prediction_has_a_finite_score(tmp_path):
    scores = {"logprob": [0.0, -20.0], "mean_logprob": [0.0, 0.0], "std_logprob": [0.0, 0.0]}
    certain = {name: values[:1] for name, values in scores.items()}
    found = score_membership(load_records(str(write_records(tmp_path / "r.parquet", {"in": [scores, certain]}))), 100)
    assert np.isfinite(found["min_k_plus_plus"]).all()
    assert found["min_k_plus_plus"][0] < found["min_k_plus_plus"][1] == 0


def test_documents_without_tokens_are_counted_and_not_scored(tmp_path, options):
    rng = np.random.default_rng(1)
    empty = {"pieces": [], "logprob": []}
    sets = {"in": [*draw_documents(rng, 3), empty], "out": draw_documents(rng, 4)}
    result = measure_membership(options(records=str(write_records(tmp_path / "r.parquet", sets))))
    assert [(result[side]["documents"], result[side]["empty"]) for side in ("members", "nonmembers")] == [
        (3, 1),
        (4, 0),
    ]
    assert pq.read_table(tmp_path / "m.documents.parquet").num_rows == 7


def test_unusable_input_is_refused_and_nothing_written(tmp_path, options):
    rng = np.random.default_rng(2)
    sets = {"in": draw_documents(rng, 3), "out": draw_documents(rng, 3), "none": [{"pieces": [], "logprob": []}]}
    records = str(write_records(tmp_path / "r.parquet", sets))
    other = str(write_records(tmp_path / "o.parquet", sets | {"in": sets["in"][::-1]}))
    fewer = str(write_records(tmp_path / "f.parquet", sets | {"in": sets["in"][:2]}))
    pq.write_table(pq.read_table(records).drop_columns("greedy"), tmp_path / "x.parquet")
    (tmp_path / "t.parquet").write_text("text")
    short, infinite = ({"in": [one]} for one in ({"pieces": [], "logprob": [-1.0]}, {"logprob": [-np.inf]}))
    damaged = [str(write_records(tmp_path / f"d{i}.parquet", one)) for i, one in enumerate((short, infinite))]
    for changes, message in (
        ({"members": "on"}, "has no set 'on'; its sets are in, out, none"),
        ({"members": "out"}, "--members and --nonmembers are both 'out'"),
        ({"members": "none"}, "no document of 'none' has a token"),
        ({"records": str(tmp_path / "gone.parquet")}, "no such file"),
        ({"records": str(tmp_path / "t.parquet")}, "cannot be read as Parquet"),
        ({"records": str(tmp_path / "x.parquet")}, "holds no token records"),
        ({"records": damaged[0]}, "is damaged"),
        ({"records": damaged[1]}, "is damaged"),
        ({"reference": other}, "its tokens of document 0 of 'in' differ"),
        ({"reference": fewer}, "its documents are not those of"),
    ):
        with pytest.raises(InputError, match=message):
            measure_membership(options(**{"records": records} | changes))
        assert not list(tmp_path.glob("m.*"))


def test_bootstrap_intervals_are_those_of_the_normal_approximation():
    """DeLong's variance (Biometrics 44, 1988) of AUC, in NumPy."""
    rng = np.random.default_rng(3)
    members, nonmembers = rng.normal(0.8, 1, 300), rng.normal(0, 1, 200)
    found = stratified_bootstrap(roc_auc, members, nonmembers, resamples=4000, seed=0)
    wins = (members[:, None] > nonmembers).astype(float)
    error = np.sqrt(wins.mean(1).var(ddof=1) / 300 + wins.mean(0).var(ddof=1) / 200)
    assert found.value == pytest.approx(wins.mean(), abs=1e-12)
    ends = wins.mean() + scipy.special.ndtri([0.025, 0.975]) * error
    # The quantiles of 4,000 resamples have an error of 0.04 of the standard error; the distribution is a little skew.
    np.testing.assert_allclose([found.low, found.high], ends, atol=0.2 * error)
    assert found == stratified_bootstrap(roc_auc, members, nonmembers, resamples=4000, seed=0)
    other = stratified_bootstrap(roc_auc, members, nonmembers, resamples=4000, seed=1)
    assert (found.low, found.high) != (other.low, other.high)
    rate = stratified_bootstrap(tpr_at_low_fpr, members, nonmembers, resamples=400, seed=0)
    assert rate.value == np.mean(members > np.sort(nonmembers)[-3])  # two of 200 may be above


def write_bigram_model(folder: Path, table: np.ndarray) -> Path:
    """Write a Llama whose attention and MLP add zero, so that its logits after token i are `table[i]`.

    The embedding of token i is a large multiple of unit vector i. RMSNorm makes it √V times the unit vector.
    """
    config = tiny_config(
        "llama", vocab_size=VOCAB, hidden_size=VOCAB, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    weights = tiny_weights(config)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{name}.weight"][:] = 0
    weights["model.embed_tokens.weight"] = np.float32(100) * np.eye(VOCAB, dtype=np.float32)
    weights["model.norm.weight"][:] = 1
    weights["lm_head.weight"] = np.ascontiguousarray(table.T / np.sqrt(VOCAB), np.float32)
    folder.mkdir()
    json_files.write_json(folder / "config.json", config, checksum=False)
    write_safetensors(folder, weights)
    write_tiny_tokenizer(folder, VOCAB)
    return folder


def test_auc_of_planted_members_is_that_of_all_pairs_of_exact_likelihoods(tmp_path, options):
    """Members are drawn from the model, nonmembers from a flatter table."""
    rng = np.random.default_rng(4)
    table = 2 * rng.normal(size=(VOCAB, VOCAB))
    sets = {}
    for name, n, sharpness in (("sequences", 40, 1.0), ("controls", 30, 0.6)):
        probabilities = np.exp(sharpness * table)
        cumulative = np.cumsum(probabilities / probabilities.sum(1, keepdims=True), axis=1)
        rows = rng.integers(0, VOCAB, (n, LENGTH))
        for i in range(1, LENGTH):
            draws = rng.random(n)[:, None]
            rows[:, i] = np.minimum((cumulative[rows[:, i - 1]] < draws).sum(1), VOCAB - 1)
        sets[name] = rows
        np.save(tmp_path / f"{name}.npy", rows)
    config = ExtractConfig(
        model=str(write_bigram_model(tmp_path / "bigram", table)),
        sequences=str(tmp_path / "sequences.npy"),
        control_sequences=str(tmp_path / "controls.npy"),
        out=str(tmp_path / "e.json"),
        prefix=1,
        suffix=LENGTH - 1,
        mesh="data=1",
        greedy_decode=False,
        token_records=True,
    )
    extract(config)
    found = measure_membership(
        options(records=str(tmp_path / "e.tokens.parquet"), members="sequences", nonmembers="controls")
    )
    texts = {(row["set"], row["document"]): row["text"] for row in pq.read_table(found["records"]).to_pylist()}
    exact = {
        name: [
            membership_scores(texts[name, i], full_logit_scores(table[row[:-1]], row[1:]), 20)
            for i, row in enumerate(rows)
        ]
        for name, rows in sets.items()
    }
    for measure in ("loss", "zlib", "min_k", "min_k_plus_plus"):
        auc = pairwise_auc(*([one[measure] for one in rows] for rows in exact.values()))
        assert found["scores"][measure]["auc"] == pytest.approx(auc, abs=1e-12), measure
        assert 0.55 < auc < 0.999, measure
    stored = pq.read_table(tmp_path / "m.documents.parquet").to_pylist()
    for row, known in zip(stored, [one for rows in exact.values() for one in rows], strict=True):
        for measure, value in known.items():
            assert row[measure] == pytest.approx(value, abs=1e-4)


def test_scores_of_the_real_model_equal_those_of_transformers(tmp_path, stories260k, data_dir, options):
    torch = pytest.importorskip("torch", reason="transformers needs torch to run a model")
    from transformers import AutoModelForCausalLM

    folder = data_dir / "tinystories"
    names = {"train": "in", "heldout": "out"}
    files = []
    for name, shown in names.items():
        lines = (folder / f"{name}.jsonl").read_text().splitlines()[:6]
        files.append(write_jsonl(tmp_path / f"{shown}.jsonl", map(json.loads, lines)))
    scoring = {"text_max_tokens": 200, "token_records": True, "mesh": "data=1"}
    score(ScoreConfig(str(stories260k), texts=tuple(files), out=str(tmp_path / "s.json"), **scoring))
    measure_membership(options(records=str(tmp_path / "s.tokens.parquet")))
    judge = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    model = hub.open_model(stories260k)
    stored = {(row["set"], row["document"]): row for row in pq.read_table(tmp_path / "s.tokens.parquet").to_pylist()}
    for row in pq.read_table(tmp_path / "m.documents.parquet").to_pylist():
        record = stored[row["set"], row["document"]]
        tokens = [model.special_tokens.bos_token_id, *record["tokens"]]
        with torch.no_grad():
            logits = judge(torch.tensor([tokens])).logits[0, :-1].double().numpy()
        exact = full_logit_scores(logits, record["tokens"])
        assert exact["greedy"].tolist() == record["greedy"]
        for name, value in membership_scores(record["text"], exact, 20).items():
            assert row[name] == pytest.approx(value, abs=2e-3), name  # sums of 200 log-probabilities, right to 1e-5
