"""The tokenizer gives back exactly the text it was given."""

import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pltmoe.data.tokenizer import Tokenizer, load_tokenizer
from pltmoe.errors import DataError
from tests.unit.data.odd_text import ODD_TEXTS

_CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from(
    " \t\n\r\0\u2581\u2585\u2047\u0301"
)


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_odd_text_comes_back(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.unk, tokenizer.bos, tokenizer.eod, tokenizer.pad} & set(ids)


def test_any_text_comes_back(tokenizer: Tokenizer):
    @settings(max_examples=300, deadline=None)
    @given(st.text(_CHARACTERS))
    @example("\u2581")
    def comes_back(text: str):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    comes_back()


def test_space_mark_is_not_a_space(tokenizer: Tokenizer):
    """sentencepiece alone decodes U+2581 as a space; the ids of the two must differ."""
    assert tokenizer.encode("a\u2581b") != tokenizer.encode("a b")


def test_ids_that_the_hugging_face_side_relies_on(tokenizer: Tokenizer):
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (0, 1, 2, 3)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.model_path))
    assert [pieces.id_to_piece(i) for i in range(4)] == ["<|unk|>", "<|bos|>", "<|eos|>", "<|pad|>"]
    assert [pieces.id_to_piece(i) for i in (4, 259)] == ["<0x00>", "<0xFF>"]
    assert tokenizer.vocab_size == pieces.get_piece_size() == 600


def test_special_ids_give_no_text(tokenizer: Tokenizer):
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eod, tokenizer.pad]) == "a b"


def test_named_by_contents_not_by_path(tokenizer: Tokenizer, tmp_path: Path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(tokenizer.model_path.read_bytes())
    assert load_tokenizer(copy).unique_identifiers == tokenizer.unique_identifiers


def test_travels_to_loader_processes(tokenizer: Tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("x\u2581 = 1\n") == tokenizer.encode("x\u2581 = 1\n")


def test_missing_file():
    with pytest.raises(DataError, match=r"nowhere\.model: no such tokenizer; make one with tools/"):
        load_tokenizer("nowhere.model")
    with pytest.raises(DataError, match=r"nowhere\.json: no such tokenizer$"):
        load_tokenizer("nowhere.json")


@pytest.mark.parametrize("content", [b"", b"not a model" * 100])
def test_other_file(tmp_path: Path, content: bytes):
    path = tmp_path / "other.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"other\.model: not a sentencepiece model"):
        load_tokenizer(path)


def test_folder_instead_of_a_file(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)


def _train(path: Path, **options: object) -> Path:
    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words to learn from, and more words"] * 20),
            model_writer=stream,
            minloglevel=2,
            **options,
        )
    return path


def test_model_without_an_end_of_document(tmp_path: Path):
    path = _train(tmp_path / "no_eos.model", vocab_size=40, eos_id=-1, model_type="bpe")
    with pytest.raises(DataError, match="has no end-of-sentence piece"):
        load_tokenizer(path)


def test_foreign_model_works_but_says_that_it_loses_text(tmp_path: Path):
    foreign = load_tokenizer(_train(tmp_path / "foreign.model", vocab_size=40, model_type="bpe"))
    assert not foreign.is_lossless
    assert foreign.decode(foreign.encode("words and more")) == "words and more"
    assert foreign.pad == -1


def test_a_dummy_prefix_is_not_put_into_the_text(tmp_path: Path):
    """As Llama's models have it: at each U+2581 the text would be cut and get one."""
    path = _train(tmp_path / "llama.model", vocab_size=300, model_type="bpe", byte_fallback=True,
                  normalization_rule_name="identity", remove_extra_whitespaces=False)  # fmt: skip
    foreign = load_tokenizer(path)
    assert not foreign.is_lossless
    assert foreign.decode(foreign.encode("a b")) == "a b"
    assert foreign.decode(foreign.encode("a\u2581b")) == "a b", "and not 'a \u2581 b'"


@pytest.mark.parametrize("bad", [-1, 600])
def test_id_outside_the_vocabulary(tokenizer: Tokenizer, bad: int):
    with pytest.raises(DataError, match=rf"token id {bad} is not in 0 \.\. 599"):
        tokenizer.decode([5, bad])


def test_half_a_surrogate_pair(tokenizer: Tokenizer):
    with pytest.raises(DataError, match=r"half a surrogate pair \(U\+D800 at character 2\)"):
        tokenizer.encode("ab\ud800")
