"""Every file under configs/ is complete, commented, and differs from its peers only as it says."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pltmoe.config import config_to_dict, load_config
from pltmoe.config.run import RunConfig
from tests.contracts.source import REPOSITORY, name_of

CONFIGS = REPOSITORY / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
LOOPS = {
    "model.num_loops", "model.cross_loop_shift", "model.share_first_loop_kv", "model.gated_swa",
}  # fmt: skip
BETWEEN = {"model.normalize_per_loop", "model.hidden_scale"}
NAMES = {"name", "train.output_dir"}
PAPER = [f for f in FILES if not f.name.startswith("quickstart")]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or prefix in ("tracking.tags.", "deepspeed."):
        return {prefix[:-1]: tree}
    return {k: v for key, sub in tree.items() for k, v in flat(sub, f"{prefix}{key}.").items()}


def field_paths(section: type[BaseModel], prefix: str = "") -> set[str]:
    paths = set()
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            paths |= field_paths(kind, f"{prefix}{name}.")
        else:
            paths.add(prefix + name)
    return paths


def different(files: list[Path]) -> set[str]:
    trees = [flat(config_to_dict(load_config(file))) for file in files]
    return {key for key in trees[0] if any(tree[key] != trees[0][key] for tree in trees)}


def test_all_announced_files_are_there():
    ablation = {f"ablation_680m_13b/row{n}" for n in range(1, 7)}
    assert ablation == {str(f.relative_to(CONFIGS)).split("_", 3)[0] + "_680m_13b/" +
                        f.name.split("_")[0] for f in FILES if "ablation" in str(f)}  # fmt: skip
    expected = {"quickstart_vanilla", "quickstart_loop2", "quickstart_plt2", "plt_1.7b_40b",
                "vanilla_2.5b_60b", "plt_dense_1.2b", "vanilla_dense_1.2b", "plt_moe_1b_7b",
                "vanilla_moe_1b_7b", "plt_1.7b_40b_one_node"}  # fmt: skip
    assert expected <= {f.stem for f in FILES}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_file_is_valid_and_complete(file: Path):
    load_config(file)
    given = set(flat(yaml.safe_load(file.read_text())))
    assert given == field_paths(RunConfig)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_key_has_a_comment_and_paths_are_relative(file: Path):
    lines = file.read_text().splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        if line.startswith("  ") and ":" in line and not line.lstrip().startswith(("#", "-")):
            assert "# " in line or above.lstrip().startswith("# "), f"no comment: {line}"
        assert len(line) <= 100, line
    config = load_config(file)
    for path in (config.data.tokenizer, config.data.train[0].path, config.train.output_dir):
        assert not path.is_absolute()


def test_ablation_rows_differ_only_in_their_loops():
    rows = [file for file in FILES if file.parent.name == "ablation_680m_13b"]
    assert len(rows) == 6 and different(rows) == LOOPS | NAMES
    flags = ("num_loops", "cross_loop_shift", "share_first_loop_kv", "gated_swa")
    table = [tuple(getattr(load_config(row).model, flag) for flag in flags) for row in rows]
    assert table == [
        (1, False, False, False),
        (2, False, False, False),
        (2, True, False, False),
        (2, True, True, False),
        (2, True, True, True),
        (3, True, True, True),
    ]


def test_quickstart_trio_differs_only_in_its_loops_and_trains_on_equal_tokens():
    trio = [CONFIGS / f"quickstart_{name}.yaml" for name in ("vanilla", "loop2", "plt2")]
    assert different(trio) == LOOPS | BETWEEN | NAMES
    plt = load_config(trio[2]).model
    assert plt.normalize_per_loop and plt.hidden_scale == 0.053
    assert "normalize_per_loop" in trio[2].read_text().split("name:")[0], "the header says so"


def test_pairs_differ_only_in_their_loops():
    for size in ("dense_1.2b", "moe_1b_7b"):
        pair = [CONFIGS / f"{kind}_{size}.yaml" for kind in ("plt", "vanilla")]
        assert different(pair) == LOOPS | NAMES
    headline = [CONFIGS / f"{name}.yaml" for name in ("plt_1.7b_40b", "vanilla_2.5b_60b")]
    assert different(headline) == LOOPS | NAMES | {"model.num_layers"}
    one_node = [headline[0], CONFIGS / "plt_1.7b_40b_one_node.yaml"]
    assert not {key for key in different(one_node) if key.startswith("model.")}


@pytest.mark.parametrize("file", PAPER, ids=name_of)
def test_papers_configurations_use_the_papers_loop_and_its_tokens(file: Path):
    config = load_config(file)
    m = config.model
    assert (m.normalize_per_loop, m.emb_scale, m.hidden_scale, m.window_keys) == (False, 1, 1, 64)
    of_a_step = config.train.global_batch_size * config.data.sequence_length
    budgets = {"ablation_680m_13b": 150e9, "headline": 1000e9, "one-node": 10e9}
    budget = budgets.get(config.tracking.experiment, 400e9)
    assert 0 <= config.train.steps * of_a_step - budget < of_a_step
    assert f"{int(budget):,} / " in file.read_text(), "the arithmetic is written out"


@pytest.mark.parametrize(
    ("kind", "lr", "warmup_steps", "heads", "kv_heads"),
    [("dense_1.2b", 3e-4, 2000, 32, 8), ("moe_1b_7b", 4e-4, 2500, 16, 16)],
)
def test_open_set_up_is_the_papers(kind: str, lr: float, warmup_steps: int, heads: int, kv_heads):
    config = load_config(CONFIGS / f"plt_{kind}.yaml")
    m, o = config.model, config.optimizer
    assert (m.num_layers, m.hidden_size, m.tied_embeddings) == (16, 2048, True)
    assert (m.num_attention_heads, m.num_kv_heads) == (heads, kv_heads)
    assert (o.lr, o.warmup_steps, o.schedule) == (lr, warmup_steps, "cosine")
    assert config.train.global_batch_size == 1024
    assert (m.num_experts, m.moe_top_k) == ((64, 8) if "moe" in kind else (None, None))
