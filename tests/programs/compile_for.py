"""Compiles for a machine that is elsewhere: compile_for.py tpu|gpu.

Prints a JSON object of what the compiled programs call: for each program, the
kernels' names and how often they appear.
"""

import json
import os
import re
import sys

from prefix_distill.plan import ENVIRONMENT

# Read when jax is imported.
os.environ |= ENVIRONMENT | {"TPU_STDERR_LOG_LEVEL": "1"}
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from prefix_distill import sharding  # noqa: E402
from prefix_distill.models.config import ModelConfig  # noqa: E402
from prefix_distill.models.config import RopeConfig  # noqa: E402
from prefix_distill.models.transformer import Model  # noqa: E402
from prefix_distill.plan import programs  # noqa: E402
from prefix_distill.rollout import generate  # noqa: E402
from prefix_distill.structs import PromptBatch  # noqa: E402

_KERNEL = re.compile(r'custom_call_target="([^"]+)"')
# An odd length, for a kernel that takes none.
_ROWS, _PROMPT, _LENGTH = 8, 255, 256


def _devices(platform: str) -> list[jax.Device]:
  if platform == "tpu":
    return programs.devices(programs.parse_machine("v5e:2x2"))
  return programs.devices(programs.parse_machine("h100:4"))


def main() -> None:
  devices = np.array(_devices(sys.argv[1])).reshape(2, 1, 2)
  mesh = jax.sharding.Mesh(
      devices,
      ("data", "fsdp", "tensor"),
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  config = ModelConfig(
      family="qwen3",
      vocab_size=1024,
      dim=256,
      mlp_dim=512,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=128,
      norm_eps=1e-6,
      rope=RopeConfig(1e6),
      tied=True,
      max_length=4096,
  )
  model = Model(config, "bfloat16", remat="full", mesh=mesh)
  params = sharding.with_shardings(model.abstract_params(), mesh)
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def array(shape, dtype, place=rows):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def loss(params, tokens, mask):
    hidden = model.apply(params, tokens, mask)
    return jnp.sum(hidden.astype(jnp.float32) ** 2)

  batch = PromptBatch(
      array((_ROWS, _PROMPT), jnp.int32),
      array((_ROWS, _PROMPT), bool),
      array((_ROWS,), jnp.int32),
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
  draw = jax.tree.map(
      lambda x: array(x.shape, x.dtype, whole), generate.Draw.of(_LENGTH)
  )
  settings = generate.SamplerConfig((1,), 0, config.vocab_size)
  programs = {
      "forward": (model.apply, (params, batch.tokens, batch.mask)),
      "backward": (jax.grad(loss), (params, batch.tokens, batch.mask)),
      "rollout": (
          lambda *x: generate.sample(model, settings, _LENGTH, *x),
          (params, batch, key, draw),
      ),
  }
  found = {}
  for name, (function, args) in programs.items():
    text = jax.jit(function).trace(*args).lower().compile().as_text()
    names = _KERNEL.findall(text)
    found[name] = {n: names.count(n) for n in sorted(set(names))}
  print(json.dumps(found))


if __name__ == "__main__":
  main()
