"""Where a run starts, which parts of a checkpoint it asks for, and what its folder then says."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pltmoe.checkpoint.manifest import Manifest
from pltmoe.errors import CheckpointError, DataError, EngineError
from pltmoe.train import pretrain
from tests.distributed.tiny import tiny_config

FP8 = {"model__hidden_size": 64, "model__head_dim": 16, "model__moe_ffn_hidden_size": 32,
       "train__precision": "fp8"}  # fmt: skip
ALL = ("model", "optimizer", "random", "guard", "fp8_scales")


@pytest.mark.parametrize(
    ("recipe", "contains", "processes", "tensor_parallel", "asked", "warned"),
    [
        ("delayed", ALL, 2, 1, ALL, False),
        ("delayed", ALL[:-1], 2, 1, ALL[:-1], True),
        ("delayed", ALL, 2, 2, ALL[:-1], True),
        ("delayed", ALL, 4, 1, ("model", "optimizer", "guard"), True),
        ("tensorwise", ALL, 2, 1, ALL[:-1], False),
    ],
)
def test_scales_of_fp8_come_back_in_the_same_layout(
    recipe: str, contains: Any, processes: int, tensor_parallel: int, asked: Any, warned: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = tiny_config(**FP8, train__fp8_recipe=recipe)
    manifest = Manifest(config=config, step=3, world_size=2, contains=contains)
    config = tiny_config(
        **FP8, train__fp8_recipe=recipe, parallel__tensor_parallel_size=tensor_parallel
    )
    found: dict[str, Any] = {}
    engine = SimpleNamespace(
        placeholders=lambda *parts, absent: found.setdefault("asked", parts),
        restore=lambda loaded, step: found.update(step=step),
    )
    monkeypatch.setattr(pretrain.store, "load_state", lambda folder, wanted: wanted)
    start = pretrain.Start({}, Path("run/checkpoints/step_3"), manifest)
    with caplog.at_level(logging.WARNING):
        said = pretrain._load(config, engine, SimpleNamespace(world_size=processes), start)
    assert said == "resumed from run/checkpoints/step_3 (step 3)" and found["step"] == 3
    assert found["asked"] == asked
    message = f"FP8 scales begin anew: {start.folder} has none for this layout"
    assert (message in caplog.text) == warned


def test_a_part_that_nothing_takes_up_is_refused() -> None:
    """Such as a moving average that ``Engine.state`` writes and ``placeholders`` forgets."""
    config = tiny_config()
    manifest = Manifest(config=config, step=3, contains=("model", "optimizer", "ema"))
    engine = SimpleNamespace(placeholders=lambda *parts, absent: {"model": {}, "optimizer": {}})
    start = pretrain.Start({}, Path("run/checkpoints/step_3"), manifest)
    with pytest.raises(CheckpointError, match="step_3 holds ema, with which this code does not"):
        pretrain._load(config, engine, SimpleNamespace(world_size=1), start)


def test_what_another_engine_was_told_does_not_stay_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.json").write_text("{}")
    config = tiny_config(train__output_dir=tmp_path)
    engine = SimpleNamespace(capabilities=SimpleNamespace(layout="DP1", precision="fp32", files={}))
    start = pretrain.Start({})
    pretrain._start_tracker(config, engine, start, start.consumed(config)).finish("FINISHED")
    assert (tmp_path / "config.yaml").is_file() and not (tmp_path / "deepspeed.json").exists()


def test_a_notebook_without_a_gpu_is_told_what_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pretrain.cpu, "is_standing_in", lambda: False)
    with pytest.raises(EngineError, match=r"no GPU here: call stand_in_for_cuda\(\) of pltmoe"):
        pretrain.pretrain(tiny_config())


def test_a_torch_that_cannot_read_its_checkpoints_ends_the_run_before_anything_is_touched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    half_written = tmp_path / "checkpoints" / ".writing_step_00000002"
    half_written.mkdir(parents=True)

    def refuse() -> None:
        raise CheckpointError("torch 2.15.0 is too new")

    monkeypatch.setattr(pretrain.distributed, "on_main", lambda call: call())
    monkeypatch.setattr(pretrain.store, "check_torch", refuse)
    with pytest.raises(CheckpointError, match="torch 2.15.0 is too new"):
        pretrain._find_start(tiny_config(train__output_dir=tmp_path))
    assert half_written.exists()


def test_a_tokenizer_that_is_gone_is_told_before_a_checkpoint_is_compared_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny_config(train__output_dir=tmp_path, data__tokenizer=tmp_path / "gone.model")
    monkeypatch.setattr(pretrain.distributed, "on_main", lambda call: call())
    monkeypatch.setattr(pretrain, "fingerprints_of", lambda sources: {})
    newest = (tmp_path, Manifest(config=config, step=3))
    monkeypatch.setattr(pretrain, "newest_intact", lambda *_: newest)
    with pytest.raises(DataError, match=r"gone\.model: no such tokenizer"):
        pretrain._find_start(config)
