#!/usr/bin/env bash
# From nothing to a published model on one machine, through the tools that a cluster uses:
#
#   corpus -> tokenizer -> dataset -> pretrain vanilla, loop-2 and PLT-2 on equal tokens
#   -> Hugging Face -> generate -> decode benchmark -> report
#
#   bash tools/quickstart.sh            about 0.4M tokens each, 2 processes
#   bash tools/quickstart.sh --smoke    the same with a few steps, for continuous integration
#   bash tools/quickstart.sh --output DIR [--processes N] [--engine deepspeed]
#
# A second run reuses what is there; training continues from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="" processes=2 smoke=no engine=megatron
while (($#)); do
    case $1 in
        --smoke) smoke=yes ;;
        --output) out=${2:?--output needs a folder} && shift ;;
        --engine) engine=${2:?--engine needs megatron or deepspeed} && shift ;;
        --processes) processes=${2:?--processes needs a number} && shift ;;
        *) echo "error: unknown argument $1 (see the head of tools/quickstart.sh)" >&2 && exit 2 ;;
    esac
    shift
done
if [[ $smoke == yes ]]; then
    out=${out:-quickstart-smoke}
    corpus_bytes=1500000
    size=(train.steps=12 train.log_interval=2 train.eval_interval=6 train.eval_steps=1
        train.global_batch_size=8 checkpoint.save_interval=6 optimizer.warmup_steps=2)
    decode=(--new-tokens 8 --rounds 2 --prompt-tokens 96)
else
    out=${out:-quickstart}
    corpus_bytes=8000000
    size=()
    decode=()
fi

started=$SECONDS
step() { printf '\n\033[1m[quickstart %3ds] %s\033[0m\n' $((SECONDS - started)) "$*"; }

step "environment"
bash tools/setup_env.sh
work_started=$SECONDS
python=.venv/bin/python
export MLFLOW_DISABLE_TELEMETRY=true HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 # models this small lose time to more threads
mkdir -p "$out/corpus" "$out/tokenizer" "$out/data"
out=$(cd "$out" && pwd)

step "corpus: the source files of Python's standard library"
$python tools/build_corpus.py --output "$out/corpus/corpus.jsonl" --max-bytes $corpus_bytes

step "tokenizer"
$python tools/train_tokenizer.py "$out/corpus/corpus.jsonl" \
    --output "$out/tokenizer/tokenizer.model" --vocab-size 2048

step "Megatron dataset"
$python tools/preprocess_data.py "$out/corpus/corpus.jsonl" \
    --tokenizer "$out/tokenizer/tokenizer.model" --output "$out/data/corpus" --overwrite

for model in vanilla loop2 plt2; do
    step "pretrain $model on $processes processes, expert parallel, engine $engine"
    $python -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        tools/pretrain.py --config "configs/quickstart_$model.yaml" \
        "data.tokenizer=$out/tokenizer/tokenizer.model" "data.train=$out/data/corpus" \
        "engine=$engine" "parallel.expert_parallel_size=$processes" "train.output_dir=$out/runs/$model" \
        "tracking.mlflow_uri=sqlite:///$out/mlflow.db" ${size[@]+"${size[@]}"}
done

for model in vanilla loop2 plt2; do
    step "convert $model to Hugging Face and compare the logits"
    newest=$(cat "$out/runs/$model/checkpoints/latest")
    # The folder tells which checkpoint it came from, so a longer run is converted again.
    if [[ -f $out/hf/$model/config.json && $(cat "$out/hf/$model.from" 2>/dev/null) == "$newest" ]]; then
        echo "$out/hf/$model is there already (from $newest)"
    else
        rm -rf "$out/hf/$model" && mkdir -p "$out/hf"
        $python tools/convert_to_hf.py --checkpoint "$out/runs/$model" --output "$out/hf/$model"
        echo "$newest" >"$out/hf/$model.from"
    fi
done

step "generate text from PLT-2, both loops of a token in one pass"
$python tools/generate.py --model "$out/hf/plt2" --output "$out/generated.json" \
    --prompt "def read_lines(path):" --prompt "class Error(Exception):" --prompt "import os"

step "decode benchmark of the three models"
$python tools/benchmark_decode.py --output "$out/decode.json" \
    --model "quickstart-vanilla=$out/hf/vanilla" --model "quickstart-loop2=$out/hf/loop2" \
    --model "quickstart-plt2=$out/hf/plt2" ${decode[@]+"${decode[@]}"}

step "comparison"
$python tools/compare_runs.py "$out/runs/vanilla" "$out/runs/loop2" "$out/runs/plt2" \
    --output "$out/report" --decode "$out/decode.json" --generated "$out/generated.json" \
    --title "Quickstart: vanilla, loop-2 and PLT-2 on equal tokens" \
    --mlflow-uri "sqlite:///$out/mlflow.db" | tee "$out/report.log"

step "done: set-up $((work_started - started)) s, work $((SECONDS - work_started)) s"
cat <<EOF
report           $out/report/
runs             $out/runs/{vanilla,loop2,plt2}/   metrics.jsonl, config.yaml, checkpoints/
PLT-2 for users  $out/hf/plt2/                     from_pretrained(..., trust_remote_code=True)
MLflow           $(sed -n 's/^MLflow: //p' "$out/report.log" | sed 's| mlflow ui | .venv/bin/mlflow ui |')
EOF
