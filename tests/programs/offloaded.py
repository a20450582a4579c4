"""What the layers' inputs take on a machine elsewhere: offloaded.py NAME.

Prints a JSON object: for each way to keep them the bytes of temporaries on a
device and on its host; and those that the inputs have.
"""

import os
import sys

from prefix_distill.plan import ENVIRONMENT

# Before JAX is imported.
os.environ.update(ENVIRONMENT)

import json  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import toys  # noqa: E402

from prefix_distill import sharding  # noqa: E402
from prefix_distill.config import MeshSpec  # noqa: E402
from prefix_distill.models.transformer import Model  # noqa: E402
from prefix_distill.plan import programs  # noqa: E402

# More than the fast memory beside a core holds.
ROWS, LENGTH = 32, 4096
CONFIG = toys.model_config(
    dim=256,
    mlp_dim=512,
    num_heads=2,
    num_kv_heads=2,
    head_dim=128,
    num_layers=16,
    vocab_size=512,
)


def main(topology: str) -> None:
  devices = programs.devices(programs.parse_machine(topology))
  mesh = sharding.make_mesh(MeshSpec(1, len(devices), 1), devices)
  rows = sharding.batch_sharding(mesh)
  tokens, mask = (
      jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=rows)
      for dtype in (jnp.int32, bool)
  )
  taken = {}
  for remat in ("full", "offload"):
    model = Model(CONFIG, "bfloat16", remat, mesh)
    params = sharding.with_shardings(model.abstract_params(), mesh)

    def loss(params, tokens, mask, model=model):
      return jnp.sum(model.apply(params, tokens, mask).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss)).lower(params, tokens, mask)
    sizes = lowered.compile().memory_analysis()
    taken[remat] = sizes.temp_size_in_bytes, sizes.host_temp_size_in_bytes
  inputs = CONFIG.num_layers * ROWS // len(devices) * LENGTH * CONFIG.dim * 2
  print(json.dumps(taken | {"inputs": inputs}))


if __name__ == "__main__":
  main(sys.argv[1])
