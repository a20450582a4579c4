"""`--preflight`: checks and shows the prompts of both models.

It checks what a run checks, with the run's own code, up to the weights: the
settings, the devices that are here, each model's config.json, tokenizers,
templates, the first training records and the evaluation sets. It reads no
weights and writes nothing.
"""

from collections.abc import Sequence
import dataclasses
import itertools

import numpy as np
import rich.box
import rich.console
import rich.panel
import rich.table
from rich.text import Text

from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.data import prompts
from prefix_distill.data.prompts import PromptReader
from prefix_distill.data.records import Question
from prefix_distill.data.tokenizer import Tokenizer
from prefix_distill.distill import prefix_schedule
from prefix_distill.errors import ConfigError
from prefix_distill.errors import counted
from prefix_distill.train import setup

_SPECIAL = "bold cyan"
_QUIET = "dim"
_BOUNDARY = "┊ the answer begins here"


def run(config: Config, console: rich.console.Console) -> None:
  """Checks the prompts, and prints them with what was checked.

  Raises:
    UserError: see `setup.check`; nothing is printed then.
  """
  _check_devices(config)
  inputs = setup.check(config, first=True)
  models, data, suffix = inputs.fed, inputs.data, inputs.data.suffixes[0]
  encoded = [models[0].tokenizer.encode_prompt(data.question, suffix)]
  if data.teacher_question is not None:
    encoded.append(
        models[1].tokenizer.encode_own(data.teacher_question, suffix)
    )
  _print_prompts(console, config, models, encoded, data.number)
  _print_turn(console, config, models, data)
  console.print(_special_tokens(models, encoded), _facts(config, models))
  shown = dataclasses.replace(config.data, suffix=suffix)
  filled = dataclasses.replace(config, data=shown)
  found = _warnings(filled, data.question, models, encoded)
  notes = filter(None, [setup.same_model_note(config), *data.notes])
  _print_verdict(console, [*found, *notes])


def _check_devices(config: Config) -> None:
  """Refuses a mesh and batches that do not fit the devices here.

  Raises:
    ConfigError: with what to do on another machine than the run's.
  """
  try:
    setup.check_batches(config, sharding.make_mesh(config.mesh))
  except ConfigError as error:
    raise ConfigError(
        f"{error} If these are not the run's devices, JAX_PLATFORMS=cpu and"
        " JAX_NUM_CPU_DEVICES in the environment stand in for their number."
    ) from error


def _warnings(
    config: Config,
    question: Question,
    models: Sequence[PromptReader],
    encoded: Sequence[Sequence[int]],
) -> list[str]:
  found = prompts.warnings(config.data, question, models[0].tokenizer)
  names = (
      ("prompt", "data.max_prompt_len"),
      ("teacher's prompt", "data.max_teacher_prompt_len"),
  )
  shown = zip(encoded, _limits(config), names, strict=False)
  for tokens, limit, (name, field) in shown:
    if len(tokens) > limit:
      found.append(
          f"The {name} has {len(tokens)} tokens and {field} is {limit}: this"
          " record would be dropped."
      )
  trained, graded = config.rollout.temperature, config.evaluation.temperature
  if config.method != "sft" and trained != graded:
    found.append(
        f"evaluation.temperature is {graded:g} and rollout.temperature is"
        f" {trained:g}: the accuracy is of another distribution than the one"
        " that is trained. Set both to one value, unless that is meant."
    )
  return found


def _limits(config: Config) -> tuple[int, int]:
  return config.data.max_prompt_len, config.data.teacher_prompt_len


def _print_prompts(
    console: rich.console.Console,
    config: Config,
    models: Sequence[PromptReader],
    encoded: Sequence[Sequence[int]],
    number: int,
) -> None:
  who = ", ".join(f"{model.role} {model.tokenizer.path}" for model in models)
  readers = ["both models read"]
  if len(models) == 1 or len(encoded) > 1:
    readers = [f"the {model.role} reads" for model in models]
  console.print(Text(f"Preflight ({config.method}): {who}"), style="bold")
  shown = zip(readers, models, encoded, _limits(config), strict=False)
  for reader, model, tokens, limit in shown:
    console.print(
        Text(
            f"What {reader} for record {number + 1} of"
            f" {config.data.train.source}:"
            f" {len(tokens)} tokens, at most {limit}"
        )
    )
    body = _prompt(model.tokenizer, tokens)
    console.print(rich.panel.Panel(body, border_style=_QUIET))


def _print_turn(
    console: rich.console.Console,
    config: Config,
    models: Sequence[PromptReader],
    data: prompts.PromptIterator,
) -> None:
  """Prints what the teacher is asked to rewrite, with a short answer in it."""
  rewriting = setup.rewriting_of(config, models)
  if rewriting is None:
    return
  answer = models[0].tokenizer.encode("(the student's answer)")
  asked = rewriting.ask([data.question], np.zeros(1), [answer]).prompts
  tokens = asked.tokens[0][asked.mask[0]].tolist()
  console.print(
      Text(
          "What the teacher is asked to rewrite for record"
          f" {data.number + 1}: {len(tokens)} tokens, at most"
          f" {config.rollout.rewrite.max_prompt_len}"
      )
  )
  body = _prompt(models[1].tokenizer, tokens)
  console.print(rich.panel.Panel(body, border_style=_QUIET))


def _prompt(tokenizer: Tokenizer, tokens: Sequence[int]) -> Text:
  """Returns the prompt with its special tokens, line breaks and end marked."""
  text, special = Text(overflow="fold"), tokenizer.special_ids
  # A character may have several tokens, so runs of text are decoded whole.
  for is_special, part in itertools.groupby(tokens, special.__contains__):
    decoded = tokenizer.decode(list(part))
    if is_special:
      text.append(decoded, style=_SPECIAL)
      continue
    for i, line in enumerate(decoded.split("\n")):
      text.append("↵\n" if i else "", style=_QUIET)
      text.append(line)
  return text.append(_BOUNDARY, style="reverse")


def _special_tokens(
    models: Sequence[PromptReader], encoded: Sequence[Sequence[int]]
) -> rich.table.Table:
  """Tabulates the special tokens of the prompts, and the stop tokens."""
  tokenizer, tokens = models[0].tokenizer, [*itertools.chain(*encoded)]
  where = "in both prompts" if len(encoded) > 1 else "in the prompt"
  stops = {i for model in models for i in model.tokenizer.stop_ids}
  met = {*tokenizer.special_ids} & {*tokens} | stops | {tokenizer.pad_id}
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for header in ("special token", "id", where, "stop of", "pads"):
    justify = "right" if header in ("id", where) else "left"
    table.add_column(header, justify=justify)
  for token in sorted(met):
    stopped = [m.role for m in models if token in m.tokenizer.stop_ids]
    count = tokens.count(token)
    table.add_row(
        Text(tokenizer.decode([token]), style=_SPECIAL),
        str(token),
        f"{count}x" if count else "-",
        ", ".join(stopped) or "-",
        "yes" if token == tokenizer.pad_id else "-",
    )
  return table


def _facts(config: Config, models: Sequence[PromptReader]) -> rich.table.Table:
  tokenizer = models[0].tokenizer
  rows = ", ".join(f"{model.role} {model.vocab_size:,}" for model in models)
  table = rich.table.Table.grid(padding=(0, 2))
  table.add_column(style=_QUIET, no_wrap=True)
  table.add_column()
  facts = {
      "templates": _templates(config, models),
      "boundary": "the prompt's tokens stay as they are when a word follows",
      "vocabulary": f"{tokenizer.num_tokens:,} tokens; rows: {rows}",
      "stop tokens": _stops(config, models),
      "padding": _padding(tokenizer),
      "temperature": _temperature(config),
      "caps": _caps(config),
  }
  for name, fact in facts.items():
    table.add_row(name, Text(fact))
  return table


def _templates(config: Config, models: Sequence[PromptReader]) -> str:
  if len(models) == 1:
    return "the student's; there is no teacher"
  if config.data.teacher_prompt:
    return "each model's own; the teacher reads data.teacher_prompt"
  return "the student's and the teacher's give the same tokens"


def _stops(config: Config, models: Sequence[PromptReader]) -> str:
  tokenizer = models[0].tokenizer
  names = {
      model.role: ", ".join(
          f"{tokenizer.decode([i])} ({i})" for i in model.tokenizer.stop_ids
      )
      for model in models
  }
  if len(models) == 1:
    return f"{names['student']}; completions end with {tokenizer.end_id}"
  text = "; ".join(f"{role} {name}" for role, name in names.items())
  if len(set(names.values())) == 1:
    text = f"{names['student']}, the same for both"
  if len({i for model in models for i in model.tokenizer.stop_ids}) == 1:
    return text
  if config.loss.merge_stop_tokens:
    return f"{text}; one event in the loss"
  return f"{text}; told apart in the loss (loss.merge_stop_tokens is False)"


def _padding(tokenizer: Tokenizer) -> str:
  name = tokenizer.decode([tokenizer.pad_id])
  text = f"{name} ({tokenizer.pad_id}), masked everywhere"
  if tokenizer.pad_id in tokenizer.stop_ids:
    return f"{text}, so it may well be a stop token"
  return text


def _temperature(config: Config) -> str:
  graded = f"{config.evaluation.temperature:g} in evaluation"
  if config.is_supervised:
    return f"1 in the loss; {graded}"
  return f"{config.rollout.temperature:g} in sampling and loss; {graded}"


def _caps(config: Config) -> str:
  if config.is_supervised:
    return f"none; completions of at most {config.rollout.max_len:,} tokens"
  first = prefix_schedule.cap(config, 0)
  last = prefix_schedule.cap(config, max(config.steps - 1, 0))
  lengths = prefix_schedule.needed(config)
  buckets = counted(len(lengths), "bucket")
  caps = f"{first:,} in the first update, {last:,} in the last"
  if not prefix_schedule.make(config).is_planned:
    caps = f"at most {last:,}, chosen by the schedule {config.schedule!r}"
  elif first == last:
    caps = f"{last:,} in every update"
  return f"{caps}; {buckets}: {', '.join(f'{n:,}' for n in lengths)}"


def _print_verdict(
    console: rich.console.Console, warnings: Sequence[str]
) -> None:
  console.print()
  for warning in warnings:
    console.print(Text(f"Warning: {warning}", style="yellow"))
  passed = "The checks passed"
  if warnings:
    passed += f" with {counted(len(warnings), 'warning')}"
  console.print(
      Text(f"{passed}. No weights were read and nothing was written.")
  )
