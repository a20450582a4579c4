#!/usr/bin/env bash
# Runs prefix_distill on a TPU slice, or several, with gcloud.
#
#   launch/tpu.sh create --name NAME --zone ZONE --type v5litepod-16 [--spot]
#   launch/tpu.sh setup --name NAME --zone ZONE --repo URL
#   launch/tpu.sh run --name NAME --zone ZONE --workdir gs://BUCKET/DIR \
#     -- --config=configs/math.py:qwen3-1.7b [...]
#   launch/tpu.sh logs | status | delete --name NAME --zone ZONE
#
#   --name NAME       the queued resource, or the TPU VM
#   --zone ZONE       where; --project PROJECT if it is not gcloud's default
#   --plain           a TPU VM that is there or not, instead of a queued
#                     resource; to be given with every sub-command
#   --type TYPE       accelerator type of a slice
#   --version NAME    runtime version (by the type: v5e, v5p, v6e)
#   --slices N        how many slices (1); more than 1 need a queued resource
#   --spot            capacity that is cheaper and may be taken away
#   --repo URL        what to clone; --ref BRANCH of it (main)
#   --workdir DIR     gs://BUCKET/DIR; mounted on every host
#   --worker N        whose log (0), of --slice N (0)
#   --dry-run         print the commands and run nothing
#
# After a preemption: delete, create, setup, run with the same --workdir.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

actions='create setup run logs status delete' switches='plain spot'
flags='name zone project type version slices repo ref workdir worker slice'
name='' zone='' project='' plain='' spot='' type='' version='' slices=1
repo='' ref=main workdir='' worker=0 slice=0
parse "$@"
need_name
need zone slices
need_numbers slices
[[ -z $plain ]] || (( slices == 1 )) ||
  fail "--plain is one slice, and --slices is $slices; leave out one of them."

kind=queued-resources
[[ -z $plain ]] || kind=tpu-vm
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")

tpu() {
  run gcloud compute tpus "$kind" "$@" "${where[@]}"
}

# Runs a command on all hosts of all slices, or on one.
on_hosts() {
  local hosts=(--worker=all)
  [[ $plain ]] || hosts+=(--node=all)
  tpu ssh "$name" "${hosts[@]}" "--command=$1"
}

on_host() {
  local host=("--worker=$worker")
  [[ $plain ]] || host+=("--node=$slice")
  tpu ssh "$name" "${host[@]}" "--command=$1"
}

default_version() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--version is missing, and none is known for --type $type." ;;
  esac
}

create() {
  local tier=() nodes=("--node-id=$name")
  need type
  [[ $version ]] || version=$(default_version)
  (( slices == 1 )) || nodes=("--node-count=$slices" "--node-prefix=$name")
  [[ -z $spot ]] || tier=(--spot)
  if [[ $plain ]]; then
    tpu create "$name" "--accelerator-type=$type" "--version=$version" \
      ${tier[@]+"${tier[@]}"}
  else
    tpu create "$name" "--accelerator-type=$type" \
      "--runtime-version=$version" "${nodes[@]}" ${tier[@]+"${tier[@]}"}
  fi
}

# The hosts' own Python may be too old, so uv brings one.
setup() {
  need repo ref
  on_hosts "set -e
test -d ~/prefix_distill || git clone $(quote "$repo") ~/prefix_distill
cd ~/prefix_distill
git fetch origin $(quote "$ref")
git checkout --detach FETCH_HEAD
curl -LsSf https://astral.sh/uv/install.sh | sh
test -d .venv || ~/.local/bin/uv venv --python 3.11 .venv
~/.local/bin/uv pip install --python .venv/bin/python -e '.[tpu]'
if ! command -v gcsfuse; then
  key=/usr/share/keyrings/cloud.google.asc
  packages=https://packages.cloud.google.com/apt
  curl -fsS \$packages/doc/apt-key.gpg | sudo tee \$key > /dev/null
  echo \"deb [signed-by=\$key] \$packages gcsfuse-\$(lsb_release -cs) main\" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get update
  sudo apt-get install -y gcsfuse
fi"
}

# Hosts write to one directory, so none may keep what it saw of it (on large
# machines gcsfuse does that by default, for ever). The run outlives the ssh
# connection; its process id and its log stay on the host.
start() {
  need_bucket
  need_arguments
  on_hosts "set -e
cd ~/prefix_distill
if test -f ~/run.pid && kill -0 \$(cat ~/run.pid) 2> /dev/null; then
  echo \"\$(hostname): a run is alive; see logs and status.\" >&2
  exit 1
fi
mkdir -p ~/gcs/$bucket
mountpoint -q ~/gcs/$bucket || gcsfuse --metadata-cache-ttl-secs=0 \
--metadata-cache-negative-ttl-secs=0 $bucket ~/gcs/$bucket
setsid nohup .venv/bin/python -m prefix_distill.main --distributed=auto \
--workdir=\"\$HOME\"/gcs/$bucket/$(quote "$directory") \
$(quote_all "${arguments[@]}") >> ~/run.log 2>&1 < /dev/null &
echo \$! > ~/run.pid"
}

status() {
  local field=state.state
  [[ -z $plain ]] || field=state
  tpu describe "$name" "--format=value($field)"
  # shellcheck disable=SC2016  # For the hosts' shells.
  on_hosts 'if test -f ~/run.pid && kill -0 $(cat ~/run.pid) 2> /dev/null; then
  echo "$(hostname): runs"
else
  echo "$(hostname): does not run: $(tail -n 1 ~/run.log)"
fi'
}

case $action in
  create) create ;;
  setup) setup ;;
  run) start ;;
  logs) on_host 'tail -n 100 -F ~/run.log' ;;
  status) status ;;
  delete)
    # --force deletes the slices along with the request for them.
    if [[ $plain ]]; then
      tpu delete "$name" --quiet
    else
      tpu delete "$name" --force --quiet
    fi
    ;;
esac
