"""Continue text with an exported model, all loops of a token in one pass (pltmoe/inference).

python tools/generate.py --model DIR                                  type prompts, an empty line
                                                                      continues the last text
python tools/generate.py --model DIR --prompt "def read_lines(path):" --prompt "import os"
python tools/generate.py --model DIR --prompts-file prompts.txt       one prompt per line, or .jsonl
echo "import os" | python tools/generate.py --model DIR               the whole input is one prompt

One prompt is printed as it is made; of several, the first is, and the others follow. Times go to
stderr at the end.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pltmoe.errors import ConfigError, ConversionError, DataError
from pltmoe.hf.code_cache import check_code_cache
from pltmoe.inference.engine import MAX_BATCH, Engine, Timing
from pltmoe.inference.sampling import SamplingOptions
from pltmoe.inference.text import TextStream
from pltmoe.inference.weights import describe_folder, read_fields
from pltmoe.runtime.command_line import output_file, positive, run_tool

ENGINES = ("pltmoe", "transformers")
DTYPES = ("float32", "bfloat16", "float16", "float64")
_NO_TEXT = "is no text in UTF-8: look at its encoding, and at the locale (LC_ALL=C.UTF-8)"


@dataclass(frozen=True)
class Request:
    """What the command line asks of every prompt."""

    options: SamplingOptions
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A text, and the tokens that made it."""

    text: str
    ids: list[int]


class Writer:
    """Prints texts while they come: the first at once, each other one when its turn comes."""

    def __init__(self, prompts: Sequence[str]):
        self._prompts, self._turn = prompts, 0
        self._waiting = [""] * len(prompts)
        self._finished: set[int] = set()
        self._bold = sys.stdout.isatty()
        self._shown = -1

    def add(self, index: int, piece: str) -> None:
        """Print a piece, or keep it until the texts before it are complete."""
        self._waiting[index] += piece
        self._flush()

    def finish(self, index: int) -> None:
        """Mark a text as complete."""
        self._finished.add(index)
        self._flush()

    def _flush(self) -> None:
        while self._turn < len(self._prompts):
            self._show_prompt()
            sys.stdout.write(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            if self._turn not in self._finished:
                break
            sys.stdout.write("\033[0m\n\n" if self._bold else "\n\n")
            self._turn += 1
        sys.stdout.flush()

    def _show_prompt(self) -> None:
        if self._shown < self._turn:
            self._shown = self._turn
            sys.stdout.write(self._prompts[self._turn] + ("\033[1m" if self._bold else ""))


def main() -> None:
    """Parse the command line, generate, print."""
    args = _parser().parse_args()
    # Refuse what is no exported model before anything heavy is loaded.
    (read_fields if args.engine == "transformers" else describe_folder)(args.model)
    request = Request(
        SamplingOptions(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        ),
        tuple(map(_unescaped, args.stop)),
    )
    prompts = _prompts(args)
    if prompts is None and args.output:
        raise ConfigError("--output needs prompts: --prompt, --prompts-file, or text on stdin")
    run = _transformers(args) if args.engine == "transformers" else _engine(args)
    if prompts is None:
        return _interactive(run, request)
    texts, timing = run([Text(prompt, []) for prompt in prompts], request)
    print(_times(timing), file=sys.stderr)
    if args.output:
        samples = [{"prompt": p, "text": t.text} for p, t in zip(prompts, texts, strict=True)]
        _write(args.output, json.dumps(samples, indent=2, ensure_ascii=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of convert_to_hf.py")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument(
        "--prompts-file",
        type=Path,
        help='one prompt per line; .jsonl: {"prompt": "..."} per line',
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="among so many likeliest; 0: all (default)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="among the likeliest of this sum (1)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first prompt; the next ones count up"
    )
    parser.add_argument(
        "--stop", action="append", default=[], help=r"end at this text (\n: new line); repeatable"
    )
    parser.add_argument("--output", type=output_file, help="also write prompts and texts as JSON")
    parser.add_argument("--device", type=_usable_device, help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--fp8", action="store_true", help="experts in FP8 (GPU: 8.9 or newer)")
    parser.add_argument("--max-slots", type=positive, help="default: as it was trained")
    parser.add_argument("--max-batch", type=positive, help=f"prompts at once ({MAX_BATCH})")
    parser.add_argument(
        "--engine", choices=ENGINES, default="pltmoe", help="transformers: its generate()"
    )
    return parser


def _usable_device(name: str) -> str:
    """Read ``--device``.

    Raises:
        ConfigError: PyTorch does not have it here.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: cannot be used here ({why})") from None
    return name


def _prompts(args: argparse.Namespace) -> list[str] | None:
    """Return the prompts, or None: they will be typed.

    Raises:
        DataError: one is empty or no text, or the file of them cannot be read.
    """
    prompts = list(args.prompt)
    try:
        if args.prompts_file is not None:
            prompts += list(_lines(args.prompts_file))
        elif not prompts:
            if sys.stdin.isatty():
                return None
            prompts = [sys.stdin.read().removesuffix("\n")]
        "".join(prompts).encode()
    except UnicodeError:
        raise DataError(f"a prompt {_NO_TEXT}") from None
    if any(not prompt for prompt in prompts) or not prompts:
        raise DataError("there is nothing to continue: a prompt is empty")
    return prompts


def _lines(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts-file {path} cannot be read as text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if path.suffix != ".jsonl" or not line.strip():
            yield from [line] if line.strip() else []
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            prompt = None
        if not isinstance(prompt, str):
            raise DataError(f'{path}:{number}: expected one JSON object with a text "prompt"')
        yield prompt


def _unescaped(text: str) -> str:
    r"""Turn ``\n`` and the like, as typed in a shell, into what they mean; letters stay.

    Raises:
        ConfigError: a backslash that means nothing.
    """
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--stop {text!r}: {error.reason}; a backslash is \\\\") from None


Run = Callable[[Sequence[Text], Request], tuple[list[Text], Timing]]
"""Continues prompts; one without ids is still to be tokenized."""


def _tokenizer(folder: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **options)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{folder} holds no tokenizer that loads: {error}") from None


def _engine(args: argparse.Namespace) -> Run:
    dtype = getattr(torch, args.dtype) if args.dtype else None
    tokenizer = _tokenizer(args.model)
    engine = Engine.load(
        args.model, args.device, dtype, args.max_slots, args.max_batch or MAX_BATCH, fp8=args.fp8
    )

    def run(prompts: Sequence[Text], request: Request) -> tuple[list[Text], Timing]:
        ids = [prompt.ids or tokenizer(prompt.text)["input_ids"] for prompt in prompts]
        options = [
            replace(request.options, seed=request.options.seed + index)
            for index in range(len(prompts))
        ]
        texts = [TextStream(tokenizer, prompt, request.stop) for prompt in ids]
        stream, writer = engine.stream(ids, options), Writer([prompt.text for prompt in prompts])
        for new in stream:
            text = texts[new.index]
            if new.reason != "stop":
                ids[new.index] = [*ids[new.index], new.token]
                writer.add(new.index, text.add(new.token))
            if text.stopped:
                stream.stop(new.index)
            if new.reason is not None or text.stopped:
                writer.add(new.index, text.finish())
                writer.finish(new.index)
        made = zip(texts, ids, strict=True)
        # Behind a stop string the tokens go on, or in the middle of one: the text decides.
        return [Text(t.text, [] if t.stopped else whole) for t, whole in made], stream.timing

    return run


def _transformers(args: argparse.Namespace) -> Run:
    """Return the same through transformers' generate(): what users of the folder have."""
    from transformers import AutoModelForCausalLM

    if args.stop or args.fp8 or args.max_slots or args.max_batch:
        raise ConfigError(
            "--stop, --fp8, --max-slots and --max-batch are for --engine pltmoe, not transformers"
        )
    check_code_cache(read_fields(args.model))
    tokenizer = _tokenizer(args.model, padding_side="left")
    if tokenizer.pad_token is None:  # Llama 3; padding is masked, any token will do
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        args.model, trust_remote_code=True, dtype=args.dtype or "auto"
    )
    model = model.eval().to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def run(prompts: Sequence[Text], request: Request) -> tuple[list[Text], Timing]:
        torch.manual_seed(request.options.seed)
        o = request.options
        sampling: dict[str, Any] = {"do_sample": bool(o.temperature)}
        if o.temperature:
            sampling |= {"temperature": o.temperature}
            sampling |= {"top_k": o.top_k, "top_p": o.top_p}
        prompt_texts = [prompt.text for prompt in prompts]
        batch = tokenizer(prompt_texts, return_tensors="pt", padding=True).to(model.device)
        start, size = time.perf_counter(), batch["input_ids"].size(1)
        ids = model.generate(**batch, max_new_tokens=o.max_new_tokens, **sampling)[:, size:]
        timing = Timing(decode_s=time.perf_counter() - start, steps=ids.size(1))
        timing.prompt_tokens = int(batch["attention_mask"].sum())
        ends = model.generation_config.eos_token_id
        is_end = torch.isin(ids, torch.tensor([] if ends is None else ends, device=ids.device))
        # Up to the first end, which counts: what follows it is padding.
        timing.new_tokens = int((is_end.cumsum(1) - is_end.long() == 0).sum())
        streams = [TextStream(tokenizer, prompt) for prompt in batch["input_ids"].tolist()]
        for stream, tokens in zip(streams, ids.tolist(), strict=True):
            for token in tokens:
                stream.add(token)
            stream.finish()
        texts = [stream.text for stream in streams]
        writer = Writer(prompt_texts)
        for index, text in enumerate(texts):
            writer.add(index, text)
            writer.finish(index)
        return [Text(text, []) for text in texts], timing

    return run


def _interactive(run: Run, request: Request) -> None:
    """Read prompts from the terminal until it ends."""
    print("Type a prompt; an empty line continues the last text, Ctrl-D ends.", file=sys.stderr)
    last = Text("", [])
    while True:
        try:
            typed = input("> ")
            typed.encode()
        except UnicodeError:
            print(f"error: this {_NO_TEXT}", file=sys.stderr)
            continue
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        prompt = Text(typed, []) if typed else last
        if not prompt.text:
            continue
        try:
            texts, timing = run([prompt], request)
        except DataError as error:  # too long, or out of the vocabulary: the next may do
            print(f"error: {error}", file=sys.stderr)
            continue
        last = Text(prompt.text + texts[0].text, texts[0].ids)
        print(_times(timing), file=sys.stderr)


def _times(t: Timing) -> str:
    prefill = f" in {1e3 * t.prefill_s:.0f} ms" if t.prefill_s else ""
    return (
        f"{t.prompt_tokens} prompt tokens{prefill}, {t.new_tokens} new tokens "
        f"in {t.decode_s:.2f} s{'' if prefill else ' with the prompts'}: "
        f"{t.ms_per_token:.2f} ms per token, {t.tokens_per_second:.1f} tokens/s"
    )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    run_tool(main)
