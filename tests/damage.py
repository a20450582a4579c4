"""Ways to damage a checkpoint, of every kind that disks and people do.

`python tests/damage.py CHECKPOINTS STEP` lists them; with a name as a third
argument it does that damage.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
import shutil
import sys


@dataclasses.dataclass(frozen=True)
class Damage:
  """One way to damage a checkpoint.

  Attributes:
    name: what it does.
    do: takes the checkpoint's directory, beside which there are others.
  """

  name: str
  do: Callable[[pathlib.Path], None]


def _file(step: pathlib.Path, pattern: str) -> pathlib.Path:
  """Returns the largest file of a pattern."""
  files = [path for path in step.glob(pattern) if path.is_file()]
  return max(files, key=lambda path: (path.stat().st_size, path.name))


def _flip(pattern: str, place: float, step: pathlib.Path) -> None:
  """Flips one bit at a place between 0, the start, and 1, the end."""
  file = _file(step, pattern)
  data = bytearray(file.read_bytes())
  data[int(place * (len(data) - 1))] ^= 0x10
  file.write_bytes(data)


def _cut(pattern: str, share: float, step: pathlib.Path) -> None:
  """Leaves a share of a file."""
  file = _file(step, pattern)
  data = file.read_bytes()
  file.write_bytes(data[: int(share * len(data))])


def _zeros(pattern: str, step: pathlib.Path) -> None:
  """Writes zeros over the second half, as a crash of some disks leaves it."""
  file = _file(step, pattern)
  data = file.read_bytes()
  half = len(data) // 2
  file.write_bytes(data[:half] + bytes(len(data) - half))


def _remove(path: pathlib.Path) -> None:
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def _delete(pattern: str, step: pathlib.Path) -> None:
  for path in list(step.glob(pattern)):
    _remove(path)


def _directory(pattern: str, step: pathlib.Path) -> None:
  """Puts a directory in a file's place."""
  file = _file(step, pattern)
  file.unlink()
  file.mkdir()


def _plain(inner: str, step: pathlib.Path) -> None:
  """Puts a file in a directory's place."""
  path = step / inner
  shutil.rmtree(path)
  path.write_text("once a directory\n")


def _write(pattern: str, text: bytes, step: pathlib.Path) -> None:
  _file(step, pattern).write_bytes(text)


def _edit(name: str, value: object, step: pathlib.Path) -> None:
  """Changes a field of the host's JSON, as a person might."""
  file = step / "host" / "metadata"
  values = json.loads(file.read_text())
  for part in name.split(".")[:-1]:
    values[part] = dict(values[part])
  at = values
  *groups, last = name.split(".")
  for part in groups:
    at = at[part]
  at[last] = value
  file.write_text(json.dumps(values))


def _from_another(inner: str, step: pathlib.Path) -> None:
  """Takes a part from the checkpoint before."""
  others = [p for p in step.parent.iterdir() if p.name < step.name]
  _remove(step / inner)
  shutil.copytree(max(others) / inner, step / inner)


def _another_whole(step: pathlib.Path) -> None:
  others = [p for p in step.parent.iterdir() if p.name < step.name]
  shutil.rmtree(step)
  shutil.copytree(max(others), step)


def _empty(step: pathlib.Path) -> None:
  shutil.rmtree(step)
  step.mkdir()


def _loop(step: pathlib.Path) -> None:
  """A link to itself."""
  shutil.rmtree(step)
  step.symlink_to(step)


# Of arrays, of the catalogue of arrays, of shapes, and of the host.
_ARRAYS = "state/**/d/*"
_CATALOGUE = "state/manifest.ocdbt"
_TREE = "state/_METADATA"
_HOST = "host/metadata"


def _of(function: Callable, *args: object) -> Callable:
  return functools.partial(function, *args)


DAMAGES = (
    *(
        Damage(f"a bit of the arrays at {x:.0%}", _of(_flip, _ARRAYS, x))
        for x in (0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1)
    ),
    Damage("a bit of the catalogue", _of(_flip, _CATALOGUE, 0.5)),
    Damage("a bit of the catalogue's end", _of(_flip, _CATALOGUE, 1)),
    Damage("a bit of the tree", _of(_flip, _TREE, 0.5)),
    Damage("a bit of the host", _of(_flip, _HOST, 0.02)),
    Damage("a bit of the checksums", _of(_flip, _HOST, 0.6)),
    Damage("a bit of the seal", _of(_flip, _HOST, 0.98)),
    Damage("half of the arrays", _of(_cut, _ARRAYS, 0.5)),
    Damage("arrays without their last byte", _of(_cut, _ARRAYS, 0.9999)),
    Damage("empty arrays", _of(_cut, _ARRAYS, 0)),
    Damage("zeros in the arrays", _of(_zeros, _ARRAYS)),
    Damage("half of the catalogue", _of(_cut, _CATALOGUE, 0.5)),
    Damage("half of the tree", _of(_cut, _TREE, 0.5)),
    Damage("half of the host", _of(_cut, _HOST, 0.5)),
    Damage("an empty host", _of(_cut, _HOST, 0)),
    Damage("no arrays", _of(_delete, "state/**/d")),
    Damage("no catalogue", _of(_delete, "state/**/manifest.ocdbt")),
    Damage("no tree", _of(_delete, _TREE)),
    Damage("no state", _of(_delete, "state")),
    Damage("no host", _of(_delete, "host")),
    Damage("no mark of success", _of(_delete, "commit_success.txt")),
    Damage("no metadata", _of(_delete, "_CHECKPOINT_METADATA")),
    Damage("a directory for the arrays", _of(_directory, _ARRAYS)),
    Damage("a directory for the host", _of(_directory, _HOST)),
    Damage("a file for the state", _of(_plain, "state")),
    Damage("a file for the host's directory", _of(_plain, "host")),
    Damage("a file for the checkpoint", _of(_plain, "")),
    Damage("an empty checkpoint", _empty),
    Damage("a checkpoint that links to itself", _loop),
    Damage("no checkpoint", _remove),
    Damage("the checkpoint before under this step", _another_whole),
    Damage("the state of the checkpoint before", _of(_from_another, "state")),
    Damage("the host of the checkpoint before", _of(_from_another, "host")),
    Damage("garbage for the host", _of(_write, _HOST, b"\xff\x00{]")),
    Damage("a list for the host", _of(_write, _HOST, b"[1, 2]")),
    Damage("null for the host", _of(_write, _HOST, b"null")),
    Damage("a number for the host's text", _of(_edit, "data", 7)),
    Damage("other sums of the host", _of(_edit, "totals.seconds", "long")),
    Damage("a host without its seal", _of(_write, _HOST, b'{"step": 4}')),
    Damage("garbage for the tree", _of(_write, _TREE, b"{}")),
    Damage("a list for the tree", _of(_write, _TREE, b"[]")),
)


def main() -> None:
  root, step, *names = sys.argv[1:]
  for damage in DAMAGES:
    if damage.name in names:
      damage.do(pathlib.Path(root, step))
    if not names:
      print(damage.name)


if __name__ == "__main__":
  main()
