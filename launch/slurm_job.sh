#!/usr/bin/env bash
# What launch/slurm.sh submits: runs a command once on every node; shortly
# before the time limit the command is told to save, and the job is requeued.

set -euo pipefail

# Slurm signals this shell alone (--signal=B:USR1). The processes get a SIGTERM
# by scancel, which leaves this shell out. It must not go through srun: a srun
# that gets a SIGTERM kills its processes instead of passing it on.
limit=''
# shellcheck disable=SC2329  # By the trap.
save() {
  limit=1
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap save USR1

# Without --cpu-bind=none a node's one process may be kept on one core. If one
# process fails, the others could only wait for it.
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --label "$@" &
step=$!

# The trap interrupts a wait; the last one has the status.
while kill -0 "$step" 2>/dev/null; do
  wait "$step" || true
done
status=0
wait "$step" || status=$?

# A run that reached its last update in the meantime ended with 0.
if [[ $limit ]] && (( status )); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
