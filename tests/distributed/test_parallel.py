"""Every layout computes what one process computes: the loss and every gradient, in float64."""

import pytest

from tests.distributed.layouts import MODELS, TESTED, changes_for

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]
CASES = "tests.distributed.parallel_cases"
TOLERANCE = 1e-12
"""Relative to a parameter's largest gradient: float64 sums in another order leave about 1e-14."""


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
