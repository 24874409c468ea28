"""Every layout trains the same model, and a checkpoint moves between layouts."""

from typing import Any

import pytest
import torch

from tests.distributed.tiny import DENSE

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group(__name__)]
CASES = "tests.distributed.engine_cases"
STEPS = 4

# Sums over tokens and ranks run in another order, and Adam divides small differences of small
# gradients by their root mean square. Four steps leave less than a tenth of these bounds; a wrong
# divisor or a lost rank is a thousand times over them.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def serial(warm_ranks, tmp_path_factory):
    """Four steps of one process, four micro batches each, with masked tokens; saved."""
    folder = tmp_path_factory.mktemp("serial")
    return folder, warm_ranks(1, f"{CASES}:train", steps=STEPS, save_to=folder)[0]


@pytest.mark.parametrize("expert_parallel", [2, 1])
def test_two_processes_equal_one(serial, warm_ranks, expert_parallel):
    """Loss, gradient norm, metrics, weights and expert biases, with all router losses on."""
    _, one = serial
    two = warm_ranks(
        2, f"{CASES}:train", steps=STEPS, parallel__expert_parallel_size=expert_parallel
    )
    for report in two:
        for key in ("losses", "norms", "rates"):
            assert report[key] == pytest.approx(one[key], rel=1e-5), key
        assert report["valid"] == pytest.approx(one["valid"], rel=1e-5)
        assert report["metrics"][-1] == pytest.approx(one["metrics"][-1], rel=1e-4)
        assert_same_weights(report["weights"], one["weights"])
    held = [set(report["weights"]) for report in two]
    assert held[0] | held[1] == set(one["weights"])
    assert (held[0] == held[1]) == (expert_parallel == 1)
    biases = [bias for name, bias in one["weights"].items() if "expert_bias" in name]
    assert len(biases) == 2 and all(bias.abs().max() > 0.005 for bias in biases)


def test_dense_model_on_two_processes_equals_one(warm_ranks):
    one = warm_ranks(1, f"{CASES}:train", steps=2, model=DENSE)[0]
    for report in warm_ranks(2, f"{CASES}:train", steps=2, model=DENSE):
        assert report["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert_same_weights(report["weights"], one["weights"])


def test_gradients_equal_the_written_out_loss(warm_ranks):
    """Router losses keep their weight when tokens are masked: micro batches count by tokens."""
    differences = warm_ranks(1, f"{CASES}:gradients_against_reference")[0]
    assert len(differences) > 20
    assert max(differences.values()) < 1e-4, differences


def test_updates_are_those_of_pytorchs_adamw(warm_ranks):
    """Betas, epsilon, weight decay of matrices alone, clipping."""
    differences = warm_ranks(1, f"{CASES}:updates_against_torch")[0]
    assert len(differences) > 20
    assert max(differences.values()) < 1e-6, differences


def test_a_bf16_checkpoint_gives_fp32_ranks_the_same_weights(warm_ranks, tmp_path):
    """Those of the fp32 masters: what bf16 weights of the checkpoint have lost is not missing."""
    run = {"target": f"{CASES}:train", "model": DENSE}
    warm_ranks(2, **run, steps=3, save_to=tmp_path, train__precision="bf16")
    first, second = warm_ranks(2, **run, steps=0, load_from=tmp_path, train__precision="fp32")
    for name, weight in first["loaded"]["weights"].items():
        assert torch.equal(weight, second["loaded"]["weights"][name]), name
        assert not torch.equal(weight, weight.bfloat16().float()), name


def test_checkpoint_moves_between_layouts(serial, warm_ranks, tmp_path):
    """EP=2 -> one process, and one process -> EP=2: same optimizer state, same next losses.

    "Next" as in a run that never stopped: learning rate and Adam's step count go on.
    """
    folder, one = serial
    straight = warm_ranks(1, f"{CASES}:train", steps=STEPS + 2)[0]
    expert_parallel = {"parallel__expert_parallel_size": 2}
    split = warm_ranks(2, f"{CASES}:train", steps=STEPS, save_to=tmp_path, **expert_parallel)
    joined = warm_ranks(1, f"{CASES}:train", steps=2, load_from=tmp_path)[0]
    continued = warm_ranks(2, f"{CASES}:train", steps=2, load_from=tmp_path, **expert_parallel)
    resplit = warm_ranks(2, f"{CASES}:train", steps=2, load_from=folder, **expert_parallel)

    assert_same_moments([joined["loaded"]["moments"]], [r["moments"] for r in split])
    assert_same_moments([r["loaded"]["moments"] for r in resplit], [one["moments"]])
    for report in split:
        for name, weight in report["weights"].items():
            assert torch.equal(joined["loaded"]["weights"][name], weight), name
    for report in (joined, *continued, *resplit):
        assert report["losses"] == pytest.approx(straight["losses"][STEPS:], rel=1e-5)
        assert report["rates"] == straight["rates"][STEPS:]
        assert_same_weights(report["weights"], straight["weights"])


def test_bf16_keeps_fp32_master_weights_through_a_checkpoint(serial, warm_ranks, tmp_path):
    """Two steps, save, load, two steps: the same weights, bit for bit, as four steps."""
    bf16 = {"train__precision": "bf16"}
    straight = warm_ranks(1, f"{CASES}:train", steps=4, **bf16)[0]
    warm_ranks(1, f"{CASES}:train", steps=2, save_to=tmp_path, **bf16)
    resumed = warm_ranks(1, f"{CASES}:train", steps=2, load_from=tmp_path, **bf16)[0]
    assert resumed["losses"] == straight["losses"][2:]
    assert_same_moments([resumed["moments"]], [straight["moments"]])
    for name, weight in resumed["weights"].items():
        assert torch.equal(weight, straight["weights"][name]), name
        kind = torch.float32 if "expert_bias" in name else torch.bfloat16
        assert weight.dtype == kind, name
    for pieces in straight["moments"].values():
        assert all(values.dtype == torch.float32 for _, values in pieces)
    assert straight["losses"] == pytest.approx(serial[1]["losses"], rel=0.02)


def test_each_rank_gets_its_random_states_back(warm_ranks, tmp_path):
    (first, again), (second, second_again) = warm_ranks(
        2, f"{CASES}:random_numbers", folder=tmp_path
    )
    assert first == again and second == second_again
    assert first[0] != second[0]


def test_weights_alone_of_a_vanilla_model(warm_ranks, tmp_path):
    """Gates and expert biases start at zero, and master weights are the new ones."""
    report = warm_ranks(1, f"{CASES}:weights_of_a_vanilla_model", folder=tmp_path)[0]
    new = [name for name in report["loaded"] if "expert_bias" in name or "plt_gate" in name]
    assert len(new) == 2 * 3 and not any(report["loaded"][name].any() for name in new)
    for name in report["loaded"].keys() - new:
        weight = report["loaded"][name]
        assert torch.equal(weight, report["before"][name]), name
        (start, master), *_ = report["moments"][(name, "param")]
        expected = weight.float().flatten()[start : start + master.numel()]
        assert torch.equal(master, expected), name


def test_gradients_are_clipped_by_their_global_norm(warm_ranks):
    """Adam's first moments shrink by limit / norm, on both ranks, experts included."""
    free = warm_ranks(2, f"{CASES}:clipping", limit=0.0)
    clipped = warm_ranks(2, f"{CASES}:clipping", limit=0.1)
    for before, after in zip(free, clipped, strict=True):
        assert before["norm"] == pytest.approx(after["norm"], rel=1e-6) and after["norm"] > 0.2
        assert any("experts" in name for name in before["first"])
        for name, pieces in before["first"].items():
            for (_, expected), (_, got) in zip(pieces, after["first"][name], strict=True):
                torch.testing.assert_close(got, expected * (0.1 / after["norm"]))


def test_what_is_not_finite_stops_before_the_update(warm_ranks):
    """Where no step may be skipped; test_skipped_steps.py has the others."""
    for report in warm_ranks(2, f"{CASES}:broken_steps"):
        assert report["loss"].startswith("step 2: the loss is not finite (rank 1: nan). Nothing")
        assert "step 2: the gradient norm is not finite" in report["gradient"]
        assert "broken gradients: final_norm.weight." in report["gradient"]
        assert report["untouched"]


def assert_same_weights(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, weight in got.items():
        torch.testing.assert_close(
            weight, expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_moments(got: list[Any], expected: list[Any]) -> None:
    """Compare bit for bit after putting the ranks' shards together."""
    left, right = _joined(got), _joined(expected)
    assert left.keys() == right.keys()
    assert {kind for _, kind in left} >= {"param", "exp_avg", "exp_avg_sq"}
    for key, values in left.items():
        assert torch.equal(values, right[key]), key


def _joined(ranks: list[Any]) -> dict[Any, torch.Tensor]:
    pieces: dict[Any, dict[int, torch.Tensor]] = {}
    for rank in ranks:
        for key, parts in rank.items():
            pieces.setdefault(key, {}).update(dict(parts))
    return {k: torch.cat([v[start] for start in sorted(v)]) for k, v in pieces.items()}
