"""tools/generate.py: the same text as transformers, from every kind of input; errors in a line."""

import io
import json
import runpy
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoTokenizer

from pltmoe.inference.engine import Engine
from pltmoe.inference.sampling import SamplingOptions
from pltmoe.inference.text import TextStream
from tests.repository import REPOSITORY, run_tool

PROMPTS = ["def test_", "import torch\n", "x"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


generate = partial(run_tool, "generate.py")


def prompts_as_arguments():
    return [x for prompt in PROMPTS for x in ("--prompt", prompt)]


@pytest.fixture
def tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported, trust_remote_code=True)


def test_both_engines_write_the_same_text(exported, tmp_path):
    texts = {}
    for name in ("pltmoe", "transformers"):
        output = tmp_path / f"{name}.json"
        common = ["--model", exported, "--engine", name, "--output", output, "--dtype", "float64"]
        shown = generate(*common, "--max-new-tokens", 12, *prompts_as_arguments())
        assert shown.returncode == 0, shown.stderr
        texts[name] = json.loads(output.read_text())
        for sample in texts[name]:
            assert sample["prompt"] + sample["text"] in shown.stdout
        assert "ms per token" in shown.stderr and "tokens/s" in shown.stderr
    assert [s["prompt"] for s in texts["pltmoe"]] == PROMPTS
    assert texts["pltmoe"] == texts["transformers"]


def test_a_space_in_front_of_a_continuation_stays(exported, tmp_path):
    """Some tokenizers take one from what they decode (Llama 2); here it is another character."""
    folder, output = tmp_path / "model", tmp_path / "out.json"
    shutil.copytree(exported, folder)
    common = ["--model", folder, "--prompt", "def test_", "--max-new-tokens", 4, "--output", output]
    assert generate(*common).returncode == 0
    expected = json.loads(output.read_text())[0]["text"]
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["decoder"]["decoders"].append(
        {"type": "Strip", "content": expected[0], "start": 1, "stop": 0}
    )
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    for name in ("pltmoe", "transformers"):
        assert generate(*common, "--engine", name).returncode == 0
        assert json.loads(output.read_text())[0]["text"] == expected, name


def test_a_seed_gives_one_text_alone_and_in_a_batch(exported, tmp_path):
    def texts(*arguments):
        output = tmp_path / "out.json"
        drawing = ["--temperature", 1.0, "--top-k", 30, "--top-p", 0.95, "--max-new-tokens", 10]
        common = ["--model", exported, "--output", output, "--dtype", "float64"]
        assert generate(*common, *drawing, *arguments).returncode == 0
        return [sample["text"] for sample in json.loads(output.read_text())]

    together = texts("--seed", 3, *prompts_as_arguments())
    assert together == texts("--seed", 3, "--max-batch", 1, *prompts_as_arguments())
    assert texts("--seed", 4, "--prompt", PROMPTS[1]) == together[1:2]
    assert texts("--seed", 9, "--prompt", PROMPTS[1]) != together[1:2]


def test_prompts_from_files_and_stdin(exported, tmp_path):
    lines, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("import os\n\nclass A:\n")
    objects.write_text(json.dumps({"prompt": "a\nb"}) + "\n")
    output = tmp_path / "out.json"

    def prompts(*arguments, stdin=None):
        common = ["--model", exported, "--max-new-tokens", 2, "--output", output]
        assert generate(*common, *arguments, stdin=stdin).returncode == 0
        return [sample["prompt"] for sample in json.loads(output.read_text())]

    assert prompts("--prompts-file", lines) == ["import os", "class A:"]
    assert prompts("--prompt", "x", "--prompts-file", objects) == ["x", "a\nb"]
    assert prompts(stdin=io.StringIO("two\nlines\n")) == ["two\nlines"]


def test_typed_prompts_and_going_on(exported, tokenizer):
    """An empty line continues; what was typed too long is refused and the next one taken."""
    typed = Terminal("\nimport os\n\n" + "long " * 200 + "\ncaf\udce9\n")
    shown = generate("--model", exported, "--max-new-tokens", 5, stdin=typed)
    assert shown.returncode == 0, shown.stderr
    engine = Engine.load(exported, "cpu")
    ids = tokenizer("import os")["input_ids"]
    whole = engine.generate([ids], SamplingOptions(max_new_tokens=5))[0].tokens
    text = TextStream(tokenizer, ids)
    first = "".join(text.add(token) for token in whole) + text.finish()
    assert f"import os{first}\n" in shown.stdout
    assert shown.stdout.count(f"import os{first}") == 2
    assert shown.stderr.count("ms per token") == 2
    assert "error: prompt 1 (" in shown.stderr and "error: this is no text" in shown.stderr


def test_stop_strings_end_the_text_before_them(exported, tmp_path):
    output = tmp_path / "out.json"
    common = ["--model", exported, "--prompt", PROMPTS[0], "--output", output]
    assert generate(*common, "--max-new-tokens", 30).returncode == 0
    whole = json.loads(output.read_text())[0]["text"]
    stop = whole[9:12]
    assert generate(*common, "--max-new-tokens", 30, "--stop", stop).returncode == 0
    assert json.loads(output.read_text())[0]["text"] == whole[: whole.index(stop)]


def test_a_stop_string_may_be_any_text(exported):
    tool = runpy.run_path(str(REPOSITORY / "tools/generate.py"))
    for typed, meant in ((r"\n\n", "\n\n"), ("é。", "é。"), (r"\\", "\\"), ("a\tb", "a\tb")):
        assert tool["_unescaped"](typed) == meant
    said = generate("--model", exported, "--prompt", "x", "--stop", "end\\").stderr
    assert "at end of string; a backslash is" in said


def test_going_on_reads_the_tokens_that_were_made(exported, tokenizer):
    """Not the text again, whose tokens may be others."""
    arguments = ["--model", exported, "--max-new-tokens", 6, "--dtype", "float64"]
    shown = generate(*arguments, stdin=Terminal("import os\n\n")).stdout
    ids = tokenizer("import os")["input_ids"]
    engine = Engine.load(exported, "cpu", torch.float64)
    whole = engine.generate([ids], SamplingOptions(max_new_tokens=12))[0].tokens
    text = TextStream(tokenizer, ids)
    assert "import os" + "".join(map(text.add, whole)) + text.finish() in shown


def test_transformers_times_count_no_padding(exported, tmp_path):
    """The second text ends early: what follows its end is not made. No token is one for padding."""
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))
    common = ["--model", folder, "--engine", "transformers", "--max-new-tokens", 8]
    common += ["--prompt", "x", "--prompt", "import torch\n"]
    assert " 16 new tokens in " in generate(*common).stderr
    texts = []
    for prompt in ("x", "import torch\n"):
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(prompt)["input_ids"]
        found = Engine.load(folder, "cpu").generate([ids], SamplingOptions(max_new_tokens=8))
        texts.append(found[0].tokens)
    end = next(token for token in texts[1] if token not in texts[0])
    path = folder / "generation_config.json"
    given = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(given | {"eos_token_id": end, "pad_token_id": end}))
    made = 8 + texts[1].index(end) + 1
    shown = generate(*common).stderr
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


def test_errors_are_one_line(exported, tmp_path):
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
        *_, said = generate(*arguments).stderr.splitlines()
        assert said.startswith("error: ") and message in said
    done = generate("--model", exported, "--output", tmp_path / "x.json", stdin=Terminal())
    assert "--output needs prompts: --prompt" in done.stderr
    latin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    done = generate("--model", exported, stdin=latin)
    assert "a prompt is no text in UTF-8" in done.stderr


def test_a_folder_without_tokenizer(exported, tmp_path):
    for name in ("config.json", "configuration_plt_moe.py", "modeling_plt_moe.py"):
        (tmp_path / name).write_text((exported / name).read_text())
    done = generate("--model", tmp_path, "--prompt", "x")
    assert "holds no tokenizer that loads" in done.stderr


def test_max_slots_can_be_raised(exported, tmp_path):
    output = tmp_path / "out.json"
    common = ["--model", exported, "--prompt", "x", "--output", output]
    assert generate(*common, "--max-new-tokens", 99, "--max-slots", 128).returncode == 0
    assert len(json.loads(output.read_text())[0]["text"]) > 50
