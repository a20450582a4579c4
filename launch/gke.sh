#!/usr/bin/env bash
# Runs prefix_distill on TPUs of a GKE cluster, as a JobSet.
#
#   launch/gke.sh create | setup --name NAME [PLACE] [SLICE]
#   launch/gke.sh run --name NAME [PLACE] [SLICE] --repo URL \
#     --workdir gs://BUCKET/DIR -- --config=configs/math.py:qwen3-1.7b [...]
#   launch/gke.sh logs | status | delete --name NAME [PLACE]
#
# PLACE is a cluster that is there (docs/clusters.md says what it needs):
#   --project PROJECT --location LOCATION --cluster CLUSTER
# SLICE is what a TPU slice is made of:
#   --machine TYPE    machine type, such as ct5lp-hightpu-4t
#   --topology AxB    of the slice's chips, such as 4x4
#   --slices N        how many slices (1), each a node pool NAME-0, NAME-1, ...
#   --zone ZONE       for create: the zone of the nodes
#   --spot            for create: capacity that may be taken away; and for
#                     run there: a pod has 15 seconds to save, not 120
#
#   --name NAME       the JobSet
#   --repo URL        what a pod clones; --ref BRANCH of it (main)
#   --image IMAGE     has Python 3.11 or newer and git (python:3.11)
#   --workdir DIR     gs://BUCKET/DIR; mounted in every pod
#   --restarts N      how often all pods start again if one fails (20)
#   --worker N        whose log (0), of --slice N (0)
#   --keep-nodes      for delete: only the JobSet
#   --dry-run         print the commands and run nothing

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

actions='create setup run logs status delete' switches='spot keep-nodes'
flags='name project location cluster machine topology slices zone repo ref
image workdir restarts worker slice'
flags=${flags//$'\n'/ }
name='' project='' location='' cluster='' machine='' topology='' slices=1
zone='' spot='' repo='' ref=main image=python:3.11 workdir='' restarts=20
worker=0 slice=0 keep_nodes=''
jobset=https://github.com/kubernetes-sigs/jobset/releases/download/v0.10.1
parse "$@"
need_name
need project location cluster slices restarts
need_numbers slices restarts

where=("--project=$project" "--location=$location")
# What `get-credentials` calls the cluster: not another one by mistake.
kube=(kubectl "--context=gke_${project}_${location}_${cluster}")

# Sets what follows from machine type and topology.
read_slice() {
  local rest
  need machine topology
  [[ $machine =~ -([1-9][0-9]*)t$ ]] ||
    fail "--machine is '$machine'; a TPU machine type ends in its number of" \
      "chips, such as ct5lp-hightpu-4t."
  chips=${BASH_REMATCH[1]}
  case $machine in
    ct4p-*) accelerator=tpu-v4-podslice ;;
    ct5lp-*) accelerator=tpu-v5-lite-podslice ;;
    ct5p-*) accelerator=tpu-v5p-slice ;;
    ct6e-*) accelerator=tpu-v6e-slice ;;
    *) fail "--machine is '$machine'; ct4p, ct5lp, ct5p and ct6e are known." ;;
  esac
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "--topology is '$topology'; it is AxB or AxBxC chips."
  rest=$((${topology//x/*}))
  (( rest % chips == 0 )) ||
    fail "--topology $topology is $rest chips, which $machine with $chips of" \
      "them does not divide."
  hosts=$((rest / chips))
}

create() {
  local i tier=()
  need zone
  read_slice
  [[ -z $spot ]] || tier=(--spot)
  for (( i = 0; i < slices; i++ )); do
    run gcloud container node-pools create "$name-$i" \
      "--cluster=$cluster" "${where[@]}" "--node-locations=$zone" \
      "--machine-type=$machine" "--tpu-topology=$topology" \
      "--num-nodes=$hosts" --workload-metadata=GKE_METADATA \
      ${tier[@]+"${tier[@]}"}
  done
}

# As a YAML string. Kubernetes reads $$ in an argument as $.
yaml() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "${text//\$/\$\$}"
}

manifest() {
  # A spot node is gone 30 s after the notice, of which a pod gets 15 or so.
  local grace=120
  [[ -z $spot ]] || grace=15
  cat <<YAML
apiVersion: v1
kind: ServiceAccount
metadata:
  name: prefix-distill
---
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # A job for each slice, and a node pool for each job.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # If a pod fails, all start again, and go on from the last checkpoint.
    maxRestarts: $restarts
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
          spec:
            restartPolicy: Never
            serviceAccountName: prefix-distill
            # To finish an update and save when the node is taken away.
            terminationGracePeriodSeconds: $grace
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
            containers:
            - name: train
              image: $(yaml "$image")
              command:
              - bash
              - -c
              - |
                set -e
                git clone --depth 1 --branch "\$1" "\$0" /prefix_distill
                cd /prefix_distill
                pip install --quiet -e '.[tpu]'
                shift
                # In the shell's place, so that it gets the SIGTERM.
                exec python -m prefix_distill.main --distributed=auto \
                  --notice=$grace "\$@"
              - $(yaml "$repo")
              - $(yaml "$ref")
              - $(yaml "--workdir=/gcs/$directory")
$(
    for argument in "${arguments[@]}"; do
      echo "              - $(yaml "$argument")"
    done
  )
              resources:
                limits:
                  google.com/tpu: $chips
              volumeMounts:
              - name: bucket
                mountPath: /gcs
            volumes:
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: $bucket
                  # All pods write to it, so none keeps what it saw of it.
                  mountOptions: "metadata-cache:ttl-secs:0,\
metadata-cache:negative-ttl-secs:0"
YAML
}

start() {
  need repo ref image
  read_slice
  need_bucket
  need_arguments
  if [[ $dry_run ]]; then
    echo "$(quote_all "${kube[@]}" apply -f -) <<'MANIFEST'"
    manifest
    echo MANIFEST
  else
    manifest | "${kube[@]}" apply -f -
  fi
}

logs() {
  local labels=jobset.sigs.k8s.io/jobset-name=$name
  labels+=,jobset.sigs.k8s.io/job-index=$slice
  labels+=,batch.kubernetes.io/job-completion-index=$worker
  run "${kube[@]}" logs --follow --tail=100 --container=train \
    "--selector=$labels"
}

delete() {
  local i
  run "${kube[@]}" delete jobset "$name" --ignore-not-found
  [[ -z $keep_nodes ]] || return 0
  for (( i = 0; i < slices; i++ )); do
    run gcloud container node-pools delete "$name-$i" \
      "--cluster=$cluster" "${where[@]}" --quiet
  done
}

case $action in
  create) create ;;
  setup)
    run gcloud container clusters get-credentials "$cluster" "${where[@]}"
    run "${kube[@]}" apply --server-side -f "$jobset/manifests.yaml"
    ;;
  run) start ;;
  logs) logs ;;
  status)
    run "${kube[@]}" get jobset "$name"
    run "${kube[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  delete) delete ;;
esac
