"""The decode benchmark: what it counts, how it judges, and that its file grows run by run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from pltmoe.config.counts import kv_cache_bytes
from pltmoe.errors import DataError
from pltmoe.inference.benchmark import measure as measuring
from pltmoe.inference.benchmark.exported import DecodeSetup, measure_exported
from pltmoe.inference.benchmark.measure import Result, Setup, measure
from pltmoe.inference.benchmark.ratios import TARGETS, Outcome, outcomes
from pltmoe.inference.benchmark.report import add_run
from pltmoe.inference.benchmark.suite import (
    ABLATION,
    BIG_VANILLA,
    CLP,
    HEADLINE,
    LOOP2,
    PLT2,
    PLT2_SHARED,
    PLT3,
    SHARED_KV,
    SMALL_PLT,
    SMALL_SHARED,
    VANILLA,
    Candidate,
    candidates,
)
from pltmoe.inference.benchmark.traffic import bytes_moved
from pltmoe.inference.engine import Session
from pltmoe.inference.model import PLTDecoder
from pltmoe.inference.weights import random_weights
from pltmoe.reports.summary import read_decode
from tests.repository import CONFIGS
from tests.unit.inference.folders import write_folder
from tests.unit.inference.models import model
from tools import benchmark_decode

TINY = {
    "vocab_size": 61, "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4,
    "num_kv_heads": 2, "head_dim": 8, "num_experts": 16, "moe_top_k": 2,
    "moe_ffn_hidden_size": 8, "window_keys": 4,
}  # fmt: skip
SETUP = Setup((2, 3), 12, 4, 2, (9,), 1)
WHERE = {"device": "CPU", "versions": "v", "commit": "c", "dtype": "float32", "scale": "small"}


def tiny(names: tuple[str, ...]) -> list[Candidate]:
    found = candidates(CONFIGS, [ABLATION])
    return [
        Candidate(c.group, c.name, c.model.model_copy(update=TINY))
        for c in found
        if c.name in names
    ]


@pytest.fixture(scope="module")
def result() -> Result:
    names = (VANILLA, LOOP2, CLP, PLT2, PLT2_SHARED, PLT3)
    return measure(tiny(names), SETUP, torch.device("cpu"), torch.float32)


def of(result: Result, model: str, batch: int = 3) -> dict[str, Any]:
    return next(r for r in result.decode if r["model"] == model and r["batch"] == batch)


def test_the_models_are_those_of_the_paper() -> None:
    found = {c.name: c.model for c in candidates(CONFIGS, [ABLATION, HEADLINE])}
    rows = {VANILLA: (1, 0, 0, 0), LOOP2: (2, 0, 0, 0), CLP: (2, 1, 0, 0), SHARED_KV: (2, 1, 1, 0),
            PLT2: (2, 1, 1, 1), PLT3: (3, 1, 1, 1)}  # fmt: skip
    for name, row in rows.items():
        m = found[name]
        assert row == (m.num_loops, m.cross_loop_shift, m.share_first_loop_kv, m.gated_swa), name
    assert found[PLT2_SHARED].moe_loop_routing == found[SMALL_SHARED].moe_loop_routing == "shared"
    assert 3 * found[SMALL_PLT].num_layers == 2 * found[BIG_VANILLA].num_layers


def test_scaled_down_models_keep_what_the_ratios_depend_on() -> None:
    full = candidates(CONFIGS, [ABLATION, HEADLINE])
    small = candidates(CONFIGS, [ABLATION, HEADLINE], scaled_down=True)
    layers = {c.name: c.model.num_layers for c in small}
    assert 3 * layers[SMALL_PLT] == 2 * layers[BIG_VANILLA]
    for before, after in zip(full, small, strict=True):
        assert before.model.num_loops == after.model.num_loops
        assert after.model.moe_top_k == 8 and after.model.num_experts == 256


def test_models_of_one_size_share_their_weights_and_are_measured_in_turn(result: Result) -> None:
    assert len({c.weights_key() for c in tiny((VANILLA, LOOP2, PLT2, PLT3))}) == 1
    assert all(r["in_turn_with"] == 5 for r in result.decode)
    assert all(len(r["rounds_ms"]) == SETUP.rounds for r in result.decode)


def test_distinct_experts_are_counted_over_all_passes(result: Result) -> None:
    """Shared routing reads what vanilla reads; a vanilla loop reads twice, pass by pass."""
    vanilla = of(result, VANILLA)["distinct_experts_per_layer"]
    assert 2 <= vanilla <= 6  # three rows of two experts
    assert of(result, PLT2_SHARED)["distinct_experts_per_layer"] <= 6
    assert of(result, PLT2)["distinct_experts_per_layer"] > vanilla
    assert (
        of(result, PLT3)["distinct_experts_per_layer"]
        > of(result, PLT2)["distinct_experts_per_layer"]
    )
    assert of(result, LOOP2)["passes"] == 2 and of(result, PLT3)["passes"] == 1


def test_cache_bytes_are_those_of_the_formula(result: Result) -> None:
    for c in tiny((VANILLA, LOOP2, PLT2, PLT3)):
        slots = SETUP.context + SETUP.new_tokens
        expected = kv_cache_bytes(c.model, slots, bytes_per_element=4)
        assert of(result, c.name)["cache_bytes_per_sequence"] == expected


def test_prefill_is_measured_for_every_model(result: Result) -> None:
    assert {(r["model"], r["prompt_tokens"]) for r in result.prefill} == {
        (name, 9) for name in (VANILLA, LOOP2, CLP, PLT2, PLT2_SHARED, PLT3)
    }


@pytest.mark.parametrize("name, slots", [(VANILLA, 11), (LOOP2, 22), (CLP, 22), (PLT2, 15)])
def test_bytes_moved_are_weights_experts_keys_and_values(name: str, slots: int) -> None:
    """Counted by hand: d 16, Q 32, K and V 16 each, 61 tokens, 2 layers, floats of 4 bytes."""
    (c,) = tiny((name,))
    m = c.model
    session = Session(PLTDecoder(random_weights(m, "cpu", torch.float32), 32), 3, 16)
    layer = 16 * (32 + 2 * 16) + 32 * 16 + 2 * 16 + 2 * 8 + 16 * 16  # QKV, out, norms, router
    layer += (4 * 8 + 4) if m.gated_swa else 0
    passes = 2 if name == LOOP2 else 1
    expert, slot = 3 * 16 * 8, 2 * 2 * 8  # a slot of one layer
    written = m.num_loops
    expected = 2 * layer * passes + 61 * 16 + 3 * 16 + 5 * expert + 3 * 2 * slot * (slots + written)
    assert bytes_moved(session, context=11, experts_read=5) == 4 * expected


def test_a_model_whose_cache_does_not_fit_is_not_run_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = tiny((VANILLA, LOOP2))
    need = 3 * kv_cache_bytes(models[0].model, 16, 4) + 3 * 8 * 61
    monkeypatch.setattr(measuring, "_free_bytes", lambda device: need)
    monkeypatch.setattr(measuring, "weight_bytes", lambda members, dtype: 0)
    setup = Setup((3,), 12, 4, 1, (), 1)
    found = measure(models, setup, torch.device("cpu"), torch.float32).decode
    assert {r["model"]: "ms_per_token" in r for r in found} == {VANILLA: True, LOOP2: False}
    assert "GiB of cache" in next(r["not_run"] for r in found if r["model"] == LOOP2)


def test_a_batch_that_no_model_fits_costs_no_other_result(monkeypatch: pytest.MonkeyPatch) -> None:
    models = tiny((VANILLA,))
    need = 3 * kv_cache_bytes(models[0].model, 16, 4) + 3 * 8 * 61
    monkeypatch.setattr(measuring, "_free_bytes", lambda device: need)
    monkeypatch.setattr(measuring, "weight_bytes", lambda members, dtype: 0)
    kept: list[tuple[int, int]] = []
    setup = Setup((3, 9), 12, 4, 1, (9,), 1)
    found = measure(
        models, setup, torch.device("cpu"), torch.float32,
        keep=lambda so_far: kept.append((len(so_far.decode), len(so_far.prefill))),
    )  # fmt: skip
    assert ["ms_per_token" in r for r in found.decode] == [True, False]
    assert kept == [(1, 0), (2, 0), (2, 1)], "what is measured is kept at once"


def test_exported_folders_are_measured_through_the_engine(tmp_path: Path) -> None:
    """What tools/compare_runs.py --decode reads, and that PLT-2 is one pass there."""
    names = {"plt2": 1, "loop2": 2}
    for name in names:
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name, model(name))
    setup = DecodeSetup(batch=2, prompt_tokens=5, new_tokens=3, rounds=1)
    found = measure_exported({n: tmp_path / n for n in names}, setup, {"device": "CPU"})
    (tmp_path / "decode.json").write_text(json.dumps(found))
    for name, entry in read_decode(tmp_path / "decode.json").items():
        assert entry["passes"] == names[name]
        assert entry["context"] == 8 and entry["batch"] == 2 and entry["device"] == "CPU"
        expected = kv_cache_bytes(model(name), 8, bytes_per_element=4)
        assert entry["cache_bytes_per_sequence"] == expected


def decode_records(**ms: float) -> list[dict[str, Any]]:
    models = {"plt": SMALL_SHARED, "big": BIG_VANILLA}
    return [
        {"group": HEADLINE, "model": models[name], "batch": batch, "ms_per_token": time}
        for name, time in ms.items()
        for batch in (4, 16, 32, 64)
    ]


def headline(records: list[dict[str, Any]]) -> Outcome:
    return next(o for o in outcomes(records, []) if o.target is TARGETS[0])


def test_a_target_is_met_only_where_all_it_speaks_of_was_measured() -> None:
    assert headline([]).verdict == "not run"
    met = headline(decode_records(plt=0.7, big=1.0))
    assert met.verdict == "met" and met.values == dict.fromkeys((4, 16, 32, 64), 0.7)
    assert headline(decode_records(plt=0.71, big=1.0)).verdict == "not met"
    assert headline(decode_records(plt=0.7, big=1.0)[:-1]).verdict == "not run"
    one_is_over = decode_records(plt=0.6, big=1.0)
    one_is_over[2]["ms_per_token"] = 0.8
    assert headline(one_is_over).verdict == "not met"


def test_ratios_without_a_target_are_reported() -> None:
    records = [r | {"model": r["model"].replace(", shared routing", "")} for r in
               decode_records(plt=0.9, big=1.0)]  # fmt: skip
    assert outcomes(records, [])[1].verdict == "reported"


def test_runs_of_one_machine_add_up_and_others_begin_anew(result: Result, tmp_path: Path) -> None:
    models = tiny((VANILLA, LOOP2, CLP, PLT2, PLT2_SHARED, PLT3))
    tree = add_run(tmp_path, result, models, SETUP, WHERE | {"command": "first"})
    alone = of(result, VANILLA) | {"batch": 9, "in_turn_with": 0}
    more = Result(2e9, "plain", "wall clock", [alone])
    tree = add_run(tmp_path, more, models, SETUP, WHERE | {"command": "second \udce9"})
    assert len(tree["decode"]) == len(result.decode) + 1 and len(tree["runs"]) == 2
    text = (tmp_path / "decode.md").read_text()
    assert "- Measured alone, not in turn with others: vanilla.\n" in text
    assert r"`second \udce9`" in text and "| PLT-2, shared routing | 3 |" in text
    assert text.count("**not run**") == sum(r["verdict"] == "not run" for r in tree["ratios"])
    other = add_run(tmp_path, more, models, SETUP, WHERE | {"command": "x", "device": "GPU"})
    assert len(other["decode"]) == 1
    assert json.loads((tmp_path / "decode.json").read_text())["where"]["device"] == "GPU"


def test_a_file_of_something_else_is_not_overwritten(result: Result, tmp_path: Path) -> None:
    (tmp_path / "decode.json").write_text('{"plt2": {}}')
    with pytest.raises(DataError, match="is not a file of this benchmark: move it away"):
        add_run(tmp_path, result, tiny((VANILLA,)), SETUP, WHERE | {"command": "x"})


def test_the_command_measures_a_configuration_and_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--batches 1,2 --context 8 --new-tokens 2 --rounds 1 --prefill 0"
    config = CONFIGS / "quickstart_plt2.yaml"

    def run(*arguments: str) -> None:
        command = ["benchmark_decode.py", *arguments, *sizes.split(), "--output", str(tmp_path)]
        monkeypatch.setattr(benchmark_decode.sys, "argv", command)
        benchmark_decode.main()

    run("--compare", "none", "--config", str(config))
    tree = json.loads((tmp_path / "decode.json").read_text())
    assert [(r["model"], r["batch"]) for r in tree["decode"]] == [
        ("quickstart_plt2", 1),
        ("quickstart_plt2", 2),
    ]
    assert tree["where"]["scale"] == "the models of the configurations"
    assert not tree["prefill"] and "context 8, 2 tokens, 1 rounds" in capsys.readouterr().out
    height, width, _ = imread(tmp_path / "decode.png").shape
    assert width > 2 * height
    for arguments, message in {
        ("--compare", "headlines"): "unknown comparison headlines; there are ablation, headline",
        ("--only", "PLT-9"): "--only PLT-9: there are vanilla",
        ("--compare", "none"): "--compare none needs a --config",
        ("--model", "plt2"): "--model plt2: expected NAME=DIR",
        ("--model", "plt2=x", "--fp8"): "--fp8 is for random weights: leave out --model",
        ("--batch", "2"): "--batch is for exported folders: give --model",
    }.items():
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err
