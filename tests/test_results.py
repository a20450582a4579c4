"""Numbers of the experiments: intervals, comparisons, and the pages."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy

from prefix_distill import assets
from prefix_distill.experiments import reproduce
from prefix_distill.experiments import results
from prefix_distill.models import huggingface

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "results"
TASKS = {name: task.about for name, task in reproduce.TASKS.items()}
CELLS = {name: cell.about for name, cell in reproduce.CELLS.items()}


def run(
    cell, seed, accuracies, step_flops, task="capable", every=2, problems=200
):
  """A run whose problems 0, 1, ... are right, as many as the accuracy says."""
  count = len(accuracies)
  right = [round(problems * x) for x in accuracies]
  verdicts = [results.pack("1" * n + "0" * (problems - n)) for n in right]
  return {
      "task": task,
      "cell": cell,
      "seed": seed,
      "steps": [every * i for i in range(count)],
      "flops": [step_flops * every * i for i in range(count)],
      "seconds": [1.0 * i for i in range(count)],
      "finish_rate": [1.0] * count,
      "mean_length": [9.0] * count,
      "samples": 1,
      "problems": {"heldout": problems, "validation": problems},
      "verdicts": {"heldout": verdicts, "validation": verdicts},
  }


def curve(*runs):
  (found,) = results.curves(runs).values()
  return found


def rising(cell="full", flops=10.0, seeds=3, to=0.9):
  shape = np.array([0.1, 0.3, 0.5, 0.7, 0.9]) * to / 0.9
  return [run(cell, seed, shape, flops) for seed in range(seeds)]


@pytest.mark.parametrize("verdicts", ["0", "1", "01101", "1" * 240, "0" * 239])
def test_verdicts_are_packed_without_loss(verdicts):
  packed = results.pack(verdicts)
  assert len(packed) == -(-len(verdicts) // 4)
  found = results.unpack(packed, len(verdicts))
  assert "".join(f"{x:.0f}" for x in found) == verdicts


def test_an_interval_has_the_width_of_both_sources():
  rng = np.random.default_rng(1)

  def noisy(means, problems):
    runs = [
        run("full", i, [0.0, 0.0], 1.0, problems=problems)
        for i in range(len(means))
    ]
    for one, mean in zip(runs, means, strict=True):
      right = rng.random(problems) < mean
      text = "".join("1" if x else "0" for x in right)
      one["verdicts"]["heldout"][-1] = results.pack(text)
    return results.interval(results.at_end, curve(*runs))

  # Equal seeds: independent problems, each answered by all seeds.
  found = noisy([0.7] * 8, 400)
  half = 1.96 * (0.7 * 0.3 / (8 * 400)) ** 0.5
  # The bootstrap of two factors is never narrower, and not thrice as wide.
  assert half < (found.high - found.low) / 2 < 3 * half
  # Seeds that differ: their own spread rules.
  means = [0.5, 0.9] * 6
  found = noisy(means, 2000)
  half = 1.96 * np.std(means) / 12**0.5
  assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.2)


def test_pairs_are_compared_on_the_same_problems():
  # The problems differ much, the methods little.
  better = curve(*rising("linear", to=0.92))
  full = curve(*rising("full", to=0.9))
  gain = results.interval(
      results.difference(results.at_end, results.at_end), better, full
  )
  alone = results.interval(results.at_end, full)
  assert gain.value == pytest.approx(0.02)
  assert 0 <= gain.low and gain.high < 0.05
  assert alone.high - alone.low > 0.05


def test_costs_are_read_along_the_curve():
  full = curve(*rising(flops=10.0))
  assert results.value(results.cost_to(0.5), full) == pytest.approx(40.0)
  assert results.value(results.cost_to(0.6), full) == pytest.approx(50.0)
  assert results.value(results.cost_to(0.05), full) == 0.0
  assert np.isinf(results.value(results.cost_to(0.95), full))
  short = curve(*rising("short", flops=1.0))
  ratio = results.quotient(results.cost_to(0.6), results.cost_to(0.6))
  assert results.value(ratio, short, full) == pytest.approx(0.1)
  # At half of full's cost, full is half way; the short one has long ended.
  half = results.at_cost(0.5)
  assert results.value(half, full, full) == pytest.approx(0.5)
  assert results.value(half, short, full) == pytest.approx(0.9)


def test_at_equal_cost_the_dearer_one_is_read_on_its_way():
  full, short = curve(*rising()), curve(*rising("short", flops=5.0, to=0.6))
  # The short one costs half, and there full has half of its way.
  gain = results.value(results.at_equal_cost, short, full)
  assert gain == pytest.approx(0.6 - 0.5)


def test_what_is_never_reached_has_no_finite_ratio():
  full, low = curve(*rising()), curve(*rising("low", to=0.5))
  ratio = results.quotient(results.cost_to(0.8), results.cost_to(0.8))
  assert results.interval(ratio, low, full).ratio() == "never"
  assert results.value(ratio, full, low) == 0.0


def test_the_best_stop_is_chosen_on_the_validation_split():
  (one,) = rising(seeds=1)
  one["verdicts"] = {
      "validation": [
          results.pack(("1" * n).ljust(200, "0"))
          for n in (20, 178, 100, 181, 181)
      ],
      "heldout": [
          results.pack(("1" * n).ljust(200, "0"))
          for n in (20, 60, 80, 199, 200)
      ],
  }
  found = curve(one)
  assert found.stop == 1  # Within two points of 181, and the cheapest.
  assert results.value(results.at_stop, found) == pytest.approx(0.3)
  assert results.value(results.stop_cost, found) == 20.0


def test_a_seed_that_ended_stays_where_it_ended():
  early = run("audited", 1, [0.1, 0.8], 5.0)
  found = curve(run("audited", 0, [0.1, 0.2, 0.3, 0.4], 5.0), early)
  assert found.steps.tolist() == [0, 2, 4, 6]
  assert found.flops[1].tolist() == [0.0, 10.0, 10.0, 10.0]
  np.testing.assert_allclose(
      found.right["heldout"][1].mean(1), [0.1, 0.8, 0.8, 0.8]
  )


@pytest.mark.parametrize(
    "low, high, word",
    [
        (0.001, 0.1, "better"),
        (-0.019, 0.1, "as good"),
        (-0.021, 0.1, "undecided"),
        (-0.1, -0.001, "worse"),
        (-0.015, -0.001, "as good"),
    ],
)
def test_words_are_what_intervals_allow(low, high, word):
  assert results.Interval(0.0, low, high).word() == word


def test_the_trials_choose_by_validation():
  def trial(rate, accuracies):
    return run("full", 100, accuracies, 1.0) | {"rate": rate}

  trials = [trial(1e-4, [0.1, 0.8, 0.8]), trial(3e-4, [0.1, 0.9, 0.2])]
  assert results.chosen_rate(trials, "capable", "full") == 3e-4
  assert results.chosen_rate(trials, "capable", "linear") is None
  todo = reproduce.Experiment("capable", "full", 0)
  line = reproduce.command(todo, pathlib.Path("x"), trials)
  assert "--config.optimizer.learning_rate=0.0003" in line
  job = reproduce.Experiment("chain", "full-fast", 0)
  line = reproduce.command(job, pathlib.Path("x"), trials)
  assert "--config.optimizer.learning_rate=0.001" in line
  # A cell that had no trials takes another one's.
  todo = reproduce.Experiment("capable", "first-32", 0)
  line = reproduce.command(todo, pathlib.Path("x"), trials)
  assert "--config.optimizer.learning_rate=0.0003" in line


def test_a_new_seed_lands_inside_or_not():
  found = curve(
      *(run("full", s, [0, x], 1.0) for s, x in enumerate((0.78, 0.8, 0.82)))
  )
  text, inside = results.compare_seed(found, run("full", 9, [0, 0.83], 1.0))
  assert inside and "inside" in text
  text, inside = results.compare_seed(found, run("full", 9, [0, 0.3], 1.0))
  assert not inside and "OUTSIDE" in text


def test_a_run_is_read_from_its_workdir(tmp_path):
  def line(step, name, verdicts, **values):
    return {
        "step": step,
        "model": "student",
        "mode": "sampled",
        "set": name,
        "flops": 7.0 * step,
        "verdicts": verdicts,
        "samples": 1,
        "problems": len(verdicts),
        "finish_rate": 1.0,
        "mean_length": 3.0,
    } | values

  lines = [
      line(0, "validation", "00000"),
      line(0, "heldout", "00001"),
      line(0, "heldout", "11111", mode="greedy"),
      {"step": 1, "loss": 0.5, "seconds": 2.5},
      line(1, "validation", "11000"),
      line(1, "heldout", "11110"),
      line(1, "heldout", "11111", model="teacher"),
  ]
  text = "".join(json.dumps(x) + "\n" for x in lines)
  (tmp_path / "metrics.jsonl").write_text(text)
  assert results.read_run(tmp_path) is None  # It has not ended.
  (tmp_path / "export").mkdir()
  found = results.read_run(tmp_path) | {"task": "t", "cell": "c", "seed": 0}
  assert found["flops"] == [0.0, 7.0] and found["seconds"] == [0.0, 2.5]
  one = curve(json.loads(json.dumps(found)))
  assert one.right["heldout"][0].sum(1).tolist() == [1.0, 4.0]
  assert one.right["validation"][0].sum(1).tolist() == [0.0, 2.0]


def test_trials_do_not_see_the_test_split(tmp_path):
  for rate, sets in ((None, "heldout+validation"), (1e-4, "validation")):
    todo = reproduce.Experiment("chain", "linear", 3, rate)
    line = reproduce.command(todo, tmp_path, [])
    assert line[3].endswith(f":chain,sets={sets}")
    assert "--config.seed=3" in line


def test_the_command_alone_makes_what_is_committed(tmp_path, monkeypatch):
  """Every run and trial of the pages is one of its own, and no other is."""
  asked = []

  def run_all(self, all_runs, parallel):
    del self, parallel
    asked.extend(results_key(x.key) for x in all_runs)
    return False

  results_key = reproduce.key
  monkeypatch.setattr(reproduce.Runner, "run_all", run_all)
  monkeypatch.setattr(reproduce.Runner, "analyse", lambda *_: [])
  assert not reproduce.main(["--docs", str(tmp_path)])
  kept = [results_key(x) for x in results.load(DOCS / "runs.jsonl")]
  assert len(kept) == len(set(kept)) and len(asked) == len(set(asked))
  assert set(kept) == set(asked)


def test_a_run_that_is_known_is_not_done_again(tmp_path, monkeypatch, capsys):
  file, started = tmp_path / "runs.jsonl", []
  file.write_text(json.dumps(run("full", 0, [0, 1], 1.0)) + "\n")
  runner = reproduce.Runner(tmp_path / "runs", file)

  def fake(todo, core=None):
    started.append(str(todo))
    if todo.cell == "linear":
      return None
    return run(todo.cell, todo.seed, [0, 1], 1)

  monkeypatch.setattr(runner, "run", fake)
  todo = [
      reproduce.Experiment("capable", cell, seed)
      for seed in (0, 1)
      for cell in ("full", "linear")
  ]
  assert runner.run_all(todo, 2)  # Some failed.
  assert sorted(started) == [
      "capable full 1",
      "capable linear 0",
      "capable linear 1",
  ]
  assert "FAILED" in capsys.readouterr().out
  assert len(results.load(file)) == 2


def test_a_language_models_weights_are_deleted_when_its_run_is_kept(
    tmp_path, monkeypatch
):
  """They are gigabytes; the small students are analysed later."""
  runner = reproduce.Runner(tmp_path / "runs", tmp_path / "runs.jsonl")
  todo = [reproduce.Experiment(x, "full", 0) for x in ("language", "chain")]

  def fake(one, core=None):
    for name in ("export", "checkpoints"):
      (runner.place(one) / name).mkdir(parents=True)
    (runner.place(one) / "metrics.jsonl").touch()
    return run(one.cell, one.seed, [0, 1], 1, task=one.task)

  monkeypatch.setattr(runner, "run", fake)
  assert not runner.run_all(todo, 1)
  left = [
      sorted(x.name for x in runner.place(one).iterdir()) for one in todo
  ]
  assert left == [
      ["metrics.jsonl"],
      ["checkpoints", "export", "metrics.jsonl"],
  ]


def test_a_teacher_that_cannot_be_trained_fails_its_task_alone(
    tmp_path, monkeypatch
):
  started = []

  def start(line, **kwargs):
    (config,) = [x for x in line if x.startswith("--config=")]
    (workdir,) = [x for x in line if x.startswith("--workdir=")]
    started.append("sft" if "method=sft" in config else "run")
    if started[-1] == "run":
      place = pathlib.Path(workdir.removeprefix("--workdir="))
      (place / "export").mkdir(parents=True)

  monkeypatch.setattr(reproduce.subprocess, "run", start)
  monkeypatch.setattr(results, "read_run", lambda place: {"steps": [0]})
  student = str(assets.path("teacher"))
  runner = reproduce.Runner(
      tmp_path / "runs", tmp_path / "runs.jsonl", student
  )
  todo = [
      reproduce.Experiment(task, "full", seed)
      for task in ("language", "half", "chain")
      for seed in range(2)
  ]
  assert runner.run_all(todo, 1)  # Some failed.
  # The teacher, the halved student, and the runs of the other task.
  assert started == ["sft", "sft", "run", "run"]
  kept = results.load(tmp_path / "runs.jsonl")
  assert [run["task"] for run in kept] == ["chain", "chain"]


def test_a_halved_model_has_every_second_layer(tmp_path):
  source, to = assets.path("teacher"), tmp_path / "half"
  reproduce.halve(str(source), to)
  before, after = (
      safetensors.numpy.load_file(x / huggingface.SINGLE) for x in (source, to)
  )
  layers = huggingface.read_config(str(source)).num_layers
  found = huggingface.read_config(str(to))
  assert layers > 2 and found.num_layers == (layers + 1) // 2
  huggingface.check_weights(str(to), found)
  for name, values in after.items():
    head, dot, rest = name.partition("model.layers.")
    layer, _, tail = rest.partition(".")
    origin = f"{head}{dot}{2 * int(layer)}.{tail}" if dot else name
    np.testing.assert_array_equal(values, before[origin])


def test_the_page_and_the_figure_are_made(tmp_path, capsys):
  runs = [*rising(), *rising("linear", 5.0), *rising("fixed-64", 2.0, to=0.4)]
  cells = ["full", "linear"]
  results.write(runs, tmp_path, TASKS, CELLS, cells)
  text = (tmp_path / "README.md").read_text()
  assert "90.0 (85.5-94.0)" in text or "90.0 (" in text
  assert "growing prefix (the paper's) - full on-policy distillation" in text
  assert "| 0.50 (0.50-0.50) | 3 | cheaper |" in text
  assert (tmp_path / "accuracy_flops.png").stat().st_size > 5_000
  results.write([], tmp_path / "none", TASKS, CELLS, [])
  assert "no two runs" in capsys.readouterr().out


def test_the_readmes_table_stands_between_its_marks():
  text = "a\n<!-- results -->\nold\n<!-- end -->\nb\n"
  made = results.with_summary(text, "| new |\n")
  assert made == "a\n<!-- results -->\n| new |\n<!-- end -->\nb\n"
  assert results.with_summary(made, "| new |\n") == made
  assert results.with_summary("none here", "| new |\n") == "none here"


def test_the_readmes_table_has_a_row_for_each_task():
  found = _found(full=(0.9, 10.0), linear=(0.8, 5.0))
  mechanism = [
      {"task": "a", "what": "gradient",
       "prefixes": [{"length": 8, "cosine": 0.257}]},
      {"task": "a", "what": "teacher_prefix",
       "rows": [{"length": 0, "accuracy": 0.25},
                {"length": 8, "accuracy": 0.5}]},
  ]
  tasks = {"a": "A", "b": "B"}
  table = results.summary({"a": found, "b": found}, tasks, mechanism)
  first, second = table.splitlines()[2:]
  assert first.startswith("| A | 3 | 0.26 | 25.0 to 50.0 | -10.0 (")
  assert second.startswith("| B | 3 |  |  | -10.0 (")
  # At half of full's FLOPs, full has six tenths of its way behind it.
  assert "| 50.0% | +22.0 (" in first


def test_the_committed_pages_are_what_the_committed_runs_say():
  runs = results.load(DOCS / "runs.jsonl")
  mechanism = results.load(DOCS / "mechanism.jsonl")
  assert runs and mechanism
  notes = {name: task.note for name, task in reproduce.TASKS.items()}
  again = results.load(DOCS / "again.jsonl")
  page = results.page(runs, TASKS, CELLS, mechanism, notes, again)
  assert (DOCS / "README.md").read_text() == page
  readme = (DOCS.parents[1] / "README.md").read_text()
  assert "<!-- results -->\n|" in readme
  table = results.summary(results._by_task(runs, TASKS), TASKS, mechanism)
  assert results.with_summary(readme, table) == readme


def _word(first, second, what, task="chain"):
  runs = results.load(DOCS / "runs.jsonl")
  found = {
      cell: found
      for (name, cell), found in results.curves(
          run for run in runs if "rate" not in run
      ).items()
      if name == task
  }
  return results.compare(results.Comparison("", first, second, what), found)


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_difference_in_a_sentence_is_one_of_the_results(page):
  pattern = re.compile(r"[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)")
  known = set(pattern.findall((DOCS / "README.md").read_text()))
  text = " ".join((DOCS.parents[1] / page).read_text().split())
  # In docs/methods.md the unit stands between.
  text = re.sub(r"(\d) (points|nats) \(", r"\1 (", text)
  found = pattern.findall(text)
  assert len(found) > 10 and set(found) <= known


@pytest.mark.parametrize(
    "task, first, second, what, words",
    [
        ("capable", "linear", "full", "end", ("as good",)),
        ("capable", "fixed-16", "full", "end", ("as good",)),
        ("capable", "linear", "full-fast", "equal", ("as good",)),
        ("capable", "fixed-16", "full-fast", "equal", ("better",)),
        ("capable", "first-32", "last-32", "end", ("as good",)),
        ("capable", "random", "linear", "end", ("as good",)),
        ("capable", "forward", "full", "end", ("worse",)),
        ("chain", "fixed-64", "full", 0.1, ("better",)),
        ("chain", "fixed-64-fast", "full-fast", 0.1, ("better",)),
        ("chain", "forward", "full", "end", ("as good",)),
        ("chain", "off-forward", "full", "end", ("as good",)),
        ("chain", "forward", "full-forward", "end", ("undecided",)),
        ("chain", "off-forward", "full-forward", "end", ("undecided",)),
        ("chain", "first-32", "32-64", "end", ("better",)),
        ("chain", "first-32", "last-32", "end", ("better",)),
        ("chain", "linear", "full", "end", ("worse",)),
        ("chain", "random", "linear", "end", ("as good",)),
        ("chain", "linear", "full-forward", "equal", ("worse",)),
        ("chain", "linear", "seqkd", "equal", ("worse",)),
        ("chain", "fixed-64", "forward", "end", ("worse",)),
        ("chain", "audited", "full", "equal", ("as good", "undecided")),
        ("weak", "linear", "fixed-16", "end", ("better",)),
        ("weak", "linear", "full", "equal", ("worse",)),
        ("weak", "fixed-16", "full", "equal", ("worse",)),
        ("weak", "fixed-64", "full", "equal", ("worse",)),
        ("weak", "off-forward", "full", "end", ("worse",)),
        ("weak", "forward", "full", "end", ("worse",)),
        ("weak", "first-32", "32-64", "end", ("better",)),
        ("weak", "first-32", "last-32", "end", ("undecided",)),
        ("language", "fixed-8", "before", "end", ("worse",)),
        ("language", "first-32", "32-64", "end", ("better",)),
        ("language", "first-32", "last-32", "end", ("better",)),
        ("language", "linear", "full", "end", ("worse",)),
        ("language", "linear", "full", "equal", ("undecided",)),
        ("half", "linear", "full", "equal", ("worse",)),
        ("half", "fixed-8", "full", "equal", ("worse",)),
        ("half", "fixed-8", "before", "end", ("better",)),
        ("half", "full", "full-forward", "end", ("better",)),
        ("half", "full", "off-reverse", "end", ("better",)),
        ("half", "full", "off-forward", "end", ("better",)),
        ("half", "first-32", "32-64", "end", ("worse",)),
        ("language", "random", "full", "equal", ("worse",)),
        ("language", "audited", "full", "equal", ("worse",)),
        ("language", "plateau", "full", "equal", ("undecided",)),
        ("language", "full", "full-forward", "end", ("better",)),
        ("language", "off-forward", "full", "end", ("better",)),
        ("language", "off-forward", "linear", "equal", ("better",)),
    ],
)
def test_a_sentence_of_the_readme_says_what_its_interval_says(
    task, first, second, what, words
):
  text = " ".join((DOCS.parents[1] / "README.md").read_text().split())
  found = _word(first, second, what, task)
  assert found.word() in words
  assert found.gain().removesuffix(" nats") in text


def test_shares_of_flops_in_the_readmes_sentences():
  text = " ".join((DOCS.parents[1] / "README.md").read_text().split())
  for task, cell in (
      ("capable", "linear"),
      ("capable", "fixed-16"),
      ("chain", "forward"),
      ("language", "linear"),
      ("language", "off-forward"),
  ):
    cost = _word(cell, "full", "end", task).cost.value
    assert f"for {100 * cost:.0f} %" in text
  for cell in ("off-reverse", "off-forward"):
    cost = _word("full", cell, "end", "half").cost.value
    assert f"for {100 * cost:.0f} % of their FLOPs" in text


def test_the_chains_in_the_table_of_methods():
  text = (DOCS.parent / "methods.md").read_text()
  runs = results.load(DOCS / "runs.jsonl")
  found = results.curves(run for run in runs if "rate" not in run)
  for cell in (
      "linear",
      "full",
      "fixed-64",
      "fixed-16",
      "random",
      "audited",
      "seqkd",
      "forward",
      "off-reverse",
      "off-forward",
      "full-forward",
      "first-32",
      "32-64",
      "last-32",
  ):
    curve = found["chain", cell]
    assert results.interval(results.at_end, curve).percent() in text
    assert len(curve.seeds) == 5


def _found(**accuracies):
  """Cells of one task, three seeds, all at the same FLOPs for each update."""
  shape = np.array([0.0, 0.3, 0.6, 0.9, 1.0])
  runs = [
      run(cell.replace("_", "-"), seed, 0.1 + (to - 0.1) * shape, cost)
      for cell, (to, cost) in accuracies.items()
      for seed in range(3)
  ]
  return {cell: curve for (_, cell), curve in results.curves(runs).items()}


def test_a_verdict_is_what_the_intervals_say():
  growing = results.FINDINGS[0]
  found = _found(full=(0.9, 10.0), linear=(0.9, 4.0))
  assert results.verdict(growing, found)[0] == "holds"
  found = _found(full=(0.9, 10.0), linear=(0.7, 4.0))
  said, why = results.verdict(growing, found)
  assert said == "does not hold" and "-20.0" in why and "3 seeds" in why
  one = {cell: curve.of([0]) for cell, curve in found.items()}
  said, why = results.verdict(growing, one)
  assert said == "does not hold in one run" and "(1 seed)" in why
  assert results.verdict(growing, _found(full=(0.9, 10.0)))[0] == "not run"
  # As good at the end, but no better at the same FLOPs.
  found = _found(full=(0.9, 10.0), linear=(0.9, 10.0))
  assert results.verdict(growing, found)[0] == "open"


def test_one_table_has_a_row_for_each_finding_and_task():
  found = _found(full=(0.9, 10.0), linear=(0.9, 4.0))
  table = results.verdicts_table({"a": found, "b": found}, {"a": "A", "b": "B"})
  rows = table.splitlines()[2:]
  assert len(rows) == 2 * len(results.FINDINGS)
  assert [row.split(" | ")[1] for row in rows[:2]] == ["A", "B"]


def _scored(cell, seed, nats):
  """A run whose answers are so many nats from the teacher, at the end."""
  found = run(cell, seed, [0.1, 0.5], 1.0)
  kl = [[9.0] * 20, [nats + 0.01 * i for i in range(20)]]
  return found | {
      "kl": kl,
      "kl_positions": [[3.0, 5.0, 1.0], [nats / 4, nats / 2, nats / 4]],
  }


def test_answers_that_the_teacher_scored_are_compared():
  runs = [
      _scored(cell, seed, nats)
      for cell, nats in (("full", 2.0), ("linear", 3.0))
      for seed in range(2)
  ]
  found = {cell: c for (_, cell), c in results.curves(runs).items()}
  table = results.divergence_table(found, CELLS)
  before, full, linear = table.splitlines()[2:]
  assert "| before | 2 | 9.00 (9.00-9.00) |" in before
  assert "| 3.00 | 6.00 |" in before
  assert "| 2.09 (" in full
  assert "| +1.00 (+1.00 to +1.00) | 0.75 | 2.25 |" in linear
  assert not results.divergence_table(_found(full=(0.9, 1.0)), CELLS)
  # Runs of the same cells stand beside them.
  other = results.curves([_scored("linear", 0, 5.0)])
  other = {cell: curve for (_, cell), curve in other.items()}
  beside = results.divergence_table(found, CELLS, other).splitlines()
  assert beside[0].endswith("| behind | in another run |")
  assert [x.split(" | ")[-1] for x in beside[2:]] == [" |", " |", "5.10 |"]


def test_time_is_that_of_the_fastest_seed():
  """What else a machine did only adds to it."""
  found = _found(full=(0.9, 10.0), linear=(0.8, 5.0))
  seconds = {"full": [[0, 400], [0, 100], [0, 900]], "linear": [[0, 25]] * 3}
  found = {
      name: dataclasses.replace(curve, seconds=np.array(seconds[name], float))
      for name, curve in found.items()
  }
  table = results.methods_table(found, {"full": "full", "linear": "linear"})
  _, _, _, full, linear = (x.split(" | ") for x in table.splitlines())
  assert full[4:6] == ["100.0%", "100%"] and linear[4:6] == ["50.0%", "25%"]


def test_where_answers_were_scored_the_divergence_decides():
  cells = (("full", 2.0), ("linear", 2.1), ("fixed-8", 12.0))
  runs = [
      _scored(cell, seed, nats) for cell, nats in cells for seed in range(2)
  ]
  found = {cell: c for (_, cell), c in results.curves(runs).items()}
  # The margin is 2 % of the 9 nats before, and 0.1 nats are within it.
  compared = results.compare(
      results.Comparison("", "linear", "full", "end"), found
  )
  assert compared.gain() == "-0.1 (-0.1 to -0.1) nats"
  assert compared.word() == "as good"
  spoiled = results.compare(
      results.Comparison("", "fixed-8", "before", "end"), found
  )
  assert spoiled.word() == "worse" and spoiled.accuracy.value < -3.0
  # The shortest prefix decides, also where a longer one was run.
  longer = results.curves(_scored("fixed-16", seed, 1.0) for seed in range(2))
  for more in ({}, {cell: c for (_, cell), c in longer.items()}):
    said, why = results.verdict(results.FINDINGS[2], found | more)
    assert said == "holds" and "fixed-8 - before" in why
  # Whole answers stand for prefixes of 64; some cells have no stand-in.
  said, why = results.verdict(results.FINDINGS[4], found)
  assert (said, why) == ("not run", "")
  forms = (("full-forward", 2.0), ("off-reverse", 3.0), ("off-forward", 1.0))
  runs += [
      _scored(cell, seed, nats) for cell, nats in forms for seed in range(2)
  ]
  found = {cell: c for (_, cell), c in results.curves(runs).items()}
  said, why = results.verdict(results.FINDINGS[4], found)
  assert said == "does not hold" and why.startswith(
      "full - full-forward at the end +0.0"
  )
  assert "full - off-reverse at the end +1.0" in why
  for what in ("stop", "to 90%"):  # Accuracies and a validation split only.
    of = results.Comparison("", "linear", "full", what)
    assert results.compare(of, found) is None


def test_a_mechanism_that_is_known_is_not_measured_again(
    tmp_path, monkeypatch
):
  asked = []

  def analysis(self, task, what, *flags):
    del self
    asked.append((what, *flags))
    if what == "position":
      paths = ["bundled:weak", *filter(None, flags[0].split("=")[1].split(","))]
      values = {"rollouts": [2.0] * 100, "kl": [0.1] * 100}
      return {path: values for path in paths}
    if what == "gradient":
      return {"x": {"halves": 1.0, "prefixes": []}}
    row = dict.fromkeys(results.PREFIX_FIELDS, 1)
    return {"heldout": [row | {"more": 2}]}

  monkeypatch.setattr(reproduce.Runner, "_analysis", analysis)
  file = tmp_path / "runs.jsonl"
  runs = [run("full", seed, [0.1, 0.9], 1.0) for seed in range(2)]
  file.write_text("".join(json.dumps(x) + "\n" for x in runs))
  runner = reproduce.Runner(tmp_path / "runs", file)
  export = runner.place(reproduce.Experiment("capable", "full", 0)) / "export"
  export.mkdir(parents=True)
  lines = runner.analyse("capable", [])
  assert [(x["what"], x.get("cell"), x.get("seed")) for x in lines] == [
      ("position", "before", 0),
      ("position", "full", 0),
      ("gradient", None, None),
      ("teacher_prefix", None, None),
  ]
  assert lines[-1]["rows"] == [dict.fromkeys(results.PREFIX_FIELDS, 1)]
  asked.clear()
  assert not runner.analyse("capable", lines) and not asked
  (runner.place(reproduce.Experiment("capable", "full", 1)) / "export").mkdir(
      parents=True
  )
  (line,) = runner.analyse("capable", lines)
  assert (line["what"], line["seed"]) == ("position", 1)
  assert len(asked) == 1

  # A language model's students are scored in their evaluations.
  asked.clear()
  monkeypatch.setattr(reproduce.Runner, "_make_all", lambda *_: True)
  lines = runner.analyse("language", [])
  assert [x["what"] for x in lines] == ["gradient", "teacher_prefix"]
  lengths = [flags for _, *flags in asked]
  assert lengths[0][0] == "--lengths=8,16,32" and "64" not in lengths[1][0]
  # Without the models that are made first there is nothing to analyse.
  monkeypatch.setattr(reproduce.Runner, "_make_all", lambda *_: False)
  assert runner.analyse("half", []) == []
