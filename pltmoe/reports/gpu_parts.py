"""The parts of tools/gpu_check.py: what each runs, those that tell most first."""

from dataclasses import dataclass

TRAIN_STEPS = 200
MODELS = ("vanilla", "loop2", "plt2")
RECIPES = ("tensorwise", "delayed", "blockwise")
"""Of FP8, on Hopper."""
TRANSFORMER_ENGINE = "Transformer Engine"
PRECISIONS = {
    "bf16": "train.precision=bf16",
    "bf16-fused": "train.precision=bf16 train.gradient_accumulation_fusion=true",
    "bf16-local": "train.precision=bf16 train.transformer_impl=local",
    "tensorwise": "train.precision=fp8 train.fp8_recipe=tensorwise",
    "delayed": "train.precision=fp8 train.fp8_recipe=delayed",
    "blockwise": "train.precision=fp8 train.fp8_recipe=blockwise",
}
"""What the models that fill the device are timed in."""
FULL = {
    "fine": ("ten layers of 1B/7B", "model.num_layers=10"),
    "wide": (
        "four layers as wide as Phi-3.5-MoE's",
        "model.num_layers=4 model.hidden_size=4096 model.num_attention_heads=32 "
        "model.num_kv_heads=8 model.num_experts=16 model.moe_top_k=2 "
        "model.moe_ffn_hidden_size=6400",
    ),
}
"""Two PLT-2 that fill 139 GiB, in words and as changes of configs/plt_moe_1b_7b.yaml. The paper's
layers, 8 of 64 experts: 4.33B parameters, 0.81B active. And layers of a public model, 2 of 16
experts: 5.47B, 1.07B active. There a token's products are larger beside what only moves."""
FULL_SIZES = (
    "--config configs/plt_moe_1b_7b.yaml --rounds 8 --profile parallel.expert_parallel_size=1 "
    "train.global_batch_size=32"
)
FULL_MICRO_BATCHES = (4, 2)
"""The first that fits is measured. tools/plan.py expects of 4 at most 123 GiB in bf16 and 130 GiB
in FP8, of 130 GiB that are usable."""
LEARN_STEPS = 150
SEEDS = (1, 2)
NORMED = "model.normalize_per_loop=true model.hidden_scale=0.053"
LEARNING = {
    "row1": ("row1_vanilla", ""),
    "row2": ("row2_loop2", ""),
    "row3": ("row3_clp", ""),
    "row4": ("row4_shared_kv", ""),
    "row5": ("row5_plt2", ""),
    "row6": ("row6_plt3", ""),
    "plt2-normed": ("row5_plt2", NORMED),
    "plt3-normed": ("row6_plt3", NORMED),
    "plt2-shared-routing": ("row5_plt2", "model.moe_loop_routing=shared"),
}
"""What is trained to compare losses: file of configs/ablation_680m_13b, and changes."""
LEARN_SIZES = (
    "data.split=null data.valid=$WORK/learn/valid "
    "model.vocab_size=8192 model.num_layers=8 model.hidden_size=640 model.num_attention_heads=10 "
    "model.num_kv_heads=5 model.head_dim=64 model.num_experts=64 model.moe_ffn_hidden_size=640 "
    "data.sequence_length=1024 train.global_batch_size=128 train.micro_batch_size=16 "
    "parallel.expert_parallel_size=1 optimizer.lr=0.001 optimizer.min_lr=0.0001"
)
"""100M active of 0.7B parameters."""
SPEED_SIZES = (
    "--config configs/plt_moe_1b_7b.yaml --rounds 10 parallel.expert_parallel_size=1 "
    "model.num_layers=4 model.vocab_size=8192 train.micro_batch_size=4 train.global_batch_size=64"
)
"""Two models of these must fit the device, optimizers included. The head, which runs once whatever
the loops, weighs no more than beside the sixteen layers of the whole model. The optimizer weighs
more: a step of the whole model has 16 times the tokens for four times the parameters. Micro batches
are the configuration's own: of smaller ones, 64 experts would be started more slowly than they run,
and the ratios be the host's."""


PYTEST = "{python} -m pytest -v -rs --durations 5 -n 4 -o faulthandler_timeout=100"
"""Four processes share the device: most of the time goes to imports, and to compilers. What one
breaks on the GPU ends its own tests only. A test that hangs says where."""
APART = ("test_deepspeed.py", "test_engine.py", "test_inference.py", "test_training.py")
"""Of tests/gpu: parts of their own."""


@dataclass(frozen=True)
class Part:
    """One check: shell commands in order, run in the repository with $WORK set."""

    name: str
    what: str
    commands: tuple[str, ...]
    makes: tuple[str, ...] = ()
    """What other parts need of it, in $WORK: without these it is not done."""
    data_of: str = ""
    """The part that makes what it needs."""
    needs: str = ""
    """Software that must be there."""
    seconds: int = 240
    """About how long it takes on an H200: a guess, until one has run it. Twice as long ends it."""


def _pretrain(model: str, name: str, more: str = "") -> str:
    return (
        f"rm -rf $WORK/runs/{name} && "
        f"{{python}} tools/pretrain.py --config configs/quickstart_{model}.yaml "
        "data.tokenizer=$WORK/tokenizer.model 'data.train=[{{path: '$WORK/corpus'}}]' "
        f"parallel.expert_parallel_size=1 train.output_dir=$WORK/runs/{name} "
        f"train.steps={TRAIN_STEPS} train.eval_interval={TRAIN_STEPS} train.micro_batch_size=8 "
        f"checkpoint.save_interval={TRAIN_STEPS} {more}"
    ).strip()


def precision_words(precision: str) -> str:
    """Return one of PRECISIONS in words."""
    in_words = {
        "bf16": "bf16",
        "bf16-fused": "bf16, weight gradients added inside the products",
        "bf16-local": "bf16, PyTorch's layers",
    }
    return in_words.get(precision, f"FP8 {precision}")


def _full(model: str, precision: str) -> Part:
    """Time one model that fills the device, in a process of its own."""
    name, (words, sizes) = f"mfu-{model}-{precision}", FULL[model]
    large, small = (
        f"{{python}} tools/benchmark_train.py --compare mfu --output $WORK/{name} {FULL_SIZES} "
        f"{sizes} train.micro_batch_size={size} {PRECISIONS[precision]}"
        for size in FULL_MICRO_BATCHES
    )
    what = f"MFU of PLT-2, {words}, {precision_words(precision)}"
    more = "set -o pipefail; export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; "
    log = f"$WORK/{name}.first"
    too_large = f"grep -qiE 'out of memory|ALLOC_FAILED' {log}"  # of PyTorch and CUDA, of cuBLAS
    tries = f"{large} 2>&1 | tee {log} || {{{{ {too_large} && {small}; }}}}"
    needs = "" if precision in ("bf16", "bf16-local") else TRANSFORMER_ENGINE
    return Part(name, what, (more + tries,), needs=needs, seconds=150)


def _learning(name: str, seed: int) -> Part:
    """Train one model of about 100M active parameters on the sources of installed packages."""
    file, changes = LEARNING[name]
    command = (
        f"rm -rf $WORK/learn/{name}-seed{seed} && "
        f"{{python}} tools/pretrain.py --config configs/ablation_680m_13b/{file}.yaml "
        "data.tokenizer=$WORK/learn/tokenizer.model "
        "'data.train=[{{path: '$WORK/learn/corpus'}}]' "
        f"train.output_dir=$WORK/learn/{name}-seed{seed} train.seed={seed} "
        f"train.steps={LEARN_STEPS} train.eval_interval={LEARN_STEPS // 10} train.eval_steps=5 "
        f"optimizer.warmup_steps={LEARN_STEPS // 10} "
        f"checkpoint.save_interval={LEARN_STEPS} {LEARN_SIZES} {changes}".strip()
        + f" && rm -r $WORK/learn/{name}-seed{seed}/checkpoints"  # 9 GB; fifteen would fill disks
    )
    what = f"{file}{', ' + changes if changes else ''}, seed {seed}: {LEARN_STEPS} steps"
    name = f"learn-{name}-seed{seed}"
    return Part(name, what, (command,), data_of="learn-data", seconds=300)


def _decoding(name: str, what: str, options: str, seconds: int = 240) -> Part:
    """One share of the decode benchmark; all of them add to $WORK/decode/decode.json."""
    folder = decode_folder(name)
    command = (
        f"{{python}} tools/benchmark_decode.py --output $WORK/{folder} --new-tokens 64 --rounds 3 "
        f"{options}"
    )
    return Part(f"decode-{name}", what, (command,), seconds=seconds)


def decode_folder(name: str) -> str:
    """Return where a share writes: other weights or other kernels never come into one table."""
    own = [kind for kind in ("fp8", "fused") if name.endswith(kind)]
    return "-".join(["decode", *own])


PARTS = (
    _full("fine", "bf16"),
    *(_full("wide", precision) for precision in ("bf16", "tensorwise")),
    Part(
        "speed",
        "PLT-2 step / vanilla step, and our vanilla step / Megatron-core's, four layers of 1B/7B",
        tuple(
            f"{{python}} tools/benchmark_train.py --compare {name} --output $WORK/speed "
            f"--profile {SPEED_SIZES}"
            for name in ("loops", "megatron")
        ),
    ),
    Part(
        "tests",
        "tests/gpu but for decoding, whole runs and DeepSpeed",
        (" ".join([f"{PYTEST} tests/gpu", *(f"--ignore tests/gpu/{file}" for file in APART)]),),
        seconds=200,
    ),
    *(_full("wide", precision) for precision in ("delayed", "bf16-fused")),
    Part(
        "train",
        f"{TRAIN_STEPS} steps of the quickstart's three models in bf16 on one GPU",
        (
            "{python} tools/build_corpus.py --output $WORK/text.jsonl --max-bytes 8000000",
            "{python} tools/train_tokenizer.py $WORK/text.jsonl --output $WORK/tokenizer.model "
            "--vocab-size 2048",
            "{python} tools/preprocess_data.py $WORK/text.jsonl --tokenizer $WORK/tokenizer.model "
            "--output $WORK/corpus --overwrite",
            *(_pretrain(model, model) for model in MODELS),
        ),
        ("tokenizer.model", "corpus.bin", *(f"runs/{model}/checkpoints" for model in MODELS)),
    ),
    Part(
        "fp8",
        f"{TRAIN_STEPS} steps of the quickstart's PLT-2 in FP8 beside bf16, on the data of train",
        tuple(
            _pretrain("plt2", f"plt2-{recipe}", f"train.precision=fp8 train.fp8_recipe={recipe}")
            for recipe in RECIPES
        ),
        data_of="train",
        needs=TRANSFORMER_ENGINE,
    ),
    _decoding(
        "headline-vanilla",
        "vanilla 2.5B/60B, batch 1 to 256, prefill",
        "--compare headline --only 'vanilla 2.5B/60B'",
        seconds=150,
    ),
    _decoding(
        "headline-plt",
        "PLT-2 1.7B/40B, both routings, batch 1 to 256, prefill; the ratios",
        "--compare headline --only 'PLT-2 1.7B/40B' --only 'PLT-2 1.7B/40B, shared routing'",
        seconds=200,
    ),
    Part(
        "tests-decode",
        "decoding: tests/gpu/test_engine.py and test_inference.py",
        (f"{PYTEST} tests/gpu/test_engine.py tests/gpu/test_inference.py",),
        seconds=150,
    ),
    Part(
        "tests-runs",
        "tests/gpu/test_training.py: runs that resume, repeat, or began on a CPU",
        (f"{PYTEST} tests/gpu/test_training.py",),
    ),
    _full("fine", "tensorwise"),
    *(_full(model, "bf16-local") for model in FULL),
    _full("wide", "blockwise"),
    *(_full("fine", precision) for precision in ("delayed", "bf16-fused", "blockwise")),
    Part(
        "speed-fp8",
        "a step of the same PLT-2 in FP8 / in bf16",
        (
            "{python} tools/benchmark_train.py --compare precision --output $WORK/speed "
            f"--profile {SPEED_SIZES}",
        ),
        needs=TRANSFORMER_ENGINE,
        seconds=150,
    ),
    Part(
        "tests-deepspeed",
        "DeepSpeed's engine: tests/gpu/test_deepspeed.py",
        (f"{PYTEST} tests/gpu/test_deepspeed.py",),
        seconds=200,
    ),
    Part(
        "decode",
        "decoding of the three exported models through the engine",
        (
            *(
                f"rm -rf $WORK/hf/{m} && {{python}} tools/convert_to_hf.py "
                f"--checkpoint $WORK/runs/{m} --output $WORK/hf/{m}"
                for m in MODELS
            ),
            "{python} tools/benchmark_decode.py --output $WORK/decode.json "
            + " ".join(f"--model {m}=$WORK/hf/{m}" for m in MODELS),
        ),
        data_of="train",
    ),
    _decoding(
        "headline-fused",
        "the headline pair with what lies between the large kernels compiled, batch 4 to 64",
        "--compare headline --fuse --batches 4,16,64 --prefill 0",
    ),
    _decoding(
        "one-size-fused",
        "680M/13B, the same: vanilla and PLT-2 with shared routing",
        "--compare ablation --only vanilla --only 'PLT-2, shared routing' --fuse "
        "--batches 4,32,64 --prefill 0",
    ),
    _decoding(
        "headline-fp8",
        "PLT-2 1.7B/40B and vanilla 2.5B/60B with experts in FP8, batch 4 to 64",
        "--compare headline --fp8 --batches 4,16,64 --prefill 0",
    ),
    _decoding(
        "prefill", "680M/13B, all rows: prefill of 1k to 32k", "--compare ablation --batches 0"
    ),
    _decoding(
        "one-size",
        "680M/13B: vanilla, loop-2, + CLP, + shared KV, PLT-2, PLT-3, batch 1 to 32",
        "--compare ablation --batches 1,4,16,32 --prefill 0",
        seconds=360,
    ),
    _decoding(
        "one-size-large",
        "the same, batch 64 to 256",
        "--compare ablation --batches 64,128,256 --prefill 0",
        seconds=360,
    ),
    Part(
        "learn-data",
        "150 MB of source text of installed packages to learn from, 8 MB of Python's to compare by",
        (
            "mkdir -p $WORK/learn",
            "{python} tools/build_corpus.py --output $WORK/learn/text.jsonl --max-bytes 150000000 "
            "--library $({python} -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')",
            "{python} tools/train_tokenizer.py $WORK/learn/text.jsonl --vocab-size 8192 "
            "--output $WORK/learn/tokenizer.model",
            # Installed packages copy from one another, hardly from the standard library.
            "{python} tools/build_corpus.py --output $WORK/learn/valid.jsonl --max-bytes 8000000",
            "{python} tools/preprocess_data.py $WORK/learn/valid.jsonl --overwrite "
            "--tokenizer $WORK/learn/tokenizer.model --output $WORK/learn/valid",
            "{python} tools/preprocess_data.py $WORK/learn/text.jsonl --workers 8 --overwrite "
            "--tokenizer $WORK/learn/tokenizer.model --output $WORK/learn/corpus",
        ),
        ("learn/tokenizer.model", "learn/corpus.bin", "learn/valid.bin"),
        seconds=150,
    ),
    *(_learning(name, SEEDS[0]) for name in LEARNING),
    *(_learning(row, seed) for seed in SEEDS[1:] for row in LEARNING if row.startswith("row")),
)
LAST_DECODING = "decode-one-size-large"
"""Of those that write to one table."""
PROFILES = (
    ("PLT-2 and vanilla, four layers of 1B/7B", "speed", "loops"),
    ("Our vanilla model and Megatron-core's, four layers", "speed", "megatron"),
    *(
        (f"PLT-2, {words}, {precision_words(precision)}", f"mfu-{model}-{precision}", "mfu")
        for model, (words, _) in FULL.items()
        for precision in PRECISIONS
    ),
    ("PLT-2 in FP8 and in bf16, four layers", "speed", "precision"),
)
"""Title, folder and comparison, in the order of docs/profile.md."""
