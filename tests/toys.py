"""Small models, prompts and model directories that the tests share."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from prefix_distill import assets
from prefix_distill import config as config_lib
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.data.tokenizer import Tokenizer
from prefix_distill.distill import chunked_head
from prefix_distill.distill import divergence
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.divergence import Distribution
from prefix_distill.models import huggingface as hf
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.config import RopeConfig
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.structs import PromptBatch
from prefix_distill.structs import Rollout
from prefix_distill.train import setup as setup_lib

_TESTS = pathlib.Path(__file__).parent

NUM_TOKENS = 13
STOPS = (11, 12)
PAD = 0
# How a teacher rewrites a toy's answers.
REWRITE = config_lib.RewriteSpec(
    prompt="{question} {answer} Be brief.",
    thoughts="keep",
    scored_in="rewriting",
    max_draft_len=12,
    max_prompt_len=144,
    max_len=10,
)
# A run of the command line that takes seconds.
SMALL_RUN = (
    "--config=configs/math.py:tiny-weak",
    "--config.steps=6",
    "--config.data.batch_size=4",
    "--config.rollout.max_len=24",
    "--config.prefix.buckets=(8,24)",
    "--config.prefix.linear.increment=3",
    "--config.evaluation.max_len=24",
    "--config.evaluation.every=2",
    "--config.evaluation.batch_size=8",
    "--config.evaluation.greedy=False",
    "--config.evaluation.sets.heldout.size=8",
    "--config.checkpoint.every=2",
    "--tracker=none",
)


def model_config(**changes) -> ModelConfig:
  """Two layers of width 16, with 13 real tokens in 40 rows."""
  config = ModelConfig(
      family="qwen3",
      vocab_size=40,
      dim=16,
      mlp_dim=32,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      norm_eps=1e-6,
      rope=RopeConfig(10_000.0),
      tied=False,
      max_length=128,
  )
  return dataclasses.replace(config, **changes)


def _dense(term, student_logits, teacher_logits, dist) -> jax.Array:
  """Returns a divergence of whole logits; the larger vocabulary is cut."""
  rows = min(student_logits.shape[-1], teacher_logits.shape[-1])
  logits = student_logits[..., :rows], teacher_logits[..., :rows]
  return divergence.compare(term, *divergence.distributions(*logits, dist))


reverse_kl = functools.partial(_dense, divergence.reverse_kl_term)
forward_kl = functools.partial(_dense, divergence.forward_kl_term)


def jsd(student_logits, teacher_logits, dist, beta=0.5) -> jax.Array:
  term = divergence.named("jsd", beta)
  return _dense(term, student_logits, teacher_logits, dist)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def token_divergence(
    student, teacher, dist, student_params, teacher_params, batch, rollout
) -> jax.Array:
  """Returns the exact reverse KL at each rollout token, in nats: [B, P]."""
  exact = loss_lib.ExactLoss(dist)
  _, metrics = chunked_head.weighted_sum(
      *exact.arguments(
          student,
          student_params,
          teacher.head(teacher_params),
          student.prefix_hidden(student_params, batch, rollout),
          rollout,
          loss_lib.score(teacher, exact, teacher_params, batch, rollout),
          rollout.mask,
      )
  )
  return metrics["kl"]


def model(seed: int = 0, **changes) -> tuple[Model, Params]:
  toy = Model(model_config(**changes))
  return toy, toy.init(jax.random.key(seed))


def prompts(rows: int, columns: int = 5, seed: int = 0) -> PromptBatch:
  """Random prompts of 1 to `columns` tokens, padded on the left."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, columns + 1, rows)
  mask = np.arange(columns) >= columns - lengths[:, None]
  tokens = rng.integers(1, STOPS[0], (rows, columns))
  return PromptBatch(
      jnp.asarray(np.where(mask, tokens, PAD), jnp.int32),
      jnp.asarray(mask),
      jnp.arange(rows, dtype=jnp.int32),
  )


def rollout(lengths: list[int], columns: int, seed: int = 0) -> Rollout:
  """Random tokens, of which each row's first `length` count."""
  rng = np.random.default_rng(seed)
  mask = np.arange(columns) < np.array(lengths)[:, None]
  tokens = rng.integers(1, NUM_TOKENS, mask.shape)
  log_probs = np.where(mask, -rng.random(mask.shape), 0)
  log_probs = jnp.asarray(log_probs, jnp.float32)
  return Rollout(
      jnp.asarray(np.where(mask, tokens, PAD), jnp.int32),
      jnp.asarray(mask),
      log_probs,
      log_probs,
  )


def distribution(**changes) -> Distribution:
  dist = Distribution(temperature=1.0, num_tokens=NUM_TOKENS)
  return dataclasses.replace(dist, **changes)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
  """Collects the names of the functions that XLA compiles, in any thread."""
  names = []

  class Handler(logging.Handler):

    def emit(self, record: logging.LogRecord) -> None:
      found = re.match(
          r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()
      )
      if found:
        names.append(found[1])

  handler, logger = Handler(), logging.getLogger("jax")
  propagate, logger.propagate = logger.propagate, False
  logger.addHandler(handler)
  jax.config.update("jax_log_compiles", True)
  try:
    yield names
  finally:
    jax.config.update("jax_log_compiles", False)
    logger.removeHandler(handler)
    logger.propagate = propagate


def models(
    config: config_lib.Config, mesh: jax.sharding.Mesh, **changes
) -> setup_lib.Models:
  """Two toy models of one layer, and what else programs are built from."""
  student, teacher = (
      Model(model_config(num_layers=1), mesh=mesh) for _ in range(2)
  )
  return setup_lib.Models(
      config,
      mesh,
      student,
      teacher,
      NUM_TOKENS,
      PAD,
      special_ids=STOPS,
      **changes,
  )


def load_models(
    config: config_lib.Config, mesh: jax.sharding.Mesh
) -> tuple[setup_lib.Models, Tokenizer, list[Params]]:
  """Reads the models of a config, with so many stops that most answers end."""
  tokenizer = tokenizer_lib.load(config.student.path)
  stops = tuple(range(0, tokenizer.num_tokens, 12))
  specs = config.student, config.teacher
  both = [Model(hf.read_config(spec.path), mesh=mesh) for spec in specs]
  models = setup_lib.Models(
      config,
      mesh,
      *both,
      tokenizer.num_tokens,
      tokenizer.pad_id,
      tokenizer.special_ids,
      stops,
      stops,
  )
  params = [
      setup_lib.load_model(spec, model, mesh, 0)
      for spec, model in zip(specs, both, strict=True)
  ]
  return models, tokenizer, params


def write_model(directory: pathlib.Path, seed: int, tokenizer: str) -> str:
  """Writes a random model with a bundled tokenizer; returns its path."""
  settings = json.loads((assets.path(tokenizer) / "config.json").read_text())
  settings |= {
      "vocab_size": -(-settings["vocab_size"] // 8) * 8,
      "hidden_size": 16,
      "intermediate_size": 32,
      "num_hidden_layers": 2,
      "layer_types": ["full_attention"] * 2,
      "max_window_layers": 2,
      "head_dim": 8,
      "tie_word_embeddings": False,
  }
  source = directory.with_name(directory.name + "-architecture")
  source.mkdir(parents=True)
  (source / "config.json").write_text(json.dumps(settings))
  params = Model(hf.read_config(str(source))).init(jax.random.key(seed))
  hf.export(
      params, str(source), f"bundled:{tokenizer}", directory, "float32"
  )
  return str(directory)


def write_models(directory: pathlib.Path) -> list[str]:
  """Writes a student and a teacher; returns their paths."""
  return [
      write_model(directory / name, seed, name)
      for seed, name in enumerate(("capable", "teacher"))
  ]


def run_config(student: str, teacher: str, **changes) -> config_lib.Config:
  """Three updates on the bundled task with cap 8, and an evaluation."""
  problems = config_lib.DatasetSpec("math_task", answer="answer", size=200)
  heldout = dataclasses.replace(problems, split="test", size=8)
  config = config_lib.Config(
      method="prefix",
      steps=3,
      student=config_lib.ModelSpec(student),
      teacher=config_lib.ModelSpec(teacher),
      data=config_lib.DataSpec(problems, batch_size=8, max_prompt_len=96),
      prefix=config_lib.PrefixSpec(
          "fixed", fixed=config_lib.FixedSpec(8)
      ),
      rollout=config_lib.RolloutSpec(per_prompt=2, max_len=16),
      optimizer=config_lib.OptimizerSpec(learning_rate=1e-2),
      evaluation=config_lib.EvaluationSpec(
          {"heldout": heldout}, max_len=12, greedy=False, batch_size=8
      ),
  )
  return dataclasses.replace(config, **changes)


def _environment(devices: int) -> dict[str, str]:
  return os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)]),
      "XLA_FLAGS": xla_flags(devices),
  }


def xla_flags(devices: int) -> str:
  """Returns the tests' flags of XLA, with so many devices."""
  count = f"--xla_force_host_platform_device_count={devices}"
  return f"{os.environ['XLA_FLAGS']} {count}"


def start(program: str, *args: str, devices: int) -> subprocess.Popen:
  """Starts a script of tests/programs with so many devices.

  It compiles all anew: a kept program shows none of the partitioner's warnings.
  """
  return subprocess.Popen(
      [sys.executable, _TESTS / "programs" / program, *args],
      env=_environment(devices) | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
  )


def interruptible(*command: str | pathlib.Path) -> list[str | pathlib.Path]:
  """Returns the command with SIGINT at its default.

  Whoever runs the tests may ignore it, as `nohup` in a script does; processes
  inherit that, and neither Python nor bash then hears of a SIGINT.
  """
  program = (
      "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
      " os.execvp(sys.argv[1], sys.argv[1:])"
  )
  return [sys.executable, "-ISc", program, *command]


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def start_run(
    *flags: str,
    devices: int,
    processes: int = 1,
    own: Sequence[Sequence[str]] | None = None,
    folders: Sequence[pathlib.Path] | None = None,
) -> list[subprocess.Popen]:
  """Starts a run of the command line, in one process or several.

  Args:
    *flags: of all processes.
    devices: of each process.
    processes: how many.
    own: flags of each process.
    folders: which process starts where; the repository for all if None.
  """
  address = f"--distributed=localhost:{free_port()}"
  started = []
  for i in range(processes):
    more = [*own[i]] if own else []
    if processes > 1:
      more += [address, f"--num_processes={processes}", f"--process_id={i}"]
    started.append(
        subprocess.Popen(
            [sys.executable, "-m", "prefix_distill.main", *flags, *more],
            cwd=folders[i] if folders else _TESTS.parent,
            env=_environment(devices),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )
  return started


def end(
    processes: Sequence[subprocess.Popen], seconds: float
) -> list[tuple[int, str, str]]:
  """Returns exit status, output and errors of each; kills all if one hangs."""
  deadline, ends = time.monotonic() + seconds, []
  try:
    for process in processes:
      out, err = process.communicate(timeout=deadline - time.monotonic())
      ends.append((process.returncode, out, err))
  finally:
    for process in processes:
      process.kill()
  return ends


def finish(processes: Sequence[subprocess.Popen], seconds: float) -> list[str]:
  """Returns what each printed; kills all if one fails or hangs."""
  ends = end(processes, seconds)
  for code, _, err in ends:
    assert code == 0, err[-5000:]
  return [out for _, out, _ in ends]
