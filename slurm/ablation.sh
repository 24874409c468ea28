#!/usr/bin/env bash
# The six rows of the paper's ablation as one job array; row N is task N.
#
#   bash slurm/ablation.sh [section.key=value ...]     checks that all rows fit, then submits
#   sbatch slurm/ablation.sh [section.key=value ...]   each task checks its row first
#
# SBATCH_ARRAY_INX=1,5 takes some rows only, 1-6%2 two at a time. Rows of your own are row7_NAME.yaml
# to row9, beside the six or all in ABLATION=FOLDER, and SBATCH_ARRAY_INX=1-7. Settings: slurm/env.sh.
#SBATCH --job-name=ablation
#SBATCH --array=1-6
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.out
[[ $0 == */slurm_script ]] || cd "$(dirname "$0")/.." || exit 2
[[ -f slurm/pretrain.sh ]] || { echo "submit from the repository's root" >&2 && exit 2; }
CONFIGS=("${ABLATION:-configs/ablation_680m_13b}"/row[1-9]_*.yaml)
CONFIG=${CONFIGS[${SLURM_ARRAY_TASK_ID:-1} - 1]}
# shellcheck source=slurm/pretrain.sh
source slurm/pretrain.sh
