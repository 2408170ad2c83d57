"""Train a Pythia-shaped model from scratch, self-train it and export it.

`python tests/test_from_scratch.py FOLDER` does the same at a larger size (docs/from_scratch.md).
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_selftrain import cli, load_model


def write_untrained_pythia(
    folder: Path, texts: Path, *, vocabulary: int, width: int, layers: int, positions: int
) -> None:
    """Write a GPT-NeoX config and a trained byte-level BPE tokenizer, without weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end_of_text = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end_of_text], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in texts.open(encoding="utf-8")), trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": vocabulary,
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 4 * width,
        "max_position_embeddings": positions, "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "layer_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def train_from_scratch(
    out: Path, data: Path, *, vocabulary: int, steps: int, samples: int, length: int, limit: int
) -> dict:
    """Train on stories, sample, self-train; return held-out scores before and after."""
    texts, heldout = data / "tinystories" / "train.jsonl", data / "tinystories" / "heldout.jsonl"
    write_untrained_pythia(out / "untrained", texts, vocabulary=vocabulary, width=128, layers=4, positions=512)

    def run(*args: object) -> None:
        args = (*args, "--mesh", "data=1") if args[0] in ("train", "sample", "score") else args
        assert cli.main([str(arg) for arg in args]) == 0, args

    run("import", texts, "--model", out / "untrained", "--out", out / "stories")
    paths = ("--model", out / "untrained", "--corpus", out / "stories", "--out", out / "base")
    shape = ("--batch-size", 16, "--seq-len", length)
    schedule = ("--learning-rate", 3e-3, "--schedule", "cosine", "--final-learning-rate", 3e-4, "--weight-decay", 0.1)
    run("train", *paths, "--init", "scratch", "--steps", steps, *shape, *schedule, "--checkpoint-every", steps)
    run("sample", "--model", out / "base", "--out", out / "corpus", "--samples", samples, "--max-tokens", length)
    paths = ("--model", out / "base", "--corpus", out / "corpus", "--out", out / "student")
    run("train", *paths, *shape, "--learning-rate", 3e-4)
    scores = {}
    for name in ("base", "student"):
        run("score", "--model", out / name, "--texts", heldout, "--text-limit", limit, "--out", out / f"{name}.json")
        scores[name] = json.loads((out / f"{name}.json").read_text())
    return scores


@pytest.mark.nightly
def test_models_trained_from_scratch_equal_transformers(data_dir: Path, tmp_path: Path):
    scores = train_from_scratch(tmp_path, data_dir, vocabulary=512, steps=30, samples=64, length=128, limit=20)
    (text,) = scores["base"]["texts"]
    nll = scores["base"]["texts"][text]["nll"]
    assert nll < 0.8 * np.log(512)  # 20 % below a uniform distribution over the vocabulary
    check_export(tmp_path)


def check_export(out: Path) -> float:
    """Compare logits with transformers at 512 positions; return the largest difference."""
    torch = pytest.importorskip("torch", reason="the models of transformers need torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    worst = 0.0
    for name in ("base", "student"):
        ours = load_model(str(out / name), mesh="data=1")
        theirs = AutoModelForCausalLM.from_pretrained(out / name / "model", dtype=torch.float32)
        tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 512)).astype(np.int32)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        worst = max(worst, float(np.abs(np.asarray(ours.logits(tokens)) - expected).max()))
        text = "Once upon a time"
        assert AutoTokenizer.from_pretrained(out / name / "model").encode(text) == ours.tokenizer.encode(text)
    assert worst <= 1e-4  # the parity bound of the project
    return worst


if __name__ == "__main__":
    data = Path(os.environ["JAX_SELFTRAIN_DATA"])
    result = train_from_scratch(
        Path(sys.argv[1]), data, vocabulary=2048, steps=250, samples=1024, length=256, limit=400
    )
    print(json.dumps({name: scores["texts"] for name, scores in result.items()}, indent=2))
    print("largest difference from the logits of transformers:", check_export(Path(sys.argv[1])))
