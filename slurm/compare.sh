#!/usr/bin/env bash
# Pretrains both models of the comparison and, after both, writes the report on a node without GPU:
#
#   bash slurm/compare.sh [section.key=value ...]      overrides of both runs
#   REPORT=FOLDER PLT_CONFIG=A.yaml VANILLA_CONFIG=B.yaml bash slurm/compare.sh
#
# A run that fails for good cancels the report; one that is requeued only delays it.
#SBATCH --job-name=compare-report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
[[ $0 == */slurm_script ]] || cd "$(dirname "$0")/.." || exit 2
[[ -f slurm/job.sh ]] || { echo "submit from the repository's root" >&2 && exit 2; }
# shellcheck source=slurm/job.sh
source slurm/job.sh
if in_job; then # the report: PLT VANILLA FOLDER OVERRIDES..., also in MLflow if the runs are there
    plt=$(field train.output_dir "$1" "${@:4}")
    vanilla=$(field train.output_dir "$2" "${@:4}")
    # By the environment, where `ps` does not show a password.
    PLTMOE_MLFLOW_URI=$(field tracking.mlflow_uri "$2" "${@:4}")
    export PLTMOE_MLFLOW_URI
    run_python tools/compare_runs.py "$vanilla" "$plt" --output "$3"
    exit
fi
export PLT_CONFIG=${PLT_CONFIG:-configs/plt_1.7b_40b.yaml}
export VANILLA_CONFIG=${VANILLA_CONFIG:-configs/vanilla_2.5b_60b.yaml}
REPORT=${REPORT:-runs/comparison}

if can_check; then
    plt=$(field train.output_dir "$PLT_CONFIG" "$@")
    vanilla=$(field train.output_dir "$VANILLA_CONFIG" "$@")
    [[ $plt != "$vanilla" ]] || die "both runs would write to $plt: leave train.output_dir to the configs"
fi

first=$(CONFIG=$PLT_CONFIG bash slurm/pretrain_plt_moe.sh "$@")
if ! second=$(CONFIG=$VANILLA_CONFIG bash slurm/pretrain_vanilla_moe.sh "$@"); then
    scancel "$first"
    die "the second run was refused: job $first is cancelled"
fi
submit slurm/compare.sh "${CPU_OPTIONS[@]}" --dependency="afterok:$first:$second" \
    --kill-on-invalid-dep=yes -- "$PLT_CONFIG" "$VANILLA_CONFIG" "$REPORT" "$@"
