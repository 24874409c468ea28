"""Which files make a tokenizer, and what they are called in a checkpoint or an export."""

from pathlib import Path

SENTENCEPIECE = "tokenizer.model"
HUGGING_FACE = "tokenizer.json"
HUGGING_FACE_CONFIG = "tokenizer_config.json"


def is_hugging_face(path: Path) -> bool:
    """Whether a tokenizer's file is one of Hugging Face's ``tokenizers``, not sentencepiece's."""
    return path.suffix == ".json"


def tokenizer_files(path: Path) -> dict[str, Path]:
    """Return name in a checkpoint -> file, of the tokenizer whose main file is ``path``.

    The main file decides the ids of a text and comes first. Hugging Face's does not say which
    token ends a document; the configuration beside it does.
    """
    if not is_hugging_face(path):
        return {SENTENCEPIECE: path}
    return {HUGGING_FACE: path, HUGGING_FACE_CONFIG: path.with_name(HUGGING_FACE_CONFIG)}


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """Return name in a checkpoint -> contents, the main file first.

    Raises:
        OSError: a file cannot be read.
    """
    return {name: file.read_bytes() for name, file in tokenizer_files(path).items()}


def find_tokenizer(folder: Path) -> Path | None:
    """Return the main file of the tokenizer in a checkpoint or a model's folder, if it has one.

    An export of a sentencepiece model also holds it as Hugging Face's; data were made with the
    model.
    """
    for name in (SENTENCEPIECE, HUGGING_FACE):
        if all(path.is_file() for path in tokenizer_files(folder / name).values()):
            return folder / name
    return None
