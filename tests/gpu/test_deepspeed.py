"""DeepSpeed's engine on a GPU: fused AdamW, the optimizer in host memory, ZeRO 3, bf16."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.deepspeed_cases import curve

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed installed")

OFFLOAD = {"deepspeed__zero_optimization__offload_optimizer": {"device": "cpu"}}
# fp32 sums run in another order each time; bf16 keeps three digits of each weight.
CLOSE = {"fp32": 1e-4, "bf16": 0.01}


@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize(("stage", "more"), [(1, {}), (2, {}), (2, OFFLOAD), (3, {})], ids=str)
def test_it_learns_as_the_megatron_engine_and_goes_on_from_a_checkpoint(
    stage: int, more: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    run = {"train__precision": precision, "optimizer__lr": 1e-3}
    expected = curve(None, 6, **run)
    straight = curve(stage, 6, **run, **more)
    assert straight["losses"] == pytest.approx(expected["losses"], rel=CLOSE[precision])
    curve(stage, 3, save_to=tmp_path, **run, **more)
    resumed = curve(stage, 3, load_from=tmp_path, **run, **more)
    assert resumed["losses"] == pytest.approx(straight["losses"][3:], rel=CLOSE[precision])
    assert resumed["rates"] == straight["rates"][3:]
