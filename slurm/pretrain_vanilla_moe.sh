#!/usr/bin/env bash
# Pretrains the model without loops that PLT-2 is compared with: 2.5B active of 60B parameters.
#
#   bash slurm/pretrain_vanilla_moe.sh [section.key=value ...]     checks that it fits, then submits
#   sbatch slurm/pretrain_vanilla_moe.sh [section.key=value ...]   checks as the job's first act
#
# NODES, GPUS_PER_NODE (first form) or --nodes, --gpus-per-node, --ntasks-per-node (second form)
# change the size, CONFIG the configuration. Site settings: slurm/env.sh. Manual: docs/slurm.md.
#SBATCH --job-name=vanilla-2.5b-60b
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
CONFIG=${CONFIG:-configs/vanilla_2.5b_60b.yaml}
CONFIGS=("$CONFIG")
# shellcheck source=slurm/pretrain.sh
source slurm/pretrain.sh
