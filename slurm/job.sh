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

# Whether this is the job itself: Slurm runs a copy of the script, under this name. Variables would
# not tell; a shell inside another job (salloc, a notebook) has inherited those of that job.
in_job() { [[ $0 == */slurm_script ]]; }

# Whether this machine can check a configuration; its Python may lack what a container has.
can_check() {
    run_python -c 'import pltmoe.plan, pltmoe.data.inputs' >/dev/null 2>&1 && return
    say "${CONTAINER[*]:+${CONTAINER[*]} }$PYTHON cannot import pltmoe.plan here: the job checks itself"
    return 1
}

# run_python ARGUMENTS...: in a job as a step of one task, so that the container options apply.
run_python() {
    local step=()
    if in_job; then
        step=(srun --nodes=1 --ntasks=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" "${SRUN_OPTIONS[@]}")
    fi
    "${step[@]}" "${CONTAINER[@]}" "$PYTHON" "$@"
}

# field NAME CONFIG OVERRIDES...: what a run has there
field() { run_python tools/pretrain.py --config "$2" --print "$1" "${OVERRIDES[@]}" "${@:3}"; }

# submit SCRIPT OPTIONS... -- ARGUMENTS...: prints the number of the job.
submit() {
    local script=$1 options=() job name
    shift
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    if [[ -n ${SLURM_JOB_ID:-} ]]; then # a job around this shell: its memory and array are not ours
        for name in "${!SLURM_@}"; do
            [[ $name =~ ^SLURM_(CONF|CLUSTERS|JWT)$ ]] || unset "$name"
        done
    fi
    job=$(sbatch --parsable "${options[@]}" "$script" "${@:2}")
    say "job ${job%%;*}: $script; its log will be in slurm/logs/"
    printf '%s\n' "${job%%;*}"
}
