"""Tokenizers of Hugging Face as models come with them: byte-level BPE of a few merges."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from tests.repository import REPOSITORY

SPECIAL = ["<|endoftext|>", "<|pad|>", "<|begin|>"]
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tokenizer(folder: Path, *, template: str = "$A", composes: bool = False) -> Path:
    """Write tokenizer.json and tokenizer_config.json, and return the first.

    Args:
        folder: is made.
        template: what a text becomes, such as ``<|begin|> $A`` in Llama 3.
        composes: accents join their letters (NFC), as in Qwen.
    """
    tokenizer = Tokenizer(models.BPE())
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    configure(path, eos_token="<|endoftext|>", pad_token={"content": "<|pad|>"}, bos_token=None)
    return path


def configure(path: Path, **config: Any) -> None:
    """Write the configuration beside a tokenizer.json."""
    path.with_name("tokenizer_config.json").write_text(json.dumps(config))
