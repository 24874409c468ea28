# Body of the pretraining jobs: submits the script that sources it, or is the job.
# Needs CONFIG; the arguments are overrides. docs/slurm.md tells what happens on which ending.
# shellcheck shell=bash
# shellcheck source=slurm/job.sh
source slurm/job.sh
[[ ${BASH_SOURCE[0]} != "$0" ]] ||
    die "slurm/pretrain.sh is what others source: run slurm/pretrain_plt_moe.sh, with CONFIG=FILE"

# The job's name for scontrol; an array's own number would stand for all of its tasks.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-${SLURM_JOB_ID:-}}
ASKED_TO_STOP='^(130|138|143)$' # 128 + SIGINT, SIGUSR1, SIGTERM
HANG=75                         # HANG_EXIT_CODE of pltmoe/runtime/heartbeat.py

# check_fits CONFIG GPUS OVERRIDES...: refuses what cannot fit, and names the number.
check_fits() {
    if [[ -z $GPU_TYPE ]]; then
        say "GPU_TYPE is empty: not checked whether $1 fits"
    else
        run_python tools/plan.py --config "$1" --gpus "$2" --gpu "$GPU_TYPE" "${@:3}" >&2
    fi
}

# check_data CONFIG OVERRIDES...: refuses what reads files that are not there.
check_data() {
    if [[ $CHECK_DATA != yes ]]; then
        say "CHECK_DATA is $CHECK_DATA: not checked whether the data of $1 are there"
    else
        run_python tools/plan.py --config "$1" --data "${@:2}" >&2 ||
            die "(CHECK_DATA=no submits from a machine that does not see the data's file system)"
    fi
}

# What SCRIPT itself tells sbatch: directive nodes SCRIPT
directive() { sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$2"; }

# seconds LIMIT: of a time limit in any of sbatch's forms; nothing for one without end.
seconds() {
    local days=0 h=0 m=0 s=0
    [[ $1 =~ ^[0-9]+([-:][0-9]+)*$ ]] || return 0
    case $1 in
    *-*) IFS=-: read -r days h m s <<<"$1" ;;
    *:*:*) IFS=: read -r h m s <<<"$1" ;;
    *) IFS=: read -r m s <<<"$1" ;;
    esac
    echo $((((10#$days * 24 + 10#${h:-0}) * 60 + 10#${m:-0}) * 60 + 10#${s:-0}))
}

# check_time LIMIT SCRIPT: refuses a job that would be asked to stop as soon as it begins.
check_time() {
    local limit lead signal=${SBATCH_SIGNAL:-$(directive signal "$2")}
    limit=$(seconds "$1")
    lead=60 # where --signal names none
    [[ $signal != *@* ]] || lead=$((10#${signal##*@}))
    [[ -z $limit || -z $signal ]] || ((limit > lead + 60)) ||
        die "a time limit of $1 leaves no time to train: Slurm sends --signal=$signal up to" \
            "$((lead + 60)) s before it. Give more time, or a later signal (SBATCH_SIGNAL=B:USR1@60)"
}

check_and_submit() {
    local script nodes gpus one
    script=slurm/$(basename "$0")
    nodes=${NODES:-$(directive nodes "$script")}
    gpus=${GPUS_PER_NODE:-$(directive gpus-per-node "$script")}
    check_time "${SBATCH_TIMELIMIT:-$(directive time "$script")}" "$script"
    if can_check; then
        for one in "${CONFIGS[@]}"; do
            check_fits "$one" $((nodes * gpus)) "${OVERRIDES[@]}" "$@"
            check_data "$one" "${OVERRIDES[@]}" "$@"
        done
    fi
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

# Nodes of which no rank has left its line, and that run nothing any more or do not see this folder.
lost_nodes() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        grep -qs " $node\$" "$LOGS"/rank_*.exit ||
            timeout 20 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
                test -r "$PWD/slurm/task.sh" >/dev/null 2>&1 ||
            echo "$node" &
    done | sort | paste -sd,
}

# After a hang: the node of the ranks that were behind, if it is one. Those that end first waited.
node_behind() {
    local behind=$OUTPUT/logs/ranks_behind.txt rank nodes=() # written by pltmoe/runtime/heartbeat.py
    [[ -f $behind ]] || { say "a hang, for which no rank is named" && return; }
    mapfile -t nodes < <(while read -r rank; do
        sed -n "s/^--- rank $rank on \([^,]*\),.*/\1/p" "$LOGS/rank_$rank.log"
    done <"$behind" | sort -u)
    say "a hang; behind were: rank $(paste -sd' ' "$behind") on ${nodes[*]}"
    ((${#nodes[@]} != 1)) || echo "${nodes[0]}"
}

conclude() {
    local crash code rank node ended lost
    is_running || leave
    crash=$(first_crash)
    lost=$(lost_nodes)
    ended=$(find "$LOGS" -name 'rank_*.exit' | wc -l)
    if [[ -n $lost ]]; then
        say "$lost does not answer or does not see $PWD: lost, with its ranks" \
            "(what the others said: $LOGS)"
        after_crash "$lost"
    elif [[ -n $crash ]]; then
        read -r _ code rank node <<<"$crash"
        say "rank $rank on $node ended first, with exit code $code; the end of $LOGS/rank_$rank.log:"
        tail -n 20 "$LOGS/rank_$rank.log" >&2
        [[ $code != 2 ]] || die "exit code 2 means that the run has to be changed: not requeued"
        [[ $code != "$HANG" ]] || node=$(node_behind)
        after_crash "$node"
    elif ((ended < SLURM_NTASKS)); then
        say "only $ended of $SLURM_NTASKS ranks ended by themselves (logs: $LOGS)"
        after_crash ""
    elif cat "$LOGS"/rank_*.exit | awk -v asked="$ASKED_TO_STOP" '$2 ~ asked {n++} END {exit !n}'; then
        if [[ $(newest) == "$BEGAN_AT" ]]; then
            say "asked to stop before the first step: a time limit has to be longer than the start"
            after_crash ""
        else
            requeue "stopped with work left"
        fi
    fi
}

# The checkpoint that the run would go on from.
newest() { cat "$OUTPUT/checkpoints/latest" 2>/dev/null || echo none; }

# after_crash NODE: another try, if that has not been tried too often from the same checkpoint.
after_crash() {
    local newest tries
    newest=$(newest)
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
    local excluded others allowed='^(idle|mixed|allocated|completing|planned)[-+~#%]?$'
    excluded=$(scontrol show job "$JOB" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [[ $excluded == "(null)" ]] || excluded+=,
    excluded=${excluded#(null)}$1
    # --states would not do: to it a drained node is idle as well.
    others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %T' |
        awk -v allowed="$allowed" '$2 ~ allowed {print $1}' | sort -u |
        comm -23 - <(scontrol show hostnames "$excluded" | sort -u) | wc -l)
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
check_time "$(patiently squeue --noheader --jobs="$JOB" --format=%l)" "$0"
check_fits "$CONFIG" "$SLURM_NTASKS" "${OVERRIDES[@]}" "$@"
OUTPUT=$(field train.output_dir "$CONFIG" "$@")
LOGS=$OUTPUT/logs/job_$JOB/leg_${SLURM_RESTART_COUNT:-0}
mkdir -p "$LOGS"
say "$CONFIG on $SLURM_NTASKS GPUs of $SLURM_JOB_NODELIST; every rank's log: $LOGS"
BEGAN_AT=$(newest)
run_ranks "${OVERRIDES[@]}" "$@"
conclude
