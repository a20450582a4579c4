"""A model answers prompts: `prefix-distill sample` and `prefix-distill chat`.

  prefix-distill sample --model=runs/math --prompt='What is 7 + 5?' --num=4
  prefix-distill chat --model=Qwen/Qwen3-1.7B --max_len=2048

`--model` is a directory in Hugging Face format, a hub id, `bundled:NAME`, or
the directory of a run; `--step` chooses one of the run's checkpoints. A run
also gives the system prompt, the suffix of the prompt (`<think>`), the sampling
settings and the stop tokens. `chat` keeps the turns; an empty line ends it.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile

from absl import logging
import jax
import numpy as np
import rich.console
from rich.text import Text

from prefix_distill import export
from prefix_distill import main as main_lib
from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import DatasetSpec
from prefix_distill.config import EvaluationSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import ModelSpec
from prefix_distill.data import prompts
from prefix_distill.data import records
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.data.records import Question
from prefix_distill.data.tokenizer import Tokenizer
from prefix_distill.errors import ArgumentParser
from prefix_distill.errors import check
from prefix_distill.errors import JsonError
from prefix_distill.errors import read_json
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.train import setup
from prefix_distill.train import workdir as workdir_lib

# A prompt's columns are a multiple of it, so that few programs are compiled.
_COLUMNS = 64
_ROWS = 64


def is_run(name: str) -> bool:
  """Whether a name is that of a run's directory."""
  with contextlib.suppress(JsonError, ValueError):
    found = read_json(pathlib.Path(name, "config.json"))
    return isinstance(found, dict) and "method" in found
  return False


@contextlib.contextmanager
def found(name: str, step: str) -> Iterator[tuple[str, Config | None]]:
  """Yields where a model is, and the settings of its run if it has one.

  A checkpoint is read as it would be exported, from a directory that is gone
  afterwards.

  Args:
    name: see the module.
    step: of a run: `last`, `best` or a number; else empty or `last`.

  Raises:
    UserError: there is no such checkpoint.
  """
  if step:
    export.check_step(step)
  if not is_run(name):
    check(
        step in ("", "last"),
        f"--step={step} but --model={name} is no directory of a run; leave"
        " --step out.",
    )
    yield name, None
    return
  workdir = pathlib.Path(name)
  config = workdir_lib.read_config(workdir)
  if step in ("", "last") and workdir_lib.is_finished(workdir):
    yield str(workdir / "export"), config
    return
  with tempfile.TemporaryDirectory() as directory:
    to = pathlib.Path(directory, "model")
    export.export(workdir, step or "last", to)
    yield str(to), config


@dataclasses.dataclass(frozen=True)
class Speaker:
  """A model that is ready to answer.

  Attributes:
    model: its architecture, on all devices that are here.
    params: its weights.
    tokenizer: its tokenizer.
  """

  model: Model
  params: Params
  tokenizer: Tokenizer

  @classmethod
  def load(cls, path: str, dtype: str, system: str | None) -> "Speaker":
    """Loads a model; the rows of a batch lie over all devices.

    Args:
      path: a directory, a hub id, or `bundled:NAME`.
      dtype: that of activations.
      system: see `data.system`.

    Raises:
      UserError: the model or its tokenizer cannot be used.
    """
    spec = ModelSpec(path, compute_dtype=dtype)
    mesh = sharding.make_mesh(MeshSpec())
    model = setup.make_model(hf.read_config(path), spec, mesh)
    tokenizer = tokenizer_lib.load(path, system)
    hf.check_weights(path, model.config)
    params = setup.load_model(spec, model, mesh, 0)
    return cls(model, params, tokenizer)

  def answers(
      self,
      questions: Sequence[Question],
      suffix: str,
      spec: EvaluationSpec,
      num: int,
      seed: int,
  ) -> evaluator.Completions:
    """Answers each question `num` times.

    Raises:
      UserError: a question is too long for the model, or is no text.
    """
    batch = self._encode(questions, suffix, spec.max_len)
    problems = evaluator.Problems(
        "prompts", batch, [""] * len(questions), num, 0
    )
    config = evaluator.sampler_config(
        self.tokenizer, spec, self.tokenizer.stop_ids
    )
    shards = sharding.batch_shards(self.model.mesh)
    rows = min(len(questions) * num, _ROWS)
    engine = continuous_batching.Engine(
        self.model, config, self.params, -(-rows // shards) * shards
    )
    draw = generate.Draw.of(spec.max_len, spec.temperature, spec.greedy)
    return evaluator.complete(
        engine, self.tokenizer, problems, num, seed, draw
    )

  def _encode(
      self, questions: Sequence[Question], suffix: str, max_len: int
  ) -> prompts.PromptBatch:
    lengths = [
        len(self.tokenizer.encode_prompt(question, suffix))
        for question in questions
    ]
    room = self.model.config.max_length - max_len
    number = int(np.argmax(lengths))
    check(
        lengths[number] <= room,
        f"Prompt {number + 1} has {lengths[number]} tokens, which with"
        f" --max_len={max_len} is more than the"
        f" {self.model.config.max_length} positions of"
        f" {self.tokenizer.path}; lower --max_len or shorten it.",
    )
    length = min(-(-lengths[number] // _COLUMNS) * _COLUMNS, room)
    rows = [
        prompts.encode_problem(
            self.tokenizer, question, length, suffix, f"prompt {i + 1}"
        )
        for i, question in enumerate(questions)
    ]
    return prompts.stack(rows, range(len(rows)))


def _parser(command: str) -> argparse.ArgumentParser:
  parser = ArgumentParser(command, __doc__)
  add = parser.add_argument
  add("--model", default="", help="see above")
  add("--step", default="", help="of a run: last (default), best or a number")
  add("--max_len", type=int, help="tokens of the longest answer (256)")
  add("--temperature", type=float, help="divides the logits (1)")
  add("--top_k", type=int, help="draws from so many tokens; 0 is off (0)")
  add("--top_p", type=float, help="draws from so much probability (1)")
  add("--greedy", action="store_true", help="take the most probable token")
  add("--seed", type=int, default=0, help="of the draws (0)")
  add("--system", help="the system prompt (the template's own)")
  add("--suffix", help="what follows the prompt, such as <think> (nothing)")
  add(
      "--dtype",
      default="",
      choices=("", "float32", "bfloat16"),
      help="of activations (float32 on a CPU, else bfloat16)",
  )
  if command == "sample":
    add("--prompt", action="append", default=[], help="may come several times")
    add("--prompts", default="", help="a file of records, as data.train.source")
    add("--question", default="question", help="the field in --prompts")
    add("--size", type=int, default=8, help="records of --prompts (8)")
    add("--num", type=int, default=1, help="answers to each prompt (1)")
    add("--json", default="", help="a file for the answers, a line each")
  return parser


def _spec(args: argparse.Namespace, config: Config | None) -> EvaluationSpec:
  """Returns how to sample: what flags say, or else the run's settings.

  Raises:
    ConfigError: a value that cannot work.
  """
  values = {}
  for name in ("max_len", "temperature", "top_k", "top_p"):
    given = getattr(args, name)
    if given is None and config is not None:
      given = getattr(config.evaluation, name)
    if given is not None:
      values[name] = given
  return EvaluationSpec({}, greedy=args.greedy, **values)


def _read(args: argparse.Namespace) -> list[Question]:
  """Returns the questions of the flags.

  Raises:
    UserError: there are none, or a record cannot be used.
  """
  asked: list[Question] = list(args.prompt)
  if args.prompts:
    spec = DatasetSpec(args.prompts, question=args.question, size=args.size)
    source = records.read(spec)
    asked += [
        records.question(source[i], args.question, source.where(i))
        for i in range(len(source))
    ]
  check(
      bool(asked),
      "There is nothing to answer; give --prompt=TEXT or --prompts=FILE.",
  )
  return asked


def _sample(
    speaker: Speaker,
    args: argparse.Namespace,
    asked: Sequence[Question],
    spec: EvaluationSpec,
    suffix: str,
    console: rich.console.Console,
) -> None:
  out = speaker.answers(asked, suffix, spec, args.num, args.seed)
  lines = []
  for i, question in enumerate(asked):
    console.print(Text(records.last_turn(question), style="bold"))
    for j, text in enumerate(out.texts[i]):
      end = "" if out.finished[i, j] else ", cut"
      console.print(Text(text))
      console.print(Text(f"[{out.lengths[i, j]} tokens{end}]\n", style="dim"))
      lines.append({
          "question": question,
          "answer": text,
          "tokens": int(out.lengths[i, j]),
          "finished": bool(out.finished[i, j]),
      })
  if args.json:
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    pathlib.Path(args.json).write_text("".join(texts), encoding="utf-8")


def _chat(
    speaker: Speaker,
    seed: int,
    spec: EvaluationSpec,
    suffix: str,
    console: rich.console.Console,
) -> None:
  turns: list[dict[str, str]] = []
  while True:
    try:
      text = console.input("[bold]you:[/bold] ")
    except EOFError:
      return
    if not text.strip():
      return
    turns.append({"role": "user", "content": text})
    waiting = console.status("...")
    with waiting if console.is_terminal else contextlib.nullcontext():
      out = speaker.answers([turns], suffix, spec, 1, seed + len(turns))
    console.print(Text(out.texts[0][0]))
    if not out.finished[0, 0]:
      console.print(Text(f"[cut at {spec.max_len} tokens]", style="dim"))
    # Templates drop earlier thoughts themselves where the model wants that.
    answer = suffix + out.texts[0][0]
    turns.append({"role": "assistant", "content": answer})


def _run(command: str, args: argparse.Namespace) -> None:
  check(bool(args.model), "--model is missing; set it.")
  check(
      0 <= args.seed < 2**31, f"--seed={args.seed} is no seed; give 0 or more."
  )
  console = rich.console.Console(highlight=False)
  if command == "sample":
    check(args.num >= 1, f"--num={args.num}; give 1 or more.")
    asked = _read(args)  # Before the weights.
  with found(args.model, args.step) as (path, config):
    spec = _spec(args, config)
    suffix, system = args.suffix, args.system
    if config is not None:
      suffix = config.data.suffix if suffix is None else suffix
      system = config.data.system if system is None else system
    speaker = Speaker.load(path, args.dtype or dtype(), system)
    if command == "sample":
      _sample(speaker, args, asked, spec, suffix or "", console)
    else:
      _chat(speaker, args.seed, spec, suffix or "", console)


def dtype() -> str:
  """Returns bfloat16 on an accelerator, and float32 on a CPU."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def start() -> None:
  """Does what the command line says, or exits with one sentence."""
  command = sys.argv[0].split()[-1]
  args = _parser(command).parse_args(sys.argv[1:])
  logging.set_verbosity(logging.WARNING)
  main_lib.keep_compiled_programs()
  try:
    _run(command, args)
  except UserError as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit(130)
