"""Reading a run: files, overrides, and what the user is told when something is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pltmoe.config import (
    config_from_dict,
    config_to_dict,
    load_config,
    model_from_dict,
    write_config,
)
from pltmoe.errors import ConfigError
from tests.configs import DENSE, MOE, run_tree


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree()))
    return path


def message_of(*args, call=load_config) -> str:
    with pytest.raises(ConfigError) as error:
        call(*args)
    return str(error.value)


def test_file_and_overrides(file: Path):
    overrides = [
        "model.num_loops=3",
        "optimizer.lr=3e-4",
        "parallel.expert_parallel_size=2",  # a section that the file does not have
        "data.split=[98, 2, 0]",
        "tracking.tags={team: a}",
        "checkpoint.save_interval=null",
        "model.cross_loop_shift=true",
    ]
    config = load_config(file, overrides)
    assert config.model.num_loops == 3 and config.model.cross_loop_shift is True
    assert config.optimizer.lr == 3e-4, "3e-4 without a dot is a string for YAML"
    assert config.parallel.expert_parallel_size == 2
    assert config.data.split == (98.0, 2.0, 0.0)
    assert config.tracking.tags == {"team": "a"}
    assert config.checkpoint.save_interval is None
    assert load_config(file).model.num_loops == 1


def test_written_configuration_is_complete_and_reads_back_equal(file: Path, tmp_path: Path):
    config = load_config(file, ["data.split=[98,2,0]", "train.eval_interval=5"])
    write_config(config, tmp_path / "all.yaml")
    assert load_config(tmp_path / "all.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config
    assert "window_keys: 64" in (tmp_path / "all.yaml").read_text(), "defaults are spelled out"


def test_a_password_is_not_written_down(file: Path, tmp_path: Path):
    """config.yaml is an artefact of the run, and travels in every checkpoint."""
    config = load_config(file, ["tracking.mlflow_uri=http://me:secret@host:5000"])
    write_config(config, tmp_path / "written.yaml")
    assert "secret" not in (tmp_path / "written.yaml").read_text()
    again = load_config(tmp_path / "written.yaml")
    assert again.tracking.mlflow_uri == "http://***@host:5000"


def test_configuration_is_frozen(file: Path):
    with pytest.raises(ValueError, match="frozen"):
        load_config(file).model.num_loops = 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model__num_loop": 2},
            "model.num_loop: unknown key (value 2); did you mean num_loops?",
        ),
        ({"model__zzz": 1}, "model.zzz: unknown key (value 1)"),
        ({"optimiser__lr": 1}, "optimiser: unknown key (value {'lr': 1}); did you mean optimizer?"),
        ({"model__num_layers": "four"}, "model.num_layers: Input should be a valid integer"),
        ({"model__num_layers": 0}, "model.num_layers: Input should be greater than 0 (got 0)"),
        ({"data__train": None}, "data.train: Input should be a valid list (got None)"),
        ({"data__train": []}, "data.train: List should have at least 1 item"),
        ({"data__train": [{"pth": "x"}]}, "data.train.0.path: required, but missing"),
        (
            {"data__train": [{"path": "a", "wieght": 2}]},
            "data.train.0.wieght: unknown key (value 2); did you mean weight?",
        ),
        ({"optimizer__schedule": "cosin"}, "optimizer.schedule: Input should be 'cosine', 'wsd'"),
        ({"optimizer": {}}, "optimizer.lr: required, but missing"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr: "),  # .nan of YAML: a run of NaN
        ({"optimizer__lr": float("inf")}, "optimizer.lr: "),
        ({"model": None}, "run.yaml: model: "),  # model: with nothing below it
        ({"train__seed": -1}, "train.seed: Input should be "),
        ({"train__seed": 2**32}, "train.seed: Input should be "),  # more than NumPy takes
    ],
)
def test_wrong_keys_and_values_name_the_full_path(changes: dict, expected: str):
    message = message_of(run_tree(**changes), "run.yaml", call=config_from_dict)
    assert message.startswith("run.yaml: ") and expected in message
    assert "zzz" not in message or "did you mean" not in message


@pytest.mark.parametrize("short", ["a/b", ["a/b"], {"path": "a/b"}, Path("a/b")])
def test_a_prefix_is_short_for_a_source(short: Any):
    long = config_from_dict(run_tree(data__train=[{"path": "a/b"}], data__valid=[{"path": "a/b"}]))
    assert config_from_dict(run_tree(data__train=short, data__valid=short)) == long
    blend = config_from_dict(run_tree(data__train=["a", {"path": "b", "weight": 2}])).data.train
    assert [(str(source.path), source.weight) for source in blend] == [("a", 1.0), ("b", 2.0)]


def test_all_problems_are_told_at_once():
    tree = run_tree(model__num_loop=2, optimizer__lr=-1)
    message = message_of(tree, call=config_from_dict)
    assert "model.num_loop" in message and "optimizer.lr" in message


def test_model_section_alone():
    assert model_from_dict(DENSE).is_moe is False
    assert model_from_dict(MOE).is_moe is True
    message = message_of(DENSE | {"num_lops": 1}, call=model_from_dict)
    assert message == "model: num_lops: unknown key (value 1); did you mean num_loops?"
    message = message_of(DENSE | {"head_dim": 5}, call=model_from_dict)
    assert message == "model: model.head_dim (5) must be even: RoPE rotates pairs"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_loops", "override 'model.num_loops': expected section.key=value"),
        ("model..num_loops=1", "override 'model..num_loops=1': expected section.key=value"),
        ("=1", "override '=1': expected section.key=value"),
        ("name.first=x", "override 'name.first=x': name is a value ('small'), not a section"),
        ("model.num_loops=[1", "override 'model.num_loops=[1': value is not valid YAML"),
        ("name=2001-99-99", "override 'name=2001-99-99': value is not valid YAML"),
        ("data.train={path: a, path: b}", "{path: a, path: b}': value is not valid YAML"),
        ("train.output_dir=caf\udce9", r"caf\udce9': value is not UTF-8 text without control"),
        ("steps=20", "steps: unknown key (value 20); did you mean train.steps?"),
        ("model.nm_loops=1", "model.nm_loops: unknown key (value 1); did you mean num_loops?"),
    ],
)
def test_bad_overrides(file: Path, override: str, expected: str):
    assert expected in message_of(file, [override])


def test_unreadable_files(tmp_path: Path):
    assert message_of(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: no such config file"
    assert f"{tmp_path}: cannot be read (Is a directory)" == message_of(tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [1, 2")
    assert message_of(bad).startswith(f"{bad}: not valid YAML: ")
    assert "\n" not in message_of(bad)
    bad.write_text("- just\n- a list\n")
    assert message_of(bad).startswith(f"{bad}: expected a mapping with 'model', 'data'")
    bad.write_bytes(b"name: \xff\xfe\n")
    assert message_of(bad) == f"{bad}: not UTF-8 text (byte 6)"
    bad.write_text("model:\n  num_loops: 2\n  num_loops: 3\n")
    assert "key 'num_loops' is given twice" in message_of(bad) and "line 3" in message_of(bad)
    bad.write_text("? [a]\n: 1\n")
    assert "a key must be a single word" in message_of(bad)
