# What the scripts of this folder share; sourced from the root of the repository.
# shellcheck shell=bash
set -euo pipefail
# shellcheck source=slurm/env.sh
source slurm/env.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # the package need not be installed

say() { printf '[slurm] %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 2
}

# Whether this is a batch job, not a login node (and not the shell of salloc).
in_job() { [[ ${ENVIRONMENT:-} == BATCH && -n ${SLURM_JOB_ID:-} ]]; }

# run_python ARGUMENTS...: in a job as a step of one task, so that the container options apply.
run_python() {
    local step=()
    if in_job; then
        step=(srun --nodes=1 --ntasks=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" "${SRUN_OPTIONS[@]}")
    fi
    "${step[@]}" "${CONTAINER[@]}" "$PYTHON" "$@"
}

# submit SCRIPT OPTIONS... -- ARGUMENTS...: prints the number of the job.
submit() {
    local script=$1 options=() job
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    job=$(sbatch --parsable "${options[@]}" "$script" "${@:2}")
    say "job ${job%%;*}: $script; its log will be in slurm/logs/"
    printf '%s\n' "${job%%;*}"
}
