"""What is decided before a model is built: FP8, and in which attention branch."""

from typing import Any

import pytest
import torch

from pltmoe.config import RunConfig, config_from_dict
from pltmoe.engines.backends import backends, choose_fp8, weight_gradients
from pltmoe.errors import ConfigError
from pltmoe.model.megatron_config import Fp8, transformer_config
from pltmoe.parallel.layout import layout_for
from pltmoe.parallel.pipeline import build_stage
from pltmoe.plan.planner import make_plan
from pltmoe.runtime import devices, te_attention
from pltmoe.runtime.devices import Backend
from pltmoe.runtime.fp8 import Machine
from tests.configs import DENSE, LOOP_ROWS, MOE, run_tree

H200, B200 = Machine((9, 0), (9, 19, 0), (13, 0)), Machine((10, 0), (9, 21, 0), (13, 0))
TE = Backend("TE", "Transformer Engine is installed")


def config(row: str = "5 plt2", **train: Any) -> RunConfig:
    sizes = {"hidden_size": 32, "head_dim": 128, "moe_ffn_hidden_size": 32}
    tree = run_tree() | {"model": MOE | LOOP_ROWS[row] | sizes}
    tree["train"] |= {"precision": "fp8"} | train
    return config_from_dict(tree)


def test_on_hopper_the_local_branch_is_bf16() -> None:
    found, branches = choose_fp8(config(fp8_recipe="delayed", fp8_attention=True), TE, H200)
    assert found == Fp8("delayed", global_attention=True, local_attention=False)
    assert str(branches["global attention"]).startswith("fp8 (cuDNN 9.19.0")
    assert "sliding window" in str(branches["local attention"])
    found, _ = choose_fp8(config(fp8_recipe="mxfp8", fp8_attention=True), TE, B200)
    assert found == Fp8("mxfp8", global_attention=True, local_attention=True)


def test_attention_stays_bf16_unless_asked_for() -> None:
    found, branches = choose_fp8(config(fp8_recipe="delayed"), TE, H200)
    assert found == Fp8("delayed")
    assert {str(b) for b in branches.values()} == {"bf16 (train.fp8_attention is false)"}
    _, branches = choose_fp8(config("1 vanilla"), TE, H200)
    assert set(branches) == {"global attention"}
    assert choose_fp8(config(precision="bf16"), TE, H200) == (None, {})


def test_what_the_machine_cannot_do_is_refused() -> None:
    none = Backend("torch", "Transformer Engine is not installed")
    for impl, machine in ((none, H200), (none, None)):
        with pytest.raises(ConfigError, match="needs Transformer Engine on an NVIDIA GPU: Trans"):
            choose_fp8(config(), impl, machine)
    with pytest.raises(ConfigError, match="train.fp8_recipe: recipe mxfp8 is for compute"):
        choose_fp8(config(fp8_recipe="mxfp8"), TE, H200)


def test_fused_weight_gradients_need_transformer_engine_or_apex(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused, bf16 = config(precision="bf16", gradient_accumulation_fusion=True), torch.bfloat16
    none = Backend("torch", "there is no GPU")
    assert weight_gradients(fused, TE, bf16).choice == "TE"
    assert str(weight_gradients(config(), none, bf16)) == (
        "torch (train.gradient_accumulation_fusion is false)"
    )
    with pytest.raises(
        ConfigError,
        match=r"needs Transformer Engine's layers \(there is no GPU\) or NVIDIA Apex's product "
        r"\(NVIDIA Apex is not installed with its CUDA kernels\): set it to false",
    ):
        weight_gradients(fused, none, bf16)
    monkeypatch.setattr(devices, "why_no_apex_products", lambda dtype: None)
    assert str(weight_gradients(fused, none, bf16)) == (
        "Apex (inside the products of attention and head; grouped experts: torch)"
    )
    tree = run_tree() | {"model": DENSE}
    tree["train"] |= {"gradient_accumulation_fusion": True}
    assert str(weight_gradients(config_from_dict(tree), none, bf16)) == (
        "Apex (inside the products of attention, dense layers and head)"
    )


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_run_takes_megatrons_repeatable_paths(
    deterministic: bool, groups: Any
) -> None:
    """The embedding has another backward pass then; Transformer Engine's attention checks it."""
    run = config(precision="fp32", deterministic=deterministic)
    stage = build_stage(run, layout_for(run, 1), groups, torch.float32, torch.device("cpu"))
    assert stage.config.deterministic_mode is deterministic
    assert stage.embedding.word_embeddings.deterministic_mode is deterministic


def test_start_up_names_what_transformer_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(precision="bf16", micro_batch_size=4)
    made = transformer_config(run.model)
    made.transformer_impl = "transformer_engine"  # asked for at once it needs the library
    asked = []
    monkeypatch.setattr(
        te_attention, "selected", lambda **how: asked.append(how) or Backend("TE", "cuDNN")
    )
    found = backends(run, made, TE)
    assert {backend.choice for backend in found.values()} == {"TE"}
    assert {"global attention kernel", "local attention kernel", "norm", "linear layers",
            "experts", "router"} == set(found)  # fmt: skip
    assert "softmax and top-k in one kernel" in str(found["router"])
    assert [how["window_keys"] for how in asked] == [None, run.model.window_keys]
    assert {(how["slots"], how["batch"], how["head_dim"]) for how in asked} == {(32, 4, 128)}
    biased = run.model.model_copy(update={"moe_expert_bias_update_rate": 1e-3})
    found = backends(run.model_copy(update={"model": biased}), made, TE)
    assert "TE's kernel ignores an expert bias" in str(found["router"])


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_megatron_is_told_the_recipe(recipe: Any) -> None:
    """With Transformer Engine, also what Megatron makes of it."""
    # A dense one: with experts Megatron takes no FP8 where Transformer Engine is not installed.
    model = config_from_dict(run_tree() | {"model": DENSE}).model
    made = transformer_config(model, fp8=Fp8(recipe, global_attention=recipe != "blockwise"))
    assert made.fp8_recipe == recipe and made.fp8 in ("hybrid", "e4m3")
    assert (made.fp8_amax_history_len, made.fp8_amax_compute_algo) == (1024, "max")
    assert made.local_attention_in_fp8 is False
    assert transformer_config(model).fp8 is None
    pytest.importorskip("transformer_engine.pytorch", reason="the rest needs Transformer Engine")
    from megatron.core.fp8_utils import get_fp8_recipe

    theirs = get_fp8_recipe(made)
    question = {"tensorwise": "float8_current_scaling", "blockwise": "float8_block_scaling"}
    assert getattr(theirs, question.get(recipe, recipe))()
    assert theirs.fp8_dpa == (recipe != "blockwise")


def test_the_planner_counts_fp8_copies_of_weights() -> None:
    """One of each weight, and its transpose."""
    found = {}
    for precision in ("bf16", "fp8"):
        stage = make_plan(config(precision=precision), 1).stages[0]
        found[precision] = stage.weights.parameters
    assert found["fp8"] == 2 * found["bf16"]
