"""The commands of the console script, and the settings in words."""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pages
import pytest
import rich.console
import toys

from prefix_distill import command_line
from prefix_distill import commands
from prefix_distill import config as config_lib
from prefix_distill import model_commands
from prefix_distill import runs
from prefix_distill.config import EvaluationSpec
from prefix_distill.config import ModelSpec
from prefix_distill.data import records
from prefix_distill.distill import prefix_schedule
from prefix_distill.errors import ConfigError
from prefix_distill.errors import UserError

_ROOT = pathlib.Path(__file__).parents[1]


def _command(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, "-m", "prefix_distill.commands", *arguments],
      capture_output=True,
      text=True,
      timeout=600,
      **kwargs,
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
  """A finished run of seconds."""
  workdir = tmp_path_factory.mktemp("run") / "one"
  done = _command("train", *toys.SMALL_RUN, f"--workdir={workdir}", cwd=_ROOT)
  assert done.returncode == 0, done.stderr
  return workdir


def test_help_names_every_command():
  done = _command("--help")
  assert done.returncode == 0
  for name in commands.COMMANDS:
    assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], "did you mean train?"),
        (["eval"], "--config is missing"),
        (["eval", "--model=nowhere"], "--model=nowhere is no directory of a"),
        (["sample"], "--model is missing"),
        (["sample", "--model=nowhere", "--num=0", "--prompt=a"], "--num=0"),
        (["sample", "--model=nowhere"], "give --prompt=TEXT"),
        (["chat", "--model=nowhere"], "nowhere"),
        (["report"], "--workdir is missing"),
        (["report", "nowhere"], "no run is there"),
        (["report", "nowhere", "--workdir=there"], "name one"),
        (["report", "--workdir=nowhere"], "no run is there"),
        (["compare", "runs"], "two runs or more"),
        (["compare", "nowhere", "nothing"], "no run is there"),
        (["train", "--config=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, tmp_path):
  done = _command(*arguments, cwd=tmp_path)
  assert done.returncode not in (0, None)
  # The hub's client may warn before.
  *before, line = done.stderr.strip().splitlines()
  assert line.startswith("error: ") and words in line
  assert "Traceback" not in "".join(before)


def test_no_command_shows_them():
  done = _command()
  assert done.returncode == 2 and "prefix-distill COMMAND" in done.stdout


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_has_every_setting(command):
  done = _command(command, "--help")
  assert done.returncode == 0 and not done.stderr
  for group in command_line.groups():
    for setting in group.settings:
      assert f"--config.{setting.name}  " in done.stdout
  assert "--workdir" in done.stdout


def test_every_field_has_words():
  """`groups` fails on a field that its docstring leaves out."""
  found = {x.name: x for group in command_line.groups() for x in group.settings}
  leaves = config_lib.plain(_config("math"))

  def check(values, before):
    for name, value in values.items():
      at = f"{before}{name}"
      if isinstance(value, dict) and at != "evaluation.sets":
        check(value, f"{at}.")
      elif at != "evaluation.sets":
        assert found[at].about

  check(leaves, "")
  assert found["steps"].kind == "int, at least 0"
  assert found["steps"].default == "required"
  assert found["prefix.schedule"].default == "'linear'"
  assert found["rollout.top_p"].kind == "float, above 0, at most 1"


def test_the_page_of_settings_is_of_today():
  page = (_ROOT / "docs" / "configuration.md").read_text()
  assert page == command_line.settings_page(), (
      "run python -m prefix_distill.command_line > docs/configuration.md"
  )


def _config(name: str) -> config_lib.Config:
  return _told_config(name)[0]


def _told_config(name: str) -> tuple[config_lib.Config, str]:
  """Returns the settings of a config, and what it says of them."""
  done = _command("train", f"--config={name}", "--print_config", cwd="/")
  assert done.returncode == 0, done.stderr
  return config_lib.from_dict(json.loads(done.stdout)), done.stderr


def test_a_config_that_ships_is_found_by_its_name():
  assert _config("math:tiny-weak").student.path == "bundled:weak"
  assert command_line.config_file("math").endswith("configs/math.py")
  assert command_line.config_file("somewhere/math.py") == "somewhere/math.py"


def test_a_runs_directory_is_short_and_of_its_settings_alone(monkeypatch):
  monkeypatch.setattr(command_line, "_WORKDIR", types.SimpleNamespace(value=""))

  def named(config: str) -> str:
    return str(command_line.workdir(["main", f"--config={config}"]))

  assert named("configs/math.py") == named("math") == "runs/math"
  assert named("math:tiny,method=full") == "runs/math-tiny-method-full"
  long = "own:student=/models/mine/,teacher=/models/yours,prompts=asked.jsonl"
  names = {named(f"{long},steps={steps}") for steps in range(1, 9)}
  assert len(names) == 8
  assert all(re.fullmatch("runs/own-mine-[0-9a-f]{8}", name) for name in names)
  endless = named(f"math:{'a' * 999}")
  assert len(endless) < 80 and endless != named(f"math:{'a' * 998}")


def test_printed_settings_are_a_config(tmp_path):
  first = _config("math:chain,method=full")
  file = tmp_path / "kept.json"
  file.write_text(json.dumps(config_lib.plain(first)))
  assert _config(str(file)) == first


def test_a_runs_settings_can_be_changed(tmp_path):
  file = tmp_path / "kept.json"
  file.write_text(json.dumps(config_lib.plain(_config("math"))))
  done = _command(
      "train",
      f"--config={file}",
      "--config.prefix.buckets=(8,16)",
      "--config.data.system=Be brief.",
      "--print_config",
  )
  found = config_lib.from_dict(json.loads(done.stdout))
  assert found.prefix.buckets == (8, 16)
  assert found.data.system == "Be brief."


def test_what_holds_no_settings_is_refused(tmp_path):
  file = tmp_path / "model.json"
  file.write_text("{}")
  done = _command("train", f"--config={file}")
  assert done.returncode == 1 and "no field 'method'" in done.stderr


def test_eval_grades_a_run_as_the_run_did(run, tmp_path):
  """Same weights, prompts and draws: the same verdicts, one by one."""
  lines = [
      json.loads(line) for line in (run / "metrics.jsonl").open()
  ]
  last = [x for x in lines if x.get("model") == "student"][-1]
  file = tmp_path / "found.jsonl"
  done = _command("eval", f"--model={run}", f"--json={file}", cwd=_ROOT)
  assert done.returncode == 0, done.stderr
  (found,) = map(json.loads, file.open())
  for name in ("verdicts", "accuracy", "mean_length", "finish_rate"):
    assert found[name] == last[name]
  assert "heldout" in done.stdout


def test_eval_takes_a_runs_settings_and_flags_that_change_them(run, tmp_path):
  """In any order, and from a path that the shell does not expand."""
  file = tmp_path / "found.jsonl"
  done = _command(
      "eval",
      "--config.evaluation.sets.heldout.size=4",
      f"--model=~/{run.name}",
      f"--json=~/{file.name}",
      cwd=_ROOT,
      env=os.environ | {"HOME": str(run.parent)},
  )
  assert done.returncode == 0, done.stderr
  (found,) = map(json.loads, (run.parent / file.name).open())
  assert found["problems"] == 4


def test_a_run_is_told_from_the_model_that_it_wrote(run):
  asked = f"own:student={run},teacher={run},prompts=x"
  done = _command("train", f"--config={asked}")
  assert done.returncode and "the directory of a run; give" in done.stderr
  assert f"{run}/export" in done.stderr


def test_eval_takes_any_checkpoint_and_any_model(run):
  early = _command("eval", f"--model={run}", "--step=4", cwd=_ROOT)
  assert early.returncode == 0 and "8 x 1" in early.stdout
  missing = _command("eval", f"--model={run}", "--step=5", cwd=_ROOT)
  assert missing.returncode == 1 and "--step=5" in missing.stderr
  other = _command(
      "eval",
      "--model=bundled:weak",
      f"--config={run / 'config.json'}",
      cwd=_ROOT,
  )
  assert other.returncode == 0, other.stderr


def test_sample_answers_a_prompt_as_often_as_asked(run, tmp_path):
  file = tmp_path / "answers.jsonl"
  done = _command(
      "sample",
      f"--model={run}",
      "--prompt=What is 7 + 5?",
      "--num=3",
      "--max_len=8",
      f"--json={file}",
  )
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in file.open()]
  assert [x["question"] for x in lines] == ["What is 7 + 5?"] * 3
  assert all(1 <= x["tokens"] <= 8 for x in lines)
  cut = sum(not x["finished"] for x in lines)
  assert done.stdout.count("[8 tokens, cut; --max_len=N for more]") == cut > 0


def test_chat_keeps_the_turns_and_ends_with_an_empty_line(run):
  done = _command(
      "chat",
      f"--model={run}",
      "--max_len=4",
      "--greedy",
      input="What is 1 + 1?\nAnd 2 + 2?\n\n",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("you:") == 3
  assert "[cut at 4 tokens; --max_len=N for more]" in done.stdout


def test_a_run_is_no_model_and_a_model_no_run(run):
  assert model_commands.is_run(str(run))
  assert not model_commands.is_run(str(run / "export"))
  with pytest.raises(ConfigError, match="no directory of a run"):
    with model_commands.find_model("bundled:weak", "3"):
      pass


def test_report_is_written_again(run):
  for file in (run / "report").iterdir():
    file.unlink()
  done = _command("report", f"--workdir={run}")
  assert done.returncode == 0, done.stderr
  assert any((run / "report").iterdir())
  bare = _command("report", str(run))
  assert bare.returncode == 0 and bare.stdout == done.stdout


def test_compare_puts_runs_side_by_side(run, tmp_path):
  other = tmp_path / "two"
  done = _command(
      "train",
      *toys.SMALL_RUN,
      "--config.seed=1",
      f"--workdir={other}",
      cwd=_ROOT,
  )
  assert done.returncode == 0, done.stderr
  to = tmp_path / "figures"
  done = _command("compare", str(run), str(other), f"--to={to}")
  assert done.returncode == 0, done.stderr
  assert (to / "heldout.png").stat().st_size > 1000
  assert "one" in done.stdout and "two" in done.stdout


@pytest.mark.parametrize(
    "sets, words",
    [({}, "has no evaluation set"), (None, "no evaluation yet; leave it out")],
)
def test_a_run_without_evaluations_is_not_compared(sets, words, tmp_path):
  changes = {} if sets is None else {"evaluation": EvaluationSpec(sets)}
  pages.write(pages.RUN[2:4], tmp_path, **changes)
  with pytest.raises(UserError, match=words):
    runs.read(tmp_path, "one")


def test_a_difference_is_paired():
  """As good on every problem: no doubt; else the interval holds the mean."""
  ours = {"verdicts": "1100" * 30, "samples": 2}
  same = runs.difference(ours, ours)
  assert same == (0, 0, 0)
  theirs = {"verdicts": "1000" * 25 + "1111" * 5, "samples": 2}
  value, low, high = runs.difference(ours, theirs)
  # Problems 2 and 1 of a pair: +0.5 and 0, then 0 and -1.
  assert value == pytest.approx((25 * 0.5 - 5) / 60)
  assert low < value < high
  back = runs.difference(theirs, ours)
  assert back[0] == -value


def _scored_run(directory, last: list[float], **changes) -> pathlib.Path:
  """A run whose answers were 20 nats from the teacher, and now are `last`."""
  verdicts = {"verdicts": "10" * 4, "samples": 1, "problems": 8, "dropped": 0}
  lines = [
      pages.evaluation(
          step, **verdicts, answer_kls=nats, answer_kl=sum(nats) / len(nats)
      )
      for step, nats in ((0, [20.0] * 4), (2, last))
  ]
  pages.write([*lines, pages.update(1), pages.update(2)], directory, **changes)
  return directory


def test_compare_tells_which_students_answers_are_nearer(tmp_path):
  first = _scored_run(tmp_path / "one", [5.0, 6.0, 7.0, 8.0])
  nearer = _scored_run(tmp_path / "two", [4.0, 5.5, 6.0, 7.5])
  taught = _scored_run(
      tmp_path / "three", [1.0] * 4, teacher=ModelSpec("bundled:weak")
  )
  fewer = _scored_run(tmp_path / "four", [1.0] * 3)
  out = io.StringIO()
  console = rich.console.Console(file=out, width=120)
  paths = [first, nearer, taught, fewer]
  runs.compare(paths, tmp_path / "to", console)
  found = {
      name: line.split()
      for line in out.getvalue().partition("whole answers")[2].splitlines()
      for name in line.split()[:1]
  }
  assert found["one"][1:] == ["bundled:teacher", "20.00", "6.50", "-"]
  # Each problem's answer is half a nat or a nat nearer.
  assert " ".join(found["two"][3:]) == "5.75 -0.75 (-1.00 to -0.50)"
  assert found["three"][-2:] == ["another", "teacher"]
  assert found["four"][-2:] == ["other", "problems"]
  read = [runs.read(path, path.name) for path in paths[:2]]
  _, lower = runs.figure(read, "heldout").axes
  assert [max(x.get_ydata()) for x in lower.get_lines()] == [20, 20]
  assert lower.get_xlim()[1] > 2e9  # The last update's FLOPs.


def test_own_models_need_one_line(tmp_path):
  """Fields, lengths and the rest are chosen from what is there."""
  file = tmp_path / "asked.jsonl"
  rows = [
      {"id": n, "problem": "Ann has 7 pens. " * (1 + n % 9), "answer": str(n)}
      for n in range(80)
  ]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found, told = _told_config(
      f"own:student=bundled:capable,teacher=bundled:teacher,prompts={file},"
      f"eval={file},steps=9,tokens=33"
  )
  assert found.data.train.question == "problem"
  assert found.evaluation.sets["own"].answer == "answer"
  assert f"evaluation on {file} (fields 'problem' and 'answer')" in told
  assert found.data.max_prompt_len == 64 and found.data.suffix == "<think>"
  assert found.rollout.max_len == 33
  caps = [prefix_schedule.cap(found, step) for step in range(9)]
  assert caps[0] == 1 and caps[-1] == 33


def test_own_models_of_a_billion_parameters_take_bfloat16(tmp_path):
  """The teacher's weights too, of which a run holds a copy beside all else."""
  large = tmp_path / "large"
  shutil.copytree(_ROOT / "prefix_distill" / "assets" / "teacher", large)
  settings = json.loads((large / "config.json").read_text())
  settings |= {"hidden_size": 8192, "intermediate_size": 65536}
  (large / "config.json").write_text(json.dumps(settings))
  found = _config(
      f"own:student=bundled:capable,teacher={large},prompts=math_task,"
      "eval=math_task"
  )
  assert found.evaluation.sets["own"].size == 240
  assert found.student.param_dtype == found.student.compute_dtype == "float32"
  assert found.teacher.compute_dtype == "float32"
  assert found.teacher.param_dtype == "bfloat16"


def test_own_models_read_a_part_of_a_data_set(tmp_path, monkeypatch):
  """As gsm8k, which has configurations, and its test split for evaluation."""
  data = tmp_path / "sums"
  for name, first in (("main", 7), ("other", 8)):
    (data / name).mkdir(parents=True)
    for split in ("train", "test"):
      rows = [{"question": f"{first} + {n}?", "answer": str(first + n)}
              for n in range(3)]
      text = "".join(json.dumps(row) + "\n" for row in rows)
      (data / name / f"{split}.jsonl").write_text(text)
  parts = "".join(
      f"  - config_name: {name}\n    data_dir: {name}\n"
      for name in ("main", "other")
  )
  (data / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
  found = _config(
      f"own:student=bundled:capable,teacher=bundled:teacher,prompts={data},"
      f"subset=other,eval={data}"
  )
  train, held_out = found.data.train, found.evaluation.sets["own"]
  assert (train.subset, train.split) == ("other", "train")
  assert (held_out.subset, held_out.split) == ("other", "test")
  assert records.read(train)[0]["question"] == "8 + 0?"


@pytest.mark.parametrize(
    "argument, words",
    [
        ("", "needs student= and teacher= and prompts="),
        ("student=bundled:weak,lr=3", "no argument 'lr=3'"),
        (
            "student=bundled:weak,teacher=bundled:teacher,prompts=no.jsonl",
            "no.jsonl",
        ),
        (
            "student=bundled:weak,teacher=bundled:teacher,prompts=chain_task,"
            "question=text",
            "text",
        ),
        (
            "student=bundled:weak,teacher=bundled:teacher,prompts=chain_task,"
            "steps=none",
            "steps=none is no number",
        ),
        (
            "student=bundled:weak,teacher=bundled:teacher,prompts=chain_task,"
            "completion=solution",
            "completion=solution is read with method=sft alone; add method=sft",
        ),
        (
            "student=bundled:weak,teacher=bundled:teacher,prompts=chain_task,"
            "answer=answer",
            "answer=answer is a field of the problems to grade, and there are",
        ),
        (
            "student=bundled:weak,teacher=bundled:teacher,prompts=typo.jsonl",
            "typo.jsonl has no field that looks like a question (found:"
            " probelm, n); add ,question=FIELD",
        ),
    ],
)
def test_own_models_that_lack_something_are_refused(argument, words, tmp_path):
  (tmp_path / "typo.jsonl").write_text('{"probelm": "1 + 1?", "n": 2}\n')
  done = _command("train", f"--config=own:{argument}", cwd=tmp_path)
  assert done.returncode == 1 and words in done.stderr
  assert "Traceback" not in done.stderr
