#!/usr/bin/env bash
# Tokenizes a corpus on one node; takes the arguments of tools/preprocess_data.py:
#
#   bash slurm/preprocess.sh TEXT... --tokenizer data/tokenizer.model --output data/corpus
#
# Interrupted and requeued, it continues where it was.
#SBATCH --job-name=preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
[[ $0 == */slurm_script ]] || cd "$(dirname "$0")/.." || exit 2
[[ -f slurm/job.sh ]] || { echo "submit from the repository's root" >&2 && exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh
if in_job; then
    run_python tools/preprocess_data.py --workers "$SLURM_CPUS_PER_TASK" "$@"
else
    submit slurm/preprocess.sh "${CPU_OPTIONS[@]}" -- "$@"
fi
