"""Commands that take a model: eval, sample, chat and export.

A model is a directory in Hugging Face format, a hub id, `bundled:NAME`, or the
directory of a run, of which `--step` chooses a checkpoint. `eval` grades its
answers to the sets of a config, `sample` and `chat` show its answers to prompts
of yours, and `export` writes a run's checkpoint as a model directory.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

from absl import flags
from absl import logging
import huggingface_hub
import jax
import numpy as np
import rich.console
import rich.table
from rich.text import Text

from prefix_distill import command_line
from prefix_distill import compilation
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
from prefix_distill.errors import check_path
from prefix_distill.errors import ConfigError
from prefix_distill.errors import counted
from prefix_distill.errors import JsonError
from prefix_distill.errors import one_line
from prefix_distill.errors import read_json
from prefix_distill.errors import shown
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.models import huggingface as hf
from prefix_distill.models import lora
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.report import page
from prefix_distill.report import report
from prefix_distill.rollout import continuous_batching
from prefix_distill.rollout import generate
from prefix_distill.train import checkpoint
from prefix_distill.train import microbatch
from prefix_distill.train import setup
from prefix_distill.train import workdir as workdir_lib

# What --help says of each command.
_MODEL = """\
`--model` is a directory in Hugging Face format, a hub id, `bundled:NAME`, or
the directory of a run; `--step` chooses one of the run's checkpoints."""
_EVAL = rf"""Grades a model's answers to problems.

  prefix-distill eval --model=runs/math
  prefix-distill eval --model=Qwen/Qwen3-1.7B \
    --config=math:qwen3-1.7b,sets=math500+aime24

{_MODEL} --config
names the evaluation sets, the sampling and the suffix of the prompts; without
it a run's own settings count. --config.evaluation.sets.mine.source=FILE adds a
set.
"""
_ANSWER = f"""\
A model answers prompts: `prefix-distill sample` and `prefix-distill chat`.

  prefix-distill sample --model=runs/math --prompt='What is 7 + 5?' --num=4
  prefix-distill chat --model=Qwen/Qwen3-1.7B --max_len=2048

{_MODEL} A run
also gives the system prompt, the suffix of the prompt (`<think>`), the sampling
settings and the stop tokens. `chat` keeps the turns; an empty line ends it.
"""
_EXPORT = """Writes a checkpoint as a Hugging Face model directory.

  prefix-distill export --workdir=runs/math --step=40 --to=DIR

`--step` is a number, `last`, or `best` for the one that `checkpoint.best`
chooses. Only the student's weights are read, into the host's memory: no
accelerator is used, so that the run may go on beside it. `--push=USER/NAME`
uploads the directory to the hub, as a private repository unless `--public` is
given; it needs HF_TOKEN or `hf auth login`. Without `--to` the directory is
gone afterwards.
"""
_NO_MODEL = "--model is missing; set it."
# The columns of the table of evaluations.
_HEADER = (
    "set",
    "mode",
    "accuracy, %",
    "problems x answers",
    "finish",
    "of those right",
    "tokens mean / 95 %",
)
# A prompt's columns are a multiple of it, so that few programs are compiled.
_COLUMNS = 64
_ROWS = 64


# The model of a run.


def is_run(name: str) -> bool:
  """Whether a name is that of a run's directory."""
  with contextlib.suppress(JsonError, ValueError):
    found = read_json(pathlib.Path(name, "config.json"))
    return isinstance(found, dict) and "method" in found
  return False


@contextlib.contextmanager
def find_model(name: str, step: str) -> Iterator[tuple[str, Config | None]]:
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
    _check_step(step)
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
    export(workdir, step or "last", to)
    yield str(to), config


def _check_step(text: str) -> None:
  """Raises ConfigError unless --step can name a checkpoint."""
  check(
      re.fullmatch("last|best|[0-9]{1,10}", text) is not None,
      f"--step is {shown(text)}; give a number, last or best.",
  )


def _choose(workdir: pathlib.Path, config: Config, text: str) -> int:
  """Returns the step of the checkpoint that `--step` names.

  Raises:
    UserError: there is no such checkpoint.
  """
  steps = checkpoint.listed(workdir)
  there = f"it has {', '.join(map(str, sorted(steps))) or 'none'}"
  check(bool(steps), f"{workdir} has no checkpoints; give another --workdir.")
  if text == "last":
    return steps[0]
  if text == "best":
    name = config.checkpoint.best
    check(
        bool(name),
        "--step=best needs a run with checkpoint.best set; give a number:"
        f" {there}.",
    )
    found = checkpoint.best(workdir, name, steps)
    check(
        found is not None,
        f"No checkpoint in {workdir} was evaluated on {name!r} yet; give a"
        f" number: {there}.",
    )
    return found
  known = text.isascii() and text.isdecimal() and int(text) in steps
  check(known, f"{workdir} has no checkpoint of --step={text}; {there}.")
  return int(text)


def export(workdir: pathlib.Path, step: str, to: pathlib.Path) -> int:
  """Writes the student of a checkpoint as a model directory; returns its step.

  Args:
    workdir: of the run.
    step: `last`, `best` or a number.
    to: a new directory.

  Raises:
    UserError: a flag or the run does not allow it.
  """
  config = workdir_lib.read_config(workdir)
  number = _choose(workdir, config, step)
  try:
    empty = not to.exists() or (to.is_dir() and not any(to.iterdir()))
    check(empty, f"--to={to} is there already; give a new directory.")
    spec = config.student
    mesh = sharding.make_mesh(MeshSpec(fsdp=1), jax.devices("cpu")[:1])
    model = Model(lora.adapted(hf.read_config(spec.path), config), mesh=mesh)
    abstract, base = model.abstract_params(), None
    if config.lora.rank:
      beside = page.adapter_directory(to)
      check(not beside.exists(), f"{beside} is there already; remove it.")
      _, abstract = lora.split(abstract)
      base = setup.load_model(spec, model, mesh, config.seed)
    abstract = sharding.with_shardings(abstract, mesh)
    params = checkpoint.read_params(workdir, number, abstract)
    params = lora.join(base, params)
    specs = [spec] if config.method == "sft" else [spec, config.teacher]
    tokenizers = [tokenizer_lib.load(one.tokenizer_path) for one in specs]
    stops, _ = setup.stop_ids(config, tokenizers)
    setup.export_student(config, params, stops, to.absolute(), workdir, number)
  except OSError as error:
    raise UserError(
        f"--to={to} cannot be written ({error.strerror}); give another place."
    ) from error
  return number


# Evaluation.


def _define_eval_flags() -> None:
  """Defines what eval takes besides --config; other commands use the names."""
  flags.DEFINE_string("model", None, "The model; see above.")
  flags.DEFINE_string("step", "", "Of a run: last (default), best or a number.")
  flags.DEFINE_string(
      "json", None, "A file for the metrics, a line for each set and mode."
  )


def _with_settings(argv: list[str]) -> list[str]:
  """Lets a run's settings stand for a missing --config."""
  words = [re.match(r"--?(\w+)(?:=(.*))?$", a, re.DOTALL) for a in argv]
  given = {m[1]: m[2] for m in words if m}
  for i, match in enumerate(words[:-1]):
    if match and match[2] is None:
      given[match[1]] = argv[i + 1]
  model = os.path.expanduser(given.get("model") or "")
  if "config" in given or not model or command_line.asks_help(argv):
    return argv
  check(
      is_run(model),
      f"--model={model} is no directory of a run here, whose settings would say"
      " what to answer; correct it, or add --config=NAME.",
  )
  # Before the flags that change its settings.
  return [argv[0], f"--config={pathlib.Path(model, 'config.json')}", *argv[1:]]


def _mesh(config: Config) -> jax.sharding.Mesh:
  """Returns the settings' mesh; or if it does not fit, all devices here."""
  try:
    mesh = sharding.make_mesh(config.mesh)
    setup.check_batches(config, mesh)
    return mesh
  except ConfigError:
    return sharding.make_mesh(MeshSpec())


def _evaluate(
    path: str, config: Config, console: rich.console.Console
) -> list[dict[str, Any]]:
  """Evaluates a model on the sets of the settings; returns a line for each.

  Args:
    path: of the model.
    config: its `evaluation` and `data` say what is asked, and how.
    console: shows each result as it comes.

  Raises:
    UserError: the model or a set cannot be used.
  """
  spec = ModelSpec(path, compute_dtype=config.student.compute_dtype)
  config = dataclasses.replace(config, student=spec)
  mesh = _mesh(config)
  student, tokenizer, problems = setup.read_evaluation(config, mesh)
  models = setup.Models.of(
      config, mesh, student, None, [tokenizer], sharding.memory(mesh)
  )
  params = setup.load_model(spec, student, mesh, config.seed)
  model = models.for_sampling(student)
  sampler = evaluator.sampler_config(
      config.evaluation, models.stop_ids, models.pad_id, models.num_tokens
  )
  rows = microbatch.answers(
      models, model, sampler, params, evaluator.longest_prompt(problems)
  )
  lines = []

  def write(values: dict[str, Any], completions: evaluator.Completions) -> None:
    del completions
    lines.append(values)
    console.print(
        Text(f"{values['set']}, {values['mode']}: {report.accuracy(values)}")
    )

  with tempfile.TemporaryDirectory() as directory:
    evaluator.evaluate(
        model,
        params,
        tokenizer,
        config.evaluation,
        problems,
        sampler,
        rows,
        config.seed,
        write,
        lambda name, mode: pathlib.Path(
            directory, f"{name}-{mode}.jsonl".replace("/", "_")
        ),
        lambda: None,
    )
  return lines


def _table(lines: list[dict[str, Any]], width: int) -> rich.table.Table:
  """Returns the results as a table for a terminal of so many columns."""
  rows = [
      (
          x["set"],
          x["mode"],
          report.accuracy(x),
          f"{x['problems']} x {x['samples']}",
          f"{x['finish_rate']:.1%}",
          f"{x['accuracy_finished']:.1%}",
          f"{x['mean_length']:.0f} / {x['length_p95']}",
      )
      for x in lines
  ]
  return report.table(_HEADER, rows, width)


def _eval() -> None:
  compilation.keep_programs()
  console = rich.console.Console(highlight=False)
  given = flags.FLAGS
  check(bool(given.model), _NO_MODEL)
  config = command_line.config()
  check(
      bool(config.evaluation.sets),
      "evaluation.sets is empty, so there is nothing to answer; give"
      " --config.evaluation.sets.NAME.source=FILE and its .answer.",
  )
  model = os.path.expanduser(given.model)
  with find_model(model, given.step) as (path, _):
    lines = _evaluate(path, config, console)
  console.print(_table(lines, console.width))
  _write_lines(given.json, lines)


# Sampling.


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
    tokenizer = self.tokenizer
    config = evaluator.sampler_config(
        spec, tokenizer.stop_ids, tokenizer.pad_id, tokenizer.num_tokens
    )
    shards = sharding.batch_shards(self.model.mesh)
    rows = min(len(questions) * num, _ROWS)
    engine = continuous_batching.Engine(
        self.model, config, self.params, -(-rows // shards) * shards
    )
    draw = generate.Draw.of(spec.max_len, spec.temperature, spec.greedy)
    return evaluator.complete(engine, tokenizer, problems, num, seed, draw)

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
      length = counted(int(out.lengths[i, j]), "token")
      end = "" if out.finished[i, j] else ", cut; --max_len=N for more"
      console.print(Text(text))
      console.print(Text(f"[{length}{end}]\n", style="dim"))
      lines.append(
          {
              "question": question,
              "answer": text,
              "tokens": int(out.lengths[i, j]),
              "finished": bool(out.finished[i, j]),
          }
      )
  _write_lines(args.json, lines)


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
      length = counted(spec.max_len, "token")
      console.print(
          Text(f"[cut at {length}; --max_len=N for more]", style="dim")
      )
    # Templates drop earlier thoughts themselves where the model wants that.
    answer = suffix + out.texts[0][0]
    turns.append({"role": "assistant", "content": answer})


def _answer(args: argparse.Namespace) -> None:
  """Does `sample`, or `chat`, which has no prompts among its flags."""
  compilation.keep_programs()
  console = rich.console.Console(highlight=False)
  asked = _read(args) if "prompt" in args else []  # Before the weights.
  with find_model(args.model, args.step) as (path, config):
    spec = _spec(args, config)
    suffix, system = args.suffix, args.system
    if config is not None:
      suffix = config.data.suffix if suffix is None else suffix
      system = config.data.system if system is None else system
    on_cpu = jax.default_backend() == "cpu"
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    speaker = Speaker.load(path, dtype, system)
    if asked:
      _sample(speaker, args, asked, spec, suffix or "", console)
    else:
      _chat(speaker, args.seed, spec, suffix or "", console)


# Export.


def push(directory: pathlib.Path, name: str, private: bool) -> str:
  """Uploads a model's directory to the hub; returns its address.

  Raises:
    UserError: the hub refuses it, or is not there.
  """
  hub = huggingface_hub.HfApi()
  try:
    made = hub.create_repo(name, private=private, exist_ok=True)
    hub.upload_folder(
        repo_id=made.repo_id,
        folder_path=directory,
        commit_message="Upload a distilled student",
    )
  except Exception as error:  # Which library it sends with depends on it.
    raise UserError(
        f"--push={name} failed ({one_line(error)}); check the name, the network"
        " and HF_TOKEN (or `hf auth login`)."
    ) from error
  return str(made)


def _export(args: argparse.Namespace) -> None:
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory() as directory:
    to = pathlib.Path(args.to or f"{directory}/model")
    workdir = pathlib.Path(args.workdir)
    number = export(workdir, args.step, to)
    if args.to:
      text = f"Written: the student after update {number} to {to}"
      if workdir_lib.read_config(workdir).lora.rank:
        text += f", its adapter to {page.adapter_directory(to)}"
      print(f"{text}.")
    if args.push:
      print(f"Uploaded to {push(to, args.push, not args.public)}.")


# The command line.


def _write_lines(file: str | None, lines: Sequence[dict[str, Any]]) -> None:
  """Writes what `--json` asks for."""
  if file:
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    path = pathlib.Path(file).expanduser()
    path.write_text("".join(texts), encoding="utf-8")


def _answer_parser(command: str) -> argparse.ArgumentParser:
  parser = ArgumentParser(command, _ANSWER)
  add = parser.add_argument
  home = os.path.expanduser  # The shell leaves --model=~/... alone.
  add("--model", type=home, default="", help="see above")
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
    about = "a file of records, as data.train.source"
    add("--prompts", type=home, default="", help=about)
    add("--question", default="question", help="the field in --prompts")
    add("--size", type=int, default=8, help="records of --prompts (8)")
    add("--num", type=int, default=1, help="answers to each prompt (1)")
    add("--json", default="", help="a file for the answers, a line each")
  return parser


def _check_answer_flags(args: argparse.Namespace) -> None:
  check(bool(args.model), _NO_MODEL)
  check(
      0 <= args.seed < 2**31, f"--seed={args.seed} is no seed; give 0 or more."
  )
  if "num" in args:
    check(args.num >= 1, f"--num={args.num}; give 1 or more.")


def _export_parser() -> argparse.ArgumentParser:
  parser = ArgumentParser("export", _EXPORT)
  add, home = parser.add_argument, os.path.expanduser
  add("--workdir", type=home, default="", help="Where the run is kept.")
  add("--step", default="last", help="A number, last or best. Default: last.")
  add("--to", type=home, default="", help="The new directory.")
  add("--push", default="", help="USER/NAME on the hub.")
  add("--public", action="store_true", help="For all to see.")
  return parser


def _check_export_flags(args: argparse.Namespace) -> None:
  check(
      re.fullmatch(r"|[\w.-]{1,96}/[\w.-]{1,96}", args.push) is not None,
      f"--push is {shown(args.push)}; give USER/NAME.",
  )
  for name in ("workdir", "to"):
    path = getattr(args, name)
    needed = name == "workdir" or not args.push
    check(bool(path) or not needed, f"--{name} is missing; set it.")
    check_path(name, path)
  _check_step(args.step)


def parse(command: str, arguments: Sequence[str]) -> argparse.Namespace:
  """Reads the flags of sample, chat or export.

  Raises:
    ConfigError: a value that cannot work.
    SystemExit: a flag that there is not, with one sentence.
  """
  if command == "export":
    args = _export_parser().parse_args(arguments)
    _check_export_flags(args)
  else:
    args = _answer_parser(command).parse_args(arguments)
    _check_answer_flags(args)
  return args


def start() -> None:
  """Does what the command line says, or exits with one sentence."""
  command = sys.argv[0].split()[-1]
  if command == "eval":
    _define_eval_flags()
  logging.set_verbosity(logging.WARNING)
  try:
    if command == "eval":
      sys.argv = _with_settings(sys.argv)
      command_line.run(_eval, _EVAL)
      return
    args = parse(command, sys.argv[1:])
    (_export if command == "export" else _answer)(args)
  except UserError as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit(130)
