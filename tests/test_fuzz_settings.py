"""3,000 odd values of the settings: sane ones are accepted, the others refused.

A refusal is one sentence of the field, the value and the mend, within a second,
and never another error. All is done in this process, and no run is started.
"""

import contextlib
import copy
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import random
import sys
import time
import types
import typing

from absl import flags
import datasets
import huggingface_hub
import numpy as np
import pytest
import rich.console

from configs import math as experiment
from prefix_distill import config as config_lib
from prefix_distill import model_commands
from prefix_distill import preflight
from prefix_distill.config import Config
from prefix_distill.errors import ConfigError
from prefix_distill.errors import UserError
from prefix_distill.train import setup
from prefix_distill.train import workdir as workdir_lib

_COUNT = 3_000
_SECONDS = 1.0
_DEEP = [3]
for _ in range(2_000):
  _DEEP = [_DEEP]

_NUMBERS = (
    0, 1, 2, 3, -1, -2, 7, 64, 1000, 2**16, 2**20 + 1, 2**30, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30,
    10**400, 10**5000, -(10**5000),
    0.0, -0.0, 0.5, 1.0, -1.0, 1.5, 1e-8, 1e-20, 1e-30, 1e-38, 5e-324, -5e-324,
    1 - 1e-9, 1 + 1e-9, 0.99999, 3e38, 4e38, 1e30, 1e308, -1e308,
    math.nan, math.inf, -math.inf,
)
_TEXTS = (
    "", " ", "a", "none", "None", "True", "nan", "inf", "-inf", "1", "1e4",
    "0x10", "1_000", "\u0663", "1,2", "(1, 2)", "[3]", "{}", "()", "a\nb",
    "a\tb", "a\0b", "\x1b[31m", "\u2028", "\x85", "\ud800", "a\udcff", "\u202e",
    "/", "/tmp", "../..", "/dev/null", "gs://bucket/x", "a/" * 3_000, "x" * 300,
    "x" * 10**6, "(" * 300, "(" * 90 + ")" * 90, "[" * 5_000, "-" * 5_000 + "1",
    "9" * 5_000, "{question}", "{", "{0}", "{a.b}", "%s", "$HOME", "'", '"',
    "bundled:teacher", "bundled:", "math_task", "cosine", "jsd", "int8",
    "prefix", "heldout",
)
_OTHERS = (
    None, True, False, b"a", 1j, (), (1,), (1, 2), (2, 1), (0,), (-1, 3),
    (2**31,), (math.nan,), ("a",), ("a", "a"), ("",), ("a\0",), (None,),
    (True,), tuple(range(1, 66)), ("x",) * 1000, [], [1], [[1]], _DEEP, {},
    {"a": 1}, {1: 2}, {"": 3}, {"a\nb": 3}, {"self": 1}, {"path": "a"}, set(),
    object(),
    np.int64(3), np.float32(0.5), np.zeros(3), np.nan,
)
_ODD = _NUMBERS + _TEXTS + _OTHERS
_NAMES = (
    "", " ", "a", "batchsize", "a\nb", "\0", "\ud800", "self", "args", "kwargs",
    "__class__", "__dict__", "__dataclass_self__", "x" * 10**5, "a-b", "0",
    "a=b", "steps", "path", "b3",
)


def _plain() -> dict:
  values = experiment.get_config().to_dict()
  values["evaluation"]["sets"]["heldout"]["size"] = 4
  return values


_VALUES = _plain()


def _leaves(kind, name):
  """Yields the dotted name and the type of each field that is no group."""
  if typing.get_origin(kind) in (types.UnionType, typing.Union):
    kind = typing.get_args(kind)[0]
  if dataclasses.is_dataclass(kind):
    for field, inner in typing.get_type_hints(kind).items():
      yield from _leaves(inner, f"{name}.{field}" if name else field)
  elif name == "evaluation.sets":
    inner = typing.get_args(kind)[1]
    yield from _leaves(inner, f"{name}.heldout")
  else:
    yield name, kind


_FIELDS = dict(_leaves(Config, ""))
_GROUPS = sorted({
    name[:i]
    for name in _FIELDS
    for i, character in enumerate(name)
    if character == "."
})


def _at(values, name):
  for part in name.split("."):
    values = values[part]
  return values


def _changed(name, value):
  """Returns the settings with one changed, in a group that is in use."""
  values = copy.deepcopy(_VALUES)
  group, _, _ = name.rpartition(".")
  if name.startswith("prefix.") and name.count(".") == 2:
    values["prefix"] = {"schedule": group.removeprefix("prefix.")}
  elif group == "loss.jsd":
    values["loss"]["exact"]["divergence"] = "jsd"
  elif group == "loss.relaxed":
    values["loss"] |= {"form": "relaxed", "normalize": "tokens"}
  elif name == "loss.exact.max_entry":
    values["loss"]["exact"]["divergence"] = "forward_kl"
  elif name == "optimizer.final_fraction":
    values["optimizer"]["decay"] = "cosine"
  elif group == "rollout.rewrite":
    values["rollout"]["source"] = "rewrite"
    values["rollout"]["rewrite"]["max_prompt_len"] = 300
  *groups, last = name.split(".")
  at = values
  for part in groups:
    at = at.setdefault(part, {})
  at[last] = value
  return values


def _cases():
  """Yields fields with values: all odd ones for some, a part for each."""
  rng = random.Random(18)
  pairs = [(name, value) for name in _FIELDS for value in _ODD]
  groups = [*itertools.product(_GROUPS, _OTHERS)]
  unknown = [
      (f"{group}.{name}" if group else name, 1)
      for group, name in itertools.product(("", *_GROUPS), _NAMES)
  ]
  chosen = rng.sample(groups, 200) + rng.sample(unknown, 200)
  return rng.sample(pairs, _COUNT - len(chosen)) + chosen


def _answer(call, limit=_SECONDS):
  """Returns the result or the one sentence of a refusal."""
  start = time.process_time()
  try:
    answer = call()
  except UserError as error:
    answer = str(error)
  except SystemExit as error:
    answer = str(error.code)
    assert answer.startswith("error: ")
    answer = answer.removeprefix("error: ")
  assert time.process_time() - start < limit
  if isinstance(answer, str):
    assert answer.isprintable(), answer
    assert answer.endswith((".", "?")), answer
    assert len(answer) < 2_500, answer  # A name is in it twice at most.
  return answer


def _assert_sane(config):
  """Checks all values of settings that were accepted."""
  plain = config_lib.to_dict(config)
  assert config_lib.from_dict(json.loads(json.dumps(plain))) == config
  for name in _FIELDS:
    if name.startswith("evaluation.sets.") and (
        "heldout" not in config.evaluation.sets
    ):
      continue
    if name.startswith("teacher.") and config.teacher is None:
      continue
    value = _at(plain, name)
    for one in value if isinstance(value, tuple) else (value,):
      assert type(one) in (int, float, bool, str, type(None)), (name, one)
      if type(one) is int:
        assert -(2**31) < one < 2 ** (32 if name.endswith("seed") else 31)
      elif type(one) is float:
        assert math.isfinite(one) and math.isfinite(np.float32(one))
        assert one == 0 or np.float32(one) ** 1 != 0, (name, one)
        assert math.copysign(1, one) == 1
      elif type(one) is str:
        assert len(one) <= 10**5 and "\0" not in one
        assert one.encode().decode() == one
  spec = config.optimizer
  for decay in (spec.b1, spec.b2):
    assert 0 <= np.float32(decay) < 1
  assert 0 < spec.learning_rate <= 1
  assert spec.learning_rate * spec.weight_decay <= 1
  assert 1e-3 <= config.rollout.temperature <= 1e3
  assert 1e-3 <= config.evaluation.temperature <= 1e3
  length = config.data.max_prompt_len + config.rollout.max_len
  assert config.rollouts_per_step * length < 2**31
  for one in config.evaluation.sets.values():
    assert one.size * one.samples <= 2**20


def _assert_names(sentence, name):
  """Checks that a sentence names the field, or what is in or around it."""
  if name.replace(".", "").isidentifier() and len(name) < 100:
    group, _, _ = name.rpartition(".")
    assert name in sentence or f"{group} is" in sentence, (name, sentence)
  assert any(mark in sentence for mark in (";", "did you mean", ", but"))


def test_settings_are_sane_or_refused():
  cases = _cases()
  assert len(cases) == _COUNT and {name for name, _ in cases} >= {*_FIELDS}
  accepted = 0
  for name, value in cases:
    values = _changed(name, value)
    answer = _answer(lambda values=values: config_lib.from_dict(values))
    if isinstance(answer, Config):
      accepted += 1
      _assert_sane(answer)
    else:
      _assert_names(answer, name)
  assert 150 < accepted < 1_500


@pytest.mark.parametrize("value", [None, 3, "a", [], [1], {1: 2}, {"": 1}])
def test_what_is_no_mapping_of_settings_is_refused(value):
  assert isinstance(_answer(lambda: config_lib.from_dict(value)), str)


_PROGRAMS = (
    "prefix_distill.command_line",
    "prefix_distill.plan.__main__",
)


def _without(names):
  """Takes the flags of modules away; returns them by module."""
  taken = {}
  for name in names:
    found = flags.FLAGS.flags_by_module_dict().get(name, ())
    taken[name] = list(found)
    for flag in taken[name]:
      delattr(flags.FLAGS, flag.name)
  return taken


def _package(name):
  return importlib.import_module(name.rpartition(".")[0])


@contextlib.contextmanager
def _program(name):
  """Imports a program alone with its flags, which others may have as well."""
  environment, modules = dict(os.environ), {}
  taken = _without(_PROGRAMS)
  for one in _PROGRAMS:
    modules[one] = sys.modules.pop(one, None)
    _package(one).__dict__.pop(one.rpartition(".")[2], None)
  try:
    yield importlib.import_module(name)
  finally:
    _reset()
    _without(_PROGRAMS)
    for one, module in modules.items():
      sys.modules.pop(one, None)
      if module is not None:
        sys.modules[one] = module
        setattr(_package(one), one.rpartition(".")[2], module)
      for flag in taken[one]:
        flags.FLAGS[flag.name] = flag
        flags.FLAGS.register_flag_by_module(one, flag)
    os.environ.clear()
    os.environ.update(environment)


def _reset():
  """Forgets what the last command gave."""
  for name in list(flags.FLAGS):
    if name.startswith("config."):
      delattr(flags.FLAGS, name)
  for found in map(flags.FLAGS.flags_by_module_dict().get, _PROGRAMS):
    for flag in found or ():
      flag.unparse()
  flags.FLAGS.unparse_flags()


@pytest.fixture
def command(monkeypatch):
  """Returns a function that parses a command as `main` does."""
  with _program("prefix_distill.command_line") as command_line:

    def parse(*given):
      argv = ["main", f"--config={experiment.__file__}", *given]
      monkeypatch.setattr(sys, "argv", argv)
      _reset()
      command_line.parse(argv)
      config = command_line.config()
      command_line.traced(config)
      command_line.workdir(argv)
      return config

    yield parse


def _text(value):
  """Returns what a user might type for a value."""
  try:
    return str(value)
  except ValueError:  # More digits than Python converts.
    return "9" * 5_000
  except RecursionError:
    return "[" * 5_000


def test_a_command_is_sane_or_refused(command):
  accepted = 0
  assert isinstance(command(), Config)
  for name, value in random.Random(19).sample(_cases(), 1_000):
    flag = f"--config.{name}={_text(value)}"
    answer = _answer(lambda flag=flag: command(flag))
    if isinstance(answer, Config):
      accepted += 1
      _assert_sane(answer)
    else:
      _assert_names(answer, name.partition("=")[0])
  assert 50 < accepted < 600


_LONG, _DIGITS = "x" * 100_000, "9" * 5_000
_SECONDS_TEXTS = (
    "nan", "inf", "-inf", "-1", "1e308", "1e9", "", "a", _LONG, _DIGITS, "1,2",
    "\0", "\n", "\ud800",
)


@pytest.mark.parametrize(
    "given",
    [
        *(f"--notice={text}" for text in _SECONDS_TEXTS),
        *(
            f"--trace={text}"
            for text in (
                "0", "-1", "51", "a", "1,a", "1,,2", "1.0", "nan", _LONG,
                _DIGITS, "\0", "\n1\n2x", "\u0663x", "2147483648",
            )
        ),
        *(
            f"--workdir={text}"
            for text in (
                "gs://bucket/run", "s3://a", "file:///tmp/a", "a\0b", "a\nb",
                "\x1b[31m", "\ud800",
            )
        ),
        *(
            f"--{name}={text}"
            for name in ("distributed_timeout", "distributed_heartbeat")
            for text in ("0", "-1", "1.5", str(2**31), _DIGITS, _LONG, "", "a")
        ),
        *(
            f"--distributed={text}"
            for text in (
                "a", ":", ":1", "a:0", "a:65536", f"a:{_DIGITS}", "a:1",
                "a:\u0663", _LONG, "a\0:1", "a\nb:1", "http://a:1",
            )
        ),
        *(
            f"--{name}={text}"
            for name in ("num_processes", "process_id")
            for text in ("0", "-1", "x", _DIGITS, str(2**31))
        ),
        "--preflight=maybe",
        "--unknown",
        "--config.steps",
        "--config.steps=",
        "--config.data=3",
        "--config.data={}",
        "--config.teacher=None",
        "--noconfig.steps",
        "--config.=3",
        "--config..=3",
        "--config.a b=3",
        "--config.data..batch_size=3",
        "--config.prefix.buckets[0]=3",
        "--config.evaluation.sets.a-b.source=c",
        "--config.evaluation.sets..source=c",
        "--config=/no/such.py",
        f"--config={_LONG}",
        "--config=/tmp",
        "config.steps=3",
        "-",
        "\n",
        _LONG,
    ],
    ids=lambda given: repr(given)[1:40],
)
def test_a_flag_that_cannot_be_is_refused(command, given):
  assert isinstance(_answer(lambda: command(given)), str)


def test_processes_that_cannot_be_are_refused(command):
  for text in ("0", "-1", _DIGITS, str(2**31)):
    answer = _answer(
        lambda text=text: command(
            "--distributed=a:1", f"--num_processes={text}", "--process_id=0"
        )
    )
    assert "--num_processes" in answer


def test_the_last_value_of_a_flag_counts(command):
  assert command("--config.steps=3", "--config.steps=4").steps == 4
  assert command("--config.steps", "5").steps == 5
  assert command("--notice=0", "--trace=1,050").steps == 50


@pytest.fixture
def offline(monkeypatch):
  """The hub is asked for nothing."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def _check(config):
  """Checks as a run and as `--preflight` do, without a result."""
  setup.check(config, first=True)
  console = rich.console.Console(file=io.StringIO(), width=80)
  preflight.run(config, console)
  return config


def test_what_is_accepted_is_checked_against_the_files(offline):
  _check(config_lib.from_dict(_VALUES))  # Loads libraries.
  cases = []
  for name, value in random.Random(20).sample(_cases(), 1_000):
    with contextlib.suppress(ConfigError):
      cases.append(config_lib.from_dict(_changed(name, value)))
  passed = 0
  for config in cases[:40]:
    answer = _answer(lambda config=config: _check(config), 3.0)
    passed += isinstance(answer, Config)
  assert len(cases) > 40 and 10 < passed


_PATHS = (
    "/", "/proc", "/dev", "/dev/null", "/dev/zero", "/proc/self/mem",
    "/no/such", "gs://bucket/x", "https://example.org/a.jsonl", "a/b", "a/b/c",
    "-", "~", "$HOME", "%s", "{}", "*", "x" * 300, "/" + "x" * 300,
    "/" + "a/" * 400, "bundled:", "bundled:/", "bundled:..",
    "bundled:../assets/teacher", "math", "a.jsonl", "/tmp/a.parquet",
    "x" * 300 + ".json", "\u202e", "\u00e9",
)


@pytest.mark.parametrize(
    "name",
    ["student.path", "teacher.path", "student.tokenizer", "data.train.source",
     "evaluation.sets.heldout.source"],
)
def test_a_path_of_nothing_is_refused(offline, name):
  for value in _PATHS:
    values = _changed(name, value)
    answer = _answer(
        lambda values=values: setup.check(config_lib.from_dict(values), True),
        3.0,
    )
    assert isinstance(answer, str), value


def _workdirs(folder):
  file = folder / "file"
  file.write_text("")
  closed = folder / "closed"
  closed.mkdir(mode=0o500)
  yield folder / ("x" * 300)
  yield file
  yield file / "run"
  yield pathlib.Path("/dev/null")
  yield pathlib.Path("/dev/null/run")
  yield pathlib.Path("/proc/run")
  if os.getuid():
    yield closed
    yield closed / "run"


def test_a_workdir_that_cannot_be_is_refused(tmp_path):
  for workdir in _workdirs(tmp_path):
    answer = _answer(lambda workdir=workdir: workdir_lib.Lock(workdir))
    assert isinstance(answer, str) and ";" in answer, workdir
    answer = _answer(lambda workdir=workdir: workdir_lib.read_config(workdir))
    assert isinstance(answer, str) and ";" in answer, workdir


def test_flags_of_the_export_are_refused():
  good = {"workdir": "/tmp/run", "to": "/tmp/model", "step": "3"}

  def parse(*given):
    return model_commands.parse("export", given)

  found = vars(parse(*(f"--{k}={v}" for k, v in good.items())))
  assert found == good | {"push": "", "public": False}
  for name in good:
    for value in (
        "", "gs://a/b", "a\0b", "a\nb", "\x1b", "\ud800", _DIGITS,
        "-1", "1.5", "nan", "\u0663",
    ):
      if name != "step" and value in (_DIGITS, *"-1 1.5 nan \u0663".split()):
        continue
      given = [f"--{k}={v}" for k, v in (good | {name: value}).items()]
      answer = _answer(lambda given=given: parse(*given))
      assert isinstance(answer, str) and f"--{name}" in answer
  for given in (["more"], ["--no"], ["--step"], ["\n"]):
    answer = _answer(
        lambda given=given: parse("--workdir=a", "--to=b", *given)
    )
    assert isinstance(answer, str)


def test_flags_of_the_plan_are_refused(monkeypatch):
  with _program("prefix_distill.plan.__main__") as plan:
    planner = plan.planner

    def planned(question, console):
      del console
      planner._choose_mesh(question)
      planner._lengths(question)
      raise UserError("planned.")

    monkeypatch.setattr(planner, "plan", planned)

    def run(*given):
      argv = [
          "plan", f"--config={experiment.__file__}", "--topology=v5e:2x2",
          *given,
      ]
      monkeypatch.setattr(sys, "argv", argv)
      _reset()
      plan.command_line.parse(argv)
      out = io.StringIO()
      try:
        with contextlib.redirect_stderr(out):
          plan.main()
      except SystemExit as error:
        if isinstance(error.code, str):
          raise
      raise UserError(out.getvalue().removeprefix("error: ").rstrip("\n"))

    for given in (
        ["--prefix=8,16"], ["--mesh=1x4x1"], ["--price=2"], ["--json=a.json"],
    ):
      assert _answer(lambda given=given: run(*given)) == "planned."
    for given in (
        *(
            f"--topology={text}"
            for text in (
                "", "v5e", "v5e:", "v5e:0x1", "v5e:-1x1", "v5e:2x2x2x2",
                "v5e:999999x999999", f"v5e:{_DIGITS}x1", "h100:65537",
                "h100:3000000", "h100:\u0663", "v5e:2x2*0", "gs://a", _LONG,
                "v5e:2x2\n", "a\0b", "x" * 300,
            )
        ),
        *(f"--prefix={t}" for t in ("0", "-1", "a", "1.5", _DIGITS, _LONG)),
        *(
            f"--mesh={text}"
            for text in (
                "0x1x1", "-1x1x1", "1x1", "a", "999999999x1x1x1", "a\0b",
                f"1x{_DIGITS}x1", _LONG,
            )
        ),
        *(f"--utilization={t}" for t in ("0", "-1", "1.1", "nan", "inf", "a")),
        *(f"--price={t}" for t in ("-1", "nan", "inf", "1e300", "a")),
        *(
            f"--measured={text}"
            for text in ("/tmp", "/no/such", "a\0b", _LONG, "/dev/null")
        ),
        *(
            f"--json={text}"
            for text in (
                "/tmp", "/no/such/a", "a\0b", _LONG, "gs://a/b", "/dev/null/a",
                "x" * 300,
            )
        ),
        "--search=maybe",
        "--no",
    ):
      answer = _answer(lambda given=given: run(given))
      assert answer != "planned." and given[2:6] in answer, given
