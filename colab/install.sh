#!/usr/bin/env bash
# Installs prefix_distill for the accelerator of this machine, and checks that
# JAX uses it: bash colab/install.sh
#
# On Colab jax is there already, with a plugin for its GPU. pip must lift jax,
# jaxlib and that plugin together: a newer jaxlib beside an old plugin leaves the
# GPU idle, and JAX computes on the CPU without a word. So the extra of the
# plugin that is there is taken, or else the one that the driver allows.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
extra=''
if nvidia-smi -L >/dev/null 2>&1; then
  installed=$(pip list 2>/dev/null | grep -oE '^jax-cuda1[23]-plugin' || true)
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader |
    head -n 1 | cut -d. -f1)
  case $installed in
    *cuda12*) extra='[cuda12]' ;;
    *cuda13*) extra='[cuda13]' ;;
    *) if ((driver < 580)); then extra='[cuda12]'; else extra='[cuda13]'; fi ;;
  esac
elif compgen -G '/dev/accel*' >/dev/null ||
  compgen -G '/dev/vfio/[0-9]*' >/dev/null ||
  [[ -n ${COLAB_TPU_ADDR:-} ]]; then
  extra='[tpu]'
fi
echo "Installing prefix_distill$extra ..."
pip install -q "$root$extra"
python - <<'PYTHON'
import sys

from prefix_distill import sharding

idle = sharding.unused_accelerator()
if idle:
  sys.exit(f"error: {idle}")
print(f"It computes on {sharding.describe_devices()}.")
PYTHON
