"""The tokenizer of an export: a Hugging Face fast tokenizer with the ids of training.

One of Hugging Face keeps its file; of a sentencepiece BPE model one is built.

sentencepiece joins, again and again, the neighbouring pieces whose union has the best score; the
leftmost of equals first. The fast tokenizer does the same with an ordered list of merges: one for
every way to split a piece in two, in the order of the pieces' scores. Spaces are kept as real
spaces (sentencepiece writes U+2581), so that a U+2581 in a text becomes bytes on both sides.

Decoding gives the same text for the ids of any text. Byte pieces in a row that are not UTF-8 (a
character cut in two) all become U+FFFD here; sentencepiece keeps the characters among them.
"""

import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pltmoe.data.tokenizer import HuggingFaceTokenizer
from pltmoe.errors import ConversionError
from pltmoe.runtime.tokenizer_files import (
    HUGGING_FACE,
    HUGGING_FACE_CONFIG,
    SENTENCEPIECE,
    is_hugging_face,
)

_SPACE_MARK = "\u2581"
_PROBES = (
    "def f(x):\n\treturn  x  # 12345\r\n\n    \u00e9 e\u0301 \U0001f600 \x00 \ufb01 <0x41>",
    "  The quick fox, 3.14159;\u3000\u4f60\u597d \u0645\u0631\u062d\u0628\u0627 \ufffd <|eos|> ",
)


def build_fast_tokenizer(model_path: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer equal to the sentencepiece model, special pieces included.

    What ends a document also begins one (``bos_token``), as in GPT-2: training puts the end of one
    document before the next and never saw the model's own beginning piece. lm-evaluation-harness
    and ``generate()`` begin with this token where they have no other.

    Names of special pieces in a *text* are ordinary text, as in sentencepiece
    (``split_special_tokens``); add their ids where you want them. No id is added by itself.

    Args:
        model_path: sentencepiece BPE model with byte fallback and without normalisation.
        max_length: slots the language model was trained with.

    Raises:
        ConversionError: another kind of sentencepiece model, or ids differ on a probe text.
    """
    pieces = _load(model_path)
    _check_kind(pieces, model_path)
    names = [_name(pieces, index) for index in range(pieces.get_piece_size())]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(pieces, names, vocabulary),
            unk_token=names[pieces.unk_id()],
            byte_fallback=True,
        )
    )
    ids = special_ids(pieces)
    unused = {pieces.bos_id()} - {-1, *ids.values()}
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: names[index] for name, index in ids.items()},
        additional_special_tokens=[names[i] for i in unused],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_max_length=max_length,
        padding_side="left",
    )
    for text in _PROBES:
        if fast.encode(text) != pieces.encode(text):
            raise ConversionError(
                f"{model_path}: the fast tokenizer gives other ids for {text!r}; only "
                "sentencepiece BPE models without normalisation can be exported "
                "(--no-tokenizer leaves the tokenizer out)"
            )
    return fast


def special_ids(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Return the ids of the special tokens that the model has, e.g. ``{"eos_token": 2}``."""
    ids = {
        "unk_token": pieces.unk_id(),
        "bos_token": pieces.eos_id(),
        "eos_token": pieces.eos_id(),
        "pad_token": pieces.pad_id(),
    }
    return {name: index for name, index in ids.items() if index >= 0}


def load_hugging_face(path: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Return what transformers makes of a ``tokenizer.json``, with the ids of training.

    Documents begin with what the tokenizer puts in front of a text; where that is nothing, what
    ends a document begins one, as of a sentencepiece model. Unlike in training, names of special
    tokens in a text are these tokens, as users of the tokenizer expect.

    Raises:
        DataError: not such a tokenizer.
        ConversionError: ids differ on a probe text.
    """
    ours = HuggingFaceTokenizer(path)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="left",
        **ours.names,
    )
    fast.bos_token = fast.convert_ids_to_tokens([*ours.prefix, ours.eod][0])
    for text in _PROBES:
        if fast.encode(text, split_special_tokens=True) != ours.encode(text):
            raise ConversionError(
                f"{path}: transformers gives other ids for {text!r} than training "
                "(--no-tokenizer leaves the tokenizer out)"
            )
    return fast


def write_tokenizer(path: Path, folder: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Write tokenizer.json, its configuration and, if it is one, the sentencepiece model."""
    is_ready = is_hugging_face(path)
    fast = (load_hugging_face if is_ready else build_fast_tokenizer)(path, max_length)
    fast.save_pretrained(folder)
    config_path = folder / HUGGING_FACE_CONFIG
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that every version knows
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(path, folder / (HUGGING_FACE if is_ready else SENTENCEPIECE))
    return fast


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{path}: not a readable sentencepiece model ({error})") from None


def _check_kind(pieces: sentencepiece.SentencePieceProcessor, path: Path) -> None:
    scores = [pieces.get_score(i) for i in range(len(pieces)) if _is_normal(pieces, i)]
    is_bpe = scores == [-float(rank) for rank in range(len(scores))]
    has_bytes = pieces.is_byte(pieces.piece_to_id("<0x00>"))
    if not (is_bpe and has_bytes):
        raise ConversionError(
            f"{path}: not a sentencepiece BPE model with byte fallback, which is the only kind "
            "that can be exported (--no-tokenizer leaves the tokenizer out)"
        )


def _is_normal(pieces: sentencepiece.SentencePieceProcessor, index: int) -> bool:
    special = pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_unused(index)
    return not (special or pieces.is_byte(index))


def _name(pieces: sentencepiece.SentencePieceProcessor, index: int) -> str:
    name = pieces.id_to_piece(index)
    return name.replace(_SPACE_MARK, " ") if _is_normal(pieces, index) else name


def _merges(
    pieces: sentencepiece.SentencePieceProcessor, names: list[str], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Return every split of every piece into two, best piece first, longer left part first."""
    normal = {names[i] for i in range(len(names)) if _is_normal(pieces, i)}
    by_score = sorted(normal, key=lambda name: -pieces.get_score(vocabulary[name]))
    return [
        (name[:cut], name[cut:])
        for name in by_score
        for cut in range(len(name) - 1, 0, -1)
        if name[:cut] in normal and name[cut:] in normal
    ]
