"""The fast tokenizer gives the ids of sentencepiece, on whatever text."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pltmoe.data.tokenizer import load_tokenizer
from pltmoe.errors import ConversionError
from pltmoe.hf.fast_tokenizer import build_fast_tokenizer, write_tokenizer

ODD = [
    " ", "  ", "\t", "\n", "\r\n", "\r", "\x00", "\x7f", "\x85", "\u00a0", "\u2028", "\u3000",
    "\u200b", "\u200d", "\ufeff", "\ufffd", "\u2581", "\u2585", "e\u0301", "\u00e9", "\ufb01",
    "\u4f60\u597d", "\u0645\u0631\u062d\u0628\u0627", "\U0001f600", "\U0001f468\u200d\U0001f469",
    "\ud7ff", "\U0010ffff", "<0x41>", "<0xE2>", "<|eos|>", "<|pad|>", "<|unk|>", "<|bos|>", "<s>",
    "self", "def ", "tokens", "aa", "a", "----", "====", "0", "12", "_", ".", "'", '"', "\\",
]  # fmt: skip
"""Spaces of all kinds, controls, normal forms, bidi, emoji, limits of Unicode, names of pieces."""


@pytest.fixture(scope="module")
def both(tokenizer_model, tmp_path_factory):
    """Return sentencepiece's tokenizer and the fast one as a user loads it."""
    folder = tmp_path_factory.mktemp("export")
    write_tokenizer(tokenizer_model, folder, max_length=64)
    fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return load_tokenizer(tokenizer_model), fast


def check(both, text):
    ours, fast = both
    ids = ours.encode(text)
    assert fast(text)["input_ids"] == ids, repr(text)
    assert fast.decode(ids) == text, repr(text)
    assert fast.decode([ours.bos, *ids, ours.eod], skip_special_tokens=True) == text


def test_every_odd_character(both):
    check(both, "")
    for odd in ODD:
        for text in (odd, f"a{odd}b", f" {odd} ", odd * 3, f"x = {odd}\n{odd}"):
            check(both, text)
    for code in [*range(0x3000), *range(0xFE00, 0x10000), *range(0x1F300, 0x1F700)]:
        check(both, f"({chr(code)})")


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.sampled_from(ODD), max_size=30).map("".join))
def test_odd_things_in_any_order(both, text):
    check(both, text)


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(max_size=60))
def test_any_text(both, text):
    check(both, text)


def test_whole_files(both):
    for path in Path(__file__).parent.glob("*.py"):
        check(both, path.read_text())


def test_text_that_spells_special_pieces(tmp_path):
    """Learned pieces add up to the name of a byte or special piece: still ordinary text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["/s> a/s> </ s>"] * 300),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=280,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    ours, fast = load_tokenizer(path), build_fast_tokenizer(path, 64)
    assert {"/s>", "<"} <= set(fast.get_vocab()), "the parts are pieces"
    for text in ("</s>", "<0x41>", "a</s></s>"):
        check((ours, fast), text)


def test_special_pieces(both):
    ours, fast = both
    assert (fast.eos_token_id, fast.pad_token_id) == (ours.eod, ours.pad)
    assert (fast.bos_token_id, fast.unk_token_id) == (ours.eod, ours.unk)
    assert ours.bos in fast.all_special_ids, "and no text, though training never sees it"
    assert len(fast) == ours.vocab_size
    batch = fast(["a b", "a"], padding=True)
    assert batch["attention_mask"][1][0] == 0, "a language model's padding goes to the left"


def test_files_say_nothing_of_this_machine(tokenizer_model, tmp_path):
    write_tokenizer(tokenizer_model, tmp_path, max_length=64)
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 64
    assert str(tokenizer_model.parent) not in json.dumps(config)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "byte_fallback": True},
        {"model_type": "bpe", "byte_fallback": False},
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc"},
    ],
)
def test_other_kinds_of_models_are_refused(options, tmp_path):
    """They would give other ids: said before a wrong tokenizer is shipped."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text for a tiny model, " * 20]),
        model_writer=model,
        vocab_size=300 if options["byte_fallback"] else 40,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(ConversionError, match="--no-tokenizer"):
        build_fast_tokenizer(path, 64)


def test_no_sentencepiece_model(tmp_path):
    path = tmp_path / "broken.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ConversionError, match="not a readable sentencepiece model"):
        build_fast_tokenizer(path, 64)
