"""The sentencepiece tokenizer: lossless, so that ``decode(encode(text)) == text`` for any text.

BPE with byte fallback, no normalisation, no dummy prefix, every space kept. sentencepiece writes a
space as U+2581 inside its pieces and turns that character back into a space when it decodes, so a
U+2581 in the text itself would be lost; ``Tokenizer`` writes it as its three byte pieces instead.
A Hugging Face fast tokenizer gives the same ids when its pieces hold real spaces (see hf/).
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from pltmoe.errors import DataError

log = logging.getLogger(__name__)

SPACE_MARK = "\u2581"
_MARKED = f"a{SPACE_MARK}b"
_PROBE = "  a\tb \r\n\n\x00\ufb01 e\u0301 \U0001f600  "


class Tokenizer:
    """A sentencepiece model with what Megatron's datasets ask of a tokenizer.

    Raises:
        DataError: no such file, not a sentencepiece model, or one without an end-of-document piece.
    """

    def __init__(self, path: str | Path):
        self.model_path = Path(path)
        model = _read_model(self.model_path)
        self._pieces = _load(model, self.model_path)
        self.sha256 = hashlib.sha256(model).hexdigest()
        if self._pieces.eos_id() < 0:
            raise DataError(
                f"{path}: has no end-of-sentence piece, which ends documents; "
                "train a tokenizer with tools/train_tokenizer.py"
            )
        self._space_mark_ids: list[int] = []
        if self._is_lossless():
            names = (f"<0x{byte:02X}>" for byte in SPACE_MARK.encode())
            self._space_mark_ids = [self._pieces.piece_to_id(name) for name in names]
        if self.decode(self.encode(_MARKED)) != _MARKED:  # each part would get a dummy prefix
            self._space_mark_ids = []
            log.warning("%s is not lossless: decoding may not give back the same text", path)

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are ``0 .. vocab_size - 1``."""
        return self._pieces.get_piece_size()

    @property
    def eod(self) -> int:
        """Id that ends every document (sentencepiece's end of sentence)."""
        return self._pieces.eos_id()

    @property
    def pad(self) -> int:
        """Id of the padding piece; -1 if the model has none (Megatron's own value for that)."""
        return self._pieces.pad_id()

    @property
    def bos(self) -> int:
        """Id of the beginning-of-document piece, -1 if there is none; not used in training."""
        return self._pieces.bos_id()

    @property
    def unk(self) -> int:
        """Id of the unknown piece; with byte fallback no text ever maps to it."""
        return self._pieces.unk_id()

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What names this tokenizer in Megatron's index cache: its contents, not its path."""
        return OrderedDict({"class": type(self).__name__, "sha256": self.sha256})

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without any special id added.

        Raises:
            DataError: the text holds a lone surrogate, which no encoding of Unicode can store.
        """
        try:
            if not self._space_mark_ids or SPACE_MARK not in text:
                return self._pieces.encode(text)
            ids: list[int] = []
            for i, part in enumerate(text.split(SPACE_MARK)):
                ids += (self._space_mark_ids if i else []) + self._pieces.encode(part)
            return ids
        except (RuntimeError, TypeError):  # the second: sentencepiece before 0.2.2
            raise _encoding_error(text) from None

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
        return self._pieces.decode(ids)

    def _is_lossless(self) -> bool:
        pieces = self._pieces
        return pieces.is_byte(pieces.piece_to_id("<0x00>")) and _PROBE == pieces.decode(
            pieces.encode(_PROBE)
        )


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such tokenizer; make one with tools/train_tokenizer.py"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _load(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        usable = pieces.LoadFromSerializedProto(model) is not False and pieces.get_piece_size() > 0
    except (RuntimeError, OSError):
        usable = False
    if not usable:
        raise DataError(f"{path}: not a sentencepiece model")
    return pieces


def _encoding_error(text: str) -> DataError:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return DataError(
            f"text holds half a surrogate pair (U+{code:04X} at character {error.start}), "
            "which is not valid Unicode"
        )
    return DataError(f"sentencepiece cannot encode a text of {len(text)} characters")
