"""Which changes of the configuration stop a resume, and what the message says."""

from pathlib import Path
from typing import Any

import pytest

from pltmoe.checkpoint import compatible
from pltmoe.checkpoint.compatible import BIAS, GATE, absent_tensors, check_resume, check_weights
from pltmoe.checkpoint.manifest import Manifest
from pltmoe.config.run import DataConfig, TrainConfig
from pltmoe.errors import CheckpointError
from pltmoe.runtime.files import sha256_of
from tests.configs import PLT2
from tests.distributed.tiny import MOE, tiny_config

FOLDER = Path("run/checkpoints/step_00000005")


FP8 = {"train__precision": "fp8"}


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"pieces")
    return path


@pytest.fixture
def check(tokenizer):
    """``check(**changes)`` resumes a run of 10 steps at step 5 with a changed configuration."""

    def resume(
        model: dict[str, Any] | None = None, old: dict | None = None, **changes: Any
    ) -> None:
        path = {"data__tokenizer": str(tokenizer)}
        manifest = Manifest(
            config=tiny_config(**path, **(old or {})),
            step=5,
            train_samples=80,
            consumed_samples=40,
            precision=(old or {}).get("train__precision", "fp32"),
            tokenizer_sha256=sha256_of(tokenizer),
        )
        check_resume(FOLDER, manifest, tiny_config(model, **path, **changes))

    return resume


def test_the_same_configuration_fits(check, caplog):
    check()
    assert not caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"train__log_interval": 3},
        {"train__output_dir": "elsewhere"},
        {"parallel__expert_parallel_size": 2},
        {"checkpoint__keep_last": 5},
        {"tracking__experiment": "other"},
        {"data__num_workers": 2},
        {"data__cache_dir": "cache"},
        {"train__deterministic": True},
        {"train__precision": "fp32"},  # what auto means here
        {"train__fp8_recipe": "blockwise"},  # nothing is in FP8
        {"optimizer__decay_steps": 10},  # what it was anyway
    ],
)
def test_what_does_not_decide_the_result_may_change(check, changes):
    check(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__lr": 2e-2}, "optimizer.lr: checkpoint 0.01, config 0.02"),
        ({"train__seed": 5}, "train.seed: checkpoint 1234, config 5"),
        ({"train__global_batch_size": 16}, "train.global_batch_size: checkpoint 8, config 16"),
        ({"train__micro_batch_size": 1}, "train.micro_batch_size: checkpoint 2, config 1"),
        ({"train__precision": "bf16"}, "train.precision: checkpoint fp32, config bf16"),
        (
            {**FP8, "old": FP8, "train__fp8_recipe": "blockwise"},
            "train.fp8_recipe: checkpoint tensorwise, config blockwise",
        ),
        (
            {**FP8, "old": FP8, "train__fp8_attention": True},
            "train.fp8_attention: checkpoint False, config True",
        ),
        ({"data__sequence_length": 32}, "data.sequence_length: checkpoint 16, config 32"),
        ({"data__reset_position_ids": True}, "data.reset_position_ids: checkpoint False"),
        ({"data__train": [{"path": "b"}]}, "data.train: checkpoint .*'corpus'.*, config .*'b'"),
        ({"model": MOE | {"num_layers": 3}}, "model.num_layers: checkpoint 2, config 3"),
        (
            {"model": MOE | {"moe_loop_routing": "shared"}},
            "model.moe_loop_routing: checkpoint independent, config shared",
        ),
        ({"model": MOE | {"rope_theta": 5.0}}, "model.rope_theta: checkpoint 10000.0, config 5.0"),
    ],
)
def test_what_decides_the_result_is_named_with_both_values(check, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        check(**changes)
    text = str(error.value)
    assert text.startswith(f"{FOLDER} does not fit the configuration: ")
    assert ("checkpoint.accept_changes=[" in text) != ("tensor shapes cannot change" in text)
    assert "or choose another train.output_dir" in text
    assert text.count("config ") == 1, "no other field is named"


def test_no_other_field_of_data_and_training_may_change_unseen():
    """A new one belongs to those that decide the result (compatible.py), or here."""
    decisive = compatible._decisive(tiny_config(data__tokenizer=__file__), None)
    data = {name for name in DataConfig.model_fields if f"data.{name}" not in decisive}
    assert data == {"valid", "cache_dir", "num_workers"}
    train = {name for name in TrainConfig.model_fields if f"train.{name}" not in decisive}
    assert train == {
        "output_dir",
        "steps",  # as optimizer.decay_steps
        "transformer_impl",
        "gradient_accumulation_fusion",
        "deterministic",
        "log_interval",
        "eval_interval",
        "eval_steps",
        "max_skipped_in_a_row",
        "hang_timeout_minutes",
    }


def test_all_differences_are_named_at_once(check):
    with pytest.raises(CheckpointError, match="optimizer.lr: .*; train.seed: ") as error:
        check(optimizer__lr=2e-2, train__seed=5)
    command = "accept them with 'checkpoint.accept_changes=[optimizer.lr,train.seed]', or"
    assert command in str(error.value)
    with pytest.raises(CheckpointError, match="train.seed: .* accept them with ") as error:
        accept = {"checkpoint__accept_changes": ["optimizer.lr"]}
        check(optimizer__lr=2e-2, train__seed=5, **accept)
    assert command in str(error.value), "those that were accepted before, too: a list replaces one"


def test_another_tokenizer_of_the_same_name(tokenizer):
    with pytest.raises(
        CheckpointError, match="data.tokenizer: checkpoint sha256 .*, config sha256"
    ):
        manifest = Manifest(
            config=tiny_config(), step=5, train_samples=80, tokenizer_sha256="0" * 64
        )
        check_resume(FOLDER, manifest, tiny_config(data__tokenizer=str(tokenizer)))


def test_other_text_behind_the_same_path(tokenizer, caplog):
    manifest = Manifest(
        config=tiny_config(data__tokenizer=str(tokenizer)),
        step=5,
        train_samples=80,
        tokenizer_sha256=sha256_of(tokenizer),
        data={"corpus": "1" * 64, "gone": "3" * 64},
    )

    def resume(now, **changes):
        config = tiny_config(data__tokenizer=str(tokenizer), **changes)
        check_resume(FOLDER, manifest, config, now)

    resume({"corpus": "1" * 64})
    resume({})  # nothing is known of it: an older checkpoint, or another path
    with pytest.raises(CheckpointError) as error:
        resume({"corpus": "2" * 64})
    assert "data.contents: corpus (.bin, .idx) is not the text that the checkpoint" in str(
        error.value
    )
    resume({"corpus": "2" * 64}, checkpoint__accept_changes=["data.contents"])
    assert "accepted change: data.contents" in caplog.text


def test_a_longer_run_is_another_schedule_unless_its_end_is_kept(check, caplog):
    with pytest.raises(CheckpointError) as error:
        check(train__steps=20)
    assert (
        "optimizer.decay_steps: checkpoint 10, config 20 (train.steps when not set; "
        "optimizer.decay_steps=10 keeps the learning-rate schedule)" in str(error.value)
    )
    linear = {"optimizer__schedule": "linear"}
    with pytest.raises(CheckpointError, match="decay_steps: checkpoint 10, config 20"):
        check(train__steps=20, old=linear, **linear)
    check(train__steps=12, optimizer__decay_steps=10)
    assert "planned for 80 sequences and is longer now" in caplog.text
    check(
        train__steps=20,
        optimizer__schedule="constant",
        old={"optimizer__schedule": "constant"},
    )
    check(train__steps=7, optimizer__decay_steps=10)


def test_accepted_changes_pass_but_shapes_never(check, caplog):
    accept = {"checkpoint__accept_changes": ["optimizer.lr", "model.num_layers"]}
    check(optimizer__lr=2e-2, **accept)
    assert "accepted change: optimizer.lr: checkpoint 0.01, config 0.02" in caplog.text
    assert "drawn anew" not in caplog.text
    check(train__seed=5, checkpoint__accept_changes=["train.seed"])
    assert "the order of the data is drawn anew (train.seed)" in caplog.text
    with pytest.raises(CheckpointError, match="model.num_layers: checkpoint 2, config 3"):
        check(model=MOE | {"num_layers": 3}, **accept)


def test_weights_alone_are_not_resumed_and_steps_do_not_go_back(tokenizer):
    config = tiny_config(data__tokenizer=str(tokenizer))
    with pytest.raises(CheckpointError, match="weights only .* checkpoint.load_weights=run/check"):
        check_resume(FOLDER, Manifest(config=config, contains=("model",)), config)
    with pytest.raises(CheckpointError, match=r"is at step 11, past train.steps \(10\): raise"):
        check_resume(FOLDER, Manifest(config=config, step=11), config)
    trained = {"precision": "fp32", "tokenizer_sha256": sha256_of(tokenizer)}
    check_resume(FOLDER, Manifest(config=config, step=10, **trained), config)  # is done: no error


def test_weights_need_the_same_shapes_only():
    manifest = Manifest(config=tiny_config(), step=5)
    other = MOE | {"moe_aux_loss_coeff": 0.5, "num_loops": 3, "rope_theta": 5.0}
    check_weights(FOLDER, manifest, tiny_config(other, optimizer__lr=2e-2))
    with pytest.raises(CheckpointError) as error:
        check_weights(FOLDER, manifest, tiny_config(MOE | {"vocab_size": 65}))
    assert str(error.value) == (
        f"the weights in {FOLDER} do not fit the configuration: "
        "model.vocab_size: checkpoint 64, config 65"
    )


def test_weights_do_not_lose_expert_biases_unnoticed():
    without = MOE | {"moe_expert_bias_update_rate": 0.0}
    path = "model.moe_expert_bias_update_rate"
    before = Manifest(config=tiny_config(without), step=5)
    check_weights(FOLDER, before, tiny_config())
    assert absent_tensors(before, tiny_config()) == (BIAS,)
    with pytest.raises(CheckpointError, match="chooses its experts with biases .*: set the same"):
        check_weights(FOLDER, Manifest(config=tiny_config(), step=5), tiny_config(without))
    accepts = tiny_config(without, checkpoint__accept_changes=[path])
    check_weights(FOLDER, Manifest(config=tiny_config(), step=5), accepts)


def test_gates_are_not_lost_but_may_be_new():
    vanilla = {name: value for name, value in MOE.items() if name not in PLT2}
    hidden = tiny_config(MOE | {"gate_use_hidden_states": True})
    for config in (tiny_config(), hidden):
        manifest = Manifest(config=tiny_config(vanilla), step=5)
        check_weights(FOLDER, manifest, config)
        assert absent_tensors(manifest, config) == (GATE,)
        with pytest.raises(CheckpointError, match="model.gated_swa: checkpoint True, config False"):
            check_weights(FOLDER, Manifest(config=config, step=5), tiny_config(vanilla))
    with pytest.raises(CheckpointError, match="model.gate_use_hidden_states: checkpoint False"):
        check_weights(FOLDER, Manifest(config=tiny_config(), step=5), hidden)
    with pytest.raises(CheckpointError, match="model.num_layers: checkpoint 2, config 3"):
        check_weights(FOLDER, manifest, tiny_config(MOE | {"num_layers": 3}))


def test_weights_are_not_used_with_another_tokenizer_unnoticed(tokenizer):
    config = tiny_config(data__tokenizer=str(tokenizer))
    same, other = (Manifest(config=config, tokenizer_sha256=it) for it in
                   (sha256_of(tokenizer), "0" * 64))  # fmt: skip
    check_weights(FOLDER, same, config)
    with pytest.raises(CheckpointError, match="was trained with another tokenizer than data.token"):
        check_weights(FOLDER, other, config)
    accepts = {"checkpoint__accept_changes": ["data.tokenizer"]}
    check_weights(FOLDER, other, tiny_config(data__tokenizer=str(tokenizer), **accepts))
