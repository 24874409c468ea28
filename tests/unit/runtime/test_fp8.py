"""The table of FP8 against Transformer Engine's own checks and attention selector.

They are pure Python up to the last question, which goes to cuDNN and needs a GPU: here it is
answered with yes. So what only cuDNN refuses (heads other than 128 on Hopper) is not compared.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pltmoe.runtime import fp8
from pltmoe.runtime.fp8 import Machine, attention_precision, why_recipe_cannot_run

ANSWERS = Path(__file__).with_name("fp8_attention_of_te_2.20.2.txt")
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0))
CUDNN = ((9, 7, 0), (9, 13, 0), (9, 14, 0), (9, 18, 0), (9, 19, 0), (9, 21, 0), (9, 23, 1),
         (9, 26, 0))  # fmt: skip
H200 = Machine((9, 0), (9, 19, 0), (13, 0))
B200 = Machine((10, 0), (9, 21, 0), (13, 0))


def branch(recipe: str, machine: Machine, window: bool, **options: Any) -> fp8.Branch:
    options = {"head_dim": 128, **options}
    return attention_precision(recipe, machine, window=window, **options)


def test_on_hopper_only_the_whole_past_with_delayed_scaling_is_fp8() -> None:
    assert str(branch("delayed", H200, False)) == "fp8 (cuDNN 9.19.0, recipe delayed)"
    assert "no cuDNN has a sliding window in FP8" in str(branch("delayed", H200, True))
    assert "heads of 128, not 64" in str(branch("delayed", H200, False, head_dim=64))
    for recipe in ("tensorwise", "blockwise"):
        assert {branch(recipe, H200, w).precision for w in (False, True)} == {"bf16"}


def test_on_blackwell_both_branches_are_fp8_with_a_new_cudnn() -> None:
    for recipe in ("delayed", "tensorwise", "mxfp8"):
        assert {branch(recipe, B200, w).precision for w in (False, True)} == {"fp8"}
    older = Machine((10, 0), (9, 19, 0), (13, 0))
    assert branch("tensorwise", older, False).precision == "fp8"
    assert "needs cuDNN 9.21, not 9.19.0" in branch("tensorwise", older, True).reason


@pytest.mark.parametrize(
    ("recipe", "machine", "message"),
    [
        ("delayed", Machine((8, 0), (9, 19, 0), (13, 0)), "needs compute capability 8.9 or newer"),
        ("blockwise", B200, "is for compute capability 9.x .Hopper.; this is 10.0: use mxfp8"),
        ("blockwise", Machine((9, 0), (9, 19, 0), (12, 6)), "needs CUDA 12.9 or newer; this is 12"),
        ("mxfp8", H200, "is for compute capability 10.x and 11.x .Blackwell.; this is 9.0"),
    ],
)
def test_recipes_that_cannot_run_say_why(recipe: str, machine: Machine, message: str) -> None:
    found = why_recipe_cannot_run(recipe, machine)  # type: ignore[arg-type]
    assert found is not None and re.search(message, found)


@pytest.fixture
def te_recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    from transformer_engine.common import recipe

    made = {
        "delayed": recipe.DelayedScaling(fp8_dpa=True),
        "tensorwise": recipe.Float8CurrentScaling(fp8_dpa=True),
        "blockwise": recipe.Float8BlockScaling(),
        "mxfp8": recipe.MXFP8BlockScaling(fp8_dpa=True),
    }
    made["blockwise"].fp8_dpa = True  # refused when it is made: then nobody can ask for it
    return made.__getitem__


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_where_transformer_engine_runs_them(
    recipe: str, te_recipe: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for blockwise on Blackwell, which Transformer Engine emulates: mxfp8 is the recipe."""
    from transformer_engine.pytorch import quantization

    checks = {
        "blockwise": quantization._compute_fp8_block_scaling_support,
        "mxfp8": quantization._compute_mxfp8_support,
    }
    check = checks.get(recipe, quantization._compute_fp8_support)
    for capability in CAPABILITIES:
        monkeypatch.setattr(quantization, "get_device_compute_capability", lambda c=capability: c)
        for cuda in ((12, 8), (13, 0)):
            monkeypatch.setattr(torch.version, "cuda", ".".join(map(str, cuda)))
            ours = why_recipe_cannot_run(recipe, Machine(capability, (9, 19, 0), cuda))  # type: ignore[arg-type]
            if recipe == "blockwise" and capability >= (10, 0):
                assert ours is not None
            else:
                assert (ours is None) == check()[0], (capability, cuda)


Case = tuple[str, bool, fp8.Version, fp8.Version, bool]
CASES: list[Case] = [
    (recipe, window, capability, cudnn, deterministic)
    for recipe in RECIPES
    for window in (False, True)
    for capability in CAPABILITIES
    if capability >= (9, 0)  # below, cuDNN refuses
    for cudnn in CUDNN
    for deterministic in (False, True)
]


def named(case: Case) -> str:
    recipe, window, capability, cudnn, deterministic = case
    versions = (".".join(map(str, version)) for version in (capability, cudnn))
    words = [recipe, "window" if window else "global", *versions]
    return " ".join(words + ["deterministic"] * deterministic)


def test_attention_runs_in_fp8_where_transformer_engine_has_selected_it() -> None:
    """Its answers as it gave them; the next test asks it again where it is installed."""
    answers = set(ANSWERS.read_text().splitlines())
    assert len(answers) > 100 and answers < set(map(named, CASES))
    for case in CASES:
        recipe, window, capability, cudnn, deterministic = case
        machine = Machine(capability, cudnn, (13, 0))
        ours = branch(recipe, machine, window, deterministic=deterministic)
        assert (ours.precision == "fp8") == (named(case) in answers), (case, ours.reason)


def test_transformer_engine_still_answers_so(
    te_recipe: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``RECORD=1`` writes the answers down."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    yes = utils.FusedAttnBackend.FP8.value
    monkeypatch.setattr(utils, "_get_fused_attn_backend", lambda **arguments: (yes, ""))
    answers = []
    for case in CASES:
        recipe, window, capability, cudnn, deterministic = case
        monkeypatch.setattr(utils, "get_device_compute_capability", lambda c=capability: c)
        monkeypatch.setattr(utils, "get_cudnn_version", lambda v=cudnn: v)
        selected = utils.get_attention_backend(
            utils.AttentionParams(
                qkv_layout="sbhd_sbhd_sbhd", batch_size=2, num_heads=16, num_gqa_groups=4,
                max_seqlen_q=4096, max_seqlen_kv=4096, head_dim_qk=128, head_dim_v=128,
                attn_mask_type="causal", window_size=(63, 0) if window else (-1, 0),
                deterministic=deterministic, is_training=True, fp8=True,
                fp8_meta={"recipe": te_recipe(recipe)},
            )
        )  # fmt: skip
        answers += [named(case)] if selected[2] else []
    text = "\n".join(answers) + "\n"
    if os.environ.get("RECORD"):
        ANSWERS.write_text(text)
    assert ANSWERS.read_text() == text
