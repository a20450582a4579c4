"""The model families by the `model_type` of their config.json."""

from prefix_distill.models.families import llama
from prefix_distill.models.families import qwen
from prefix_distill.models.families.family import Family
from prefix_distill.models.families.family import UnsupportedModelError

FAMILIES = {
    family.model_type: family
    for family in (*qwen.FAMILIES, *llama.FAMILIES)
}


def find(model_type: str | None, where: str) -> Family:
  """Returns the family of a model type.

  Args:
    model_type: of a config.json.
    where: the model's path, for the error message.

  Raises:
    UnsupportedModelError: no family has this type.
  """
  if model_type not in FAMILIES:
    raise UnsupportedModelError(
        f"{where}: model type {model_type!r} is not implemented;"
        f" {', '.join(FAMILIES)} are."
    )
  return FAMILIES[model_type]
