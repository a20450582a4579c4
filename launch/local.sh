#!/usr/bin/env bash
# Runs prefix_distill on this machine.
#
#   launch/local.sh run [FLAGS] -- --config=configs/math.py [...]
#
# Without flags it is one process with all accelerators of the machine. Several
# processes rehearse on the CPU what several hosts do.
#
#   --workdir DIR     where the run is kept (runs/ and the config's name)
#   --processes N     how many processes (1); more than 1 run on the CPU
#   --devices K       CPU devices of each process (1 if there are several)
#   --port PORT       where several processes meet (one at random)
#   --grace SECONDS   what the others get to end by themselves if one fails (30)
#   --python PYTHON   the interpreter (python)
#   --dry-run         print the commands and run nothing
#
# If a process fails, the others are killed, and the exit status is its. Ctrl-C
# goes to all; they save and end, and the same command goes on. A second Ctrl-C
# does not wait.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

actions='run' flags='workdir processes devices port grace python' switches=''
workdir='' processes=1 devices='' port=$((20000 + RANDOM % 10000)) grace=30
python=python
parse "$@"
need processes port grace python
need_numbers processes devices port grace
need_no_bucket
need_arguments

main=()
(( processes == 1 )) || devices=${devices:-1}
if [[ $devices ]]; then
  count=--xla_force_host_platform_device_count=$devices
  # JAX would prefer the number in that variable.
  main+=(env -u JAX_NUM_CPU_DEVICES JAX_PLATFORMS=cpu)
  main+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$count")
fi
main+=("$python" -m prefix_distill.main)
[[ -z $workdir ]] || arguments=("--workdir=$workdir" "${arguments[@]}")

if (( processes == 1 )); then
  [[ $dry_run ]] || exec "${main[@]}" "${arguments[@]}"
  run "${main[@]}" "${arguments[@]}"
  exit
fi

pids=()
# shellcheck disable=SC2329  # By the trap.
forward() {
  local pid
  for pid in "${pids[@]}"; do
    kill -s "$1" -- "$pid" 2>/dev/null || true
  done
}
trap 'forward INT' INT
trap 'forward TERM' TERM

# Each is a process group of its own, so that Ctrl-C reaches it once, through
# the trap, and not as a signal that background processes ignore.
set -m
for (( i = 0; i < processes; i++ )); do
  command=(
    "${main[@]}" "--distributed=localhost:$port" "--num_processes=$processes"
    "--process_id=$i" "${arguments[@]}"
  )
  if [[ $dry_run ]]; then
    echo "$(quote_all "${command[@]}") &"
  else
    "${command[@]}" </dev/null &
    pids+=($!)
  fi
done
set +m
if [[ $dry_run ]]; then
  echo wait
  exit
fi

status=0 deadline=0
# Of a pipe that nobody writes to, to wait without a child: a SIGINT just when
# one starts or ends may be lost to the trap.
exec {never}<> <(:)
while (( ${#pids[@]} )); do
  read -rt 0.2 -u "$never" || true
  for i in "${!pids[@]}"; do
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[i]"
    (( code && ! status )) || continue
    status=$code
    # The others cannot go on without it. They have time to say so, or, after a
    # Ctrl-C, when all have saved, to end in order.
    deadline=$((SECONDS + grace))
    echo "Process $i ended with status $code; the others end as well." >&2
  done
  if (( status && SECONDS >= deadline && ${#pids[@]} )); then
    for pid in "${pids[@]}"; do
      kill -KILL -- "-$pid" 2>/dev/null || true
    done
  fi
done
exit "$status"
