#!/usr/bin/env bash
# Runs prefix_distill on a SLURM cluster: one process a node, with all its GPUs.
#
#   launch/slurm.sh setup [--python PYTHON] [--cuda 12]
#   launch/slurm.sh run --name NAME --workdir DIR [FLAGS] \
#     -- --config=configs/math.py:qwen3-1.7b [...]
#   launch/slurm.sh logs | status | delete --name NAME --workdir DIR
#
# To be called in the root of the repository, which lies on a file system that
# all nodes see, as does --workdir.
#
#   --name NAME       name of the job; of one name, one runs at a time
#   --workdir DIR     where the run is kept; the log is DIR/slurm.log
#   --nodes N         how many nodes (1)
#   --gpus N          GPUs of a node (8)
#   --time LIMIT      time limit of one turn, as for sbatch (24:00:00)
#   --notice SECONDS  how long before the limit the run is told to save and
#                     is requeued; more than an update takes (600)
#   --partition P     as for sbatch; others by its environment, SBATCH_ACCOUNT
#   --python PYTHON   for setup: makes the environment .venv (python3)
#   --cuda VERSION    for setup: 13, or 12 for older GPUs and drivers (13)
#   --dry-run         print the commands and run nothing

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"

actions='create setup run logs status delete' switches=''
flags='name workdir nodes gpus time notice partition python cuda'
name='' workdir='' nodes=1 gpus=8 time=24:00:00 notice=600 partition=''
python=python3 cuda=13
parse "$@"
need_numbers nodes gpus notice
need_no_bucket
user=$(id -un)

# Seconds of a time limit, as sbatch reads it; 0 for no limit.
seconds() {
  local days=0 clock=$1 parts
  if [[ $clock == *-* ]]; then
    days=${clock%%-*} clock=${clock#*-}
  fi
  IFS=: read -r -a parts <<<"$clock"
  # D-H, D-H:M, D-H:M:S and H:M:S begin with hours; M and M:S with minutes.
  [[ $1 == *-* ]] || case ${#parts[@]} in 1 | 2) parts=(0 "${parts[@]}") ;; esac
  echo $((((10#$days * 24 + 10#${parts[0]}) * 60 + 10#${parts[1]:-0}) * 60 + \
    10#${parts[2]:-0}))
}

case $action in
  create)
    echo "SLURM hands out the nodes by itself: create is not needed."
    ;;
  setup)
    need python cuda
    [[ $cuda == 1[23] ]] || fail "--cuda is '$cuda'; it is 12 or 13."
    run "$python" -m venv .venv
    run .venv/bin/pip install -e ".[cuda$cuda]"
    ;;
  run)
    need name workdir nodes gpus time notice
    need_arguments
    if [[ ! ${time,,} =~ ^(unlimited|infinite|-1)$ ]]; then
      [[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
        fail "--time is '$time'; it is MINUTES, HOURS:MINUTES:SECONDS," \
          "DAYS-HOURS or UNLIMITED, as for sbatch."
      limit=$(seconds "$time")
      (( limit == 0 || notice < limit )) ||
        fail "--notice $notice is not below the $limit seconds of --time" \
          "$time; the job would be told to save at once, again and again."
    fi
    command=(
      sbatch "--job-name=$name" --dependency=singleton "--nodes=$nodes"
      --ntasks-per-node=1 "--gpus-per-node=$gpus" --exclusive --mem=0
      "--time=$time" --requeue "--signal=B:USR1@$notice"
      --open-mode=append "--output=$workdir/slurm.log"
    )
    [[ -z $partition ]] || command+=("--partition=$partition")
    run mkdir -p "$workdir"
    run "${command[@]}" "$here/slurm_job.sh" .venv/bin/python \
      -m prefix_distill.main --distributed=slurm "--workdir=$workdir" \
      "--notice=$notice" \
      "${arguments[@]}"
    ;;
  logs)
    need workdir
    run tail -n 100 -F "$workdir/slurm.log"
    ;;
  status)
    need name workdir
    run squeue "--user=$user" "--name=$name"
    run tail -n 3 "$workdir/slurm.log"
    ;;
  delete)
    need name
    run scancel "--user=$user" "--name=$name"
    ;;
esac
