#!/usr/bin/env bash
# Adds to an NGC PyTorch image what it lacks, at the versions of tools/requirements.txt, and leaves
# its own PyTorch, CUDA libraries, Transformer Engine and Apex alone. Run inside the image.
set -euo pipefail
cd "$(dirname "$0")"
lock=requirements.txt
[[ -f $lock ]] || lock=../tools/requirements.txt
packages='megatron-core|transformers|tokenizers|mlflow|sentencepiece|safetensors|pydantic|pyyaml'
packages+='|matplotlib|tqdm|xxhash|psutil|nvidia-ml-py|backports.zstd|deepspeed|filelock'
grep -E "^($packages)==" "$lock" >/tmp/pltmoe_packages.txt
pip list --format=freeze | grep -E '^(torch|triton|numpy|transformer[-_]engine|nvidia)' |
    grep -vE '^nvidia[-_]ml[-_]py' >/tmp/image_versions.txt || true
PIP_CONSTRAINT=/tmp/image_versions.txt pip install --no-cache-dir -r /tmp/pltmoe_packages.txt
