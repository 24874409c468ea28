# Body of the pretraining jobs: submits the script that sources it, or is the job.
# Needs CONFIG; the arguments are overrides. docs/slurm.md tells what happens on which ending.
# shellcheck shell=bash
# shellcheck source=slurm/job.sh
source slurm/job.sh

# The job's name for scontrol; an array's own number would stand for all of its tasks.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-${SLURM_JOB_ID:-}}
ASKED_TO_STOP='^(130|138|143)$' # 128 + SIGINT, SIGUSR1, SIGTERM: tools/pretrain.py has saved

# check_fits CONFIG GPUS OVERRIDES...: refuses what cannot fit, and names the number.
check_fits() {
    if [[ -z $GPU_TYPE ]]; then
        say "GPU_TYPE is empty: not checked whether $1 fits"
    elif in_job || type "${CONTAINER[0]:-$PYTHON}" >/dev/null 2>&1; then
        run_python tools/plan.py --config "$1" --gpus "$2" --gpu "$GPU_TYPE" "${@:3}" >&2
    else
        say "no ${CONTAINER[0]:-$PYTHON} here: whether $1 fits is checked when the job starts"
    fi
}

# What SCRIPT itself tells sbatch: directive nodes SCRIPT
directive() { sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$2"; }

check_and_submit() {
    local script nodes gpus one
    script=slurm/$(basename "$0")
    nodes=${NODES:-$(directive nodes "$script")}
    gpus=${GPUS_PER_NODE:-$(directive gpus-per-node "$script")}
    for one in "${CONFIGS[@]}"; do
        check_fits "$one" $((nodes * gpus)) "${OVERRIDES[@]}" "$@"
    done
    submit "$script" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" -- "$@"
}

# Asks the ranks to save and stop, again and again: one that is still starting does not listen.
ask_ranks() {
    say "the time limit is near: asking the ranks to save and stop"
    while kill -0 $$; do
        scancel --quiet --signal=USR1 "$JOB" || true
        sleep 20
    done 2>/dev/null &
}

# One task per GPU. srun is in the background: a trap runs only while the shell waits.
run_ranks() {
    local nodes step
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${nodes[0]} MASTER_PORT=$((PORT_BASE + SLURM_JOB_ID % 10000))
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${SRUN_OPTIONS[@]}" \
        bash slurm/task.sh "$LOGS" "${CONTAINER[@]}" "$PYTHON" \
        tools/pretrain.py --config "$CONFIG" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a signal ends wait, not srun
}

# How the ranks ended, from the line that each left: TIME CODE RANK NODE of the first to crash.
first_crash() {
    { cat "$LOGS"/rank_*.exit 2>/dev/null || true; } | LC_ALL=C sort -n |
        awk -v asked="$ASKED_TO_STOP" '$2 != 0 && $2 !~ asked && !n++'
}

# Nodes of which no rank has left its line, and that do not run anything any more.
lost_nodes() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        grep -qs " $node\$" "$LOGS"/rank_*.exit ||
            timeout 20 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" true >/dev/null 2>&1 ||
            echo "$node" &
    done | sort | paste -sd,
}

conclude() {
    local crash code rank node ended lost
    is_running || leave
    crash=$(first_crash)
    lost=$(lost_nodes)
    ended=$(find "$LOGS" -name 'rank_*.exit' | wc -l)
    if [[ -n $lost ]]; then
        say "$lost does not answer: lost, with its ranks (what the others said: $LOGS)"
        after_crash "$lost"
    elif [[ -n $crash ]]; then
        read -r _ code rank node <<<"$crash"
        say "rank $rank on $node ended first, with exit code $code; the end of $LOGS/rank_$rank.log:"
        tail -n 20 "$LOGS/rank_$rank.log" >&2
        [[ $code != 2 ]] || die "exit code 2 means that the run has to be changed: not requeued"
        after_crash "$node"
    elif ((ended < SLURM_NTASKS)); then
        say "only $ended of $SLURM_NTASKS ranks ended by themselves (logs: $LOGS)"
        after_crash ""
    elif cat "$LOGS"/rank_*.exit | awk -v asked="$ASKED_TO_STOP" '$2 ~ asked {n++} END {exit !n}'; then
        requeue "stopped with work left"
    fi
}

# after_crash NODE: another try, if that has not been tried too often from the same checkpoint.
after_crash() {
    local newest tries
    mkdir -p "$OUTPUT/checkpoints"
    newest=none
    [[ ! -f $OUTPUT/checkpoints/latest ]] || newest=$(<"$OUTPUT/checkpoints/latest")
    echo "$newest $1" >>"$LOGS/../crashes"
    tries=$(grep -c "^$newest " "$LOGS/../crashes")
    if ((tries > MAX_CRASH_RESTARTS)); then
        say "crash $tries since checkpoint $newest, MAX_CRASH_RESTARTS is $MAX_CRASH_RESTARTS: giving up"
        exit 1
    fi
    requeue "crash $tries since checkpoint $newest"
    [[ -z $1 || $EXCLUDE_CRASHED_NODES != yes ]] || exclude "$1"
}

# patiently COMMAND...: again, if slurmctld is too busy to answer.
patiently() {
    local try
    for try in 1 2 3 4 5; do
        "$@" && return
        sleep $((try * 5))
    done
    return 1
}

is_running() { [[ $(patiently squeue --noheader --jobs="$JOB" --format=%T) == RUNNING ]]; }
leave() { die "the job was cancelled or preempted: what follows is Slurm's"; }

requeue() {
    say "$1: requeueing job $JOB"
    trap '' TERM # which a requeue sends to all that still runs here, scontrol too
    patiently scontrol requeue "$JOB"
}

# exclude NODE: the requeued job shall not get it again.
exclude() {
    local excluded others
    excluded=$(scontrol show job "$JOB" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [[ $excluded == "(null)" ]] || excluded+=,
    excluded=${excluded#(null)}$1
    others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u | wc -l)
    others=$((others - $(scontrol show hostnames "$excluded" | wc -l)))
    if ((others < SLURM_JOB_NUM_NODES)); then
        say "too few other nodes in $SLURM_JOB_PARTITION: $1 stays allowed"
    else
        patiently scontrol update JobId="$JOB" ExcNodeList="$excluded"
        say "excluded $excluded"
    fi
}

if ! in_job; then
    check_and_submit "$@"
    exit
fi
trap ask_ranks USR1
trap : TERM # scancel sends it to this shell too, which has to wait for the ranks
check_fits "$CONFIG" "$SLURM_NTASKS" "${OVERRIDES[@]}" "$@"
OUTPUT=$(run_python tools/pretrain.py --config "$CONFIG" --print train.output_dir "${OVERRIDES[@]}" "$@")
LOGS=$OUTPUT/logs/job_$JOB/leg_${SLURM_RESTART_COUNT:-0}
mkdir -p "$LOGS"
say "$CONFIG on $SLURM_NTASKS GPUs of $SLURM_JOB_NODELIST; every rank's log: $LOGS"
run_ranks "${OVERRIDES[@]}" "$@"
conclude
