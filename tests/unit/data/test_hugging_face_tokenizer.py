"""A tokenizer.json is used as transformers uses it, but for what must not happen in documents."""

import json
import pickle
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import PreTrainedTokenizerFast

from pltmoe.data.datasets import build_datasets
from pltmoe.data.inputs import check_inputs
from pltmoe.data.preprocess import PreprocessOptions, preprocess
from pltmoe.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
from pltmoe.errors import DataError
from tests import configs
from tests.unit.data.datasets import run_config
from tests.unit.data.odd_text import ODD_TEXTS
from tests.unit.hugging_face_tokenizers import configure, write_tokenizer

END, PAD, BEGIN = range(3)
LLAMA = "<|begin|> $A"


@pytest.mark.parametrize("template", ["$A", LLAMA])
@pytest.mark.parametrize("composes", [False, True])
def test_the_ids_of_transformers(tmp_path: Path, template: str, composes: bool):
    path = write_tokenizer(tmp_path, template=template, composes=composes)
    ours, theirs = load_tokenizer(path), PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert (ours.eod, ours.pad, ours.vocab_size) == (END, -1, 400)
    for text in ODD_TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, split_special_tokens=True)
        assert ids[0] == BEGIN if template == LLAMA else BEGIN not in ids
        assert composes or ours.decode(ids) == text


def test_names_of_special_tokens_in_a_text_are_text(tmp_path: Path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    text = "it ends with <|endoftext|>, or <|begin|>s"
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        ids = copy.encode(text)
        assert not {END, PAD, BEGIN} & set(ids)
        assert copy.decode(ids) == text
        assert copy.decode([BEGIN, *ids, END]) == text


def test_the_end_is_special_although_the_file_does_not_say_so(tmp_path: Path):
    path = write_tokenizer(tmp_path)
    path.write_text(path.read_text().replace('"special": true', '"special": false'))
    tokenizer, text = load_tokenizer(path), "it ends with <|endoftext|>"
    assert END not in tokenizer.encode(text)
    assert tokenizer.decode([*tokenizer.encode(text), END]) == text


def test_an_end_that_a_text_can_hold(tmp_path: Path):
    path = write_tokenizer(tmp_path)
    configure(path, eos_token="e")
    with pytest.raises(DataError, match=r"a text can hold id \d+ \(e\), which ends documents"):
        load_tokenizer(path)
    tree = json.loads(path.read_text())  # a new token gets the number of tokens for its id
    tree["model"]["vocab"]["Z"] = len(tree["model"]["vocab"])
    tree["added_tokens"].append(tree["added_tokens"][0] | {"id": 999, "content": "<end>"})
    path.write_text(json.dumps(tree))
    configure(path, eos_token="<end>")
    with pytest.raises(DataError, match=r"a text can hold id 400 \((Z|<end>) and (Z|<end>)\)"):
        load_tokenizer(path)


def test_a_space_in_front_is_a_loss(tmp_path: Path):
    path = write_tokenizer(tmp_path)
    tree = json.loads(path.read_text())
    tree["pre_tokenizer"] = tree["pre_tokenizer"]["pretokenizers"][1]
    tree["pre_tokenizer"] |= {"add_prefix_space": True, "use_regex": True}
    path.write_text(json.dumps(tree))
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("a")) == " a"
    assert not tokenizer.is_lossless


def test_a_text_without_ids(tmp_path: Path):
    path = write_tokenizer(tmp_path)
    tree = json.loads(path.read_text())
    tree["model"] = {"type": "WordLevel", "vocab": {"<|endoftext|>": END}, "unk_token": "?"}
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"\.json: cannot encode a text of 1 characters \("):
        load_tokenizer(path)


def test_a_text_is_not_cut_or_filled(tmp_path: Path):
    """Files are saved with what they were last asked to do."""
    path = write_tokenizer(tmp_path)
    whole = load_tokenizer(path).encode("one two three")
    tree = json.loads(path.read_text())
    tree["truncation"] = {
        "max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"
    }  # fmt: skip
    tree["padding"] = {
        "strategy": {"Fixed": 100}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": PAD, "pad_type_id": 0, "pad_token": "<|pad|>",
    }  # fmt: skip
    path.write_text(json.dumps(tree))
    assert load_tokenizer(path).encode("one two three") == whole


def test_preprocessing_says_that_accents_are_composed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    text = tmp_path / "a.txt"
    text.write_text("e\u0301")
    options = PreprocessOptions(progress=False)
    for composes in (False, True):
        path = write_tokenizer(tmp_path / str(composes), composes=composes)
        preprocess([text], path.with_name("data"), path, options)
        said = caplog.text.count("is not lossless: decoding may not")
        assert (load_tokenizer(path).is_lossless, said) == (not composes, composes)


def test_data_made_by_several_processes(tmp_path: Path):
    path = write_tokenizer(tmp_path, template=LLAMA)
    lines = [f"document {i} says <|endoftext|>" for i in range(300)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    manifest = preprocess([text], tmp_path / "a", path, PreprocessOptions(progress=False))
    two = PreprocessOptions(progress=False, workers=2)
    assert preprocess([text], tmp_path / "b", path, two).bin.sha256 == manifest.bin.sha256
    assert manifest.tokenizer.end_of_document_id == END
    dataset, tokenizer = IndexedDataset(str(tmp_path / "b")), load_tokenizer(path)
    found = [dataset[i] for i in range(len(dataset))]
    assert all(ids[0] == BEGIN and ids[-1] == END and (ids == END).sum() == 1 for ids in found)
    assert [tokenizer.decode(ids) for ids in found] == lines
    config = run_config(tokenizer, tmp_path / "b")
    build_datasets(config, tokenizer, (8, 0, 0))
    configure(path, eos_token="<|pad|>")
    with pytest.raises(DataError, match=r"documents end with id 0, those of .*json with 1: name"):
        build_datasets(config, load_tokenizer(path), (8, 0, 0))


def test_what_cannot_be_used(tmp_path: Path):
    path = write_tokenizer(tmp_path)
    for eos in ({}, {"eos_token": None}, {"eos_token": "</s>"}):
        configure(path, **eos)
        with pytest.raises(DataError, match=r"names no eos_token that tokenizer\.json has"):
            load_tokenizer(path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text("[]")
    with pytest.raises(DataError, match="not the configuration of a tokenizer"):
        load_tokenizer(path)
    config.unlink()
    with pytest.raises(DataError, match=r"tokenizer_config\.json: no such file; it says which"):
        load_tokenizer(path)
    data = {"tokenizer": str(path), "train": str(tmp_path / "none"), "sequence_length": 16}
    with pytest.raises(DataError, match=r"no such file: .*_config\.json \(data\.tokenizer\), "):
        check_inputs(configs.run_config(data=data))
    with pytest.raises(DataError, match=r"cannot be read .*; name its tokenizer\.json"):
        load_tokenizer(tmp_path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer of Hugging Face \("):
        load_tokenizer(path)
    with pytest.raises(DataError, match="puts tokens behind every text"):
        load_tokenizer(write_tokenizer(tmp_path / "bert", template="<|begin|> $A <|endoftext|>"))
    with pytest.raises(DataError, match=r"is no JSON; name it mine\.model"):
        train_tokenizer([path], tmp_path / "mine.json", TrainingOptions(vocab_size=300))


def test_half_a_surrogate_pair(tmp_path: Path):
    with pytest.raises(DataError, match=r"half a surrogate pair \(U\+D800 at character 2\)"):
        load_tokenizer(write_tokenizer(tmp_path)).encode("ab\ud800")


def test_a_tokenizer_without_padding(tmp_path: Path):
    path = write_tokenizer(tmp_path)
    configure(path, eos_token="<|endoftext|>", pad_token="<|nowhere|>")
    assert HuggingFaceTokenizer(path).names == {"eos_token": "<|endoftext|>"}


@pytest.mark.parametrize("pad", ["<|begin|>", "<|endoftext|>", "e"])
def test_padding_that_documents_hold_stays_in_sequences(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, pad: str
):
    """Megatron makes token 0 of padding, and does not learn it."""
    path = write_tokenizer(tmp_path, template=LLAMA)
    configure(path, eos_token="<|endoftext|>", pad_token=pad)
    tokenizer, text = load_tokenizer(path), tmp_path / "text.txt"
    text.write_text("e" * 100)
    preprocess([text], tmp_path / "a", path, PreprocessOptions(progress=False))
    train, _, _ = build_datasets(run_config(tokenizer, tmp_path / "a"), tokenizer, (40, 0, 0))
    found = {int(i) for sample in train for i in sample["labels"][sample["loss_mask"] == 1]}
    assert found == {BEGIN, END, *tokenizer.encode("e" * 100)}
    assert not [it for it in recwarn if "pad token" in str(it.message)]
