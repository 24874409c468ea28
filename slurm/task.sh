#!/usr/bin/env bash
# One task of srun is one rank: bash slurm/task.sh LOGS COMMAND...
# Keeps LOGS/rank_N.log, and in LOGS/rank_N.exit when, how and where the rank ended.
set -uo pipefail
log=$1/rank_$SLURM_PROCID.log
record=${log%.log}.exit
shift

# Ignored until Python listens: a rank that such a signal killed while it starts would look like one
# that has saved, and the others would wait for it. The job asks again.
trap '' USR1 TERM INT
echo "--- rank $SLURM_PROCID on $SLURMD_NODENAME, $(date -u '+%F %T') UTC" >>"$log"
if ((SLURM_PROCID == 0)); then # its story is also the job's log
    "$@" 2>&1 | tee -a "$log"
else
    ("$@" >>"$log" 2>&1)
fi
code=${PIPESTATUS[0]}
printf '%s %s %s %s\n' "$(date +%s.%N)" "$code" "$SLURM_PROCID" "$SLURMD_NODENAME" >"$record"

case $code in
130 | 138 | 143) exit 0 ;; # stopped by a signal: no crash, for which srun would end the others
*) exit "$code" ;;
esac
