"""Programs that are compiled once, and ahead of time in the background."""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import math
import threading
from typing import Any

import jax
import numpy as np

from prefix_distill import sharding


def abstract(tree: Any) -> Any:
  """Replaces arrays by their shapes, dtypes and shardings."""

  def shape(x: Any) -> Any:
    if isinstance(x, jax.Array):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    if isinstance(x, jax.ShapeDtypeStruct):
      return x
    x = np.asarray(x)  # Wherever the program wants it.
    return jax.ShapeDtypeStruct(x.shape, x.dtype)

  return jax.tree.map(shape, tree)


class Program:
  """A jitted function that says when it compiles.

  Unlike a call of `jax.jit`, `compile` works on shapes alone and tells the
  shapes of the results, so that a chain of programs can be compiled in another
  thread before there is anything to run them on.
  """

  def __init__(
      self, function: Callable, static: int = 0, **options: Any
  ):
    """Describes the program.

    Args:
      function: a pure function.
      static: how many of its first arguments are static.
      **options: for `jax.jit`.
    """
    numbers = tuple(range(static))
    self._function, self._options = function, options
    self._out_shardings = options.get("out_shardings")
    self._jitted = jax.jit(function, static_argnums=numbers, **options)
    self._static = static
    self._lock = threading.Lock()
    self._compiled: dict[Any, futures.Future] = {}
    self._used: set[Any] = set()

  def __call__(self, *args: Any) -> Any:
    key, compiled = self._get(args)
    self._used.add(key)
    return compiled(*args[self._static :])

  def compile(self, *args: Any) -> Any:
    """Compiles for arguments of these shapes; returns the results' shapes."""
    compiled = self.executable(*args)
    return jax.tree.map(
        lambda info, place: jax.ShapeDtypeStruct(
            info.shape, info.dtype, sharding=place
        ),
        compiled.out_info,
        compiled.output_shardings,
    )

  def executable(self, *args: Any) -> jax.stages.Compiled:
    """Compiles for arguments of these shapes, as a call with such does."""
    return self._get(args)[1]

  def trace(self, *args: Any) -> jax.stages.Traced:
    """Traces for arguments of these shapes; the jaxpr is in the result."""
    shapes = abstract(args[self._static :])
    return self._jitted.trace(*args[: self._static], *shapes)

  def beside(self, *args: Any, tree: Any) -> jax.stages.Traced:
    """Traces with arrays lying by, so that the compiler leaves them room."""
    options = dict(self._options)
    donated = options.pop("donate_argnums", None)
    if donated is not None:
      options["donate_argnums"] = donated + 1

    def function(_, *args):
      return self._function(*args)

    jitted = jax.jit(
        function,
        static_argnums=tuple(range(1, self._static + 1)),
        keep_unused=True,
        **options,
    )
    shapes = abstract(args[self._static :])
    return jitted.trace(abstract(tree), *args[: self._static], *shapes)

  def shapes(self, *args: Any) -> Any:
    """Returns the results' shapes and places without compiling."""
    return sharding.placed(self.trace(*args).out_info, self._out_shardings)

  @property
  def used(self) -> int:
    """How many compiled versions have been called."""
    return len(self._used)

  def _get(self, args: tuple[Any, ...]) -> tuple[Any, Any]:
    static, shapes = args[: self._static], abstract(args[self._static :])
    leaves, structure = jax.tree.flatten(shapes)
    signature = tuple((x.shape, x.dtype, x.sharding) for x in leaves)
    key = (static, structure, signature)
    with self._lock:
      mine = key not in self._compiled
      future = self._compiled.setdefault(key, futures.Future())
    if mine:
      try:
        future.set_result(self._jitted.lower(*static, *shapes).compile())
      except BaseException as error:
        future.set_exception(error)
        raise
    return key, future.result()


@dataclasses.dataclass(frozen=True)
class Segments:
  """How a rollout goes through the segments of one size of the cache.

  Attributes:
    length: tokens of a segment.
    count: segments of a rollout.
    drawn: tokens that its rows have drawn before.
    prompt: S.
    columns: M, of the cache.
    reads_lengths: whether a row's columns are read up to its length only.
  """

  length: int
  count: int
  drawn: int
  prompt: int
  columns: int
  reads_lengths: bool

  def until(self, cap: int) -> "Segments":
    """Returns those that are left when rows end at a cap."""
    wanted = math.ceil((cap - self.drawn) / self.length)
    count = min(max(wanted, 0), self.count)
    return dataclasses.replace(self, count=count)

  @property
  def share(self) -> float:
    """Of the cache, that is read for a token, on average."""
    if not self.reads_lengths:
      return 1.0
    half = self.length * self.count / 2
    return min((self.prompt + self.drawn + half) / self.columns, 1.0)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A program of an update, and what it is called with.

  Attributes:
    name: "move", "prefill", "layout", "decode", "cut", "score", "gradient" or
      "apply".
    program: to be compiled.
    args: its arguments, as shapes.
    batches: how often it runs in an update; "decode" for each segment.
    trips: how often a loop in it runs whose end depends on data, at most.
    rows: of one run, over all devices; 0 if it has none.
    segments: of "decode".
  """

  name: str
  program: Program
  args: tuple[Any, ...]
  batches: int = 1
  trips: int = 1
  rows: int = 0
  segments: Segments | None = None

  @property
  def times(self) -> int:
    """How often it runs in an update."""
    return self.batches * (self.segments.count if self.segments else 1)

  def until(self, cap: int) -> "Stage":
    """Returns the stage of an update whose rollouts end at a cap."""
    if self.segments is None:
      return self
    return dataclasses.replace(self, segments=self.segments.until(cap))
