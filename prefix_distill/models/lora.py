"""LoRA (arXiv 2106.09685): trees of adapters, and of the weights beside them.

A model with adapters takes one tree, in which "layers/mlp/up" has the adapters
"layers/mlp/up_a" and "layers/mlp/up_b" beside it. Only the adapters are
trained and saved; so the two parts are kept apart, and joined where a model
runs. To join them copies nothing.
"""

import dataclasses
from typing import Any

from prefix_distill.config import Config
from prefix_distill.errors import check
from prefix_distill.models.config import Lora
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import PRODUCTS
from prefix_distill.models.config import sides

Params = dict[str, Any]


def adapted(architecture: ModelConfig, config: Config) -> ModelConfig:
  """Returns the student's architecture with the adapters of the settings.

  Raises:
    ConfigError: a product has fewer inputs or outputs than `lora.rank`.
  """
  spec = config.lora
  if not spec.rank:
    return architecture
  found = sides(architecture)
  for name in spec.targets:
    outputs, inputs = found[PRODUCTS[name]]
    most = min(outputs, inputs)
    check(
        spec.rank <= most,
        f"lora.rank is {spec.rank}, but {name} of {config.student.path} has"
        f" {inputs} inputs and {outputs} outputs, and no change of it has a"
        f" higher rank than {most}; lower lora.rank to that, or leave {name}"
        " out of lora.targets.",
    )
  targets = tuple(PRODUCTS[name] for name in spec.targets)
  lora = Lora(spec.rank, spec.scale, targets)
  return dataclasses.replace(architecture, lora=lora)


def split(params: Params) -> tuple[Params, Params]:
  """Returns the weights of the base, and the adapters; either may be empty."""
  base, adapters = {}, {}
  for name, value in params.items():
    if isinstance(value, dict):
      parts = split(value)
      for tree, part in zip((base, adapters), parts, strict=True):
        if part:
          tree[name] = part
    elif name.endswith(("_a", "_b")):
      adapters[name] = value
    else:
      base[name] = value
  return base, adapters


def join(base: Params | None, trained: Params) -> Params:
  """Returns the tree that a model takes, of the parts of `split`.

  Args:
    base: the weights that are not trained; None if all are.
    trained: the adapters; or all weights.
  """
  out = dict(base or {})
  for name, value in trained.items():
    inner = isinstance(value, dict) and name in out
    out[name] = join(out[name], value) if inner else value
  return out
