#!/usr/bin/env bash
# Pretrains PLT-2 with 1.7B active of 40B parameters.
#
#   bash slurm/pretrain_plt_moe.sh [section.key=value ...]     checks that it fits, then submits
#   sbatch slurm/pretrain_plt_moe.sh [section.key=value ...]   checks as the job's first act
#
# NODES, GPUS_PER_NODE (first form) or --nodes, --gpus-per-node, --ntasks-per-node (second form)
# change the size, CONFIG the configuration. Site settings: slurm/env.sh. Manual: docs/slurm.md.
#SBATCH --job-name=plt-1.7b-40b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
[[ $0 == */slurm_script ]] || cd "$(dirname "$0")/.." || exit 2
[[ -f slurm/pretrain.sh ]] || { echo "submit from the repository's root" >&2 && exit 2; }
CONFIG=${CONFIG:-configs/plt_1.7b_40b.yaml}
CONFIGS=("$CONFIG")
# shellcheck source=slurm/pretrain.sh
source slurm/pretrain.sh
