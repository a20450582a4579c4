"""Compiles a segment of decoding: decode_kernels.py MACHINE DTYPE.

Of Qwen3-1.7B's layers, 2 and 4 of them, with 64 rows in a cache of 2,304
columns. Prints a JSON object: kernels of a token in each, the largest result in
the loop that is no cache (in bytes), bytes of the cache of a layer, temporary
bytes, whether the number of tokens is known, and conditionals in the loop.
"""

import dataclasses
import json
import os
import pathlib
import sys

from prefix_distill.plan import ENVIRONMENT

# Read when jax is imported.
os.environ |= ENVIRONMENT | {"TPU_STDERR_LOG_LEVEL": "1"}
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)

_ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(_ROOT / "benchmarks"))

import jax  # noqa: E402
import kernels  # noqa: E402
import numpy as np  # noqa: E402

from prefix_distill import sharding  # noqa: E402
from prefix_distill.models.config import QWEN3_1_7B  # noqa: E402
from prefix_distill.models.transformer import Model  # noqa: E402
from prefix_distill.plan import cost  # noqa: E402
from prefix_distill.plan import programs  # noqa: E402
from prefix_distill.rollout import generate  # noqa: E402

_ROWS, _COLUMNS = 64, 2304


def _compile(mesh: jax.sharding.Mesh, layers: int, dtype: str):
  architecture = dataclasses.replace(
      QWEN3_1_7B, num_layers=layers
  )
  model = Model(architecture, "bfloat16", mesh=mesh)
  config = generate.SamplerConfig(
      (1, 2), 0, architecture.vocab_size, cache_dtype=dtype
  )
  place = generate.state_shardings(model, config)
  layout = jax.eval_shape(model.decode_layout, model.abstract_params())
  layout = sharding.placed(layout, sharding.decode_params(layout, mesh))
  columns = generate.columns(model, config, _COLUMNS)
  state = jax.eval_shape(
      lambda: generate.empty(
          model, config, _ROWS, columns, jax.random.key(0)
      )
  )
  state, steps = sharding.placed(state, place), generate.segment(model)
  compiled = (
      jax.jit(
          lambda *args: generate.decode(model, config, steps, *args),
          donate_argnums=1,
          out_shardings=(place, sharding.batch_sharding(mesh)),
          compiler_options=generate.compiler_options(mesh),
      )
      .trace(layout, state, generate.Draw.of(2048))
      .lower()
      .compile()
  )
  return compiled, sharding.bytes_per_device(state.cache.layers[0])


def main() -> None:
  machine, dtype = sys.argv[1:]
  devices = programs.devices(programs.parse_machine(machine))[:1]
  mesh = jax.sharding.Mesh(
      np.array(devices).reshape(1, 1, 1),
      ("data", "fsdp", "tensor"),
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  found = {}
  for layers in (2, 4):
    compiled, cache = _compile(mesh, layers, dtype)
    text = compiled.as_text()
    found[f"kernels_{layers}"] = kernels.kernels_a_token(text)
  module = cost.Module(text)
  (loop, where) = max(
      (
          (op, name)
          for name, ops in module.computations.items()
          if name not in module.fused
          for op in ops.values()
          if op.opcode == "while"
      ),
      key=lambda x: len(module.computations[x[0].attribute("body")]),
  )
  body = module.computations[loop.attribute("body")]
  found |= {
      "cache": cache,
      "temporary": compiled.memory_analysis().temp_size_in_bytes,
      "trips": module.trip_count(loop, where, {})[0],
      "conditionals": sum(op.opcode == "conditional" for op in body.values()),
      # What a scatter writes in place is no copy.
      "copied": max(
          cost.num_bytes(op.shape)
          for op in body.values()
          if op.opcode in ("copy", "transpose", "convert")
      ),
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main()
