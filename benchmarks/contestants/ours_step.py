"""This package's update: sample, score, train.

Arguments: the teacher's directory, the student's, and what to compute in.
"""

import functools
import sys

import contest
import jax
import numpy as np

from prefix_distill import config as config_lib
from prefix_distill import sharding
from prefix_distill.models import huggingface as hf
from prefix_distill.structs import PromptBatch
from prefix_distill.train import setup as setup_lib
from prefix_distill.train.update import Clock
from prefix_distill.train.update import Programs
from prefix_distill.train.update import Request


class _Trainer:
  """A student and its teacher, for rollouts of one length."""

  def __init__(
      self, teacher: str, student: str, dtype: str, shape: tuple[int, int, int]
  ):
    batch, prompt, new = shape
    # Prompts are made here; the config wants to know of some all the same.
    problems = config_lib.DatasetSpec("math_task", answer="answer", size=1)
    self._config = config = config_lib.Config(
        method="prefix",
        steps=1000,
        student=config_lib.ModelSpec(student, dtype),
        teacher=config_lib.ModelSpec(teacher, dtype, dtype),
        data=config_lib.DataSpec(problems, batch, prompt),
        rollout=config_lib.RolloutSpec(per_prompt=1, max_len=new),
        prefix=config_lib.PrefixSpec(
            "fixed", (new,), fixed=config_lib.FixedSpec(new)
        ),
        optimizer=config_lib.OptimizerSpec(1e-5, warmup_steps=2),
        evaluation=config_lib.EvaluationSpec({"none": problems}),
    )
    mesh = sharding.make_mesh(config.mesh)
    models = [
        setup_lib.make_model(hf.read_config(spec.path), spec, mesh)
        for spec in (config.student, config.teacher)
    ]
    self._programs = Programs(
        setup_lib.Models(config, mesh, *models, models[0].config.vocab_size)
    )
    params, self._teacher = (
        setup_lib.load_model(spec, model, mesh, 0)
        for spec, model in zip(
            (config.student, config.teacher), models, strict=True
        )
    )
    self._state = self._programs.init(params)
    self._mesh = mesh

  def step(self, tokens: np.ndarray) -> None:
    rows = np.arange(len(tokens), dtype=np.int32)
    batch = PromptBatch(tokens, np.ones(tokens.shape, bool), rows)
    batch = sharding.global_batch(batch, self._mesh)
    request = Request(self._config.prefix.fixed.length, jax.random.key(0))
    self._state, shown = self._programs.update(
        self._state, self._teacher, batch, None, request, Clock()
    )
    assert np.isfinite(float(shown.metrics["kl"]))
    assert shown.mask.all()


def main() -> None:
  teacher, student, dtype = [*sys.argv[1:], "float32"][:3]

  @functools.lru_cache(maxsize=1)
  def trainer(*shape):
    return _Trainer(teacher, student, dtype, shape)

  def answer(tokens, new):
    tokens = np.array(tokens, np.int32)
    trainer(*tokens.shape, new).step(tokens)

  contest.serve(answer)


if __name__ == "__main__":
  main()
