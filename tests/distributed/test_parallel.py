"""Every layout computes what one process computes, in float64: gradients, and whole runs."""

import pytest

from tests.distributed.layouts import MODELS, TESTED, TRAINED, changes_for, parallel_section

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
CASES = "tests.distributed.parallel_cases"
TOLERANCE = 1e-12
"""Relative to a parameter's largest gradient: float64 sums in another order leave about 1e-14."""

TRAINED_TOLERANCE = 1e-9
"""The same of weights: Adam raises small gradients to full size, and what is in their last digits.
Measured 1e-11 after twenty steps, of the bias of a gate."""


@pytest.fixture(scope="module")
def serial(warm_ranks, tmp_path_factory):
    """Loss, and a file of gradients, of one process; each global batch is computed once."""
    folder, known = tmp_path_factory.mktemp("serial"), {}

    def compute(model: str, sequences: int):
        if (model, sequences) not in known:
            path = folder / f"{len(known)}.pt"
            loss = warm_ranks(
                1,
                f"{CASES}:save_gradients",
                path=path,
                model=MODELS[model],
                train__global_batch_size=sequences,
                train__micro_batch_size=2,
            )[0]
            known[model, sequences] = loss, path
        return known[model, sequences]

    return compute


@pytest.mark.parametrize(
    ("processes", "layout", "model", "micro_batches"),
    sorted(TESTED, key=lambda case: case[0]),
    ids=lambda value: str(value).replace(" ", ""),
)
def test_layout_equals_one_process(serial, warm_ranks, processes, layout, model, micro_batches):
    changes = changes_for(processes, layout, micro_batches)
    loss, path = serial(model, changes["train__global_batch_size"])
    reports = warm_ranks(
        processes, f"{CASES}:compare_gradients", path=path, model=MODELS[model], **changes
    )
    seen = set()
    for report in reports:
        assert report["loss"] == pytest.approx(loss, rel=1e-13)
        worst = max(report["errors"], key=report["errors"].get)
        assert report["errors"][worst] < TOLERANCE, (worst, report["errors"][worst])
        seen |= report["errors"].keys()
        assert report["did"] == report["planned"]
        assert report["lent"] == report["may_lend"]
    assert len(seen) > 40  # all parameters of the model, over all ranks
    assert "embedding.word_embeddings.weight" in seen and "final_norm.weight" in seen


@pytest.fixture(scope="module")
def curve(warm_ranks, tmp_path_factory):
    """What one process reports in twenty steps, and a file of its weights; once per model."""
    folder, known = tmp_path_factory.mktemp("curve"), {}

    def train(model: str):
        if model not in known:
            path = folder / f"{len(known)}.pt"
            known[model] = train_on(warm_ranks, 1, "DP1", model, path)[0], path
        return known[model]

    return train


@pytest.mark.parametrize(("processes", "layout", "model"), TRAINED, ids=str)
def test_twenty_steps_equal_one_process(curve, warm_ranks, processes, layout, model):
    """Losses, gradient norms, each metric of each step; at the end weights and expert biases."""
    one, path = curve(model)
    seen = set()
    for report in train_on(warm_ranks, processes, layout, model, path):
        assert report["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
        assert report["valid"] == pytest.approx(one["valid"], rel=TOLERANCE)
        assert report["rates"] == one["rates"]
        # Megatron's norm, and the layers' statistics, are float32.
        assert report["norms"] == pytest.approx(one["norms"], rel=1e-6)
        for got, expected in zip(report["metrics"], one["metrics"], strict=True):
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
        worst = max(report["errors"], key=report["errors"].get)
        assert report["errors"][worst] < TRAINED_TOLERANCE, (worst, report["errors"][worst])
        seen |= report["errors"].keys()
    assert one["losses"][-1] < one["losses"][0] - 0.2, "nothing was learnt"
    assert len(seen) > 40 and len(one["metrics"]) == len(one["losses"]) == 20
    assert any("expert_bias" in name for name in seen) or "dense" in model
    # The loop diagnostics are among the metrics compared, with real numbers in them.
    sizes = [step["plt/update_size/loop_2"] for step in one["metrics"]]
    distances = [step["plt/slot_distance/loop_1"] for step in one["metrics"]]
    assert min(sizes) > 0.1 and min(distances) > 0.1 and len(set(sizes)) == 20


def train_on(warm_ranks, processes, layout, model, path):
    changes = {f"parallel__{field}": size for field, size in parallel_section(layout).items()}
    target = f"{CASES}:train_in_float64"
    return warm_ranks(processes, target, steps=20, model=MODELS[model], path=path, **changes)


@pytest.mark.parametrize("layout", [{}, {"parallel__pipeline_parallel_size": 2}])
def test_fp8_copies_of_weights_are_made_anew_each_step(warm_ranks, layout):
    """Also where Megatron's schedule is given chunks that own no weights."""
    (told, *_) = warm_ranks(2, f"{CASES}:stage_is_told_of_new_weights", **layout)
    assert told and all(told)
