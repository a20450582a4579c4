"""The models that ship with the package: ordinary Hugging Face directories.

`configs/bundled.py` says how they were made.
"""

import pathlib

_HERE = pathlib.Path(__file__).parent


def names() -> list[str]:
  """Returns the names that `path` knows."""
  return sorted(p.parent.name for p in _HERE.glob("*/config.json"))


def path(name: str) -> pathlib.Path:
  """Returns the directory of a bundled model.

  Raises:
    KeyError: there is none of that name.
  """
  if name not in names():
    raise KeyError(
        f"no model of that name is bundled; there are {', '.join(names())}."
    )
  return _HERE / name
