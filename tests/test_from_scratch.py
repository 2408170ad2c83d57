"""A Pythia-shaped model of real stories, from nothing to Hugging Face: every command of the house, one after another.

`python tests/test_from_scratch.py FOLDER` does the same at a size worth looking at (see docs/from_scratch.md).
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_selftrain import cli, load_model


def write_blank_pythia(folder: Path, texts: Path, *, vocabulary: int, width: int, layers: int, positions: int) -> None:
    """A GPT-NeoX config and a byte-level BPE tokenizer trained on the spot, in Hugging Face's layout; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    mark = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[mark], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in texts.open(encoding="utf-8")), trainer)
    marks = {"bos_token": mark, "eos_token": mark, "unk_token": mark}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": vocabulary,
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 4 * width,
        "max_position_embeddings": positions, "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "layer_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def from_scratch(out: Path, data: Path, *, vocabulary: int, steps: int, samples: int, length: int, limit: int) -> dict:
    """Train on stories, sample, self-train and score; returns the held-out scores before and after."""
    texts, heldout = data / "tinystories" / "train.jsonl", data / "tinystories" / "heldout.jsonl"
    write_blank_pythia(out / "blank", texts, vocabulary=vocabulary, width=128, layers=4, positions=512)

    def command(*words: object) -> None:
        words = (*words, "--mesh", "data=1") if words[0] in ("train", "sample", "score") else words
        assert cli.main([str(word) for word in words]) == 0, words

    command("import", texts, "--model", out / "blank", "--out", out / "stories")
    where = ("--model", out / "blank", "--corpus", out / "stories", "--out", out / "base")
    shape = ("--batch-size", 16, "--seq-len", length)
    falling = ("--learning-rate", 3e-3, "--schedule", "cosine", "--final-learning-rate", 3e-4, "--weight-decay", 0.1)
    command("train", *where, "--init", "scratch", "--steps", steps, *shape, *falling, "--checkpoint-every", steps)
    command("sample", "--model", out / "base", "--out", out / "corpus", "--samples", samples, "--max-tokens", length)
    where = ("--model", out / "base", "--corpus", out / "corpus", "--out", out / "student")
    command("train", *where, *shape, "--learning-rate", 3e-4)
    scores = {}
    for name in ("base", "student"):
        command(
            "score", "--model", out / name, "--texts", heldout, "--text-limit", limit, "--out", out / f"{name}.json"
        )
        scores[name] = json.loads((out / f"{name}.json").read_text())
    return scores


@pytest.mark.slow
def test_pythia_shaped_model_from_nothing_to_hugging_face(data_dir: Path, tmp_path: Path):
    scores = from_scratch(tmp_path, data_dir, vocabulary=512, steps=30, samples=64, length=128, limit=20)
    (text,) = scores["base"]["texts"]
    learned = scores["base"]["texts"][text]["nll"]
    assert learned < 0.8 * np.log(512)  # a fifth below uniform over the vocabulary: it has read something
    check_export(tmp_path)


def check_export(out: Path) -> float:
    """Compare our logits with those of transformers at 512 positions; returns the largest difference."""
    torch = pytest.importorskip("torch", reason="transformers runs models on torch, which is not installed here")
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
    result = from_scratch(Path(sys.argv[1]), data, vocabulary=2048, steps=250, samples=1024, length=256, limit=400)
    print(json.dumps({name: scores["texts"] for name, scores in result.items()}, indent=2))
    print("largest difference from transformers' logits:", check_export(Path(sys.argv[1])))
