"""Jitted programs: called on arrays they run, on shapes they are planned.

On shapes a program computes nothing. It shows the call to whoever watches and
returns the shapes of its results. So code that chains programs, such as an
update, is written once: on arrays it computes, and on shapes it says what it
would compile, hold, send and compute.
"""

from collections.abc import Callable
from collections.abc import Iterator
from concurrent import futures
import contextlib
import contextvars
import functools
import inspect
import os
import pathlib
import threading
from typing import Any

import jax
import numpy as np

from prefix_distill import sharding

# How many calls on shapes a program remembers by the arguments' identity.
_MOST_RECENT = 256
_watch = contextvars.ContextVar("watch", default=None)


@contextlib.contextmanager
def watching(watch: Callable[["Variant"], None]) -> Iterator[None]:
  """Shows `watch` each call on shapes that this thread makes inside."""
  token = _watch.set(watch)
  try:
    yield
  finally:
    _watch.reset(token)


def _signature(x: Any) -> tuple[Any, ...]:
  """Returns shape, dtype and sharding of an array or its shape."""
  if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
    return x.shape, x.dtype, x.sharding
  x = np.asarray(x)  # NumPy has no sharding: the program chooses the place.
  return x.shape, x.dtype, None


class Variant:
  """A program for arguments of certain shapes.

  Attributes:
    program: the program.
    args: its static arguments, and the shapes of the others.
    traced: the program's trace for them, which holds the jaxpr.
  """

  def __init__(
      self,
      program: "Program",
      args: tuple[Any, ...],
      traced: jax.stages.Traced,
  ):
    self.program, self.args, self.traced = program, args, traced
    self._lock = threading.Lock()
    self._compiled: futures.Future | None = None

  @property
  def arguments(self) -> dict[str, Any]:
    """The arguments by the names of the function's parameters."""
    signature = inspect.signature(self.program.function)
    return signature.bind(*self.args).arguments

  @functools.cached_property
  def results(self) -> Any:
    """Shapes of the results, and where they lie."""
    places = self.program.options.get("out_shardings")
    return sharding.placed(self.traced.out_info, places)

  def compiled(self) -> jax.stages.Compiled:
    """Compiles once, whichever thread comes first; the others wait for it."""
    with self._lock:
      mine = self._compiled is None
      if mine:
        self._compiled = futures.Future()
    if mine:
      try:
        self._compiled.set_result(self.traced.lower().compile())
      except BaseException as error:
        self._compiled.set_exception(error)
        raise
    return self._compiled.result()


class Program:
  """A jitted function with a name, compiled once for each set of shapes.

  Attributes:
    name: such as "decode".
    function: a pure function.
    static: how many of the function's first arguments are static.
    options: those of `jax.jit`; `out_shardings` must be among them.
    jitted: the function, jitted.
  """

  def __init__(
      self, name: str, function: Callable, static: int = 0, **options: Any
  ):
    self.name, self.function, self.static = name, function, static
    self.options = options
    called = functools.partial(function)
    called.__name__ = name  # In logs and profiles.
    self.jitted = jax.jit(
        called, static_argnums=tuple(range(static)), **options
    )
    self._variants: dict[Any, Variant] = {}
    self._lock = threading.Lock()
    # The same shapes come again and again, as the same objects.
    self._recent: dict[tuple[int, ...], tuple[Any, Variant]] = {}
    self._used: set[Variant] = set()

  def __call__(self, *args: Any) -> Any:
    """Runs on arrays; on shapes returns those of the results."""
    recent = self._recent.get(tuple(map(id, args)))
    if recent is None:
      static, rest = args[: self.static], args[self.static :]
      leaves, structure = jax.tree.flatten(rest)
      signature = tuple(map(_signature, leaves))
      key = (static, structure, signature)
      with self._lock:
        variant = self._variants.get(key)
        if variant is None:
          shapes = [
              jax.ShapeDtypeStruct(shape, dtype, sharding=place)
              for shape, dtype, place in signature
          ]
          shapes = (*static, *jax.tree.unflatten(structure, shapes))
          variant = Variant(self, shapes, self.jitted.trace(*shapes))
          self._variants[key] = variant
      if not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        self._used.add(variant)
        return variant.compiled()(*rest)
      if len(self._recent) > _MOST_RECENT:
        self._recent.clear()
      self._recent[tuple(map(id, args))] = args, variant
    else:
      _, variant = recent
    watch = _watch.get()
    if watch is not None:
      watch(variant)
    return variant.results

  @property
  def used(self) -> int:
    """How many variants have run."""
    return len(self._used)


def keep_programs() -> None:
  """Lets a second start find its programs; JAX's own settings come first."""
  if jax.config.jax_compilation_cache_dir is None:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = pathlib.Path(home).expanduser() / "prefix_distill"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
