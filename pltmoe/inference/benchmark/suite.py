"""Which models are compared: the rows of the ablation at one size, and the headline pair.

Loops add no weights but the gates, so the models of one size share one set of random weights: they
lie in memory together and can be measured in turn.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pltmoe.config import ModelConfig, load_config
from pltmoe.config.counts import count_parameters
from pltmoe.inference.weights import Weights

ABLATION, HEADLINE, CHOSEN = "one size", "headline", "chosen"
VANILLA, LOOP2, CLP, SHARED_KV = "vanilla", "vanilla loop-2", "+ CLP", "+ shared KV"
PLT2, PLT2_SHARED = "PLT-2", "PLT-2, shared routing"
PLT3, PLT3_SHARED = "PLT-3", "PLT-3, shared routing"
BIG_VANILLA = "vanilla 2.5B/60B"
SMALL_PLT, SMALL_SHARED = "PLT-2 1.7B/40B", "PLT-2 1.7B/40B, shared routing"
ABLATION_FILES = {
    VANILLA: "row1_vanilla", LOOP2: "row2_loop2", CLP: "row3_clp", SHARED_KV: "row4_shared_kv",
    PLT2: "row5_plt2", PLT3: "row6_plt3",
}  # fmt: skip
SCALED_DOWN = {
    "vocab_size": 2048, "hidden_size": 256, "num_attention_heads": 8, "num_kv_heads": 2,
    "head_dim": 32, "num_experts": 256, "moe_top_k": 8, "moe_ffn_hidden_size": 128,
}  # fmt: skip
"""For a CPU: as many experts per row as the real models, weights far larger than its caches."""
SCALED_LAYERS = {ABLATION: 4, SMALL_PLT: 4, SMALL_SHARED: 4, BIG_VANILLA: 6}
"""The headline pair keeps its ratio of two thirds."""


@dataclass(frozen=True)
class Candidate:
    """One model of one comparison."""

    group: str
    name: str
    model: ModelConfig

    def weights_key(self) -> str:
        """Return what decides the shapes of all weights, gates aside."""
        loops = {
            "num_loops": 1, "cross_loop_shift": False, "share_first_loop_kv": False,
            "gated_swa": False, "moe_loop_routing": "independent",
        }  # fmt: skip
        return self.model.model_copy(update=loops).model_dump_json()


def candidates(
    configs: Path, groups: Iterable[str], chosen: Sequence[Path] = (), scaled_down: bool = False
) -> list[Candidate]:
    """Return the models of these groups.

    Args:
        configs: the folder of configurations.
        groups: of ABLATION, HEADLINE; files in ``chosen`` come on top.
        chosen: any run configurations.
        scaled_down: sizes that a CPU can measure (SCALED_DOWN), except those of ``chosen``.

    Raises:
        ConfigError: a file that is not a run configuration.
    """
    found: list[Candidate] = []
    if ABLATION in groups:
        folder = configs / "ablation_680m_13b"
        found += [_of_file(ABLATION, n, folder / f"{f}.yaml") for n, f in ABLATION_FILES.items()]
        row = {c.name: c for c in found}
        found += [_shared(row[PLT2], PLT2_SHARED), _shared(row[PLT3], PLT3_SHARED)]
    if HEADLINE in groups:
        plt = _of_file(HEADLINE, SMALL_PLT, configs / "plt_1.7b_40b.yaml")
        big = _of_file(HEADLINE, BIG_VANILLA, configs / "vanilla_2.5b_60b.yaml")
        found += [big, plt, _shared(plt, SMALL_SHARED)]
    if scaled_down:
        found = [_scaled_down(c) for c in found]
    return found + [_of_file(CHOSEN, path.stem, path) for path in chosen]


def weights_for(candidate: Candidate, weights: Weights) -> Weights:
    """Return the same tensors as a model of this candidate; gates only where it has them."""
    layers = weights.layers
    if not candidate.model.gated_swa:
        layers = [replace(layer, gate_weight_hx=None, gate_bias_h=None) for layer in layers]
    return replace(weights, model=candidate.model, layers=layers)


def with_gates(candidates_of_one_size: Sequence[Candidate]) -> ModelConfig:
    """Return the model whose weights serve all of them: one with gates if there is any."""
    gated = [c.model for c in candidates_of_one_size if c.model.gated_swa]
    return gated[0] if gated else candidates_of_one_size[0].model


def describe(model: ModelConfig) -> str:
    """Say a model's size in a line."""
    n = count_parameters(model)
    experts = ""
    if model.num_experts is not None:
        experts = (
            f", {model.num_experts} experts of {model.moe_ffn_hidden_size}, top-{model.moe_top_k}"
        )
    return (
        f"{_count(n.total)} parameters, {_count(n.active)} active, {model.num_layers} layers of "
        f"{model.hidden_size}, {model.num_attention_heads} heads ({model.num_kv_heads} KV) of "
        f"{model.head_dim}{experts}"
    )


def _of_file(group: str, name: str, path: Path) -> Candidate:
    return Candidate(group, name, load_config(path).model)


def _shared(candidate: Candidate, name: str) -> Candidate:
    model = candidate.model.model_copy(update={"moe_loop_routing": "shared"})
    return Candidate(candidate.group, name, model)


def _scaled_down(candidate: Candidate) -> Candidate:
    layers = SCALED_LAYERS.get(candidate.name, SCALED_LAYERS[ABLATION])
    update = SCALED_DOWN | {"num_layers": layers}
    return replace(candidate, model=candidate.model.model_copy(update=update))


def _count(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"
