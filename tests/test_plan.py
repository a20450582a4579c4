from collections.abc import Callable
import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys

import huggingface_hub
import jax
import pytest
import rich.console
import toys

from prefix_distill import assets
from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import DatasetSpec
from prefix_distill.config import EvaluationSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import ModelSpec
from prefix_distill.config import RolloutSpec
from prefix_distill.errors import UserError
from prefix_distill.evaluate import evaluator
from prefix_distill.models import huggingface as hf
from prefix_distill.models.config import QWEN3_1_7B
from prefix_distill.models.config import QWEN3_8B
from prefix_distill.plan import planner
from prefix_distill.plan import programs
from prefix_distill.plan.planner import Assumptions
from prefix_distill.plan.programs import Measured

GPU = programs.parse_machine("h100:1")
SMALL, LARGE = QWEN3_1_7B, QWEN3_8B


@pytest.mark.parametrize(
    ("name", "size"),
    [("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v6e:4x4", 16), ("h100:8", 8),
     ("v5e:4x4*2", 32), ("a100:1", 1), ("h200:16", 16)],
)
def test_a_machine_has_so_many_devices(name, size):
  assert programs.parse_machine(name).size == size


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v5e-16", "v5e:4x4"),
        ("v7x:2x2", "v6e"),
        ("h100", "h100:8"),
        ("h100:2x4", "use h100:8"),
        ("h100:12", "multiple of 8"),
        ("v5p:4x4", "3 dimensions; use v5p:2x2x2"),
        ("v5e:2x2x2", "2 dimensions"),
        ("v5e:0x4", "1 or more"),
    ],
)
def test_another_machine_is_refused_with_what_there_is(name, text):
  with pytest.raises(programs.MachineError) as error:
    programs.parse_machine(name)
  assert name in str(error.value)
  assert text in str(error.value)


def ask(*flags: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, "-m", "prefix_distill.plan", *flags],
      text=True,
      capture_output=True,
      timeout=400,
      check=False,
      env=os.environ | {"HF_HUB_OFFLINE": "1"},
  )


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--config is missing"),
        (["--config=configs/math.py", "--confg=x"], "did you mean: config"),
        (["--config=math:tinny"], "no argument 'tinny'"),
        (["--config=owm"], "did you mean own?"),
    ],
)
def test_a_wrong_command_line_is_a_wrong_question(flags, words):
  asked = ask(*flags, "--topology=h100:8")
  (line,) = asked.stderr.strip().splitlines()
  assert asked.returncode == 2
  assert line.startswith("error: ") and words in line.replace("Did", "did")


def test_help_has_the_flags_of_plan():
  """Also where the command is the program itself."""
  asked = ask("--help")
  assert asked.returncode == 0
  for flag in ("topology", "prefix", "price", "budget", "config"):
    assert f"\n  --{flag}" in asked.stdout


def test_a_missing_compiler_ends_in_the_line_that_installs_it():
  for module in ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin"):
    if _has(module):
      pytest.skip(f"{module} is installed here")
  for topology, extra in (("v5e:2x2", "tpu"), ("h100:8", "cuda13")):
    asked = ask("--config=configs/math.py", f"--topology={topology}")
    assert asked.returncode == 2
    assert f"pip install 'jax[{extra}]'" in asked.stderr
    assert len(asked.stderr.strip().splitlines()) == 1


def _has(module: str) -> bool:
  code = f"import {module}"
  return not subprocess.run(
      [sys.executable, "-c", code], capture_output=True, check=False
  ).returncode


def test_a_wrong_question_ends_in_one_sentence():
  asked = ask("--config=configs/math.py")
  assert asked.returncode == 2
  assert "--topology is missing" in asked.stderr
  assert "v5e:4x4" in asked.stderr


@pytest.mark.aot
def test_weights_that_do_not_fit_are_refused_before_anything_is_compiled():
  asked = ask("--config=configs/math.py:qwen3-8b", "--topology=v5e:2x4")
  assert asked.returncode == 1
  (sentence,) = asked.stderr.strip().splitlines()
  # 8.2e9 parameters: float32 weights, gradient, two moments; bfloat16 teacher.
  assert "17.2 of 15.75 GiB" in sentence
  assert "use 9 devices or more" in sentence


@pytest.mark.aot
def test_what_the_compiler_refuses_gets_a_setting_that_it_takes(tmp_path):
  asked = ask(
      "--config=configs/math.py:tiny",
      "--topology=v5e:2x2",
      "--prefix=64",
      "--config.data.batch_size=524288",
      "--config.optimizer.batch_tokens=65536",
      f"--json={tmp_path / 'plan.json'}",
  )
  assert asked.returncode == 1
  assert "of 15.75 GiB" in asked.stderr.splitlines()[-1]
  plan = json.loads((tmp_path / "plan.json").read_text())
  assert not plan["fits"]
  assert all(not one["refused"] for one in plan["mended"])
  assert f"It fits with {plan['advice'][0]}" in asked.stdout


@pytest.mark.parametrize("given", [["x"], ["0"], ["-3"], [""]])
def test_lengths_are_numbers(given):
  with pytest.raises(UserError, match="no list of lengths"):
    planner.read_lengths(given)


def config(**changes):
  made = toys.run_config("student", "teacher", **changes)
  return dataclasses.replace(
      made,
      student=ModelSpec("a", "bfloat16"),
      teacher=ModelSpec("b", "bfloat16", "bfloat16"),
      data=dataclasses.replace(made.data, batch_size=512),
  )


@pytest.mark.parametrize(
    ("machine", "student", "mesh"),
    [
        # 3.4 GB of weights fit whole into 15.75 GiB while decoding, and 16.4
        # GB do not: neither a student's nor a teacher's that is evaluated.
        ("v5e:4x4", SMALL, (1, 16, 1, 2)),
        ("v5e:4x4", LARGE, (1, 16, 1, 4)),
        ("v5p:2x2x2", LARGE, (1, 8, 1)),
        ("v6e:4x4", LARGE, (1, 16, 1)),
        ("h100:8", LARGE, (1, 8, 1)),
        # Replicas on every slice and host.
        ("v5e:4x4*2", SMALL, (2, 16, 1, 2)),
        ("h100:16", LARGE, (2, 8, 1)),
    ],
)
def test_sampling_has_as_few_tensor_shards_as_the_memory_allows(
    machine, student, mesh
):
  found = planner.suggest_mesh(
      config(), student, LARGE, programs.parse_machine(machine)
  )
  assert found == MeshSpec(*mesh)


def test_training_has_tensor_shards_where_there_are_more_devices_than_prompts():
  made = config()
  few = dataclasses.replace(made.data, batch_size=8)
  made = dataclasses.replace(made, data=few)
  found = planner.suggest_mesh(
      made, SMALL, LARGE, programs.parse_machine("v5e:4x4")
  )
  assert found == MeshSpec(1, 8, 2)


def test_long_answers_need_more_shards_to_lie_on():
  made = config()
  made = dataclasses.replace(
      made,
      method="full",
      evaluation=dataclasses.replace(made.evaluation, teacher=False),
      rollout=dataclasses.replace(made.rollout, per_prompt=8, max_len=16_384),
  )
  # Keys and values of one prompt's eight rollouts take 14 GiB.
  tight, ample = map(programs.parse_machine, ("v5e:4x4", "v6e:4x4"))
  assert planner.suggest_mesh(made, SMALL, LARGE, tight).sampling_tensor == 2
  assert planner.suggest_mesh(made, SMALL, LARGE, ample).sampling_tensor == 0


def measured(**changes) -> Measured:
  return dataclasses.replace(
      Measured("gradient", 256, 1, 8, flops=0.0, moved=0.0), **changes
  )


def test_a_program_takes_as_long_as_its_slowest_part():
  machine = programs.parse_machine("h100:8")
  half = Assumptions(utilization=0.5, reach=0.5, links=0.5)
  flops = measured(flops=8 * 989e12, moved=3352e9 / 4, times=3)
  assert planner.least_seconds(flops, machine, half) == (6.0, "FLOPs")
  memory = measured(flops=989e12, moved=3352e9)
  assert planner.least_seconds(memory, machine, half) == (2.0, "memory")
  links = measured(sent={"all-gather over fsdp": 450e9, "x": 450e9})
  assert planner.least_seconds(links, machine, half) == (4.0, "links")


def _results(tmp_path, *lines):
  file = tmp_path / "results.jsonl"
  text = (json.dumps(one | {"status": "done"}) + "\n" for one in lines)
  file.write_text("".join(text))
  return file


_DEVICE = {"stage": "machine", "name": "device", "device": "NVIDIA H100 80GB"}
_UPDATES = [
    # 300 and 500 TFLOP/s, of 989, for one second and three.
    {"stage": "update", "name": "256: score", "flops": 3e14, "phase": 1.0},
    {"stage": "update", "name": "256: gradient", "flops": 15e14, "phase": 3.0},
    {"stage": "update", "name": "256: sample", "flops": 1.0, "phase": 9.0},
]
_ROLLOUTS = [
    {
        "stage": "rollout",
        "name": "a",
        "rows": 1,
        "new": 257,
        "least_bytes": 1.0,
        "ms_per_token": 9.0,
    },
    {
        "stage": "rollout",
        "name": "b",
        "rows": 64,
        "new": 257,
        "least_bytes": 256 * 5e9,
        "ms_per_token": 2.5,
    },
]


def test_measured_shares_take_the_place_of_assumed_ones(tmp_path):
  file = _results(tmp_path, _DEVICE, *_UPDATES, *_ROLLOUTS)
  found = planner.measured(file, price=2.0)
  assert found.utilization == pytest.approx(18e14 / 4 / 989e12)
  assert found.reach == pytest.approx(2e12 / 3352e9)
  assert found.price == 2.0
  assert "H100" in found.source


def test_a_share_that_was_not_measured_is_assumed(tmp_path):
  usual = planner.Assumptions()
  found = planner.measured(_results(tmp_path, _DEVICE, *_ROLLOUTS))
  assert found.reach == pytest.approx(2e12 / 3352e9)
  assert found.utilization == usual.utilization
  assert found.missing == "the products"
  found = planner.measured(_results(tmp_path, _DEVICE, *_UPDATES))
  assert found.utilization == pytest.approx(18e14 / 4 / 989e12)
  assert (found.reach, found.missing) == (usual.reach, "the memory")


def test_the_results_that_are_published_can_be_planned_with():
  file = pathlib.Path(__file__).parent.parent / "docs/results/h200.jsonl"
  found = planner.measured(file)
  assert 0.3 < found.reach < planner.Assumptions().reach


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([*_UPDATES, *_ROLLOUTS], "device of a known kind"),
        ([_DEVICE | {"device": "T4"}, *_UPDATES], "device of a known kind"),
        ([_DEVICE], "a rollout, of score or of gradient"),
    ],
)
def test_results_that_lack_something_are_refused(lines, text, tmp_path):
  with pytest.raises(UserError, match=text):
    planner.measured(_results(tmp_path, *lines))


def test_a_file_that_holds_no_results_is_refused(tmp_path):
  for name, content in (("a", "no json"), ("b", "[1]"), ("c", None)):
    file = tmp_path / name
    if content is not None:
      file.write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
      planner.measured(file)


def test_a_plan_decodes_up_to_the_cap_and_no_further(models):
  made = toys.run_config(*models)
  plan = programs.build(made, jax.devices()[:1])
  steps = 8  # Of a segment on a CPU.
  for cap, segments in ((1, 0), (2, 1), (8, 1)):
    found = {stage.name: stage for stage in plan.stages(cap)}
    assert found["decode"].times == segments if segments else (
        "decode" not in found
    )
  made = dataclasses.replace(
      made, method="full", rollout=RolloutSpec(per_prompt=2, max_len=40)
  )
  plan = programs.build(made, jax.devices()[:1])
  (decode,) = (s for s in plan.stages(40) if s.name == "decode")
  assert decode.times == 5
  assert decode.variant.arguments["steps"] == steps


def test_evaluations_are_counted_as_the_run_makes_them():
  sets = {
      "aime24": evaluator.SETS["aime24"],  # 30 problems, 16 samples.
      "own": DatasetSpec("math_task", answer="answer", size=10, samples=3),
  }
  spec = EvaluationSpec(sets, every=2, between=("own",))
  made = config(steps=7, evaluation=spec)
  # Before the first update, after 2, 4 and 6; after 7 all, and the teacher's.
  assert list(planner.evaluations(made)) == [
      ("student", ("own",), 4),
      ("student", ("aime24", "own"), 1),
      ("teacher", ("aime24", "own"), 1),
  ]
  # A greedy answer each beside the samples.
  assert planner.num_answers(spec, ("own",)) == 40
  assert planner.num_answers(spec, ("aime24", "own")) == 30 * 17 + 40
  quiet = dataclasses.replace(spec, every=0, between=(), teacher=False)
  assert list(planner.evaluations(config(steps=7, evaluation=quiet))) == [
      ("student", ("aime24", "own"), 1),
      ("student", ("aime24", "own"), 1),
  ]


def test_a_device_takes_as_many_rows_as_its_memory_holds(models):
  rollout = RolloutSpec(per_prompt=2, max_len=8)
  made = toys.run_config(*models)
  made = dataclasses.replace(
      made,
      rollout=rollout,
      evaluation=dataclasses.replace(made.evaluation, batch_size=0),
      data=dataclasses.replace(made.data, batch_size=64),
  )

  def look(made, memory):
    plan = programs.build(made, jax.devices()[:1], memory)
    (decode,) = (s for s in plan.stages(8) if s.name == "decode")
    prefill = next(s for s in plan.stages(8) if s.name == "prefill")
    assert decode.rows * prefill.times == 128
    return plan, decode, plan.evaluation()[-1]

  plan, whole, evaluate = look(made, None)
  assert (whole.rows, evaluate.rows) == (128, 64)
  layout, state = (whole.variant.arguments[n] for n in ("params", "state"))
  held = sharding.bytes_per_device([plan.programs.resting(), layout])
  cache = sharding.bytes_per_device(state.cache.layers) / whole.rows
  before = 0
  for wanted in (8, 32, 128):
    memory = (held + 2 * wanted * cache) / 0.96
    plan, decode, evaluate = look(made, memory)
    assert before < decode.rows < 2 * wanted
    before = decode.rows
    for stage in (decode, evaluate):
      found = programs.measure(programs.Job(plan, stage, 8), GPU)
      assert found.memory <= memory
  _, least, evaluate = look(made, 1.0)  # A prompt at a time is the least.
  assert (least.rows, evaluate.rows) == (2, 1)
  given = dataclasses.replace(rollout, batch_tokens=3 * (96 + 8))
  made = dataclasses.replace(made, rollout=given)
  assert look(made, memory)[1].rows == 2


def test_the_compilers_refusal_is_read():
  text = (
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory"
      " in memory space hbm. Used 26.90G of 15.75G hbm. Exceeded hbm capacity"
  )
  assert programs._refusal(text) == {
      "refused": "needs 26.9 of 15.75 GiB",
      "memory": 26.9 * 2**30,
  }
  text = (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
      " for HLO temporaries (2.45T) exceeds available HBM (15.75G)."
  )
  assert programs._refusal(text)["refused"] == "needs 2508.8 of 15.75 GiB"
  assert programs._refusal("something\n  else") == {
      "refused": "something else"
  }


def test_a_gpus_verdict_is_a_budget_and_a_tpus_the_compilers():
  gib = 2**30
  gpu, tpu = programs.parse_machine("h100:8"), programs.parse_machine("v5e:4x4")
  assert measured(memory=71 * gib).verdict(gpu)
  assert not measured(memory=72 * gib).verdict(gpu)
  assert measured(memory=17 * gib).verdict(tpu)
  assert not measured(refused="needs 17 of 15.75 GiB").verdict(tpu)


def _result(price: float = 0.0) -> planner.Result:
  """Ten updates of 1 to 10 hours, and 5 hours of evaluation, on 8 devices."""
  return planner.Result(
      programs.parse_machine("h100:8"),
      {},
      [],
      {},
      [],
      [],
      [],
      {},
      {},
      {"student, 30 answers": 5.0},
      [3600.0 * hours for hours in range(1, 11)],
      4,
      0.0,
      [],
      Assumptions(price=price),
  )


@pytest.mark.parametrize(
    "hours, updates", [(4, 0), (6, 1), (8, 2), (59.9, 9), (60, 10), (1000, 10)]
)
def test_a_budget_pays_for_updates_after_the_evaluations(hours, updates):
  assert _result().affordable(hours) == updates


def test_a_plan_says_how_a_run_is_cut_and_what_a_kill_costs():
  cut, given_up, kill = planner.turns(_result(), 24, 30, 0)
  assert "60.0 h into 3 turns" in cut
  assert "36,000 s" in given_up and "30 s" in given_up
  # Updates 5 to 8 are the longest way from one checkpoint to the next.
  assert "up to 26.0 h:" in kill


def test_a_plan_says_if_most_of_the_time_is_evaluation():
  result = dataclasses.replace(_result(), evaluation={"student": 56.0})
  said, *_ = planner.turns(result, 0, 40_000, 0)
  assert "Evaluation takes 56.0 of 111.0 h" in said
  assert "evaluation.every" in said


def test_a_set_whose_size_is_not_known_is_refused_before_the_work(
    models, stand_ins
):
  made = toys.run_config(*models)
  own = DatasetSpec("no.jsonl", answer="answer")
  spec = dataclasses.replace(made.evaluation, sets={"own": own})
  with pytest.raises(UserError) as error:
    planned(dataclasses.replace(made, evaluation=spec))
  sentence = str(error.value)
  assert sentence.startswith("The file no.jsonl does not exist")
  assert sentence.endswith("set evaluation.sets.own.size.")
  assert not stand_ins


def test_a_long_enough_limit_and_notice_cut_nothing():
  ends, kill = planner.turns(_result(), 61, 40_000, 0)
  assert ends == "It ends within a time limit of 61 h."
  assert "every 4 updates" in kill


def test_a_budget_is_a_sum_if_there_is_a_price():
  *_, kill, paid = planner.turns(_result(price=2.0), 0, 40_000, 16 * 15)
  assert "up to 26.0 h (416)" in kill
  assert paid == (
      "240 pays for 4 of 10 updates, evaluation included: --config.steps=4."
  )
  *_, paid = planner.turns(_result(), 0, 40_000, 60)
  assert paid == "60 h pays for 10 of 10 updates, evaluation included."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  return (
      toys.write_model(root / "student", 0, "capable"),
      toys.write_model(root / "teacher", 1, "teacher"),
  )


def test_a_plan_looks_at_evaluation_with_rows_as_long_as_they_get(models):
  made = toys.run_config(*models)
  plan = programs.build(made, jax.devices()[:1])
  names = [job.stage.name for job in programs.jobs(plan, (8,))]
  assert names == [
      "layout",
      "apply",
      "score",
      "prefill",
      "evaluate",
      "evaluate teacher",
      "decode",
      "gradient",
  ]
  spec = made.evaluation
  for stage in plan.evaluation():
    assert stage.rows == spec.batch_size
    columns = made.data.max_prompt_len + spec.max_len
    assert stage.columns == columns
    # A row draws its first token when its prompt is read.
    steps = stage.variant.arguments["steps"]
    assert 0 <= stage.times * steps - (spec.max_len - 1) < steps
  beside = plan.beside(plan.evaluation()[0])
  assert {"student", "teacher", "moments"} <= set(beside)
  quiet = dataclasses.replace(spec, teacher=False)
  plan = programs.build(
      dataclasses.replace(made, evaluation=quiet), jax.devices()[:1]
  )
  assert [stage.name for stage in plan.evaluation()] == ["evaluate"]


@dataclasses.dataclass
class Memory:
  """In place of `programs.Look`: a formula says what a program takes."""

  rows: Callable[[Config], int]
  needs: Callable[[Config, int], float]  # GiB, of a config and its rows.
  machine: programs.Machine = programs.parse_machine("h100:8")
  measured: list = dataclasses.field(default_factory=list)

  def job(self, config, name, bucket):
    return Job(config, name, bucket, self.rows(config))

  def measure(self, job):
    memory = 2**30 * self.needs(job.config, job.rows)
    self.measured.append(job)
    return Measured(job.name, job.bucket, 1, job.rows, 0.0, 0.0, memory=memory)


@dataclasses.dataclass
class Job:
  """In place of `programs.Job`."""

  config: Config
  name: str
  bucket: int
  rows: int


def found(memory, made, name, largest=False):
  broken = [memory.measure(memory.job(made, name, 256))]
  return planner.search(memory, planner.Found(made), broken, largest)


def by_tokens(part: str):
  """As many rows of 512 tokens as a limit allows, and one a device."""
  return lambda c: max(getattr(c, part).batch_tokens // 512, 8)


@pytest.fixture
def large(models):
  made = toys.run_config(*models)
  return dataclasses.replace(
      made,
      mesh=MeshSpec(1, 8, 1),
      optimizer=dataclasses.replace(made.optimizer, batch_tokens=2**19),
      rollout=dataclasses.replace(made.rollout, batch_tokens=2**19),
  )


def test_smaller_batches_come_before_all_else(large):
  memory = Memory(by_tokens("optimizer"), lambda c, rows: 10 + rows / 4)
  (flags,) = planner.advice(large, found(memory, large, "gradient"))
  # 71 GiB hold 244 rows; 1024 were asked for.
  assert flags == "--config.optimizer.batch_tokens=65536"


def test_the_largest_batch_is_found_if_asked_for(large):
  memory = Memory(by_tokens("rollout"), lambda c, rows: rows / 64)
  (flags,) = planner.advice(large, found(memory, large, "decode", largest=True))
  assert flags == "--config.rollout.batch_tokens=2097152"


def test_then_the_host_keeps_what_it_can_and_then_shards_split_a_row(large):
  def needs(config, rows):
    moments = 0 if config.optimizer.offload else 20
    return moments + 130 / config.mesh.tensor + rows / 64

  memory = Memory(by_tokens("optimizer"), needs)
  (flags,) = planner.advice(large, found(memory, large, "gradient"))
  # 130 GiB a row: 65 with two shards, and nothing for the moments.
  assert set(flags.split()) == {
      "--config.mesh.fsdp=4",
      "--config.mesh.tensor=2",
      "--config.mesh.sampling_tensor=1",
      "--config.optimizer.offload=True",
      "--config.student.remat=offload",
      "--config.optimizer.batch_tokens=131072",
  }


def test_before_a_row_is_split_the_layers_inputs_go_to_the_host(large):
  kept = {"none": 90, "full": 75, "offload": 30}
  memory = Memory(
      by_tokens("optimizer"), lambda c, rows: kept[c.student.remat] + rows / 64
  )
  (flags,) = planner.advice(large, found(memory, large, "gradient"))
  assert set(flags.split()) == {
      "--config.student.remat=offload",
      "--config.optimizer.offload=True",
  }
  kept["full"] = 60
  (flags,) = planner.advice(large, found(memory, large, "gradient"))
  assert "--config.student.remat=full" in flags
  assert "offload" not in flags


def test_sampling_gets_shards_of_its_own(large):
  memory = Memory(
      by_tokens("rollout"),
      lambda c, rows: 90 / (c.mesh.sampling_tensor or c.mesh.tensor),
  )
  (flags,) = planner.advice(large, found(memory, large, "decode"))
  assert "--config.mesh.sampling_tensor=2" in flags
  assert "mesh.tensor" not in flags


def test_what_fits_with_nothing_is_said(large):
  memory = Memory(by_tokens("optimizer"), lambda c, rows: 1000)
  result = found(memory, large, "gradient")
  assert result.config == large
  (sentence,) = planner.advice(large, result)
  assert "gradient at P = 256 does not fit" in sentence
  assert "use more devices" in sentence


def test_nothing_is_measured_twice(large):
  memory = Memory(by_tokens("optimizer"), lambda c, rows: 1000)
  found(memory, large, "gradient")
  seen = []
  for job in memory.measured:
    # Below 2**12 tokens there are eight rows, whatever the limit.
    spec = dataclasses.replace(job.config.optimizer, batch_tokens=0)
    asked = dataclasses.replace(job.config, optimizer=spec), job.rows
    assert asked not in seen
    seen.append(asked)


@pytest.fixture(scope="module")
def audits():
  process = toys.start("audited.py", devices=8)
  (printed,) = toys.finish([process], seconds=400)
  lines = map(json.loads, printed.strip().splitlines())
  names = ("8x1x1", "1x8x1", "two meshes", "2x2x2", "faulty", "draw")
  return dict(zip(names, lines, strict=True))


@pytest.mark.parametrize("mesh", ["8x1x1", "1x8x1", "two meshes", "2x2x2"])
def test_no_collective_is_unplanned(audits, mesh):
  programs = {k: v for k, v in audits[mesh].items() if k != "least"}
  moved = programs.pop("move", None)
  assert set(programs) == {
      "prefill",
      "layout",
      "decode",
      "score",
      "gradient",
      "apply",
  }
  assert [one["unplanned"] for one in programs.values()] == [[]] * 6
  assert (moved is None) == (mesh != "two meshes")


def test_weights_that_change_the_mesh_are_exchanged_and_never_gathered(audits):
  moved = audits["two meshes"]["move"]
  assert list(moved["sent"]) == ["all-to-all over tensor"]
  assert not moved["unplanned"]


def test_the_audit_finds_a_program_that_is_left_to_the_partitioner(audits):
  # Tables and activations come over axes that split neither of them.
  for name in ("score", "gradient"):
    sentences = audits["faulty"][name]["unplanned"]
    assert any("which nothing plans" in one for one in sentences), name


def test_a_draw_gathers_sums_of_a_split_vocabulary_and_reads_one_block(audits):
  # Once each: these wait for the network at every token.
  assert audits["draw"] == ["all-gather", "all-reduce"]


@pytest.mark.parametrize("mesh", ["8x1x1", "1x8x1"])
def test_a_gradient_sends_the_least_that_its_sharding_allows(audits, mesh):
  # Layers gathered twice, the head once, gradients scattered once. Beside that
  # travel what is looked up of the embeddings, and the numbers of the tokens,
  # which only toys notice.
  sent = sum(
      total
      for name, total in audits[mesh]["gradient"]["sent"].items()
      if not name.startswith("all-to-all")
  )
  assert sent == pytest.approx(audits[mesh]["least"], rel=0.1)


def test_weights_are_gathered_once_a_rollout(audits):
  # Not once a token: what a decode sends are counters.
  found = audits["1x8x1"]
  assert found["layout"]["sent"]["all-gather over fsdp"] > 50_000
  assert sum(found["decode"]["sent"].values()) < 100


@pytest.fixture
def stand_ins(monkeypatch):
  """The CPU in place of all devices; programs are traced and not compiled."""
  monkeypatch.setattr(
      programs, "devices", lambda machine: jax.devices()[: machine.size]
  )
  seen = []

  def traced(job, machine):
    del machine
    seen.append(job)
    known = programs.reckon(job.stage, job.bucket)
    return dataclasses.replace(known, memory=1.0)

  monkeypatch.setattr(programs, "measure", traced)
  return seen


def planned(made, machine: str = "h100:1") -> planner.Result:
  question = planner.Question(made, programs.parse_machine(machine))
  return planner.plan(question, rich.console.Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "machine, mesh, note",
    [
        ("h100:1", {"data": 1, "fsdp": 1, "tensor": 1}, "the config's"),
        ("h100:8", {"data": 1, "fsdp": 8, "tensor": 1}, "the config's"),
        # Hosts of GPUs are replicas, if one holds the weights.
        ("h100:16", {"data": 2, "fsdp": 8, "tensor": 1}, "chosen"),
    ],
)
def test_an_fsdp_axis_of_all_devices_fills_the_machine(
    large, machine, mesh, note
):
  made = dataclasses.replace(
      large,
      mesh=MeshSpec(data=1, fsdp=-1),
      data=dataclasses.replace(large.data, batch_size=16),
  )
  question = planner.Question(made, programs.parse_machine(machine))
  found, said = planner._choose_mesh(question)
  assert found.mesh == MeshSpec(*mesh.values())
  assert said.startswith(f"Mesh: {note}")


def test_a_plan_of_a_mesh_that_takes_all_devices(models, stand_ins):
  made = toys.run_config(*models, mesh=MeshSpec(data=1, fsdp=-1))
  result = planned(made)
  assert result.fits and result.notes == ["Mesh: the config's."]
  assert result.mesh == {"data": 1, "fsdp": 1, "tensor": 1}
  assert len(result.each) == made.steps and result.total_hours > 0
  assert not result.answers
  # The student before and after the updates, eight problems each time.
  assert [*result.evaluation] == [
      "student, 2 x 8 answers",
      "teacher, 8 answers",
  ]
  assert len(stand_ins) == len(result.programs) == 8


def test_a_plan_counts_the_answers_that_evaluations_score(models, stand_ins):
  made = toys.run_config(*models)
  rows = made.data.batch_size * made.rollout.per_prompt
  spec = dataclasses.replace(made.evaluation, scored=rows + 1, max_len=8)
  big = {
      name: dataclasses.replace(one, size=2 * rows)
      for name, one in spec.sets.items()
  }
  spec = dataclasses.replace(spec, sets=big)
  result = planned(dataclasses.replace(made, evaluation=spec))
  (name,) = (x for x in result.evaluation if "scored" in x)
  assert name == f"student, {2 * (rows + 1)} answers scored"
  job = next(x for x in stand_ins if x.stage.name == programs.SCORING)
  plan = job.plan
  (stage,) = plan.scoring()
  assert stage.times * stage.rows == rows and job.bucket == spec.max_len
  # A whole batch for the last answer too, before and after the updates.
  reckoner = planner._Reckoner(
      plan,
      result.programs,
      planner.Question(made, programs.parse_machine("h100:1")),
  )
  once = reckoner._run(stage, spec.max_len)[0]
  assert result.evaluation[name] == pytest.approx(2 * 2 * once / 3600)
  # The program takes both models' weights; the moments lie beside.
  beside = plan.beside(stage)
  assert {n for n, x in beside.items() if jax.tree.leaves(x)} == {"moments"}
  # Both models read the answers: about twice what the teacher alone takes.
  score = next(x for x in plan.stages(spec.max_len) if x.name == "score")
  ratio = (
      programs.reckon(stage, spec.max_len).flops
      / programs.reckon(score, spec.max_len).flops
  )
  assert 1.5 < ratio * score.rows / stage.rows < 2.5


def test_a_plan_of_seqkd_is_of_the_teachers_answers_and_then_without_it(
    models, stand_ins
):
  rollout = RolloutSpec(per_prompt=1, max_len=24)
  made = toys.run_config(*models, method="seqkd", rollout=rollout)
  result = planned(made)
  assert [(one.name, one.bucket) for one in result.programs] == [
      ("apply", 24),
      ("evaluate", 12),
      ("answer", 24),
      ("gradient", 24),
  ]
  assert set(result.held) == {"student", "moments"}
  assert any("is gone while the student learns" in x for x in result.notes)
  # Three updates of eight prompts, of which there are 200.
  ((name, hours),) = result.answers.items()
  assert name == "The teacher's 24 answers" and hours > 0
  assert [*result.hours] == ["This run's updates"]
  assert [name.split(",")[0] for name in result.evaluation] == ["student"]
  parts = (result.hours, result.answers, result.evaluation)
  whole = sum(sum(one.values()) for one in parts)
  assert result.total_hours == pytest.approx(whole)
  # What lies beside: the teacher alone; then the student and its moments.
  for job in stand_ins:
    wanted = {
        "apply": {"student"},
        "answer": {"teacher"},
        "evaluate": {"student", "moments"},
        "gradient": {"moments"},
    }[job.stage.name]
    beside = job.plan.beside(job.stage)
    assert {name for name, x in beside.items() if jax.tree.leaves(x)} <= wanted
    if job.stage.name == "gradient":  # Of given answers; nothing scores them.
      inputs = job.stage.variant.arguments["inputs"]
      assert inputs.rollout.tokens.shape == (8, 24) and inputs.scores is None
  few = dataclasses.replace(made.data.train, size=5)
  data = dataclasses.replace(made.data, train=few)
  result = planned(dataclasses.replace(made, data=data))
  assert [*result.answers] == ["The teacher's 5 answers"]


def test_a_plan_without_evaluation_sets_scores_nothing(models, stand_ins):
  made = toys.run_config(*models)
  spec = dataclasses.replace(made.evaluation, scored=3, sets={})
  assert not planned(dataclasses.replace(made, evaluation=spec)).evaluation


def test_a_plan_of_seqkd_scores_answers_as_full_distillation_does(
    models, stand_ins
):
  found = {}
  for method in ("full", "seqkd"):
    rollout = RolloutSpec(per_prompt=1, max_len=24)
    made = toys.run_config(*models, method=method, rollout=rollout)
    spec = dataclasses.replace(made.evaluation, scored=3)
    result = planned(dataclasses.replace(made, evaluation=spec))
    found[method] = result.evaluation["student, 6 answers scored"]
  assert found["seqkd"] == pytest.approx(found["full"]) and found["full"] > 0
  # The weights of both are read, and the moments stay.
  mine, theirs = (x for x in stand_ins if x.stage.name == programs.SCORING)
  assert mine.stage.rows == theirs.stage.rows
  assert jax.tree.leaves(theirs.plan.beside(theirs.stage)["moments"])


def test_a_model_that_cannot_be_downloaded_can_be_a_config(
    monkeypatch, tmp_path
):
  def unreachable(*_, **__):
    raise OSError("no network")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
  assert programs.architecture("Qwen/Qwen3-8B-Base") == (LARGE, False)
  with pytest.raises(UserError) as error:
    programs.architecture("someone/model")
  sentence = str(error.value)
  assert "someone/model is neither a directory here" in sentence
  assert sentence.endswith(
      "or put its config.json, all that a plan reads of a model, into a"
      " directory, and give that."
  )
  source = assets.path("teacher") / "config.json"
  (tmp_path / "config.json").write_text(source.read_text())
  found, was_read = programs.architecture(str(tmp_path))
  assert was_read and found == hf.read_config("bundled:teacher")


@pytest.mark.aot
def test_every_recipe_at_full_size_is_planned_for_eight_devices():
  names = (
      "compression:qwen3-8b",
      "crosslingual:qwen3-1.7b",
      "relaxed:qwen3-1.7b",
      "mixed_policy:qwen3-1.7b",
      "math:qwen3-0.6b,method=seqkd",
  )
  process = toys.start("planned.py", *names, devices=1)
  (printed,) = toys.finish([process], seconds=3600)
  found = dict(zip(names, map(json.loads, printed.splitlines()), strict=True))
  for name, plan in found.items():
    assert plan["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}, name
    assert plan["rows"]["gradient"] >= 8 and plan["rows"]["evaluate"] >= 8
    assert bool(plan["answers"]) == ("seqkd" in name)
    for part in ("hours", "evaluation"):
      assert plan[part] and all(hours > 0 for hours in plan[part].values())
