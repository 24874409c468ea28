"""Exported models behind what people use: generate, pipeline, and `transformers serve`.

The server is a real process with the command a user types, the client is OpenAI's; nothing leaves
this machine. transformers imports in ~10 s on a slow core, so one server answers all questions.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from pltmoe.hf.convert import ExportOptions, export_checkpoint
from tests.ports import free_port
from tests.unit.hf.checkpoints import TEXT_VOCABULARY, write_checkpoint
from tests.unit.hf.models import small_model

pytestmark = pytest.mark.xdist_group(__name__)
PROMPT, NEW_TOKENS = "def test_logits(name):", 12
START_SECONDS = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_model):
    """A PLT-3 export with its tokenizer, from a real checkpoint."""
    root = tmp_path_factory.mktemp("served")
    m = small_model("plt3_normed", vocab_size=TEXT_VOCABULARY)
    write_checkpoint(root / "run", m, tokenizer_model)
    options = ExportOptions(progress=False, verify=False)
    folder = export_checkpoint(root / "run", root / "plt3", options).folder
    say_only_whole_characters(folder)
    return folder


def say_only_whole_characters(folder):
    """Random weights choose bytes that are no text; a stream of those is cut as it likes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    suppressed = [i for i, piece in enumerate(pieces) if piece.startswith("<")]
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"suppress_tokens": suppressed}))


@pytest.fixture(scope="module")
def expected(folder):
    """The text that greedy decoding without a cache gives."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": False}
    return tokenizer.decode(model.generate(ids, **options)[0, ids.size(1) :])


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """`transformers serve FOLDER`; its address. Continuous batching is asked for, not used."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", str(folder),
        "--trust-remote-code", "--continuous-batching", "--device", "cpu",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(log.parent / "modules")}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | offline
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(address, process, log)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def wait_until_healthy(address, process, log):
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(address + "/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(f"no answer in {START_SECONDS} s: {log.read_text()}")


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return openai.OpenAI(base_url=server + "/v1", api_key="none", max_retries=0)


def test_a_client_gets_a_completion(client, folder, expected):
    answer = client.completions.create(
        model=str(folder), prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0
    )
    assert answer.choices[0].text == expected
    assert answer.usage.completion_tokens == NEW_TOKENS


def test_a_client_gets_a_stream(client, folder, expected):
    stream = client.completions.create(
        model=str(folder), prompt=PROMPT, max_tokens=NEW_TOKENS, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(pieces) == expected
    assert sum(bool(piece) for piece in pieces) > 1


def test_pipeline_generates_the_same(folder, expected):
    pipe = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    answer = pipe(
        [PROMPT, "import"], max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False,
        batch_size=2,
    )  # fmt: skip
    assert answer[0][0]["generated_text"] == expected


def test_continuous_batching_is_refused_with_a_way_out(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not hasattr(model, "init_continuous_batching")  # the server asks for this
    for call in (model.generate_batch, model.continuous_batching_context_manager):
        with pytest.raises(NotImplementedError, match="paged cache has no place for the windows"):
            call([[1, 2, 3]])
