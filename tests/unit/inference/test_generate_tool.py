"""tools/generate.py: the same text as transformers, from every kind of input; errors in a line."""

import io
import json
import runpy
import shutil
import sys

import pytest
import torch
from transformers import AutoTokenizer

from pltmoe.inference.engine import Engine
from pltmoe.inference.sampling import SamplingOptions
from pltmoe.inference.text import TextStream
from tests.repository import REPOSITORY

PROMPTS = ["def test_", "import torch\n", "x"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def generate(monkeypatch, *arguments, stdin=None):
    """Run the tool in this process; return its exit code or message."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", stdin or io.StringIO())
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "tools/generate.py"), run_name="__main__")
    return end.value.code


def prompts_as_arguments():
    return [x for prompt in PROMPTS for x in ("--prompt", prompt)]


@pytest.fixture
def tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported, trust_remote_code=True)


def test_both_engines_write_the_same_text(exported, tmp_path, monkeypatch, capsys):
    texts = {}
    for name in ("pltmoe", "transformers"):
        output = tmp_path / f"{name}.json"
        common = ["--model", exported, "--engine", name, "--output", output, "--dtype", "float64"]
        code = generate(monkeypatch, *common, "--max-new-tokens", 12, *prompts_as_arguments())
        assert code is None
        texts[name] = json.loads(output.read_text())
        shown = capsys.readouterr()
        for sample in texts[name]:
            assert sample["prompt"] + sample["text"] in shown.out
        assert "ms per token" in shown.err and "tokens/s" in shown.err
    assert [s["prompt"] for s in texts["pltmoe"]] == PROMPTS
    assert texts["pltmoe"] == texts["transformers"]


def test_a_seed_gives_one_text_alone_and_in_a_batch(exported, tmp_path, monkeypatch):
    def texts(*arguments):
        output = tmp_path / "out.json"
        drawing = ["--temperature", 1.0, "--top-k", 30, "--top-p", 0.95, "--max-new-tokens", 10]
        common = ["--model", exported, "--output", output, "--dtype", "float64"]
        assert generate(monkeypatch, *common, *drawing, *arguments) is None
        return [sample["text"] for sample in json.loads(output.read_text())]

    together = texts("--seed", 3, *prompts_as_arguments())
    assert together == texts("--seed", 3, "--max-batch", 1, *prompts_as_arguments())
    assert texts("--seed", 4, "--prompt", PROMPTS[1]) == together[1:2]
    assert texts("--seed", 9, "--prompt", PROMPTS[1]) != together[1:2]


def test_prompts_from_files_and_stdin(exported, tmp_path, monkeypatch):
    lines, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("import os\n\nclass A:\n")
    objects.write_text(json.dumps({"prompt": "a\nb"}) + "\n")
    output = tmp_path / "out.json"

    def prompts(*arguments, stdin=None):
        common = ["--model", exported, "--max-new-tokens", 2, "--output", output]
        assert generate(monkeypatch, *common, *arguments, stdin=stdin) is None
        return [sample["prompt"] for sample in json.loads(output.read_text())]

    assert prompts("--prompts-file", lines) == ["import os", "class A:"]
    assert prompts("--prompt", "x", "--prompts-file", objects) == ["x", "a\nb"]
    assert prompts(stdin=io.StringIO("two\nlines\n")) == ["two\nlines"]


def test_typed_prompts_and_going_on(exported, tokenizer, monkeypatch, capsys):
    """An empty line continues; what was typed too long is refused and the next one taken."""
    typed = Terminal("\nimport os\n\n" + "long " * 200 + "\ncaf\udce9\n")
    code = generate(monkeypatch, "--model", exported, "--max-new-tokens", 5, stdin=typed)
    assert code is None
    shown = capsys.readouterr()
    engine = Engine.load(exported, "cpu")
    ids = tokenizer("import os")["input_ids"]
    whole = engine.generate([ids], SamplingOptions(max_new_tokens=5))[0].tokens
    text = TextStream(tokenizer, ids)
    first = "".join(text.add(token) for token in whole) + text.finish()
    assert f"import os{first}\n" in shown.out
    assert shown.out.count(f"import os{first}") == 2
    assert shown.err.count("ms per token") == 2
    assert "error: prompt 1 (" in shown.err and "error: this is no text" in shown.err


def test_stop_strings_end_the_text_before_them(exported, tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    common = ["--model", exported, "--prompt", PROMPTS[0], "--output", output]
    assert generate(monkeypatch, *common, "--max-new-tokens", 30) is None
    whole = json.loads(output.read_text())[0]["text"]
    stop = whole[9:12]
    assert generate(monkeypatch, *common, "--max-new-tokens", 30, "--stop", stop) is None
    assert json.loads(output.read_text())[0]["text"] == whole[: whole.index(stop)]


def test_a_stop_string_may_be_any_text(exported, monkeypatch):
    tool = runpy.run_path(str(REPOSITORY / "tools/generate.py"))
    for typed, meant in ((r"\n\n", "\n\n"), ("é。", "é。"), (r"\\", "\\"), ("a\tb", "a\tb")):
        assert tool["_unescaped"](typed) == meant
    code = generate(monkeypatch, "--model", exported, "--prompt", "x", "--stop", "end\\")
    assert "at end of string; a backslash is" in code


def test_going_on_reads_the_tokens_that_were_made(exported, tokenizer, monkeypatch, capsys):
    """Not the text again, whose tokens may be others."""
    arguments = ["--model", exported, "--max-new-tokens", 6, "--dtype", "float64"]
    generate(monkeypatch, *arguments, stdin=Terminal("import os\n\n"))
    ids = tokenizer("import os")["input_ids"]
    engine = Engine.load(exported, "cpu", torch.float64)
    whole = engine.generate([ids], SamplingOptions(max_new_tokens=12))[0].tokens
    text = TextStream(tokenizer, ids)
    assert "import os" + "".join(map(text.add, whole)) + text.finish() in capsys.readouterr().out


def test_transformers_times_count_no_padding(exported, tmp_path, monkeypatch, capsys):
    """The second text ends early: what follows its end is not made."""
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    common = ["--model", folder, "--engine", "transformers", "--max-new-tokens", 8]
    common += ["--prompt", "x", "--prompt", "import torch\n"]
    assert generate(monkeypatch, *common) is None
    assert " 16 new tokens in " in capsys.readouterr().err
    texts = []
    for prompt in ("x", "import torch\n"):
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(prompt)["input_ids"]
        found = Engine.load(folder, "cpu").generate([ids], SamplingOptions(max_new_tokens=8))
        texts.append(found[0].tokens)
    end = next(token for token in texts[1] if token not in texts[0])
    path = folder / "generation_config.json"
    given = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(given | {"eos_token_id": end, "pad_token_id": end}))
    assert generate(monkeypatch, *common) is None
    made = 8 + texts[1].index(end) + 1
    shown = capsys.readouterr().err
    assert f" {made} new tokens in " in shown and "with the prompts" in shown


def test_text_comes_whole_characters_at_a_time(tokenizer):
    """Characters of several tokens wait; joined pieces are the tokenizer's own text.

    The last one is all bytes, so that the last tokens of a prompt begin inside of a character.
    """
    texts = ("  a  b\n\tcafé 你好 \N{GRINNING FACE}!", "x = 'ü'\n", "plain words here", "你好世界")
    for original in texts:
        ids = tokenizer(original)["input_ids"]
        for cut in range(len(ids)):
            stream = TextStream(tokenizer, ids[:cut])
            pieces = [stream.add(token) for token in ids[cut:]] + [stream.finish()]
            begin = tokenizer.decode(ids[:cut], skip_special_tokens=True)
            if not begin.endswith("\N{REPLACEMENT CHARACTER}"):
                assert begin + "".join(pieces) == original
                assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


class Letters:
    """One character per token."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one;two", [";"], "one"),
        ("aab aabc", ["aabc"], "aab "),
        ("ends on a maybe EN", ["END"], "ends on a maybe EN"),
        ("both at once", ["once", "at"], "both "),
        ("nothing", [""], "nothing"),
    ],
)
def test_stop_strings_are_held_back_while_they_may_come(text, stop, expected):
    stream = TextStream(Letters(), [], stop)
    pieces = []
    for letter in text:
        pieces.append(stream.add(ord(letter)))
        assert expected.startswith("".join(pieces))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == expected


def test_errors_are_one_line(exported, tmp_path, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n')
    one = ["--prompt", "x"]
    for message, arguments in (
        ("holds no exported model", ["--model", tmp_path, *one]),
        ("a prompt is empty", ["--model", exported, "--prompt", ""]),
        ("is no text in UTF-8", ["--model", exported, "--prompt", "caf\udce9"]),
        ("cannot be read as text", ["--model", exported, "--prompts-file", tmp_path / "none"]),
        ("expected one JSON object with a text", ["--model", exported, "--prompts-file", bad]),
        ("temperature (-1.0) must be 0 or more", ["--model", exported, "--temperature", -1, *one]),
        ("is a file: name the exported folder", ["--model", exported / "config.json", *one]),
        ("--device gpu: cannot be used here (",
         ["--model", exported, "--device", "gpu", *one]),
        ("is a folder; name the file", ["--model", exported, "--output", tmp_path, *one]),
        ("shorten them, or raise --max-slots", ["--model", exported, "--max-new-tokens", 99, *one]),
        ("FP8 weights need a GPU", ["--model", exported, "--fp8", "--device", "cpu", *one]),
        ("--max-slots and --max-batch are for --engine pltmoe",
         ["--model", exported, "--engine", "transformers", "--stop", "x", *one]),
        ("--max-slots and --max-batch are for --engine pltmoe",
         ["--model", exported, "--engine", "transformers", "--max-batch", 1, *one]),
    ):  # fmt: skip
        code = generate(monkeypatch, *arguments)
        assert isinstance(code, str) and code.startswith("error: ")
        assert message in code and "\n" not in code
    code = generate(
        monkeypatch, "--model", exported, "--output", tmp_path / "x.json", stdin=Terminal()
    )
    assert "--output needs prompts: --prompt" in code
    latin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    assert "a prompt is no text in UTF-8" in generate(monkeypatch, "--model", exported, stdin=latin)


def test_a_folder_without_tokenizer(exported, tmp_path, monkeypatch):
    for name in ("config.json", "configuration_plt_moe.py", "modeling_plt_moe.py"):
        (tmp_path / name).write_text((exported / name).read_text())
    code = generate(monkeypatch, "--model", tmp_path, "--prompt", "x")
    assert "holds no tokenizer that loads" in code


def test_max_slots_can_be_raised(exported, tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    common = ["--model", exported, "--prompt", "x", "--output", output]
    assert generate(monkeypatch, *common, "--max-new-tokens", 99, "--max-slots", 128) is None
    assert len(json.loads(output.read_text())[0]["text"]) > 50
