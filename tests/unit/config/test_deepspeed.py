"""DeepSpeed's JSON: the section of the configuration, and over it what other fields decide."""

from pltmoe.config import config_from_dict
from pltmoe.config.deepspeed import merged
from tests.unit.config.trees import run_tree


def test_the_section_adds_and_the_fields_decide():
    zero = {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False}
    section = {"zero_optimization": zero, "steps_per_print": 10}
    config = config_from_dict(run_tree(engine="deepspeed", deepspeed=section))
    text = merged(config, bf16=True, micro_batches=4)
    assert text["zero_optimization"] == zero
    assert text["steps_per_print"] == 10 and text["gradient_accumulation_steps"] == 4
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
