"""Preprocessing: same bytes however it ran, and nothing half-written however it failed."""

import fcntl
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pltmoe.data import parts
from pltmoe.data import preprocess as module
from pltmoe.data.indexed import bin_path, idx_path, index_cache, parts_folder
from pltmoe.data.manifest import manifest_path, read_manifest
from pltmoe.data.parts import write_part
from pltmoe.data.preprocess import PreprocessOptions, preprocess
from pltmoe.data.tokenizer import Tokenizer
from pltmoe.data.tokenizer_training import TrainingOptions, train_tokenizer
from pltmoe.errors import DataError
from pltmoe.runtime.files import sha256_of
from tests.small_disk import fill_disk
from tests.unit.data.odd_text import ODD_TEXTS


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide even the small files of tests."""
    monkeypatch.setattr(module, "_SMALLEST_PART", 100)


def _options(**options: object) -> PreprocessOptions:
    return PreprocessOptions(**{"progress": False, **options})


def _bytes(prefix: Path) -> tuple[bytes, bytes, bytes]:
    paths = (bin_path(prefix), idx_path(prefix), manifest_path(prefix))
    return tuple(path.read_bytes() for path in paths)  # type: ignore[return-value]


def _write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_documents_come_back_each_ended(tmp_path: Path, tokenizer: Tokenizer):
    texts = [text for text in ODD_TEXTS if text.strip()]
    source = _write_lines(tmp_path / "odd.jsonl", [*texts, "", " \n"])
    manifest = preprocess([source], tmp_path / "out", tokenizer.model_path, _options())
    dataset = IndexedDataset(str(tmp_path / "out"))
    found = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1] for ids in found)
    assert [tokenizer.decode(ids[:-1]) for ids in found] == texts
    assert dataset.document_indices.tolist() == list(range(len(texts) + 1))
    assert (manifest.documents, manifest.empty_documents) == (len(texts), 2)


def test_manifest_tells_counts_and_hashes(tmp_path: Path, tokenizer: Tokenizer, jsonl: Path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.jsonl")  # a name in Latin-1
    odd.write_bytes(jsonl.read_bytes())
    jsonl = odd
    prefix = tmp_path / "out.v1"
    manifest = preprocess([jsonl], prefix, tokenizer.model_path, _options())
    assert manifest == read_manifest(prefix)
    ids = np.fromfile(tmp_path / "out.v1.bin", np.uint16)
    texts = [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]
    assert manifest.tokens == len(ids) and manifest.max_token_id == ids.max()
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.documents == len(texts) == 40
    assert manifest.tokenizer.model_dump() == {
        "path": str(tokenizer.model_path),
        "sha256": sha256_of(tokenizer.model_path),
        "vocab_size": 600,
        "end_of_document_id": 2,
    }
    assert [(i.path, i.sha256) for i in manifest.inputs] == [(str(jsonl), sha256_of(jsonl))]
    for record in (manifest.bin, manifest.idx):
        path = tmp_path / record.path
        assert (record.bytes, record.sha256) == (path.stat().st_size, sha256_of(path))
    assert not parts_folder(prefix).exists()


@pytest.mark.parametrize("options", [{"part_bytes": 300}, {"part_bytes": 701}, {"workers": 2}])
def test_same_bytes_for_any_parts_and_workers(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, options: dict[str, int]
):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"text {i}\n" * 9)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes(), mtime=0))
    for name, chosen in (("a/out", {}), ("b/out", options)):
        preprocess([jsonl, folder], tmp_path / name, tokenizer.model_path, _options(**chosen))
    assert _bytes(tmp_path / "a/out") == _bytes(tmp_path / "b/out")


def test_a_log_is_not_filled_with_progress(monkeypatch):
    """Slurm's log of a day had 170,000 updates."""
    with module._bar("tokenizing", 1, PreprocessOptions()) as bar:
        assert bar.mininterval == 10.0
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with module._bar("tokenizing", 1, PreprocessOptions()) as bar:
        assert bar.mininterval == 0.5


def test_second_run_reuses(tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, monkeypatch):
    """Also of a file whose name is not UTF-8."""
    prefix, jsonl = tmp_path / "out", jsonl.rename(tmp_path / os.fsdecode(b"caf\xe9.jsonl"))
    first = preprocess([jsonl], prefix, tokenizer.model_path, _options())
    assert first == read_manifest(prefix) and first.inputs[0].path == str(jsonl)
    monkeypatch.setattr(module, "write_part", None)
    assert preprocess([jsonl], prefix, tokenizer.model_path, _options()) == first
    assert preprocess([jsonl], prefix, tokenizer.model_path, _options(overwrite=True)) == first


def test_interrupted_run_continues_with_the_same_bytes(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, monkeypatch: pytest.MonkeyPatch
):
    prefix = tmp_path / "out"
    preprocess([jsonl], tmp_path / "ref" / "out", tokenizer.model_path, _options())
    written: list[str] = []

    def stop_after_three(part, report):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(part.name)
        return write_part(part, report)

    monkeypatch.setattr(module, "write_part", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        preprocess([jsonl], prefix, tokenizer.model_path, _options())
    assert {path.stem for path in parts_folder(prefix).glob("*.json")} == set(written)
    assert not bin_path(prefix).exists()

    def count(part, report):
        written.append(part.name)
        return write_part(part, report)

    monkeypatch.setattr(module, "write_part", count)
    preprocess([jsonl], prefix, tokenizer.model_path, _options())
    assert len(written) == len(set(written)) > 4, "a finished part was done again"
    assert _bytes(prefix) == _bytes(tmp_path / "ref" / "out")


def test_parts_of_another_tokenizer_or_key_are_not_used(
    tmp_path: Path, tokenizer: Tokenizer, corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    """An interrupted run may be continued with another command; its parts must then not fit."""
    lines = [json.dumps({"text": f"text {i}", "body": f"body {i}"}) + "\n" for i in range(30)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    options = TrainingOptions(vocab_size=500, max_bytes=100_000)
    other = train_tokenizer([corpus], tmp_path / "other.model", options, progress=False)
    for number, (model, key) in enumerate(
        [(tokenizer.model_path, "body"), (other.model_path, "text")]
    ):
        folder = tmp_path / str(number)
        inputs = [tmp_path / "in.jsonl"]
        with monkeypatch.context() as patch:
            patch.setattr(module, "_join", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                preprocess(inputs, folder / "out", tokenizer.model_path, _options())
        for prefix in (folder / "out", folder / "ref" / "out"):
            preprocess(inputs, prefix, model, _options(json_key=key))
        assert _bytes(folder / "out") == _bytes(folder / "ref" / "out")


@pytest.mark.parametrize("damage", [".bin", ".lengths", ".json"])
def test_damaged_part_is_done_again(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, monkeypatch, damage: str
):
    prefix = tmp_path / "out"
    preprocess([jsonl], tmp_path / "ref" / "out", tokenizer.model_path, _options())
    monkeypatch.setattr(module, "_join", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preprocess([jsonl], prefix, tokenizer.model_path, _options())
    monkeypatch.undo()
    monkeypatch.setattr(module, "_SMALLEST_PART", 100)
    victim = sorted(parts_folder(prefix).glob("*" + damage))[0]
    victim.write_bytes(victim.read_bytes()[:-3])
    preprocess([jsonl], prefix, tokenizer.model_path, _options())
    assert _bytes(prefix) == _bytes(tmp_path / "ref" / "out")


def test_killed_between_the_renames_continues(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, monkeypatch: pytest.MonkeyPatch
):
    """A .bin without its .idx and manifest, left by a kill, is not taken for another dataset."""
    prefix = tmp_path / "out"
    preprocess([jsonl], tmp_path / "ref" / "out", tokenizer.model_path, _options())

    def killed(prefix, joined, index, manifest):
        os.replace(joined, bin_path(prefix))
        raise SystemExit

    monkeypatch.setattr(module, "_publish", killed)
    with pytest.raises(SystemExit):
        preprocess([jsonl], prefix, tokenizer.model_path, _options())
    assert not list(parts_folder(prefix).glob(".joined*"))
    monkeypatch.undo()
    preprocess([jsonl], prefix, tokenizer.model_path, _options())
    assert _bytes(prefix) == _bytes(tmp_path / "ref" / "out")


def test_disk_that_is_full_for_a_moment(
    tmp_path: Path, tokenizer: Tokenizer, small_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    """It ends the run, with the file's name; nothing is lost between two documents."""
    source = _write_lines(tmp_path / "in.jsonl", [f"number {i} " * 20 for i in range(3000)])
    options = _options(part_bytes=300_000)
    monkeypatch.setattr(module, "_SMALLEST_PART", 300_000)
    preprocess([source], tmp_path / "ref" / "out", tokenizer.model_path, options)
    filler, prefix = small_disk / "filler", small_disk / "out"
    read, count = parts.read_documents, iter(range(3000))

    def neighbour(*arguments):
        for text in read(*arguments):
            number = next(count)
            if number == 1600:
                fill_disk(filler)
            if number == 1900:
                filler.unlink()
            yield text

    with monkeypatch.context() as patch:
        patch.setattr(parts, "read_documents", neighbour)
        with pytest.raises(OSError, match="No space left on device") as caught:
            preprocess([source], prefix, tokenizer.model_path, options)
    assert Path(caught.value.filename).parent == parts_folder(prefix)
    assert len(list(parts_folder(prefix).glob("*.json"))) == 1
    filler.unlink(missing_ok=True)
    preprocess([source], prefix, tokenizer.model_path, options)
    assert _bytes(prefix) == _bytes(tmp_path / "ref" / "out")


def test_disk_with_room_for_the_parts_alone(
    tokenizer: Tokenizer, jsonl: Path, small_disk: Path, monkeypatch
):
    tokenize, prefix = module._tokenize, small_disk / "out"

    def then_fill(*arguments):
        counts = tokenize(*arguments)
        fill_disk(small_disk / "filler")
        return counts

    monkeypatch.setattr(module, "_tokenize", then_fill)
    with pytest.raises(OSError, match="No space left on device") as caught:
        preprocess([jsonl], prefix, tokenizer.model_path, _options())
    assert caught.value.filename == str(bin_path(prefix))


def test_folder_that_cannot_be_made(tmp_path: Path, tokenizer: Tokenizer, jsonl: Path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        preprocess([jsonl], tmp_path / "file" / "out", tokenizer.model_path, _options())
    assert str(caught.value.filename).startswith(str(tmp_path / "file"))


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_line_leaves_no_dataset_and_the_fixed_file_continues(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, workers: int
):
    prefix, bad = tmp_path / "o" / "out", tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl.read_bytes() + b'{"text": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 41: not valid JSON"):
        preprocess([jsonl, bad], prefix, tokenizer.model_path, _options(workers=workers))
    left = [path.name for path in (tmp_path / "o").iterdir()]
    assert left in ([], ["out.parts"])
    for path in parts_folder(prefix).glob("*"):
        assert path.name == ".lock" or path.with_name(path.name.split(".")[0] + ".json").exists()
    bad.write_bytes(jsonl.read_bytes())
    preprocess([jsonl, bad], prefix, tokenizer.model_path, _options())
    preprocess([jsonl, bad], tmp_path / "r" / "out", tokenizer.model_path, _options())
    assert _bytes(prefix) == _bytes(tmp_path / "r" / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt, line 1: not UTF-8"),
        ("a.jsonl", b"{}\n", r"a\.jsonl, line 1: no key 'text'"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:20], "ends too early"),
        ("a.txt", b"", r"a\.txt: no text in the input"),
        ("a.jsonl", b'{"text": ""}\n{"text": " "}\n', r"a\.jsonl: no text in the input"),
    ],
    ids=["utf8", "key", "archive", "empty", "blank"],
)
def test_bad_input_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, message: str
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        preprocess([tmp_path / "in"], tmp_path / "o" / "out", tokenizer.model_path, _options())
    assert list((tmp_path / "o").iterdir()) == []


def test_nothing_is_created_when_the_arguments_are_wrong(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "a.txt").write_text("text")
    for inputs, model in (
        ([tmp_path / "no"], tokenizer.model_path),
        ([tmp_path], tmp_path / "a.txt"),
    ):
        with pytest.raises(DataError):
            preprocess(inputs, tmp_path / "o" / "out", model, _options())
    with pytest.raises(DataError, match=r"v1\.bin: .* are added to a prefix: give \S+/v1$"):
        preprocess([tmp_path], tmp_path / "o" / "v1.bin", tokenizer.model_path, _options())
    assert not (tmp_path / "o").exists()


def test_other_text_needs_overwrite(tmp_path: Path, tokenizer: Tokenizer, jsonl: Path):
    prefix = tmp_path / "o" / "out"
    preprocess([jsonl], prefix, tokenizer.model_path, _options())
    before = _bytes(prefix)
    other = _write_lines(tmp_path / "other.jsonl", ["other text"])
    with pytest.raises(DataError, match=r"out\.bin: there is already a dataset .*--overwrite"):
        preprocess([other], prefix, tokenizer.model_path, _options())
    assert _bytes(prefix) == before
    manifest = preprocess([other], prefix, tokenizer.model_path, _options(overwrite=True))
    assert manifest.documents == 1 and _bytes(prefix) != before


def test_half_written_bin_is_named_and_made_again_with_overwrite(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path
):
    prefix = tmp_path / "o" / "out"
    preprocess([jsonl], prefix, tokenizer.model_path, _options())
    before = _bytes(prefix)
    bin_path(prefix).write_bytes(before[0][:-2])
    with pytest.raises(DataError, match=r"out\.bin: \d+ bytes, but out\.idx expects \d+"):
        preprocess([jsonl], prefix, tokenizer.model_path, _options())
    preprocess([jsonl], prefix, tokenizer.model_path, _options(overwrite=True))
    assert _bytes(prefix) == before


def test_dataset_in_the_folder_of_its_text(tokenizer: Tokenizer, jsonl: Path):
    """A second run over the folder must not read the first one's output as text."""
    prefix = jsonl.parent / "out"
    first = preprocess([jsonl.parent], prefix, tokenizer.model_path, _options())
    cache = index_cache(prefix)  # training has used it
    cache.mkdir()
    (cache / "1-description.txt").write_text("{}")
    (cache / "1-document_index.npy").write_bytes(b"\x93NUMPY")
    assert preprocess([jsonl.parent], prefix, tokenizer.model_path, _options()) == first
    with pytest.raises(DataError, match="the only input is the dataset itself"):
        preprocess([bin_path(prefix)], prefix, tokenizer.model_path, _options())


@pytest.mark.parametrize("overwrite", [True, False])
def test_text_whose_name_was_wrong(
    overwrite: bool, tmp_path: Path, tokenizer: Tokenizer, jsonl: Path
):
    """Its bytes are the same, but they are read as another text."""
    wrong, prefix = jsonl.rename(tmp_path / "corpus.txt"), tmp_path / "out"
    one = preprocess([wrong], prefix, tokenizer.model_path, _options())
    assert one.documents == 1
    right = wrong.rename(tmp_path / "corpus.jsonl")
    if overwrite:
        many = preprocess([right], prefix, tokenizer.model_path, _options(overwrite=True))
        assert many.documents > 1 and many.tokens != one.tokens
        moved = right.rename(tmp_path / "elsewhere.jsonl")
        assert preprocess([moved], prefix, tokenizer.model_path, _options()) == many
    else:
        with pytest.raises(DataError, match="made from other text"):
            preprocess([right], prefix, tokenizer.model_path, _options())


def test_two_runs_at_once(tmp_path: Path, tokenizer: Tokenizer, jsonl: Path):
    prefix = tmp_path / "out"
    parts_folder(prefix).mkdir()
    with open(parts_folder(prefix) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is writing this dataset"):
            preprocess([jsonl], prefix, tokenizer.model_path, _options())
    preprocess([jsonl], prefix, tokenizer.model_path, _options())


def test_input_that_changes_meanwhile(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, monkeypatch: pytest.MonkeyPatch
):
    def change_then_write(part, report):
        os.utime(jsonl, ns=(1, 1))
        return write_part(part, report)

    monkeypatch.setattr(module, "write_part", change_then_write)
    with pytest.raises(DataError, match=r"text\.jsonl: changed while it was read"):
        preprocess([jsonl], tmp_path / "o" / "out", tokenizer.model_path, _options())
    assert list((tmp_path / "o").iterdir()) == []


def test_json_key_and_include(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "a.jsonl").write_text('{"content": "abc"}\n')
    (tmp_path / "readme.txt").write_text("left out")
    options = _options(json_key="content", include="*.jsonl")
    manifest = preprocess([tmp_path], tmp_path / "o" / "out", tokenizer.model_path, options)
    assert (manifest.documents, manifest.text_bytes, manifest.json_key) == (1, 3, "content")


def test_a_manifest_that_is_damaged_or_of_a_later_format(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path
):
    prefix = tmp_path / "out"
    manifest = preprocess([jsonl], prefix, tokenizer.model_path, _options())
    manifest_path(prefix).write_text('{"documents": 4}')
    with pytest.raises(DataError, match=r"out\.manifest\.json: damaged manifest"):
        read_manifest(prefix)
    manifest_path(prefix).write_bytes(b"\xff")
    with pytest.raises(DataError, match="damaged manifest; preprocess the dataset again"):
        read_manifest(prefix)
    manifest_path(prefix).write_text(json.dumps({**manifest.model_dump(), "format": 99}))
    with pytest.raises(DataError, match="manifest format 99 is not known here"):
        read_manifest(prefix)
