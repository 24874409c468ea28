"""A run with a tokenizer.json is exported with it, and its export can be trained on."""

import json

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from pltmoe.checkpoint.compatible import check_weights
from pltmoe.checkpoint.manifest import read_manifest
from pltmoe.data.tokenizer import load_tokenizer
from pltmoe.errors import ConversionError
from pltmoe.hf import fast_tokenizer
from pltmoe.hf.convert import ExportOptions, export_checkpoint
from pltmoe.hf.convert_back import import_folder
from pltmoe.hf.verify import Verification
from tests.unit.hf.checkpoints import model_of, run_config, write_checkpoint
from tests.unit.hugging_face_tokenizers import write_tokenizer

TEXT = "def f(x):\n\treturn  x  # \u00e9 12345, Licen\u00e7a \U0001f600"
QUIET = ExportOptions(progress=False)


def _qwen(folder):
    """Save what transformers itself calls Qwen's tokenizer, with a tiny vocabulary."""
    model = json.loads(write_tokenizer(folder).read_text())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    theirs = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, pad_token="<|pad|>")
    theirs.save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["bos_token"] is None
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda folder: write_tokenizer(folder, template="<|begin|> $A"), "<|begin|>"),
        (_qwen, "<|endoftext|>"),
    ],
)
def test_there_and_back_again(make, first, tmp_path):
    path = make(tmp_path / "theirs")
    path.write_text(json.dumps(json.loads(path.read_text())))  # not as transformers lays it out
    ours, m = load_tokenizer(path), model_of("plt2")
    checkpoint = write_checkpoint(tmp_path / "run", m, path)
    export = export_checkpoint(checkpoint, tmp_path / "hf", QUIET)
    assert isinstance(export.checked, Verification)
    files = {file.name for file in export.folder.iterdir()}
    assert "tokenizer.json" in files and "tokenizer.model" not in files
    assert (export.folder / "tokenizer.json").read_bytes() == path.read_bytes()
    theirs = AutoTokenizer.from_pretrained(export.folder, trust_remote_code=True)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT), skip_special_tokens=True) == TEXT
    names = (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    assert names == (first, "<|endoftext|>", "<|pad|>")
    assert (len(theirs), theirs.model_max_length) == (400, run_config(m).data.sequence_length)
    generation = json.loads((export.folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (
        ours.eod,
        theirs.pad_token_id,
    )

    back = tmp_path / "back"
    import_folder(export.folder, back, run_config(m), progress=False)
    config = run_config(m)
    data = config.data.model_copy(update={"tokenizer": path})
    check_weights(back, read_manifest(back), config.model_copy(update={"data": data}))
    again = load_tokenizer(back / "tokenizer.json")
    assert (again.encode(TEXT), again.eod) == (ours.encode(TEXT), ours.eod)


def test_other_ids_in_transformers_are_not_shipped(monkeypatch, tmp_path):
    path = write_tokenizer(tmp_path)
    other = write_tokenizer(tmp_path / "other", template="<|begin|> $A")
    real = fast_tokenizer.PreTrainedTokenizerFast
    monkeypatch.setattr(
        fast_tokenizer, "PreTrainedTokenizerFast",
        lambda **options: real(**{**options, "tokenizer_file": str(other)}),
    )  # fmt: skip
    with pytest.raises(ConversionError, match="transformers gives other ids for"):
        fast_tokenizer.load_hugging_face(path, 64)


def test_a_folder_without_an_end_has_no_tokenizer_to_bring(tmp_path):
    """Weights come alone where the files beside them could not be used."""
    path = write_tokenizer(tmp_path / "theirs")
    checkpoint = write_checkpoint(tmp_path / "run", model_of("plt2"), path)
    export = export_checkpoint(checkpoint, tmp_path / "hf", QUIET)
    (export.folder / "tokenizer_config.json").unlink()
    import_folder(export.folder, tmp_path / "back", run_config(model_of("plt2")), progress=False)
    assert read_manifest(tmp_path / "back").tokenizer_sha256 is None
    assert not (tmp_path / "back" / "tokenizer.json").exists()
