"""DeepSpeed's JSON: the section of the configuration, and over it what other fields decide."""

import re

import pytest

from pltmoe.config import config_from_dict
from pltmoe.config.deepspeed import merged
from pltmoe.errors import ConfigError
from tests.configs import run_tree


def test_the_section_adds_and_the_fields_decide():
    zero = {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False}
    section = {"zero_optimization": zero, "memory_breakdown": True}
    config = config_from_dict(run_tree(engine="deepspeed", deepspeed=section))
    text = merged(config, bf16=True, micro_batches=4)
    assert text["zero_optimization"] == zero
    assert text["memory_breakdown"] is True and text["gradient_accumulation_steps"] == 4
    assert text["gradient_clipping"] == 1.0 and text["bf16"] == {"enabled": True}


def test_stage_0_never_clips_by_deepspeeds_norm():
    """Also where the section says again what the configuration says: the engine clips."""
    section = {"zero_optimization": {"stage": 0}, "gradient_clipping": 1.0}
    config = config_from_dict(run_tree(engine="deepspeed", deepspeed=section))
    assert merged(config, bf16=False, micro_batches=1)["gradient_clipping"] == 0.0


def test_each_run_swaps_to_a_folder_of_its_own_and_finds_it_again():
    nvme = {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 6}
    section = {"zero_optimization": {"stage": 3, "offload_optimizer": nvme}}
    folders = []
    for output in ("runs/a", "runs/a", "runs/b"):
        tree = run_tree(engine="deepspeed", deepspeed=section, train__output_dir=output)
        text = merged(config_from_dict(tree), bf16=True, micro_batches=1)
        offload = text["zero_optimization"]["offload_optimizer"]
        assert offload["device"] == "nvme" and offload["buffer_count"] == 6
        folders.append(offload["nvme_path"])
    assert folders[0] == folders[1] != folders[2]
    assert all(folder.startswith("/nvme/pltmoe_") for folder in folders)


def zero(stage: int, **more):
    return {"zero_optimization": {"stage": stage, **more}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            zero(0, reduce_bucket_size=7),
            "at deepspeed.zero_optimization.stage 0: it is for stage 1",
        ),
        (zero(3, allgather_bucket_size=7), "stage 3: it is for stage 1 or 2"),
        (zero(3, use_multi_rank_bucket_allreduce=True), "stage 3: it is for stage 1 or 2"),
        (zero(2, sub_group_size=7), "stage 2: it is for stage 3"),
        (zero(1, stage3_prefetch_bucket_size=7), "stage 1: it is for stage 3"),
        (zero(1, reduce_bucket_size=7), "unless train.precision is fp32 (it is auto): remove it"),
        (
            zero(3, offload_optimizer={"device": "cpu", "buffer_count": 5}),
            "it is for deepspeed.zero_optimization.offload_optimizer.device nvme (it is cpu)",
        ),
        ({"aio": {"queue_depth": 8}}, "offload_optimizer.device nvme (it is None)"),
        (
            zero(2, offload_optimizer={"pin_memory": True}),
            "deepspeed.zero_optimization.offload_optimizer has no device",
        ),
    ],
)
def test_what_deepspeed_would_ignore_is_refused(section, message):
    with pytest.raises(ConfigError, match="would be ignored.*" + re.escape(message)):
        config_from_dict(run_tree(engine="deepspeed", deepspeed=section))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"steps_per_print": 5}, "steps_per_print is decided by train.log_interval here"),
        (
            zero(3, param_persistence_threshold=0),
            "did you mean deepspeed.zero_optimization.stage3_param_persistence_threshold?",
        ),
    ],
)
def test_other_words_for_the_same_are_refused(section, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_dict(run_tree(engine="deepspeed", deepspeed=section))
