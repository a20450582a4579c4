"""The compiled programs of an update: sample, score, update."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from prefix_distill import sharding
from prefix_distill.distill import teacher as teacher_lib
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import sampler
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.structs import TeacherScores
from prefix_distill.train import optimizer
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import step as step_lib
from prefix_distill.train.step import TrainState


class Programs:
  """Jitted phases of one run; each compiles once for each prefix bucket."""

  def __init__(self, setup: setup_lib.Setup):
    config = setup.config
    self._setup = setup
    self._tx = optimizer.make(config.optimizer, config.steps)
    rows = sharding.batch_sharding(setup.mesh)
    state = self.abstract_state()
    shardings = jax.tree.map(lambda x: x.sharding, state)
    self._sample = jax.jit(
        sampler.sample, static_argnums=(0, 1), out_shardings=rows
    )
    self._repeat = jax.jit(
        sampler.repeat_prompts, static_argnums=1, out_shardings=rows
    )
    self._score = jax.jit(
        teacher_lib.score, static_argnums=(0, 1, 2), out_shardings=rows
    )
    self._init = jax.jit(
        functools.partial(step_lib.init_state, tx=self._tx),
        out_shardings=shardings,
        donate_argnums=0,
    )
    self._update = jax.jit(
        functools.partial(
            step_lib.train_step,
            self._loss(),
            self._tx,
            "tokens" if config.method == "sft" else "rollouts",
            config.optimizer.accumulation,
            setup.mesh,
        ),
        out_shardings=(shardings, sharding.replicated(setup.mesh)),
        donate_argnums=0,
    )

  def _loss(self) -> step_lib.LossFn:
    setup = self._setup
    if setup.teacher is None:
      return functools.partial(
          step_lib.supervised_loss, setup.student, setup.distribution
      )
    return functools.partial(
        step_lib.distillation_loss,
        setup.student,
        setup.distribution,
        setup.config.rollout.max_len,
    )

  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the state: one tree for everything."""
    shapes = jax.eval_shape(
        functools.partial(step_lib.init_state, tx=self._tx),
        self._setup.student.abstract_params(),
    )
    shardings = sharding.param_shardings(shapes, self._setup.mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )

  def init(self, params: Params) -> TrainState:
    """Builds the first state; the parameters are donated."""
    return self._init(params)

  def sample(
      self,
      params: Params,
      batch: PromptBatch,
      key: jax.Array,
      cap: int,
      bucket: int,
  ) -> Rollout:
    """Samples `per_prompt` prefixes of at most `cap` tokens: [B, bucket]."""
    setup = self._setup
    config = sampler.SamplerConfig(
        length=bucket,
        stop_ids=setup.stop_ids,
        pad_id=setup.chat.pad_id,
        num_tokens=setup.chat.num_tokens,
        per_prompt=setup.config.rollout.per_prompt,
        temperature=setup.config.rollout.temperature,
    )
    return self._sample(
        setup.student, config, params, batch, key, jnp.asarray(cap)
    )

  def repeat(self, batch: PromptBatch) -> PromptBatch:
    """Repeats each prompt for its rollouts."""
    return self._repeat(batch, self._setup.config.rollout.per_prompt)

  def score(
      self, params: Params, batch: PromptBatch, rollout: Rollout
  ) -> TeacherScores:
    """Scores prefixes with the teacher."""
    setup = self._setup
    return self._score(
        setup.teacher,
        setup.config.loss.form,
        setup.distribution,
        params,
        batch,
        rollout,
    )

  def update(
      self,
      state: TrainState,
      teacher_params: Params | None,
      batch: PromptBatch,
      rollout: Rollout,
      scores: TeacherScores | None,
  ) -> tuple[TrainState, dict[str, Any]]:
    """Takes one optimizer step; the state is donated."""
    head = None
    if scores is not None and scores.hidden is not None:
      head = self._setup.teacher.head(teacher_params)
    return self._update(state, head, (batch, rollout, scores))

  def compilations(self) -> int:
    """How many programs have been compiled so far."""
    jitted = (self._sample, self._score, self._update)
    return sum(f._cache_size() for f in jitted)  # pylint: disable=protected-access
