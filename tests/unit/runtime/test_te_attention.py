"""What the start-up block says about attention, by Transformer Engine's own selector."""

from typing import Any

import pytest

from pltmoe.errors import EngineError
from pltmoe.runtime import te_attention

SIZES: dict[str, Any] = {"slots": 4096, "batch": 2, "heads": 16, "kv_heads": 4, "head_dim": 128}


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The selector on an H200; what cuDNN would answer is for the tests to say."""
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    monkeypatch.setattr(utils, "get_device_compute_capability", lambda: (9, 0))
    monkeypatch.setattr(utils, "get_cudnn_version", lambda: (9, 19, 0))
    return utils


@pytest.mark.parametrize("window", [None, 64])
def test_both_branches_are_cudnns_on_hopper(window: Any, utils: Any, monkeypatch: Any) -> None:
    yes = utils.FusedAttnBackend.F16_arbitrary_seqlen.value
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        utils, "_get_fused_attn_backend", lambda **how: asked.append(how) or (yes, "")
    )
    found = str(te_attention.selected(**SIZES, window_keys=window))
    assert found.startswith("TE (cuDNN: ")
    assert ("a window of 64 keys" in found) == (window == 64)
    assert asked[-1]["window_size_left"] == (-1 if window is None else 63)


def test_scores_of_all_slots_are_named(utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    no = utils.FusedAttnBackend.No_Backend.value
    monkeypatch.setattr(utils, "_get_fused_attn_backend", lambda **how: (no, "not today"))
    found = str(te_attention.selected(**SIZES, window_keys=None))
    assert "unfused, all s x s scores" in found or "FlashAttention" in found


def test_no_kernel_at_all_is_an_error(utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        utils, "get_attention_backend", lambda params: (False, None, False, None, False, [])
    )
    with pytest.raises(EngineError, match="no attention for a window of 64 keys, heads of 128"):
        te_attention.selected(**SIZES, window_keys=64)
