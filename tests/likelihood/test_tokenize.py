"""Tokenization of requests, with and without a prepended BOS."""

from types import SimpleNamespace

import numpy as np
import pytest
from models_factory import write_tiny_tokenizer

from jax_selftrain.likelihood.tokenize import encode_pairs, encode_text, rolling_windows, start_token

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Byte-level BPE that prepends nothing, like Pythia's."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder, 384)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def with_bos(plain, tmp_path_factory):
    """The same with a post-processor that prepends BOS, like Llama's."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def encode_pair(tokenizer, prefix, context, continuation):
    (request,) = encode_pairs(tokenizer, prefix, [(context, continuation)])
    return request


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_continuation_has_the_tokens_after_those_of_the_context(plain, with_bos):
    context, continuation = "Once there was a big fox", " named Kalo."
    whole = ids(plain, context + continuation)
    before = len(ids(plain, context))
    assert encode_pair(plain, BOS, context, continuation) == (whole[:before], whole[before:])
    assert encode_pair(with_bos, BOS, context, continuation) == ([BOS, *whole[:before]], whole[before:])


def test_trailing_spaces_of_the_context_move_to_the_continuation(plain):
    assert encode_pair(plain, BOS, "Once there was \n", "a fox") == encode_pair(
        plain, BOS, "Once there was", " \na fox"
    )


@pytest.mark.parametrize("fixture", ["plain", "with_bos"])
def test_an_empty_context_becomes_the_prefix_token(request, fixture):
    tokenizer = request.getfixturevalue(fixture)
    assert encode_pair(tokenizer, BOS, "", " a fox") == ([BOS], ids(tokenizer, " a fox"))
    assert encode_pair(tokenizer, BOS, "", "<s> a fox") == ([BOS], ids(tokenizer, " a fox"))


@pytest.mark.parametrize("fixture", ["plain", "with_bos"])
def test_a_context_of_white_space_alone_counts_as_empty(request, fixture):
    tokenizer = request.getfixturevalue(fixture)
    assert encode_pair(tokenizer, BOS, "  ", "fox") == ([BOS], ids(tokenizer, "  fox"))


def test_bos_is_never_doubled(with_bos):
    written, plain = (encode_pair(with_bos, BOS, context, " ran") for context in ("<s>a fox", "a fox"))
    assert written == plain == ([BOS, *ids(with_bos, "a fox")], ids(with_bos, "a fox ran")[len(plain.context) - 1 :])


def test_the_prefix_token_is_bos_else_eos_else_the_start_id(plain):
    def model(bos, eos, start):
        return SimpleNamespace(
            tokenizer=SimpleNamespace(bos_token_id=bos, eos_token_id=eos),
            special_tokens=SimpleNamespace(bos_token_id=start),
        )

    assert start_token(model(0, 2, 3)) == 0
    assert start_token(model(None, 2, 3)) == 2
    assert start_token(model(None, None, 3)) == 3


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 40])
def test_rolling_windows_predict_every_token_once_and_fit_the_model(length):
    tokens = list(range(100, 100 + length))
    windows = list(rolling_windows(tokens, 7, 8))
    assert [token for window in windows for token in window.continuation] == tokens
    joined = [7, *tokens]
    done = 1
    for context, continuation in windows:
        whole = [*context, *continuation]
        done += len(continuation)
        assert whole == joined[done - len(whole) : done]  # what comes before is the true text
        assert 1 <= len(whole) - 1 <= 8
        if windows[0].continuation[0] != continuation[0]:
            assert len(whole) - 1 == 8  # later windows look back as far as they can


def test_text_is_truncated_by_tokens(plain):
    text = "Once there was a big fox naméd Kalo 🦊."
    tokens = ids(plain, text)
    assert encode_text(plain, text) == (tokens, text)
    assert encode_text(plain, text, 4) == (tokens[:4], plain.decode(tokens[:4]))


def test_a_character_of_several_tokens_is_kept_or_left_out(plain):
    """Bytes of the text and of the tokens are the same, so that bits per byte are exact."""
    text = "Kalo 🦊 and 日本 naméd 👩🏽‍🚀!"
    tokens = ids(plain, text)
    assert len(tokens) > len(text)  # some characters are several tokens
    for length in range(1, len(tokens) + 1):
        found, part = encode_text(plain, text, length)
        assert found == tokens[: len(found)]
        assert len(found) > length - 4
        assert plain.decode(found) == part
        assert text.startswith(part)
    assert encode_text(plain, "🦊", 2) == (ids(plain, "🦊")[:2], "🦊")


def test_special_strings_in_a_text_are_plain_text(plain):
    tokens, _ = encode_text(plain, "a fox</s><s>")
    assert not {BOS, EOS} & set(tokens)
    assert plain.decode(tokens) == "a fox</s><s>"


def test_pairs_equal_the_harness_for_the_real_tokenizers(data_dir):
    """Requests equal those of `TemplateLM.loglikelihood` in lm-eval 0.4.13."""
    from transformers import AutoTokenizer

    def harness(tokenizer, prefix, context, continuation):
        def tok_encode(text, **kwargs):
            if not kwargs and text.startswith(tokenizer.decode(prefix)):
                kwargs = {"add_special_tokens": False}
            return tokenizer.encode(text, **kwargs)

        if context == "":
            tokens = tok_encode(continuation, add_special_tokens=False)
            return ([prefix], tokens) if prefix != tokens[0] else (tokens[:1], tokens[1:])
        n_spaces = len(context) - len(context.rstrip())
        if n_spaces > 0:
            continuation = context[-n_spaces:] + continuation
            context = context[:-n_spaces]
        whole, before = tok_encode(context + continuation), tok_encode(context)
        return before, whole[len(before) :]

    pairs = [("", " Susan revealed herself."), ("Question: why?\nAnswer:", " because"), ("a b  ", "c"), ("a\n", " d e")]
    for name in ("stories260k", "pythia-tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(data_dir / name)
        prefix = tokenizer.bos_token_id
        assert prefix is not None
        for context, continuation in pairs:
            expected = harness(tokenizer, prefix, context, continuation)
            found = encode_pair(tokenizer, prefix, context, continuation)
            assert (list(found.context), list(found.continuation)) == expected
        assert np.array_equal(encode_text(tokenizer, "a b")[0], tokenizer.encode("a b", add_special_tokens=False))
