"""The student drafts, the teacher rewrites: two samplings and what is between.

The answers go to the host of every process, which all make the same turns for
the teacher of them (`data/rewriting.py`) and take the same tokens of what it
writes; no process waits for another's text. A draw depends on the update's key,
the record and the rollout's number alone, so neither microbatches, nor devices,
nor a restart change what is learned.

Called on shapes, both samplings and the prompts between them are shapes.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import sharding
from prefix_distill.data import rewriting
from prefix_distill.data.rewriting import Asking
from prefix_distill.models.transformer import Params
from prefix_distill.report import flops
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.train import microbatch
from prefix_distill.train.microbatch import Microbatches
from prefix_distill.train.setup import Models

# Programs of the teacher's sampling begin with it.
TEACHER = "rewrite_"
# Sets the teacher's draws apart from the student's.
_SALT = 1


@dataclasses.dataclass(frozen=True)
class Rewritten:
  """What an update's rewritings were; NumPy, in every process.

  Attributes:
    lengths: of drafts, turns and rewritings.
    shortened: bool [rollouts], whether a draft's end was not shown.
    failed: of each rollout, one of `rewriting.REASONS`, or "".
  """

  lengths: flops.RewritingLengths
  shortened: np.ndarray
  failed: Sequence[str]

  def metrics(self) -> dict[str, float]:
    """Returns shares of the rollouts, and mean lengths in tokens.

    `rewritten` is the share that is learned, `rewritten_len` the mean length
    of those, before the cap; the other lengths are of all.
    """
    these, failed = self.lengths, np.array(self.failed)
    done = failed == ""
    line = {
        "rewritten": float(np.mean(done)),
        "draft_len": float(np.mean(these.drafts)),
        "rewriting_len": float(np.mean(these.written)),
        "rewritten_len": float(these.kept.sum() / max(done.sum(), 1)),
        "drafts_shortened": float(np.mean(self.shortened)),
    }
    shares = {r: float(np.mean(failed == r)) for r in rewriting.REASONS}
    return line | {f"rewrite_{r}": x for r, x in shares.items() if x}


@dataclasses.dataclass(frozen=True)
class _Writer:
  """Samples answers up to one length with one model.

  Attributes:
    sampler: has that length as its only bucket.
    microbatches: of its prompts.
  """

  sampler: generate.Sampler
  microbatches: Microbatches

  def write(
      self,
      params: Params,
      prompts: PromptBatch,
      key: jax.Array,
      poll: Callable[[], None],
  ) -> list[np.ndarray] | None:
    """Returns the tokens of each answer, on the host; None on shapes."""
    (length,) = self.sampler.buckets
    batches = self.microbatches.for_sampling(prompts, length)
    rollouts = [
        self.sampler.sample(params, batch, key, length, poll)
        for batch in batches
    ]
    shown = [(r.tokens, r.mask) for r in rollouts]
    if sharding.is_abstract(shown):
      return None
    found = sharding.to_host(shown)
    count = self.sampler.config.per_prompt
    tokens, mask = (
        microbatch.join(list(parts), count)
        for parts in zip(*found, strict=True)
    )
    return [row[kept] for row, kept in zip(tokens, mask, strict=True)]


class Rewriter:
  """Samples the student's drafts, and the teacher's rewritings of them."""

  def __init__(
      self,
      models: Models,
      microbatches: Microbatches,
      drafter: generate.Sampler,
      writer: generate.Sampler,
      drafting: object,
      writing: object,
  ):
    """Jits the programs that split the prompts of both samplings.

    Args:
      models: of the run.
      microbatches: of the update.
      drafter: samples with the student.
      writer: samples with the teacher.
      drafting: shapes of what lies in the memory while the student samples.
      writing: the same while the teacher does.
    """
    self._models, self._microbatches = models, microbatches
    self._spec = models.config.rollout.rewrite
    self._draft, self._write = (
        _Writer(sampler, Microbatches(models, [sampler], resting))
        for sampler, resting in ((drafter, drafting), (writer, writing))
    )

  @property
  def used(self) -> int:
    """How many variants of prefill and decode have run."""
    return self._draft.sampler.used + self._write.sampler.used

  def draft(
      self,
      params: Params,
      prompts: PromptBatch,
      key: jax.Array,
      poll: Callable[[], None],
  ) -> list[np.ndarray] | None:
    """Returns the student's answers [prompts * per_prompt]; None on shapes.

    Args:
      params: the student's.
      prompts: [B, S].
      key: of the update.
      poll: called before each segment; it may raise to stop.
    """
    return self._draft.write(params, prompts, key, poll)

  def rewrite(
      self,
      params: Params,
      prompts: PromptBatch,
      drafts: list[np.ndarray] | None,
      asking: Asking | None,
      key: jax.Array,
      cap: int,
      poll: Callable[[], None],
  ) -> tuple[tuple[PromptBatch, Rollout], Rewritten | None]:
    """Returns prompts and rollouts to learn from, on the mesh of training.

    A rollout has the beginning of a rewriting after the student's prompt; none
    of its tokens counts if the rewriting failed. Its static length is the
    bucket of the longest one, at most that of the cap.

    Args:
      params: the teacher's, on the devices.
      prompts: [B, S].
      drafts: what `draft` returned.
      asking: the update's questions; None on shapes.
      key: of the update.
      cap: in tokens.
      poll: called before each segment; it may raise to stop.
    """
    mesh, bucket = self._models.mesh, self._microbatches.bucket
    turns = self._abstract_turns(prompts)
    if drafts is not None:
      asked = asking.ask(drafts)
      turns = asked.prompts
    turns = sharding.global_batch(turns, mesh)
    if not sharding.is_abstract(key):
      key = jax.random.fold_in(key, _SALT)
    written = self._write.write(params, turns, key, poll)
    batch = self._microbatches.repeat(prompts)
    if self._spec.scored_in == "rewriting":
      batch = dataclasses.replace(
          batch, teacher_tokens=turns.tokens, teacher_mask=turns.mask
      )
    if written is None:
      shape = (len(batch.tokens), bucket(cap))
      rollout = Rollout(
          jax.ShapeDtypeStruct(shape, jnp.int32),
          jax.ShapeDtypeStruct(shape, bool),
      )
      return (batch, sharding.global_batch(rollout, mesh)), None
    taken = [
        rewriting.Taken(failed="long")
        if long
        else asking.rewriting.take(tokens)
        for tokens, long in zip(written, asked.long, strict=True)
    ]
    kept = np.array([len(one.tokens) for one in taken])
    longest = max(int(kept.clip(max=cap).max()), 1)
    rollout = self._rollout(taken, cap, bucket(longest))
    shown = Rewritten(
        flops.RewritingLengths(
            drafts=np.array([len(x) for x in drafts]),
            prompts=asked.prompts.mask.sum(1),
            written=np.array([len(x) for x in written]),
            kept=kept,
        ),
        asked.shortened,
        [one.failed for one in taken],
    )
    return (batch, sharding.global_batch(rollout, mesh)), shown

  def _abstract_turns(self, prompts: PromptBatch) -> PromptBatch:
    """Shapes of the teacher's turns."""
    rows = len(prompts.tokens) * self._models.config.rollout.per_prompt
    shape = (rows, self._spec.max_prompt_len)
    return PromptBatch(
        jax.ShapeDtypeStruct(shape, jnp.int32),
        jax.ShapeDtypeStruct(shape, bool),
        jax.ShapeDtypeStruct((rows, 2), jnp.int32),
    )

  def _rollout(
      self, taken: Sequence[rewriting.Taken], cap: int, length: int
  ) -> Rollout:
    """Puts the first `cap` tokens of each into NumPy rows."""
    tokens = np.full((len(taken), length), self._models.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, one in enumerate(taken):
      kept = one.tokens[:cap]
      tokens[row, : len(kept)], mask[row, : len(kept)] = kept, True
    return Rollout(tokens, mask)
