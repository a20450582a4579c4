"""Llama and models of its kind, such as SmolLM2 (arXiv 2302.13971); SmolLM3.

SmolLM3 (huggingface.co/blog/smollm3) is Llama, and some layers do not rotate. A
layer without rotary positions (NoPE, arXiv 2305.19466) attends by content
alone; causality and the other layers tell it the order of tokens.
"""

from typing import Any

from prefix_distill.models.families import family


def _rotary(config: Any, where: str) -> tuple[bool, ...]:
  """Returns which layers rotate; () if all do.

  Args:
    config: a `transformers.SmolLM3Config`. Its `no_rope_layers`, which
      transformers makes of `no_rope_layer_interval` if it is missing, has 1 for
      a layer that rotates and 0 for one that does not.
    where: the model's path, for error messages.

  Raises:
    UnsupportedModelError: `no_rope_layers` has another value or is too short.
  """
  flags, count = config.no_rope_layers, config.num_hidden_layers
  if len(flags) < count or set(flags) - {0, 1}:
    raise family.UnsupportedModelError(
        f"{where}: no_rope_layers {flags!r} is not implemented; only a 0 or a 1"
        f" for each of the {count} layers is."
    )
  rotary = tuple(map(bool, flags[:count]))
  return () if all(rotary) else rotary


LLAMA = family.Family("llama", family.TENSORS)
SMOLLM3 = family.Family("smollm3", family.TENSORS, rotary=_rotary)

FAMILIES = (LLAMA, SMOLLM3)
