"""Compiles the attention of one query for GPUs that are elsewhere.

Prints a JSON object: for each case, what the compiled program's instructions
are, the bytes of its scratch memory and those of one cache, on a device.
"""

import json
import os
import re

from prefix_distill.plan import ENVIRONMENT

# Read when jax is imported.
os.environ |= ENVIRONMENT
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from prefix_distill.models import attention  # noqa: E402
from prefix_distill.models.kv_cache import LayerCache  # noqa: E402
from prefix_distill.plan import programs  # noqa: E402

_OPCODE = re.compile(r" = (?:\(.*?\)|\S+) ([\w-]+)\(")
# Views of what is there.
_FREE = ("parameter", "bitcast", "get-tuple-element", "tuple")
# [B, K, G, M, H] and the devices that split B and K.
_CASES = {
    "whole": ((64, 8, 2, 2304, 128), (1, 1)),
    "split": ((8, 8, 2, 16384, 128), (1, 1)),
    "odd": ((3, 5, 3, 1000, 64), (1, 1)),
    "devices": ((64, 8, 2, 2304, 128), (2, 2)),
}


def _compiled(sizes, devices, dtype):
  batch, kv_heads, group, columns, head_dim = sizes
  found = programs.devices(programs.parse_machine(f"h100:{np.prod(devices)}"))
  mesh = jax.sharding.Mesh(
      np.array(found).reshape(devices),
      ("data", "tensor"),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )

  def array(shape, dtype, *spec):
    spec = jax.sharding.PartitionSpec(*spec)
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
    )

  heads = ("data", "tensor")
  cache = (batch, kv_heads, columns, head_dim)
  kept, scales = array(cache, dtype, *heads), ()
  if dtype == jnp.int8:
    scales = [array(cache[:3], jnp.float32, *heads)] * 2
  args = (
      array((batch, kv_heads * group, head_dim), jnp.bfloat16, *heads),
      LayerCache(kept, kept, *scales),
      array((batch,), jnp.int32, "data"),
  )
  function = jax.shard_map(
      attention.decode_attention,
      mesh=mesh,
      in_specs=jax.tree.map(lambda x: x.sharding.spec, args),
      out_specs=args[0].sharding.spec,
      check_vma=False,
  )
  return jax.jit(function).trace(*args).lower().compile(), kept


def main() -> None:
  found = {}
  for name, (sizes, devices) in _CASES.items():
    for dtype in (jnp.bfloat16, jnp.int8):
      program, cache = _compiled(sizes, devices, dtype)
      text = program.as_text()
      opcodes = _OPCODE.findall(text[text.index("\nENTRY") :])
      found[f"{name} {jnp.dtype(dtype)}"] = {
          "instructions": [x for x in opcodes if x not in _FREE],
          "scratch": program.memory_analysis().temp_size_in_bytes,
          "cache": cache.size * cache.dtype.itemsize // int(np.prod(devices)),
      }
  print(json.dumps(found))


if __name__ == "__main__":
  main()
