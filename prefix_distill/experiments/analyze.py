r"""Analyses of any student and teacher: the paper's two, and the gradient.

  python -m prefix_distill.experiments.analyze --config=FILE[:ARG] \
    --what=position
  python -m prefix_distill.experiments.analyze --config=FILE[:ARG] \
    --what=teacher_prefix
  python -m prefix_distill.experiments.analyze --config=FILE[:ARG] \
    --what=gradient

position
  Where the divergence is (figure 2). The student samples whole rollouts. For
  each position this gives the mean |log p_S - log p_T| of the sampled tokens,
  and the exact reverse KL. `--students=a,b` compares several students on
  rollouts of their own, such as before and after training with a short prefix.
  That shows what happens to the loss beyond the prefix.
teacher_prefix
  What a prefix is worth (figure 3). The student continues the first tokens of
  the teacher's answer, without any training. At least the last `--withheld`
  tokens stay hidden, so that no answer leaks.
gradient
  Where the gradient points. The student samples whole rollouts; the loss on the
  first P tokens of each has a gradient, and its cosine with the gradient of the
  whole loss says how far training on the prefix is training on the whole.
  `halves` is the cosine of the whole gradients of two halves of the rollouts:
  what noise leaves of 1.

A table shows the main numbers. All of them go to `analysis/` in --workdir as
JSON, with a picture beside them.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

from absl import flags
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import rich.console

from prefix_distill import command_line
from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.distill import chunked_head
from prefix_distill.distill import loss as loss_lib
from prefix_distill.errors import check
from prefix_distill.evaluate import evaluator
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.report import plots
from prefix_distill.report import report
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.train import microbatch
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import step as step_lib
from prefix_distill.train import update
from prefix_distill.train import workdir as workdir_lib

_WHAT = flags.DEFINE_enum(
    "what",
    "position",
    ["position", "teacher_prefix", "gradient"],
    "Which analysis.",
)
_STUDENTS = flags.DEFINE_list(
    "students",
    [],
    "position, gradient: other students to compare with the config's.",
)
_BATCHES = flags.DEFINE_integer(
    "batches", 4, "position, gradient: batches of data.batch_size prompts."
)
_LENGTHS = flags.DEFINE_list(
    "lengths",
    ["0", "16", "32", "64", "96"],
    "teacher_prefix: tokens of the teacher's answer; gradient: P.",
)
_WITHHELD = flags.DEFINE_integer(
    "withheld", 40, "teacher_prefix: last tokens that always stay hidden."
)


def _load(spec: Any, setup: setup_lib.Setup, model: Any) -> Params:
  models = setup.models
  return setup_lib.load_model(spec, model, models.mesh, models.config.seed)


@dataclasses.dataclass(frozen=True)
class _Scored:
  """Whole rollouts of one student.

  Attributes:
    params: the student's weights.
    parts: (prompts, rollouts), one for each batch.
  """

  params: Params
  parts: Iterator[tuple[PromptBatch, Rollout]]


def _rollouts(
    setup: setup_lib.Setup, students: list[str], batches: int
) -> Iterator[tuple[str, _Scored]]:
  """Samples whole rollouts of each student, all to the same prompts."""
  models, config = setup.models, setup.models.config
  data = [next(setup.data)[0] for _ in range(batches)]
  length = config.rollout.max_len
  sampler = update.sampler(models, models.student, (length,))

  def parts(params: Params) -> Iterator[tuple[PromptBatch, Rollout]]:
    for number, prompts in enumerate(data):
      batch = sharding.global_batch(prompts, models.sampling_mesh)
      rollout = sampler.sample(params, batch, jax.random.key(number), length)
      batch = generate.repeat_prompts(config.rollout.per_prompt, prompts)
      yield sharding.global_batch(batch, models.mesh), rollout

  for path in students:
    spec = dataclasses.replace(config.student, path=path)
    params = _load(spec, setup, models.student)
    yield path, _Scored(params, parts(params))


def position(
    setup: setup_lib.Setup, students: list[str], batches: int
) -> dict[str, Any]:
  """Returns mean |log ratio| and exact KL at each position, by student.

  Args:
    setup: the setup of a run with an exact loss.
    students: the students' paths.
    batches: batches of prompts; all students get the same prompts.
  """
  models, out = setup.models, {}
  teacher_params = _load(models.config.teacher, setup, models.teacher)
  exact = loss_lib.ExactLoss(models.loss.dist, score_tokens=True)
  sums_of = functools.partial(
      jax.jit(_position_sums, static_argnums=(0, 1, 2)),
      models.student,
      models.teacher,
      exact,
  )
  for path, scored in _rollouts(setup, students, batches):
    sums = sum(
        np.asarray(sums_of(scored.params, teacher_params, batch, rollout))
        for batch, rollout in scored.parts
    )
    count = np.maximum(sums[2], 1)
    out[path] = {
        "log_ratio": (sums[0] / count).tolist(),
        "kl": (sums[1] / count).tolist(),
        "rollouts": sums[2].tolist(),
    }
  return out


def gradient(
    setup: setup_lib.Setup,
    students: list[str],
    batches: int,
    lengths: list[int],
) -> dict[str, Any]:
  """Returns cosines of prefixes' gradients with the whole one, by student.

  Args:
    setup: the setup of a run with a teacher.
    students: the students' paths.
    batches: batches of prompts, at least 2; all students get the same prompts.
    lengths: P of the prefixes, above 0.
  """
  check(batches > 1, f"--batches is {batches}; set it to 2 or more.")
  check(
      all(length > 0 for length in lengths) and lengths,
      f"--lengths is {lengths}; a prefix has 1 token or more.",
  )
  models, out = setup.models, {}
  teacher_params = _load(models.config.teacher, setup, models.teacher)
  score = jax.jit(loss_lib.score, static_argnums=(0, 1))
  grads_of = jax.jit(
      functools.partial(
          _window_gradient,
          models.student,
          models.teacher,
          models.loss,
          step_lib.Watch(models.config.rollout.max_len, ()),
      ),
      static_argnums=0,
  )
  for path, scored in _rollouts(setup, students, batches):
    totals, rollouts = {x: [0.0, 0.0] for x in (*lengths, 0)}, 0
    for number, (batch, rollout) in enumerate(scored.parts):
      rollouts += len(rollout.tokens)
      scores = score(
          models.teacher, models.loss, teacher_params, batch, rollout
      )
      for length, halves in totals.items():
        window = step_lib.Window(0, length)
        inputs = (batch, rollout, scores)
        found = grads_of(window, scored.params, teacher_params, inputs)
        halves[number % 2] = halves[number % 2] + found
    whole = sum(totals[0])
    out[path] = {
        "rollouts": rollouts,
        "halves": _cosine(*totals[0]),
        "prefixes": [
            {
                "length": length,
                "cosine": _cosine(sum(totals[length]), whole),
                "norm": float(
                    jnp.linalg.norm(sum(totals[length]))
                    / jnp.linalg.norm(whole)
                ),
            }
            for length in lengths
        ],
    }
  return out


def _window_gradient(
    student: Model,
    teacher: Model,
    loss: loss_lib.Loss,
    watch: step_lib.Watch,
    window: step_lib.Window,
    params: Params,
    teacher_params: Params,
    inputs: step_lib.Microbatch,
) -> jax.Array:
  """Returns the gradient of the loss on a window, as one vector."""
  head = None if inputs[2].hidden is None else teacher.head(teacher_params)

  def summed(params: Params) -> jax.Array:
    return step_lib.distillation_loss(
        student, loss, watch, window, params, head, inputs
    )[0]

  return jax.flatten_util.ravel_pytree(jax.grad(summed)(params))[0]


def _cosine(first: jax.Array, second: jax.Array) -> float:
  norms = jnp.linalg.norm(first) * jnp.linalg.norm(second)
  return float(jnp.vdot(first, second) / norms)


def _position_sums(
    student: Model,
    teacher: Model,
    exact: loss_lib.ExactLoss,
    params: Params,
    teacher_params: Params,
    batch: PromptBatch,
    rollout: Rollout,
) -> jax.Array:
  """Sums |log ratio|, KL and the mask over rollouts: [3, P]."""
  scores = loss_lib.score(teacher, exact, teacher_params, batch, rollout)
  hidden = student.prefix_hidden(params, batch, rollout)
  head = teacher.head(teacher_params)
  _, metrics = chunked_head.weighted_sum(
      *exact.arguments(
          student, params, head, hidden, rollout, scores, rollout.mask
      )
  )
  own = loss_lib.token_scores(
      student, params, hidden, rollout.tokens, rollout.mask, exact.dist
  )
  ratio = abs(own["event"] - scores.log_probs)
  parts = (ratio, metrics["kl"], jnp.ones_like(ratio))
  return jnp.stack([jnp.sum(x * rollout.mask, axis=0) for x in parts])


def teacher_prefix(
    setup: setup_lib.Setup, lengths: list[int], withheld: int
) -> dict[str, Any]:
  """Returns the student's accuracy after a prefix of the teacher's answer.

  A prefix length leaves out the problems whose teacher's answer is shorter than
  that length plus `withheld`. `problems` counts the others, and
  `accuracy_alone` is the student's accuracy on them without a prefix.

  Args:
    setup: the setup of a run, with evaluation sets.
    lengths: the lengths of the prefixes; 0 for no prefix.
    withheld: how many last tokens of the teacher's answer stay hidden.
  """
  models, tokenizer, out = setup.models, setup.tokenizer, {}
  config = models.config
  spec = config.evaluation
  sampler_config = generate.SamplerConfig(
      models.stop_ids, tokenizer.pad_id, tokenizer.num_tokens
  )
  draw = generate.Draw.of(spec.max_len, spec.temperature)

  def engine(which: Any, model: Any) -> continuous_batching.Engine:
    params, model = _load(which, setup, model), models.for_sampling(model)
    # Memory holds both models, and a prefix makes the prompts longer.
    rows = microbatch.answers(
        models,
        model,
        sampler_config,
        [params, params],
        evaluator.longest_prompt(setup.problems) + max(lengths),
    )
    return continuous_batching.Engine(model, sampler_config, params, rows)

  teacher = engine(config.teacher, models.teacher)
  student = engine(config.student, models.student)
  for name, problems in setup.problems.items():
    key = jax.random.key(config.seed)
    answers = {
        number: tokens
        for number, tokens, _ in teacher.answers(problems.batch, key, draw)
    }
    rows = []
    for length in lengths:
      kept = [
          n for n in sorted(answers) if len(answers[n]) >= length + withheld
      ]
      if not kept:
        continue
      results = []
      for given in dict.fromkeys((length, 0)):
        started = _continue_from(problems, answers, kept, given)
        done = evaluator.complete(
            student, tokenizer, started, 1, config.seed, draw
        )
        prefixes = [tokenizer.decode(answers[n][:given].tolist()) for n in kept]
        done.texts[:] = [
            [p + t[0]] for p, t in zip(prefixes, done.texts, strict=True)
        ]
        results.append(
            evaluator.summarize(
                done, started.answers, problems.grading, problems.opening
            )
        )
      rows.append({
          "length": length,
          **results[0],
          "accuracy_alone": results[-1]["accuracy"],
      })
    out[name] = rows
  return out


def _continue_from(
    problems: evaluator.Problems,
    answers: dict[int, np.ndarray],
    kept: list[int],
    length: int,
) -> evaluator.Problems:
  """Appends the first `length` tokens of the answers to the prompts."""
  prompts = jax.tree.map(lambda x: x[np.array(kept)], problems.batch)
  tokens = np.stack([answers[n][:length] for n in kept]).astype(np.int32)
  batch = PromptBatch(
      np.concatenate([prompts.tokens, tokens], axis=1),
      np.concatenate([prompts.mask, np.ones(tokens.shape, bool)], axis=1),
      prompts.index,
  )
  return dataclasses.replace(
      problems, batch=batch, answers=[problems.answers[n] for n in kept]
  )


# The columns of each analysis's table.
_HEADERS = {
    "gradient": ("tokens", "cosine with the whole", "length / the whole's"),
    "position": ("tokens", "reverse KL, nats a rollout", "absolute log ratio"),
    "teacher_prefix": (
        "the teacher's tokens",
        "accuracy after them (95 %)",
        "without them, %",
        "problems",
    ),
}


def rows(what: str, found: Any) -> list[Sequence[str]]:
  """Returns the table of one student or set, without its header.

  Args:
    what: the analysis.
    found: what it returned, of that student or set.
  """
  if what == "gradient":
    made = [
        (f"{x['length']}", f"{x['cosine']:.2f}", f"{x['norm']:.2f}")
        for x in found["prefixes"]
    ]
    return [*made, ("halves of all", f"{found['halves']:.2f}", "-")]
  if what == "teacher_prefix":
    return [
        (
            f"{x['length']}",
            report.accuracy(x),
            f"{100 * x['accuracy_alone']:.1f}",
            f"{x['problems']}",
        )
        for x in found
    ]
  count = np.array(found["rollouts"])
  nats = [
      count * np.array(found[x]) / max(count[0], 1) for x in ("kl", "log_ratio")
  ]
  return [
      (f"{start} to {end}", *(f"{x[start:end].sum():.3g}" for x in nats))
      for start, end in report.spans(len(count))
  ]


def _analyze(config: Config, workdir: pathlib.Path) -> None:
  check(
      not config.is_supervised,
      f"method is {config.method!r}, which has no teacher to compare with; use"
      " 'prefix' or 'full'.",
  )
  check(
      not config.lora.rank,
      f"lora.rank is {config.lora.rank}, and an analysis compares whole models;"
      " set lora.rank to 0, and name exports in --students.",
  )
  setup = setup_lib.prepare(config, workdir)
  with workdir_lib.claimed(config, workdir, setup.contents):
    _write(setup, workdir / "analysis")


def _write(setup: setup_lib.Setup, directory: pathlib.Path) -> None:
  config = setup.models.config
  directory.mkdir(exist_ok=True)
  students = [config.student.path, *_STUDENTS.value]
  if _WHAT.value == "gradient":
    lengths = sorted({int(n) for n in _LENGTHS.value} - {0})
    found = gradient(setup, students, _BATCHES.value, lengths)
    plots.cosine_against_prefix(found, directory / "gradient.png")
  elif _WHAT.value == "position":
    found = position(setup, students, _BATCHES.value)
    plots.signal_against_position(found, directory / "position.png")
  else:
    lengths = sorted({int(n) for n in _LENGTHS.value})
    found = teacher_prefix(setup, lengths, _WITHHELD.value)
    plots.accuracy_against_prefix(found, directory / "teacher_prefix.png")
  file = directory / f"{_WHAT.value}.json"
  file.write_text(json.dumps(found, indent=1) + "\n")
  console = rich.console.Console(highlight=False)
  for name, values in found.items():
    header, width = _HEADERS[_WHAT.value], console.width
    cells = rows(_WHAT.value, values)
    console.print(report.table(header, cells, width, name))
    if not cells:
      print(
          "No answer of the teacher's is so long; lower --lengths or"
          f" --withheld={_WITHHELD.value}."
      )
  print(f"Written: {file}, and a picture beside it.")


def main() -> None:
  _analyze(command_line.config(), command_line.workdir(sys.argv))


if __name__ == "__main__":
  command_line.run(main, __doc__)
