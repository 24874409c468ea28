#!/usr/bin/env bash
# Converts a checkpoint to Hugging Face on one node; takes the arguments of tools/convert_to_hf.py:
#
#   bash slurm/convert_to_hf.sh --checkpoint runs/plt-1.7b-40b --output hf/plt-1.7b-40b
#
# Needs memory for the weights, not a GPU.
#SBATCH --job-name=convert-to-hf
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
[[ $0 == */slurm_script ]] || cd "$(dirname "$0")/.." || exit 2
[[ -f slurm/job.sh ]] || { echo "submit from the repository's root" >&2 && exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh
if in_job; then
    run_python tools/convert_to_hf.py "$@"
else
    submit slurm/convert_to_hf.sh "${CPU_OPTIONS[@]}" -- "$@"
fi
