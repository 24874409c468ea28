"""Training the sentencepiece tokenizer on a deterministic sample of raw text."""

import io
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tqdm import tqdm

from pltmoe.data.atomic import complete_file
from pltmoe.data.sources import FileSlice, InputFile, find_inputs, read_documents, reading_of
from pltmoe.data.tokenizer import SPACE_MARK, Tokenizer, load_tokenizer
from pltmoe.errors import DataError
from pltmoe.runtime.files import sha256_of
from pltmoe.runtime.tokenizer_files import is_hugging_face

log = logging.getLogger(__name__)

_CHUNK_CHARACTERS = 2000
# U+2581 is sentencepiece's space, U+2585 its mark for unknown (it drops lines that hold one), and
# NUL ends a string in places. None may become a piece; text that holds them still round-trips.
_NOT_LEARNED = str.maketrans({SPACE_MARK: " ", "\u2585": " ", "\x00": " "})


@dataclass(frozen=True)
class TrainingOptions:
    """What decides a tokenizer besides its text."""

    vocab_size: int
    """Number of pieces: 4 special, 256 bytes, and what is learned."""
    json_key: str = "text"
    """Field of the text in JSONL files."""
    max_bytes: int = 50_000_000
    """Train on a sample of about this many bytes; sentencepiece holds the sample in memory."""
    character_coverage: float = 0.9999
    """Share of the characters that become pieces; the others are written as bytes."""


def train_tokenizer(
    inputs: Sequence[Path], output: Path, options: TrainingOptions, progress: bool = True
) -> Tokenizer:
    """Train on ``inputs`` (files or folders, see sources.py), write ``output`` and its manifest.

    The same text and options give the same bytes. An ``output`` that was made from them already
    is kept and returned.

    Raises:
        DataError: no text, broken input, a vocabulary that does not fit the text, or an ``output``
            that is named like a tokenizer of Hugging Face.
    """
    if is_hugging_face(output):
        raise DataError(f"{output}: a sentencepiece model is no JSON; name it {output.stem}.model")
    files = find_inputs(inputs)
    manifest = {
        "options": asdict(options),
        "sentencepiece": sentencepiece.__version__,
        "inputs": [{"path": str(f.path), "sha256": sha256_of(f.path)} for f in files],
    }
    if _is_current(output, manifest):
        log.info("%s: up to date, reused", output)
        return load_tokenizer(output)
    sample = _sample(files, options, progress)
    log.info("training %d pieces on %d chunks of text", options.vocab_size, len(sample))
    model = _train(sample, options)
    with complete_file(output) as temporary:
        temporary.write_bytes(model)
        manifest["model_sha256"] = sha256_of(temporary)
    with complete_file(manifest_path(output)) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return load_tokenizer(output)


def manifest_path(model: Path) -> Path:
    """Where the record of a tokenizer's training is kept: ``tokenizer.manifest.json``."""
    return model.with_name(model.stem + ".manifest.json")


def _is_current(output: Path, manifest: dict[str, Any]) -> bool:
    try:
        recorded = json.loads(manifest_path(output).read_text(encoding="utf-8"))
        recorded_sha256 = recorded.pop("model_sha256", None)
        same_text = _without_paths(recorded) == _without_paths(manifest)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False
    return same_text and output.is_file() and sha256_of(output) == recorded_sha256


def _without_paths(manifest: dict[str, Any]) -> dict[str, Any]:
    inputs = manifest["inputs"]
    texts = [(item["sha256"], reading_of(Path(item["path"])).kind) for item in inputs]
    return {**manifest, "inputs": texts}


def _sample(files: list[InputFile], options: TrainingOptions, progress: bool) -> list[str]:
    """Return chunks of text, all of them or a share chosen by their CRC: no random state."""
    total = sum(len(chunk.encode()) for chunk in _chunks(files, options, "reading", progress))
    if not total:
        names = ", ".join(str(file.path) for file in files[:3])
        raise DataError(f"{names}: no text to train a tokenizer on")
    limit = min(1.0, options.max_bytes / total) * 2**32
    chunks = _chunks(files, options, "sampling", progress)
    sample = [chunk for chunk in chunks if zlib.crc32(chunk.encode()) < limit]
    if not sample:
        raise DataError(
            f"max_bytes ({options.max_bytes}) leaves nothing of {total} bytes of text to train on"
        )
    return sample


def _chunks(
    files: list[InputFile], options: TrainingOptions, what: str, progress: bool
) -> Iterator[str]:
    """Yield the text in pieces of whole lines, about _CHUNK_CHARACTERS long."""
    size = sum(file.path.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc=what, disable=not progress) as bar:
        for file in files:
            for text in read_documents(FileSlice(file), options.json_key, bar.update):
                yield from _split(text)


def _split(text: str) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in text.translate(_NOT_LEARNED).splitlines(keepends=True):
        for start in range(0, len(line), _CHUNK_CHARACTERS):
            part = line[start : start + _CHUNK_CHARACTERS]
            if lines and length + len(part) > _CHUNK_CHARACTERS:
                yield "".join(lines)
                lines, length = [], 0
            lines.append(part)
            length += len(part)
    if lines:
        yield "".join(lines)


def _train(sample: list[str], options: TrainingOptions) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=options.vocab_size,
            byte_fallback=True,
            character_coverage=options.character_coverage,
            # Lossless: nothing is normalised, added or removed.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            # Spelled so that source code and HTML hardly ever contain them.
            unk_piece="<|unk|>",
            bos_piece="<|bos|>",
            eos_piece="<|eos|>",
            pad_piece="<|pad|>",
            max_sentence_length=8 * _CHUNK_CHARACTERS,  # bytes: no chunk is left out
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), options.vocab_size) from None
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> DataError:
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"vocabulary size {vocab_size} is too small: the special pieces, 256 bytes and the "
            f"characters of this text need {found[1]}; raise it or lower the character coverage"
        )
    if found := re.search(r"value <= (\d+)", message):
        return DataError(
            f"vocabulary size {vocab_size} is too large for this text: at most {found[1]} pieces "
            "can be learned from it; lower it or add text"
        )
    return DataError(f"sentencepiece could not train {vocab_size} pieces: {message}")
