"""The paper's two benchmark lists in the words of lm-evaluation-harness.

The names, the data sets (on huggingface.co) and what they need are checked against the installed
harness by a test; it has them all. The paper's numbers of examples in the prompt
are not known. The counts here are the customary ones: 5 for knowledge tests and for the whole dense
list, what the harness prescribes for tasks that generate, and 0 for AGIEval, which has no examples
to take from.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: a task or a group of tasks of the harness."""

    name: str
    """As the paper writes it."""
    task: str
    """As the harness calls it."""
    shots: int | None
    """Examples in the prompt; None: what the harness says."""
    metric: str
    """The one that counts in an average."""
    datasets: tuple[str, ...]
    """Repositories on huggingface.co that it reads."""
    runs_code: bool = False
    """Whether code that the model wrote is executed on this machine."""


_AGIEVAL = (
    "aqua-rat gaokao-biology gaokao-chemistry gaokao-chinese gaokao-english gaokao-geography "
    "gaokao-history gaokao-mathcloze gaokao-mathqa gaokao-physics jec-qa-ca jec-qa-kd logiqa-en "
    "logiqa-zh lsat-ar lsat-lr lsat-rc math sat-en sat-en-without-passage sat-math"
)

_MMLU = Benchmark("MMLU", "mmlu", 5, "acc", ("cais/mmlu",))
_ARC = ("allenai/ai2_arc",)

PAPER_MOE = (
    _MMLU,
    Benchmark("CEval", "ceval-valid", 5, "acc", ("ceval/ceval-exam",)),
    Benchmark(
        "AGIEval", "agieval", 0, "acc", tuple(f"hails/agieval-{n}" for n in _AGIEVAL.split())
    ),
    Benchmark("MMLU-Pro", "mmlu_pro", 5, "exact_match", ("TIGER-Lab/MMLU-Pro",)),
    Benchmark("BBH", "bbh", 3, "exact_match", ("SaylorTwift/bbh",)),
    Benchmark("DROP", "drop", 3, "f1", ("EleutherAI/drop",)),
    Benchmark("MBPP", "mbpp", 3, "pass_at_1", ("google-research-datasets/mbpp",), runs_code=True),
    Benchmark("HumanEval", "humaneval", 0, "pass@1", ("openai/openai_humaneval",), runs_code=True),
    Benchmark("MATH", "minerva_math", 4, "math_verify", ("EleutherAI/hendrycks_math",)),
    Benchmark("GSM8k", "gsm8k", 5, "exact_match", ("openai/gsm8k",)),
)
"""Of the paper's headline models, 1.7B/40B and 2.5B/60B, and of its ablation."""

PAPER_DENSE = (
    _MMLU,
    Benchmark("HellaSwag", "hellaswag", 5, "acc_norm", ("Rowan/hellaswag",)),
    Benchmark("ARC-C", "arc_challenge", 5, "acc_norm", _ARC),
    Benchmark("ARC-E", "arc_easy", 5, "acc_norm", _ARC),
    Benchmark("PIQA", "piqa", 5, "acc_norm", ("baber/piqa",)),
    Benchmark("WinoGrande", "winogrande", 5, "acc", ("allenai/winogrande",)),
    Benchmark("CommonsenseQA", "commonsense_qa", 5, "acc", ("tau/commonsense_qa",)),
)
"""Of the paper's open set-up: dense 1.2B and MoE 1B/7B."""

LOCAL = (
    Benchmark("bits per byte", "local_perplexity", 0, "bits_per_byte", ()),
    Benchmark("last word", "local_last_word", 0, "acc", ()),
    Benchmark("continuation", "local_continuation", 0, "acc", ()),
)
"""Made from a text of the user's (``local_tasks.py``); needs no network."""

LISTS = {"local": LOCAL, "paper_moe": PAPER_MOE, "paper_dense": PAPER_DENSE}


def describe_lists() -> str:
    """Return the lists as Markdown, with what each benchmark downloads."""
    lines = []
    for name, benchmarks in LISTS.items():
        lines += ["", name, "", "| benchmark | task | shots | metric | downloads |"]
        lines += ["|---|---|---:|---|---|"]
        for b in benchmarks:
            sets = b.datasets or ("nothing: made from --text",)
            code = "; runs generated code" if b.runs_code else ""
            more = f" and {len(sets) - 1} more" if len(sets) > 1 else ""
            lines.append(
                f"| {b.name} | `{b.task}` | {b.shots} | {b.metric} | {sets[0]}{more}{code} |"
            )
    return "\n".join(lines[1:]) + "\n"


def by_task() -> dict[str, Benchmark]:
    """Return every benchmark of the lists under the harness' name of it."""
    return {b.task: b for benchmarks in LISTS.values() for b in benchmarks}
