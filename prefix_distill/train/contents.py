"""Fingerprints of what a run reads, so that a resumed run reads the same.

Files are named by the setting that they belong to and not by their place, so
that another host may have them elsewhere.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from prefix_distill.config import Config
from prefix_distill.config import DatasetSpec
from prefix_distill.config import ModelSpec
from prefix_distill.data import gym
from prefix_distill.errors import UserError
from prefix_distill.evaluate.evaluator import Problems
from prefix_distill.models import huggingface as hf

# The setting, and for one of several files its name -> the fingerprint.
Contents = dict[str, str]
# Files up to this size are hashed whole.
_SMALL = 2**23
# Of larger ones, so much at either end, and blocks at even distances between.
_END, _BLOCK, _BLOCKS = 2**20, 2**16, 64
_RECORDS = 64
_MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model")


def _parts(size: int) -> Iterator[tuple[int, int]]:
  """Yields where to read, and how much."""
  if size <= _SMALL:
    yield 0, size
    return
  yield 0, _END
  for start in np.linspace(_END, size - _END - _BLOCK, _BLOCKS):
    yield int(start), _BLOCK
  yield size - _END, _END


def fingerprint(path: pathlib.Path) -> str:
  """Returns a file's size and a SHA-256: of a large file, of samples.

  A large file is read at its ends, where safetensors and Parquet have their
  headers, and at 64 places between: 16 GB of weights take a second. A change of
  a few bytes elsewhere is not seen.

  Raises:
    UserError: it cannot be read.
  """
  digest = hashlib.sha256()
  try:
    with path.open("rb") as file:
      size = os.fstat(file.fileno()).st_size
      for start, count in _parts(size):
        file.seek(start)
        digest.update(file.read(count))
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}).") from error
  return f"{size} bytes, sha256 {digest.hexdigest()[:16]}"


def _model(name: str, spec: ModelSpec) -> Iterator[tuple[str, str]]:
  """Yields the files of a model, and of its tokenizer if that is another's."""
  places = {name: spec.path}
  if spec.tokenizer:
    places[f"{name}.tokenizer"] = spec.tokenizer
  for place, path in places.items():
    weights = place == name and not spec.random_init
    directory = hf.resolve(path, weights)
    patterns = (*_MODEL_FILES, "*.safetensors") if weights else _MODEL_FILES
    for pattern in patterns:
      for file in sorted(directory.glob(pattern)):
        yield f"{place}/{file.name}", fingerprint(file)


def _hash(values: Any) -> str:
  # What JSON lacks, such as a picture, counts by its kind alone.
  text = json.dumps(values, sort_keys=True, default=lambda x: str(type(x)))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _record(records: Any, number: int) -> dict[str, Any]:
  try:
    return dict(records[number])
  except gym.NotMade:
    return {}


def _sampled(records: Any) -> str:
  """Returns the number of records, and a hash of some of them."""
  count = len(records)
  numbers = np.unique(np.linspace(0, count - 1, _RECORDS).astype(int))
  found = [_record(records, int(number)) for number in numbers]
  return f"{count} records, sha256 {_hash(found)} of {len(found)}"


def _data(
    name: str, spec: DatasetSpec, records: Any
) -> Iterator[tuple[str, str]]:
  """Yields the files of a data set, or else some of its records."""
  path = pathlib.Path(spec.source)
  if path.is_file():
    yield name, fingerprint(path)
  elif path.is_dir():
    for file in sorted(path.rglob("*")):
      inner = file.relative_to(path)
      if file.is_file() and not any(x.startswith(".") for x in inner.parts):
        yield f"{name}/{inner}", fingerprint(file)
  else:  # Of the hub, or made by the package.
    yield name, _sampled(records)


def _problems(found: Problems) -> str:
  """Returns the number of problems, and a hash of prompts and answers."""
  digest = hashlib.sha256(np.ascontiguousarray(found.batch.tokens).tobytes())
  digest.update(_hash([str(answer) for answer in found.answers]).encode())
  count = len(found.answers)
  return f"{count} problems, sha256 {digest.hexdigest()[:16]}"


def of(
    config: Config, records: Any, problems: Mapping[str, Problems]
) -> Contents:
  """Returns the fingerprints of all that a run reads.

  Args:
    config: the settings.
    records: of the training data.
    problems: the evaluation sets.
  """
  out = dict(_model("student", config.student))
  if config.method != "sft":
    out |= _model("teacher", config.teacher)
  out |= _data("data.train", config.data.train, records)
  for name, found in problems.items():
    out[f"evaluation.sets.{name}"] = _problems(found)
  specs = (config.data.train, *config.evaluation.sets.values())
  if any(spec.is_gym for spec in specs):
    out["reasoning-gym"] = f"version {gym.version()}"
  return out


def difference(old: Contents, new: Contents) -> str:
  """Says what differs first, as it goes on after "its run "; "" if nothing."""
  for name in [*new, *(name for name in old if name not in new)]:
    before, after = old.get(name, "nothing"), new.get(name, "nothing")
    if before != after:
      return f"read {name} with {before}, and there is now {after}"
  return ""
