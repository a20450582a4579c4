"""Sampling: how a token is drawn from logits, prefill, and decoding.

The prompts go through the model once. Then one token a row is drawn at a time,
in segments whose number of steps is static.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.compilation import Program
from prefix_distill.models import attention
from prefix_distill.models import kv_cache
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout

# The fewest columns by which a cache grows: a power of two, and a multiple of a
# segment.
_LEAST_STEP = 128
# Tokens between two looks at the rows. A look costs nothing on a CPU; an
# accelerator waits for it.
_SEGMENT = 64
_CPU_SEGMENT = 8
# Tokens of a block, near the square root of large vocabularies.
_BLOCK = 256
# No block crosses the border of a sixteenth of the vocabulary, so that those of
# a vocabulary that is split over as many devices, or fewer, are made in place.
_PARTS = 16


@dataclasses.dataclass(frozen=True)
class Truncation:
  """Which tokens may be drawn; hashable. All of them by default.

  Attributes:
    top_k: only so many of the most probable ones; 0 for all.
    top_p: only the most probable ones that together reach this probability
      (nucleus sampling, arXiv 1904.09751); 1 for all.
  """

  top_k: int = 0
  top_p: float = 1.0

  @property
  def is_off(self) -> bool:
    return self.top_k == 0 and self.top_p == 1.0


def _mask_padding(logits: jax.Array, num_tokens: int) -> jax.Array:
  """Rules out a vocabulary's padded rows: ids of `num_tokens` and above.

  Model vocabularies are padded (151,936 rows for 151,669 ids in Qwen3, 152,064
  in others), and two models agree only on the real ids.
  """
  if num_tokens >= logits.shape[-1]:
    return logits
  real = jnp.arange(logits.shape[-1]) < num_tokens
  return jnp.where(real, logits, -jnp.inf)


def log_probs(
    logits: jax.Array, temperature: jax.Array | float, num_tokens: int
) -> jax.Array:
  """Returns log softmax(logits / temperature) over the real ids: [..., V]."""
  scaled = _mask_padding(logits.astype(jnp.float32), num_tokens) / temperature
  return jax.nn.log_softmax(scaled, axis=-1)


def entropy_of(distribution: jax.Array) -> jax.Array:
  """Returns -sum p log p in nats, of log-probabilities [..., V]: [...]."""
  shares = jnp.exp(distribution) * distribution
  return -jnp.sum(jnp.where(distribution > -jnp.inf, shares, 0), axis=-1)


def truncate(distribution: jax.Array, truncation: Truncation) -> jax.Array:
  """Keeps the most probable tokens and renormalises: [..., V] to [..., V].

  A token is kept if it is among the `top_k`, and if the tokens that are more
  probable have less than `top_p` together; so at least one is kept. Tokens as
  probable as the last one kept are kept as well.

  Args:
    distribution: log-probabilities.
    truncation: what to keep.

  Returns:
    Log-probabilities; -inf for the tokens left out.
  """
  if truncation.is_off:
    return distribution
  size = distribution.shape[-1]
  k = min(truncation.top_k or size, size)
  ordered, _ = jax.lax.top_k(distribution, k)
  above = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
  # The first is always kept, whatever rounding makes of a top_p near 0.
  kept = (above < truncation.top_p).at[..., 0].set(True)
  least = jnp.min(
      jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True
  )
  left = jnp.where(distribution >= least, distribution, -jnp.inf)
  return jax.nn.log_softmax(left, axis=-1)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns a key per row, so that a row does not depend on its batch.

  Args:
    key: a scalar key.
    rows: int32 [B, ...], the numbers that identify a row, folded in in turn.
  """
  rows = rows.reshape(rows.shape[0], -1)

  def fold(numbers):
    folded = key
    for i in range(rows.shape[1]):
      folded = jax.random.fold_in(folded, numbers[i])
    return folded

  return jax.vmap(fold)(rows)


def choose(
    keys: jax.Array,
    distribution: jax.Array,
    greedy: jax.Array | bool,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Draws a token a row: int32 [B].

  Args:
    keys: [B], one key a row.
    distribution: [B, V], log-probabilities.
    greedy: take the most probable token instead of a random one; may be
      traced.
    mesh: whose `tensor` axis may split the vocabulary; None for one device.
  """
  best = jnp.argmax(distribution, axis=-1)
  # Both are computed: for a conditional a GPU would wait for the host.
  uniform = jax.vmap(jax.random.uniform)(keys)
  tokens = _invert_cdf(uniform, distribution, mesh)
  return jnp.where(greedy, best, tokens).astype(jnp.int32)


def _invert_cdf(
    uniform: jax.Array,
    distribution: jax.Array,
    mesh: jax.sharding.Mesh | None,
) -> jax.Array:
  """Returns the tokens at which the cumulated probabilities pass `uniform`.

  First the block of tokens, then the token in it: one random number a row,
  where Gumbel noise takes one for each token of the vocabulary, and no
  cumulated sum over all of that.
  """
  batch, size = distribution.shape
  parts = math.gcd(size, _PARTS)
  width = min(_BLOCK, size // parts)
  count = -(-size // parts // width)
  blocks = jnp.exp(distribution).reshape(batch, parts, size // parts)
  padding = ((0, 0), (0, 0), (0, count * width - size // parts))
  blocks = jnp.pad(blocks, padding).reshape(batch, parts * count, width)
  mass = blocks.sum(axis=-1)
  if mesh is not None:
    # Gathered outright, or each step of the search crosses the devices.
    mass = jax.lax.with_sharding_constraint(
        mass, sharding.batch_sharding(mesh)
    )
  before = jnp.cumsum(mass, axis=-1)
  goal = uniform[:, None] * before[:, -1:]
  block = _first_past(goal, before, mass)
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  start = jnp.where(
      block[:, None] > 0,
      jnp.take_along_axis(before, block[:, None] - 1, axis=1),
      0,
  )
  token = _first_past(goal, start + jnp.cumsum(inside, axis=-1), inside)
  return block // count * (size // parts) + block % count * width + token


def _first_past(
    goal: jax.Array, cumulated: jax.Array, mass: jax.Array
) -> jax.Array:
  """Returns where sums first exceed the goal [B, 1]: [B] of [B, N] each.

  Sums are rounded, each in its own way. So the goal may fall on an entry
  without mass, which must not be drawn, or just past the last one: then it is
  the last entry that has mass.
  """
  drawn = (cumulated > goal) & (mass > 0)
  last = mass.shape[-1] - 1 - jnp.argmax((mass > 0)[:, ::-1], axis=-1)
  return jnp.where(
      jnp.any(drawn, axis=-1), jnp.argmax(drawn, axis=-1), last
  )


def log_prob_of(tokens: jax.Array, distribution: jax.Array) -> jax.Array:
  """Picks the tokens' log-probabilities: [B] and [B, V] to [B]."""
  chosen = jnp.take_along_axis(distribution, tokens[:, None], axis=-1)
  return chosen[:, 0]


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """What is static in a rollout; hashable.

  Attributes:
    stop_ids: tokens that end a row; each is sampled and kept, and is the last
      one that the mask covers.
    pad_id: what fills the columns after the end.
    num_tokens: real token ids; padded rows of the vocabulary are never drawn.
    per_prompt: rollouts for each prompt.
    truncation: which tokens may be drawn.
    cache_dtype: what keys and values are kept in, "float32", "bfloat16" or
      "int8"; empty for the model's compute dtype.
    entropy: whether to record the entropy at each token.
  """

  stop_ids: tuple[int, ...]
  pad_id: int
  num_tokens: int
  per_prompt: int = 1
  truncation: Truncation = Truncation()
  cache_dtype: str = ""
  entropy: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
  """What is traced in a rollout, so that another value does not compile again.

  Attributes:
    cap: int32 [], tokens after which a row ends; at least 1.
    temperature: float32 [], divides the logits.
    greedy: bool [], take the most probable token.
  """

  cap: jax.Array
  temperature: jax.Array
  greedy: jax.Array

  @classmethod
  def of(
      cls, cap: int, temperature: float = 1.0, greedy: bool = False
  ) -> "Draw":
    # NumPy's, so that a program may put them where it wants.
    return cls(
        np.asarray(cap, np.int32),
        np.asarray(temperature, np.float32),
        np.asarray(greedy),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """Rows in the middle of their answers.

  Attributes:
    newest: int32 [B], the row's last token, which is not in the cache yet: the
      next step feeds it.
    count: int32 [B], tokens that the row has drawn.
    live: bool [B], false after a stop token or the cap.
    keys: [B], one key a row.
    cache: the prompt and all but the newest token.
  """

  newest: jax.Array
  count: jax.Array
  live: jax.Array
  keys: jax.Array
  cache: kv_cache.KVCache


def cache_dtype(model: Model, config: SamplerConfig) -> jnp.dtype:
  """Returns what keys and values are kept in."""
  return jnp.dtype(config.cache_dtype or model.dtype)


def columns(model: Model, config: SamplerConfig, needed: int) -> int:
  """Returns the columns of a cache that holds so many tokens a row."""
  unit = model.cache_kernel(cache_dtype(model, config)).unit
  return -(-needed // unit) * unit


def rooms(
    model: Model, config: SamplerConfig, prompt: int, length: int
) -> tuple[int, ...]:
  """Returns the sizes that a cache grows through as rows get longer.

  They are counted in columns behind the prompts. A kernel that reads all of the
  cache, however short the rows are, gets it in steps of an eighth. A kernel
  that reads each row up to its length gets all of it at once.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    prompt: S.
    length: the longest answer.
  """
  kernel = model.cache_kernel(cache_dtype(model, config))
  sizes, room = [], _LEAST_STEP
  while room < length and not kernel.reads_lengths:
    sizes.append(room)
    power = 2 ** ((prompt + room).bit_length() - 1)
    room += max(_LEAST_STEP, power // 8)
  return (*sizes, length)


def empty(
    model: Model, config: SamplerConfig, rows: int, size: int, key: jax.Array
) -> DecodeState:
  """Returns rows that have ended, to be given to prompts by `insert`.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    rows: B.
    size: M, columns of the cache.
    key: any.
  """
  c, dtype = model.config, cache_dtype(model, config)
  return DecodeState(
      newest=jnp.zeros(rows, jnp.int32),
      count=jnp.zeros(rows, jnp.int32),
      live=jnp.zeros(rows, bool),
      keys=jax.random.split(key, rows),
      cache=kv_cache.empty(
          (rows, c.num_kv_heads, size, c.head_dim),
          c.num_layers,
          dtype,
          model.cache_kernel(dtype).layout,
      ),
  )


def state_shardings(model: Model, config: SamplerConfig) -> DecodeState:
  """Returns where a state lies on the model's mesh.

  Rows lie over the batch axes, and the cache's heads over `tensor`, if that
  divides them.
  """
  shapes = jax.eval_shape(
      lambda: empty(model, config, 1, 1, jax.random.key(0))
  )
  rows = sharding.batch_sharding(model.mesh)
  cache = model.cache_shardings(shapes.cache)
  return DecodeState(rows, rows, rows, rows, cache)


class Resizer:
  """Moves rows to a cache of another size, one layer after the other.

  There is never more than one layer of the cache in both sizes. One program for
  the whole cache would hold the old cache beside the new one.
  """

  def __init__(self, place: DecodeState):
    """Jits the move of a layer; `place` is what `state_shardings` returns."""
    self._layer = Program(
        "resize",
        kv_cache.resize_layer,
        2,
        out_shardings=place.cache.layers[0],
    )

  def __call__(self, state: DecodeState, size: int) -> DecodeState:
    """Returns the rows in a cache of so many columns; deletes the old one."""
    cache = state.cache
    if cache.columns == size:
      return state
    layers = []
    for layer in cache.layers:
      layers.append(self._layer(cache.layout, size, layer))
      if not sharding.is_abstract(layer):
        for array in jax.tree.leaves(layer):
          array.delete()
    cache = dataclasses.replace(cache, layers=tuple(layers))
    return dataclasses.replace(state, cache=cache)


def insert(
    state: DecodeState, prompts: DecodeState, slots: jax.Array
) -> DecodeState:
  """Gives rows to new prompts; to be jitted with `state` donated.

  Args:
    state: B rows.
    prompts: R rows, straight from `prefill`, with at most as many columns.
    slots: int32 [R], the rows to replace; B or more for a prompt that is not
      to be inserted.
  """

  def row(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[slots].set(new, mode="drop")

  return DecodeState(
      newest=row(state.newest, prompts.newest),
      count=row(state.count, prompts.count),
      live=row(state.live, prompts.live),
      keys=row(state.keys, prompts.keys),
      cache=kv_cache.insert(state.cache, prompts.cache, slots),
  )


def start(length: int, pad_id: int, first: Rollout) -> Rollout:
  """Returns [B, length] that begins with the first tokens, then padding."""

  def lengthen(x: jax.Array, fill: int) -> jax.Array:
    room = length - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, room)), constant_values=fill)

  entropy = None if first.entropy is None else 0
  fills = Rollout(pad_id, False, 0, 0, entropy)
  return jax.tree.map(lengthen, first, fills)


def append(rollout: Rollout, drawn: Rollout, at: jax.Array) -> Rollout:
  """Writes a segment [B, n] to columns [at, at + n); the rollout is donated."""
  return jax.tree.map(
      lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=1),
      rollout,
      drawn,
  )


def segment(model: Model) -> int:
  """Returns how many tokens are drawn between two looks at the rows."""
  platform = attention.platform(model.mesh)
  return _CPU_SEGMENT if platform == "cpu" else _SEGMENT


@functools.cache
def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Returns the compiler's options for `decode` that it knows on a mesh.

  A GPU's products with few rows are split along what they sum over by default,
  and each then takes a second kernel to add up the parts. Whole, the residual
  is added in the product's own kernel.

  CUDA graphs need no option: XLA makes one of a loop's body by itself if no
  step of it looks at what the device has computed.
  """
  if attention.platform(mesh) not in ("gpu", "cuda"):
    return {}
  options = {"xla_gpu_experimental_force_split_k": 1}
  known = jax.jit(lambda x: x, compiler_options=options)
  number = jax.ShapeDtypeStruct((), jnp.float32)
  try:
    known.trace(sharding.placed(number, sharding.replicated(mesh))).lower(
    ).compile()
  except jax.errors.JaxRuntimeError:
    return {}  # An experimental option of one version may be gone in the next.
  return options


def repeat_prompts(times: int, batch: PromptBatch) -> PromptBatch:
  """Repeats each prompt for its rollouts, neighbours together: [B * times]."""
  return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), batch)


def prefill(
    model: Model,
    config: SamplerConfig,
    columns: int,
    params: Params,
    batch: PromptBatch,
    key: jax.Array,
    draw: Draw,
) -> tuple[DecodeState, Rollout]:
  """Reads each prompt once, fans it out and draws the first tokens.

  A row's draws depend on the key, the record's index and the rollout's number
  alone, not on its batch. Static: model, config, columns.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    columns: M, of the cache, S at least; see `columns`.
    params: the weights.
    batch: prompts [B, S].
    key: of this update.
    draw: see `Draw`.

  Returns:
    B * per_prompt rows, those of one prompt next to each other, and their first
    tokens [B * per_prompt, 1].
  """
  rows, n = batch.tokens.shape[0], config.per_prompt
  with jax.named_scope("prefill"):
    hidden, cache = model.prefill(
        params, batch.tokens, batch.mask, columns, config.cache_dtype
    )
  numbers = jnp.concatenate(
      [
          jnp.repeat(batch.index.reshape(rows, -1), n, axis=0),
          jnp.tile(jnp.arange(n), rows)[:, None],
      ],
      axis=1,
  )
  count = jnp.zeros(rows * n, jnp.int32)
  state = DecodeState(
      newest=count,
      count=count,
      live=jnp.ones(rows * n, bool),
      keys=row_keys(key, numbers),
      cache=kv_cache.repeat(cache, n),
  )
  distribution = _distribution(model, config, params, hidden, draw)
  distribution = jnp.repeat(distribution, n, axis=0)
  state, first = _draw(model, config, state, distribution, draw)
  return state, jax.tree.map(lambda x: x[:, None], first)


def decode(
    model: Model,
    config: SamplerConfig,
    steps: int,
    params: Params,
    state: DecodeState,
    draw: Draw,
) -> tuple[DecodeState, Rollout]:
  """Draws a segment of tokens; a row that has ended gets padding.

  To be jitted with the state donated. Static: model, config, steps.

  Args:
    model: the architecture.
    config: see `SamplerConfig`.
    steps: n, tokens of the segment.
    params: the weights, in `Model.decode_layout`.
    state: what was drawn so far, in a cache with room for n more, or for what
      the cap leaves.
    draw: see `Draw`.

  Returns:
    The rows, and the segment [B, n].
  """

  def step(state: DecodeState, _: None) -> tuple[DecodeState, Rollout]:
    with jax.named_scope("decode"):
      hidden, cache = model.decode(
          params, state.newest, state.live, state.cache
      )
    distribution = _distribution(model, config, params, hidden, draw)
    state = dataclasses.replace(state, cache=cache)
    return _draw(model, config, state, distribution, draw)

  state, drawn = jax.lax.scan(step, state, None, length=steps)
  return state, jax.tree.map(lambda x: x.T, drawn)


def sample(
    model: Model,
    config: SamplerConfig,
    length: int,
    params: Params,
    batch: PromptBatch,
    key: jax.Array,
    draw: Draw,
) -> Rollout:
  """Samples rollouts [B * per_prompt, length] as one pure function.

  `prefill` and `decode` in turn, for when one program is wanted rather than one
  for each size of the cache. Static: model, config, length.
  """
  size = columns(model, config, batch.tokens.shape[1] + length)
  state, first = prefill(model, config, size, params, batch, key, draw)
  _, drawn = decode(
      model, config, length - 1, model.decode_layout(params), state, draw
  )
  return jax.tree.map(
      lambda x, y: jnp.concatenate([x, y], axis=1), first, drawn
  )


def _distribution(
    model: Model,
    config: SamplerConfig,
    params: Params,
    hidden: jax.Array,
    draw: Draw,
) -> jax.Array:
  """Returns the next token's log-probabilities [B, V]."""
  with jax.named_scope("head"):
    logits = model.logits(params, hidden)
    return log_probs(logits, draw.temperature, config.num_tokens)


def _draw(
    model: Model,
    config: SamplerConfig,
    state: DecodeState,
    distribution: jax.Array,
    draw: Draw,
) -> tuple[DecodeState, Rollout]:
  """Draws each live row's next token; returns it as a rollout of [B]."""
  keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
  allowed = truncate(distribution, config.truncation)
  with jax.named_scope("sample"):
    token = choose(keys, allowed, draw.greedy, model.mesh)
  live = state.live
  token = jnp.where(live, token, config.pad_id)
  drawn = Rollout(
      token,
      live,
      *(
          jnp.where(live, log_prob_of(token, x), 0.0)
          for x in (distribution, allowed)
      ),
  )
  if config.entropy:
    entropy = jnp.where(live, entropy_of(distribution), 0.0)
    drawn = dataclasses.replace(drawn, entropy=entropy)
  count = state.count + live
  is_stop = jnp.isin(token, jnp.array(config.stop_ids, jnp.int32))
  state = dataclasses.replace(
      state,
      newest=token,
      count=count,
      live=live & ~is_stop & (count < draw.cap),
  )
  return state, drawn


@dataclasses.dataclass(frozen=True)
class Decoding:
  """The programs that sample with one model, on the model's mesh.

  Attributes:
    move: brings weights from another mesh, in the compute dtype.
    layout: `Model.decode_layout`.
    prefill: see `prefill`.
    decode: see `decode`; the state is donated.
    resize: gives a state another size of the cache.
    insert: see `insert`; the state is donated.
    empty: see `empty`.
  """

  move: Program
  layout: Program
  prefill: Program
  decode: Program
  resize: Resizer
  insert: Program
  empty: Program

  @property
  def used(self) -> int:
    """How many variants of prefill and decode have run."""
    return self.prefill.used + self.decode.used


def decoding(model: Model, config: SamplerConfig, role: str = "") -> Decoding:
  """Jits the programs that sample with a model; names begin with the role."""
  place = state_shardings(model, config)
  rows = sharding.batch_sharding(model.mesh)
  params = model.abstract_params()
  layout = jax.eval_shape(model.decode_layout, params)
  return Decoding(
      move=Program(
          f"{role}move",
          model.cast,
          out_shardings=sharding.param_shardings(params, model.mesh),
      ),
      layout=Program(
          f"{role}layout",
          model.decode_layout,
          out_shardings=sharding.decode_params(layout, model.mesh),
      ),
      prefill=Program(
          f"{role}prefill", prefill, 3, out_shardings=(place, rows)
      ),
      decode=Program(
          f"{role}decode",
          decode,
          3,
          out_shardings=(place, rows),
          donate_argnums=4,
          compiler_options=compiler_options(model.mesh),
      ),
      resize=Resizer(place),
      insert=Program("insert", insert, out_shardings=place, donate_argnums=0),
      empty=Program("empty", empty, 4, out_shardings=place),
  )


class Sampler:
  """Samples prefixes with one model, in programs that are compiled once.

  Attributes:
    model: on the mesh of sampling.
    config: how it samples.
    buckets: the lengths that rollouts may have, in ascending order.
  """

  def __init__(
      self,
      model: Model,
      config: SamplerConfig,
      temperature: float,
      buckets: tuple[int, ...],
      training: jax.sharding.Mesh,
      role: str = "",
  ):
    """Jits the programs.

    Args:
      model: on the mesh of sampling.
      config: see `SamplerConfig`.
      temperature: divides the logits.
      buckets: see the class.
      training: the mesh that weights come from and rollouts go to.
      role: what the names of the model's programs begin with.
    """
    self.model, self.config = model, config
    self._temperature, self.buckets = temperature, buckets
    self._segment = segment(model)
    self._programs = decoding(model, config, role)
    # Weights go to the mesh of sampling once a rollout, in the compute dtype.
    self._moves = model.mesh != training
    rows = sharding.batch_sharding(model.mesh)
    self._start = Program("start", start, 2, out_shardings=rows)
    self._append = Program(
        "append", append, out_shardings=rows, donate_argnums=0
    )
    self._cut = Program(
        "cut", _cut, 1, out_shardings=sharding.batch_sharding(training)
    )
    everywhere = sharding.replicated(model.mesh)
    self._look = Program("look", _look, out_shardings=everywhere)

  @property
  def used(self) -> int:
    """How many variants of prefill and decode have run."""
    return self._programs.used

  def sample(
      self,
      params: Params,
      batch: PromptBatch,
      key: jax.Array,
      cap: int,
      poll: Callable[[], None] = lambda: None,
  ) -> Rollout:
    """Samples `per_prompt` prefixes of at most `cap` tokens.

    The prompts are prefilled once. The cache then grows with the prefixes. On
    shapes all prefixes reach the cap.

    Args:
      params: the weights, on the mesh of training.
      batch: prompts [B, S], on the mesh of sampling.
      key: of this update.
      cap: in tokens.
      poll: called before each segment; it may raise to stop.

    Returns:
      Rollouts [B * per_prompt, P], on the mesh of training. P is the smallest
      bucket that holds the cap; or, if all rows ended earlier, the smallest one
      that holds the longest row.

    Raises:
      ValueError: no bucket of the run holds the cap.
    """
    if cap > self.buckets[-1]:
      raise ValueError(
          f"The cap is {cap}, but the run's longest prefix is"
          f" {self.buckets[-1]}; sample with that at most."
      )
    model, config, steps = self.model, self.config, self._segment
    programs = self._programs
    bucket, prompt = self.bucket(cap), batch.tokens.shape[1]
    draw = Draw.of(cap, self._temperature)
    key = sharding.replicate_key(key, model.mesh)
    if self._moves:
      params = programs.move(params)
    # One program reads the prompts of all lengths, into a small cache.
    room = min(self.buckets[0], _LEAST_STEP)
    state, first = programs.prefill(
        model, config, columns(model, config, prompt + room), params, batch,
        key, draw,
    )
    layout, drawn = programs.layout(params), 1
    del params  # The moved weights are not needed any more.
    # The first token, and whole segments.
    length = 1 + -(-(bucket - 1) // steps) * steps
    rollout = self._start(length, config.pad_id, first)
    live, longest = self._watch(state, bucket)
    for room in rooms(model, config, prompt, bucket):
      size = columns(model, config, prompt + room)
      while live and drawn < cap and drawn <= room:
        poll()
        state = programs.resize(state, size)
        state, new = programs.decode(
            model, config, steps, layout, state, draw
        )
        rollout = self._append(rollout, new, np.int32(drawn))
        drawn += steps
        live, longest = self._watch(state, bucket)
    return self._cut(bucket if live else self.bucket(longest), rollout)

  def bucket(self, length: int) -> int:
    """Returns the static length that holds so many tokens."""
    return min(b for b in self.buckets if b >= length)

  def _watch(self, state: DecodeState, bucket: int) -> tuple[bool, int]:
    """Returns whether a row is live, and the longest row's tokens."""
    live, longest = self._look(state)
    if sharding.is_abstract(live):
      return True, bucket
    return bool(live), int(longest)


def _look(state: DecodeState) -> tuple[jax.Array, jax.Array]:
  return jnp.any(state.live), jnp.max(state.count)


def _cut(length: int, rollout: Rollout) -> Rollout:
  return jax.tree.map(lambda x: x[:, :length], rollout)
