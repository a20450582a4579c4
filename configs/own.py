r"""Your own models and prompts, in one line.

  prefix-distill train \
    --config=own:student=DIR,teacher=DIR,prompts=FILE

`student` and `teacher` are directories in Hugging Face format or hub ids, with
one tokenizer; `prompts` is a .jsonl, .json or .parquet file, a data set, or a
task (see `data.train.source`). All else is chosen from what is there, said in a
few lines, and kept in the run's config.json, which is a config as well
(--config=WORKDIR/config.json; --print_config prints it before a run). Any of
it can be set:

  subset=NAME      the hub data set's configuration, such as gsm8k's "main"
  split=NAME       its split (train)
  question=FIELD   the prompts' field: text or chat messages
  eval=FILE        problems with answers to grade; none without it. Of a data
                   set that is the split "test", of the same subset
  answer=FIELD     their field of the right answer
  method=METHOD    prefix (the paper's growing cap), full, sft or seqkd
  completion=FIELD with method=sft, the field of whole answers
  steps=N          updates (60)
  tokens=N         the longest answer; else what the models' positions leave,
                   4,096 at most
  --config.GROUP.FIELD=VALUE  any setting

What is chosen, and why:

  prompts    S is the smallest multiple of 64 that holds all of the first 1,000
             prompts, at most half of the positions
  batch      64 prompts and 1 rollout each; the paper has 512 and 4
  cap        grows in every update, so that it reaches the longest answer at
             the last one
  learning   5e-5, the paper's, for students of 1 billion parameters or more;
             1e-4 below, and 3e-4 below 20 million
  devices    the weights are split over all that are there (fsdp)
  memory     as many rows at a time as fit, in sampling and in the gradient;
             layers are computed again in the backward pass from 1 billion
             parameters on
  numbers    activations in bfloat16 from 1 billion parameters on, where the
             device has it; a teacher of that size has its weights in it too
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
import re
import sys

import ml_collections

from prefix_distill import config as config_lib
from prefix_distill.config import DatasetSpec
from prefix_distill.config import EvaluationSpec
from prefix_distill.config import ModelSpec
from prefix_distill.data import records
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.errors import check
from prefix_distill.errors import ConfigError
from prefix_distill.errors import counted
from prefix_distill.models import config as model_config
from prefix_distill.models import huggingface as hf

_NAMES = (
    "student teacher prompts subset split question eval answer method"
    " completion steps tokens"
).split()
# Fields that the field's data sets have, in the order in which they are tried.
_QUESTIONS = (
    "question problem prompt messages conversations.0.value instruction query"
    " input text"
).split()
_ANSWERS = "answer final_answer expected_answer solution target label".split()
_COMPLETIONS = ("completion", "response", "output", "solution", "answer")
_LOOKED_AT, _COLUMNS, _LONGEST = 1000, 64, 4096
# A bundled task has as many as one asks for.
_BUNDLED_PROBLEMS = 240
# Parameters from which on memory rules.
_LARGE = 1e9


def _parse(argument: str) -> dict[str, str]:
  """Splits "student=A,prompts=B"."""
  found: dict[str, str] = {}
  for part in filter(None, argument.split(",")):
    name, equals, value = part.partition("=")
    if not equals and found:  # A comma in a value.
      name = list(found)[-1]
      found[name] += f",{part}"
      continue
    check(
        name in _NAMES and bool(value),
        f"configs/own.py has no argument {part!r}; use"
        f" {', '.join(f'{n}=' for n in _NAMES)}.",
    )
    found[name] = value
  needed = ["student", "prompts"]
  if found.get("method") != "sft":
    needed.insert(1, "teacher")
    check(
        "completion" not in found,
        f"configs/own.py:completion={found.get('completion')} is read with"
        " method=sft alone; add method=sft, or leave completion out.",
    )
  check(
      "answer" not in found or "eval" in found,
      f"configs/own.py:answer={found.get('answer')} is a field of the problems"
      " to grade, and there are none; add eval=FILE, or leave answer out.",
  )
  missing = [name for name in needed if name not in found]
  check(
      not missing,
      f"configs/own.py needs {' and '.join(f'{n}=' for n in missing)}; give"
      " --config=own:student=DIR,teacher=DIR,prompts=FILE.",
  )
  return found


def _number(given: dict[str, str], name: str, default: int) -> int:
  text = given.get(name, str(default))
  check(
      re.fullmatch("[1-9][0-9]{0,8}", text) is not None,
      f"configs/own.py:{name}={text} is no number; give 1 or more.",
  )
  return int(text)


def _field(
    source: str,
    record: Mapping[str, object],
    given: str | None,
    known: Sequence[str],
    what: str,
) -> str:
  """Returns the field that was given, or the first known one that is there.

  Raises:
    ConfigError: there is none.
  """
  if given is not None:
    return given
  for name in known:
    try:
      if records.field(record, name) is not None:
        return name
    except (KeyError, IndexError, TypeError, ValueError):
      continue
  article = "an" if what[0] in "aeiou" else "a"
  raise ConfigError(
      f"{source} has no field that looks like {article} {what} (found:"
      f" {', '.join(record)}); add ,{what}=FIELD to --config=own:..."
  )


def _first(source: str, split: str, subset: str) -> Mapping[str, object]:
  endless = source in config_lib.BUNDLED_TASKS
  spec = DatasetSpec(source, split, subset, size=1 if endless else 0)
  return records.peek(spec)


def _longest_prompt(
    tokenizer: tokenizer_lib.Tokenizer, spec: DatasetSpec, suffix: str
) -> int:
  """Returns the length in tokens of the longest of the first prompts."""
  source = records.read(spec, first=True)
  lengths = [
      len(
          tokenizer.encode_prompt(
              records.question(source[i], spec.question, source.where(i)),
              suffix,
          )
      )
      for i in range(min(len(source), _LOOKED_AT))
  ]
  return max(lengths)


def _suffix(tokenizer: tokenizer_lib.Tokenizer) -> str:
  """Returns `<think>` if that is a token that the template does not write."""
  opens = "<think>" in tokenizer.pretrained.get_vocab()
  text = tokenizer.prompt("What is 7 + 5?", "")
  return "<think>" if opens and not text.rstrip().endswith("<think>") else ""


def _config(given: dict[str, str]) -> config_lib.Config:
  method = given.get("method", "prefix")
  steps = _number(given, "steps", 60)
  student = hf.read_config(given["student"])
  positions, teacher = student.max_length, None
  size = model_config.num_params(student)
  large = size >= _LARGE
  compute = "bfloat16" if large else "float32"
  if "teacher" in given:
    read = hf.read_config(given["teacher"])
    positions = min(positions, read.max_length)
    is_large = model_config.num_params(read) >= _LARGE
    teacher = ModelSpec(
        given["teacher"],
        compute_dtype=compute,
        param_dtype="bfloat16" if is_large else "float32",
    )
  tokenizer = tokenizer_lib.load(given["student"])
  subset, split = given.get("subset", ""), given.get("split", "train")
  record = _first(given["prompts"], split, subset)
  question = _field(
      given["prompts"], record, given.get("question"), _QUESTIONS, "question"
  )
  completion = ""
  if method == "sft":
    completion = _field(
        given["prompts"],
        record,
        given.get("completion"),
        _COMPLETIONS,
        "completion",
    )
  endless = given["prompts"] in config_lib.BUNDLED_TASKS
  task = DatasetSpec(
      given["prompts"],
      split,
      subset,
      question=question,
      completion=completion,
      size=100_000 if endless else 0,
  )
  suffix = _suffix(tokenizer)
  longest = _longest_prompt(tokenizer, task, suffix)
  prompt = min(-(-longest // _COLUMNS) * _COLUMNS, positions // 2)
  tokens = _number(given, "tokens", min(positions - prompt, _LONGEST))
  sets = {}
  if "eval" in given:
    held_out = given["eval"]
    problem = _first(held_out, "test", subset)
    asked, answer = (
        _field(held_out, problem, given.get(what), known, what)
        for what, known in (("question", _QUESTIONS), ("answer", _ANSWERS))
    )
    sets["own"] = DatasetSpec(
        held_out,
        "test",
        subset,
        question=asked,
        answer=answer,
        size=_BUNDLED_PROBLEMS if held_out in config_lib.BUNDLED_TASKS else 0,
    )
  learning_rate = 5e-5 if large else 1e-4 if size >= 2e7 else 3e-4
  model = ModelSpec(
      given["student"],
      compute_dtype=compute,
      remat="full" if large else "none",
  )
  increment = math.ceil(tokens / max(steps - 1, 1))
  return config_lib.Config(
      method=method,
      steps=steps,
      student=model,
      teacher=teacher,
      data=config_lib.DataSpec(
          task, batch_size=64, max_prompt_len=prompt, suffix=suffix
      ),
      rollout=config_lib.RolloutSpec(per_prompt=1, max_len=tokens),
      prefix=config_lib.PrefixSpec(
          linear=config_lib.LinearSpec(increment=increment)
      ),
      optimizer=config_lib.OptimizerSpec(
          learning_rate=learning_rate, warmup_steps=2
      ),
      evaluation=EvaluationSpec(
          sets, max_len=tokens, batch_size=0, greedy=False
      ),
      mesh=config_lib.MeshSpec(data=1, fsdp=-1),
  )


def _say(config: config_lib.Config) -> None:
  """Says what was chosen, where it does not get into what others read."""
  data, rollout, sets = config.data, config.rollout, config.evaluation.sets
  graded = ", ".join(
      f"{x.source} (fields {x.question!r} and {x.answer!r})"
      for x in sets.values()
  )
  ends = f", which end with {data.suffix!r}" if data.suffix else ""
  print(
      f"Chosen: prompts of the field {data.train.question!r}, up to"
      f" {counted(data.max_prompt_len, 'token')}{ends}; answers up to"
      f" {counted(rollout.max_len, 'token')}; {counted(config.steps, 'update')}"
      f" of {counted(data.batch_size, 'prompt')} at a learning rate of"
      f" {config.optimizer.learning_rate:g}, the cap growing by"
      f" {config.prefix.linear.increment}; evaluation on"
      f" {graded or 'nothing'}. Flags such as --config.steps=N change that"
      " afterwards; --print_config shows all settings, flags included.",
      file=sys.stderr,
      flush=True,
  )


def get_config(argument: str = "") -> ml_collections.ConfigDict:
  """Returns the experiment; see the docstring above."""
  config = _config(_parse(argument))
  _say(config)
  return ml_collections.ConfigDict(config_lib.to_dict(config))
