"""Text to token ids and back: sentencepiece models, and tokenizers of Hugging Face.

What tools/train_tokenizer.py makes is lossless, ``decode(encode(text)) == text`` for any text: BPE
with byte fallback, no normalisation, no dummy prefix, every space kept. Others may not be.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from pltmoe.errors import DataError
from pltmoe.runtime.tokenizer_files import HUGGING_FACE_CONFIG, is_hugging_face, tokenizer_files

SPACE_MARK = "\u2581"
_SPECIAL = ("unk_token", "bos_token", "eos_token", "pad_token")
_MARKED = f"a{SPACE_MARK}b"
_PROBE = "  a\tb \r\n\n\x00\ufb01 e\u0301 \U0001f600  "


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Load a sentencepiece model, or a ``tokenizer.json`` with its configuration beside it.

    Raises:
        DataError: no such file, not a tokenizer, or one that names nothing to end documents with.
    """
    path = Path(path)
    return HuggingFaceTokenizer(path) if is_hugging_face(path) else SentencePieceTokenizer(path)


class Tokenizer(ABC):
    """A tokenizer with what Megatron's datasets ask of it.

    Attributes:
        model_path: its file.
        sha256: of the file.
        eod: id that ends every document.
        pad: id of a token that is only padding, which Megatron takes out of sequences; -1 if there
            is none (its own value for that).
        vocab_size: ids are ``0 .. vocab_size - 1``.
        is_lossless: whether odd spaces, controls and accents come back as they were.
    """

    model_path: Path
    sha256: str
    eod: int
    pad: int
    vocab_size: int
    is_lossless: bool

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What names this tokenizer in Megatron's index cache: its contents, not its path."""
        return OrderedDict({"class": "Tokenizer", "sha256": self.sha256})

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; a document is these and ``eod``.

        Raises:
            DataError: the text holds a lone surrogate, which no encoding of Unicode can store, or
                what the tokenizer has no id for, and none for the unknown.
        """
        try:
            return self._encode(text)
        except Exception as error:  # tokenizers raises nothing narrower
            raise _encoding_error(self.model_path, text, error) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special ids give no text.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                size = self.vocab_size
                raise DataError(f"{self.model_path}: token id {i} is not in 0 .. {size - 1}")
        return self._decode(ids)

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def _gives_back(self, text: str) -> bool:
        return self.decode(self.encode(text)) == text


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    It writes a space as U+2581 inside its pieces and turns that character back into a space when it
    decodes, so a U+2581 in the text itself would be lost; here it is written as its three byte
    pieces. A Hugging Face fast tokenizer gives the same ids when its pieces hold real spaces
    (hf/fast_tokenizer.py). No special id is added to a text.
    """

    def __init__(self, path: Path):
        self.model_path = path
        model = _read(path)
        self._pieces = _load_pieces(model, path)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.eod, self.pad = self._pieces.eos_id(), self._pieces.pad_id()
        self.vocab_size = self._pieces.get_piece_size()
        if self.eod < 0:
            raise DataError(
                f"{path}: has no end-of-sentence piece, which ends documents; "
                "train a tokenizer with tools/train_tokenizer.py"
            )
        self._space_mark_ids: list[int] = []
        if self._pieces.is_byte(self._pieces.piece_to_id("<0x00>")) and self._gives_back(_PROBE):
            names = (f"<0x{byte:02X}>" for byte in SPACE_MARK.encode())
            self._space_mark_ids = [self._pieces.piece_to_id(name) for name in names]
        self.is_lossless = self._gives_back(_MARKED)
        if not self.is_lossless:  # each part would get a dummy prefix
            self._space_mark_ids = []

    @property
    def bos(self) -> int:
        """Id of the beginning-of-document piece, -1 if there is none; not used in training."""
        return self._pieces.bos_id()

    @property
    def unk(self) -> int:
        """Id of the unknown piece; with byte fallback no text ever maps to it."""
        return self._pieces.unk_id()

    def _encode(self, text: str) -> list[int]:
        if not self._space_mark_ids or SPACE_MARK not in text:
            return self._pieces.encode(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE_MARK)):
            ids += (self._space_mark_ids if i else []) + self._pieces.encode(part)
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``, and of the ``tokenizer_config.json`` beside it what ends a document.

    What the tokenizer puts in front of a text (Llama 3's ``<|begin_of_text|>``) begins documents,
    too, so that training sees what a prompt will look like. The file alone says what that is:
    ``add_bos_token`` in the configuration (DeepSeek) means nothing, as in transformers 5. The names
    of special tokens in a text are ordinary text: no document ends in its middle because it talks
    about ``<|endoftext|>``. A length that the file cuts texts to is not heeded.

    A text of n MiB takes 80 n to 300 n MiB of memory for a moment, the more the more tokens it is.

    Attributes:
        names: of the special tokens that the configuration names, ``eos_token`` and others.
        prefix: ids in front of every text.
    """

    def __init__(self, path: Path):
        # A process encodes one text at a time, and one that encoded in parallel warns of each fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.model_path = path
        model = _read(path)
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
        except ValueError as error:
            raise DataError(f"{path}: not a tokenizer of Hugging Face ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        named = _special_tokens(tokenizer_files(path)[HUGGING_FACE_CONFIG])
        self.names = {k: name for k, name in named.items() if self._id(name) >= 0}
        if "eos_token" not in self.names:
            raise DataError(
                f"{path.with_name(HUGGING_FACE_CONFIG)}: names no eos_token that {path.name} has, "
                'which ends documents; add it, such as "eos_token": "<|endoftext|>"'
            )
        self._tokenizer.add_special_tokens(list(self.names.values()))  # as transformers does
        self.eod = self._id(self.names["eos_token"])
        self.pad = -1  # documents hold none, but often what pad_token names: eos_token, "!", <s>
        self.prefix = self._find_prefix()
        self._check_end()
        self.is_lossless = self._gives_back(_PROBE) and self._gives_back(_MARKED)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model_path,)  # a copy would not know about special tokens

    def _id(self, name: str) -> int:
        index = self._tokenizer.token_to_id(name)
        return -1 if index is None else index

    def _find_prefix(self) -> list[int]:
        whole = self.encode("a")
        text = self._tokenizer.encode("a", add_special_tokens=False).ids
        prefix = whole[: len(whole) - len(text)]
        if whole != prefix + text:
            raise DataError(
                f"{self.model_path}: puts tokens behind every text, so that a prompt would have "
                "ended; take them out of its post_processor (documents get their end all the same)"
            )
        return prefix

    def _check_end(self) -> None:
        pieces = [name for name, i in self._tokenizer.get_vocab().items() if i == self.eod]
        ids = self.encode(self.names["eos_token"])
        if len(pieces) > 1 or self.eod in ids[len(self.prefix) :]:
            raise DataError(
                f"{self.model_path}: a text can hold id {self.eod} ({' and '.join(pieces)}), which "
                f"ends documents: name another eos_token in {HUGGING_FACE_CONFIG}"
            )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode_batch_fast([text])[0].ids  # a third of the time of encode

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        more = "" if is_hugging_face(path) else "; make one with tools/train_tokenizer.py"
        raise DataError(f"{path}: no such tokenizer{more}") from None
    except OSError as error:
        more = "; name its tokenizer.json" if path.is_dir() else ""
        raise DataError(f"{path}: cannot be read ({error.strerror}){more}") from None


def _special_tokens(path: Path) -> dict[str, str]:
    """Return key -> name of the special tokens; each is a name, or an object with ``content``."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; it says which token ends a document (eos_token)")
    try:
        config = json.loads(_read(path))
        tokens = {key: config.get(key) for key in _SPECIAL}
    except (ValueError, AttributeError):
        raise DataError(f"{path}: not the configuration of a tokenizer, a JSON object") from None
    contents = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items()}
    return {key: name for key, name in contents.items() if isinstance(name, str)}


def _load_pieces(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        usable = pieces.LoadFromSerializedProto(model) is not False and pieces.get_piece_size() > 0
    except (RuntimeError, OSError):
        usable = False
    if not usable:
        raise DataError(f"{path}: not a sentencepiece model")
    return pieces


def _encoding_error(path: Path, text: str, reason: Exception) -> DataError:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return DataError(
            f"text holds half a surrogate pair (U+{code:04X} at character {error.start}), "
            "which is not valid Unicode"
        )
    return DataError(f"{path}: cannot encode a text of {len(text)} characters ({reason})")
