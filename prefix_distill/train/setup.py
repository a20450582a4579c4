"""Everything that can fail, before anything expensive."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import os
import pathlib

import jax

from prefix_distill import config as config_lib
from prefix_distill import distributed
from prefix_distill import sharding
from prefix_distill.config import Config
from prefix_distill.config import ModelSpec
from prefix_distill.data import prompts
from prefix_distill.data import tokenizer as tokenizer_lib
from prefix_distill.data.prompts import PromptIterator
from prefix_distill.data.prompts import Rewriting
from prefix_distill.data.tokenizer import Tokenizer
from prefix_distill.distill import divergence
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill import prefix_schedule
from prefix_distill.distill.loss import Loss
from prefix_distill.errors import ConfigError
from prefix_distill.errors import shown
from prefix_distill.evaluate import evaluator
from prefix_distill.models import huggingface as hf
from prefix_distill.models import lora
from prefix_distill.models.config import ModelConfig
from prefix_distill.models.transformer import Model
from prefix_distill.models.transformer import Params
from prefix_distill.report import page
from prefix_distill.report import report
from prefix_distill.train import workdir as workdir_lib
from prefix_distill.train.workdir import Contents


@dataclasses.dataclass(frozen=True)
class Models:
  """The models of a run, and all else that its programs are built from.

  Neither weights nor data, so it can be made for devices that are not there.

  Attributes:
    config: the settings.
    mesh: the device mesh.
    student: the student's architecture.
    teacher: the teacher's; None for supervised training.
    num_tokens: how many token ids the tokenizer has.
    pad_id: fills the columns behind a prefix.
    special_ids: tokens such as `<think>` and the stop tokens.
    stop_ids: tokens that end the student's answers: those of both models, or
      with `loss.merge_stop_tokens` off the student's own.
    teacher_stop_ids: tokens that end the teacher's answers.
    memory: bytes of a device that programs may use; None for no limit.
  """

  config: Config
  mesh: jax.sharding.Mesh
  student: Model
  teacher: Model | None
  num_tokens: int
  pad_id: int = 0
  special_ids: tuple[int, ...] = ()
  stop_ids: tuple[int, ...] = ()
  teacher_stop_ids: tuple[int, ...] = ()
  memory: float | None = None

  @classmethod
  def of(
      cls,
      config: Config,
      mesh: jax.sharding.Mesh,
      student: Model,
      teacher: Model | None,
      tokenizers: Sequence[Tokenizer],
      memory: float | None,
  ) -> "Models":
    """Reads token ids from the tokenizers of the student and the teacher."""
    tokenizer = tokenizers[0]
    return cls(
        config,
        mesh,
        student,
        teacher,
        tokenizer.num_tokens,
        tokenizer.pad_id,
        tokenizer.special_ids,
        *stop_ids(config, tokenizers),
        memory,
    )

  @property
  def shares_weights(self) -> bool:
    """Whether the teacher's weights are those beside the student's adapters."""
    return self.teacher is not None and self.config.shares_weights

  @property
  def scoring(self) -> "Models":
    """The same models, as full distillation uses them to score answers."""
    config = dataclasses.replace(self.config, method="full")
    return dataclasses.replace(self, config=config)

  @property
  def sampling_mesh(self) -> jax.sharding.Mesh:
    """The mesh on which training and evaluation sample."""
    return sharding.sampling_mesh(self.mesh, self.config.mesh)

  def for_sampling(self, model: Model) -> Model:
    """Returns the student or the teacher on `sampling_mesh`."""
    return dataclasses.replace(model, mesh=self.sampling_mesh)

  @property
  def loss(self) -> Loss:
    """The loss; supervised training uses only its distribution."""
    config = self.config
    merge = config.loss.merge_stop_tokens and not config.is_supervised
    stop_ids = self.stop_ids if merge else ()
    return loss_lib.make(config, self.num_tokens, stop_ids)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a run needs besides weights.

  Attributes:
    models: what programs are built from.
    tokenizer: the student's tokenizer.
    data: whole batches, the same in all processes.
    problems: the evaluation sets.
    contents: fingerprints of all that it reads.
    rewriting: how the teacher rewrites; None if it does not.
    scoring: what scores answers of evaluations where `models` lacks the
      teacher; None if nothing does.
  """

  models: Models
  tokenizer: Tokenizer
  data: PromptIterator
  problems: dict[str, evaluator.Problems]
  contents: Contents
  rewriting: Rewriting | None = None
  scoring: Models | None = None


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a run reads besides weights, checked.

  Attributes:
    mesh: the device mesh.
    fed: the student and, if there is one, the teacher, with their tokenizers.
    student: the student's architecture.
    teacher: the teacher's; None for supervised training.
    data: whole batches.
    problems: the evaluation sets.
  """

  mesh: jax.sharding.Mesh
  fed: list[prompts.PromptReader]
  student: Model
  teacher: Model | None
  data: PromptIterator
  problems: dict[str, evaluator.Problems]


def check_batches(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError unless all batches split evenly over the meshes."""
  sampling = sharding.sampling_mesh(mesh, config.mesh)
  for one in (mesh, sampling):
    sharding.check_batch("data.batch_size", config.data.batch_size, one)
  rows = config.evaluation.batch_size
  sharding.check_batch("evaluation.batch_size", rows, sampling)


def _check_weights(spec: ModelSpec, model: Model) -> None:
  if not spec.random_init:
    hf.check_weights(spec.path, model.base.config)


def make_model(
    architecture: ModelConfig, spec: ModelSpec, mesh: jax.sharding.Mesh
) -> Model:
  """Makes a model that computes in what the settings and all devices allow."""
  dtype = spec.compute_dtype
  lacking = sharding.first_without(sharding.has_bfloat16, mesh)
  if dtype == "bfloat16" and lacking is not None:
    dtype = "float32"
  return Model(architecture, dtype, spec.remat, mesh)


def _dtype_note(
    config: Config,
    mesh: jax.sharding.Mesh,
    student: Model,
    teacher: Model | None,
) -> str:
  """Returns a sentence if a model does not compute in what was asked for."""
  pairs = {
      "student": (config.student, student),
      "teacher": (config.teacher, teacher),
  }
  names = [
      f"{role}.compute_dtype"
      for role, (spec, model) in pairs.items()
      if model is not None and model.compute_dtype != spec.compute_dtype
  ]
  if not names:
    return ""
  device = sharding.first_without(sharding.has_bfloat16, mesh)
  return (
      f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} 'bfloat16',"
      f" which {sharding.describe_device(device)} lacks; float32 is used"
      " instead."
  )


def same_model_note(config: Config) -> str:
  """Returns a warning if student and teacher compute the same."""
  if (
      config.teacher is None
      or config.is_supervised
      or config.rollout.source == "rewrite"
      or config.data.teacher_prompt
      or config.lora.path
      or config.teacher.path.rstrip("/") != config.student.path.rstrip("/")
      or config.teacher.random_init != config.student.random_init
  ):
    return ""
  return (
      f"Student and teacher are the same model, {config.student.path}, and read"
      " the same prompts, so they agree and hardly anything is learned; set"
      " teacher.path to a better model, or data.teacher_prompt so that the"
      " teacher reads more than the student."
  )


def check_refresh(
    config: Config, student: ModelConfig, teacher: ModelConfig
) -> None:
  """Refuses to copy a student's weights into another architecture.

  How many positions a model's config.json allows may differ.

  Raises:
    ConfigError: the two differ in something else.
  """
  if not config.teacher.refresh:
    return
  for field in dataclasses.fields(ModelConfig):
    mine, theirs = (getattr(x, field.name) for x in (student, teacher))
    if field.name != "max_length" and mine != theirs:
      raise ConfigError(
          f"teacher.refresh is {config.teacher.refresh}, but {field.name} is"
          f" {shown(mine)} in the student {config.student.path} and"
          f" {shown(theirs)} in the teacher {config.teacher.path}; set"
          " teacher.path to a model of the student's architecture, or"
          " teacher.refresh to 0."
      )


def _check_lengths(
    config: Config, student: Model, teacher: Model | None
) -> None:
  needed = config.data.max_prompt_len + max(
      prefix_schedule.longest(config), config.evaluation.max_len
  )
  if needed > student.config.max_length:
    raise ConfigError(
        f"data.max_prompt_len {config.data.max_prompt_len} plus the longest"
        f" answer (rollout.max_len {config.rollout.max_len},"
        f" evaluation.max_len {config.evaluation.max_len}) is {needed}, which"
        f" is more than the {student.config.max_length} positions of"
        f" {config.student.path}; lower one of the three."
    )
  if teacher is None:
    return
  prompt = config.data.teacher_prompt_len
  prefix = prefix_schedule.longest(config)
  if prompt + prefix > teacher.config.max_length:
    raise ConfigError(
        f"The teacher's prompt of up to {prompt} tokens plus the longest prefix"
        f" of {prefix} is {prompt + prefix}, which is more than the"
        f" {teacher.config.max_length} positions of {config.teacher.path};"
        " lower data.max_teacher_prompt_len (or data.max_prompt_len),"
        " rollout.max_len or the prefix's cap."
    )
  if config.rollout.source == "rewrite":
    _check_rewriting_lengths(config, student, teacher)


def _check_rewriting_lengths(
    config: Config, student: Model, teacher: Model
) -> None:
  rollout, spec = config.rollout, config.rollout.rewrite
  needed = config.data.max_prompt_len + rollout.draft_len
  if needed > student.config.max_length:
    raise ConfigError(
        f"rollout.rewrite.max_draft_len is {spec.max_draft_len}, so that the"
        f" student's answers may have {rollout.draft_len} tokens, which with"
        f" data.max_prompt_len {config.data.max_prompt_len} is {needed}, more"
        f" than the {student.config.max_length} positions of"
        f" {config.student.path}; lower it."
    )
  answer = rollout.rewriting_len
  if spec.scored_in == "rewriting":
    answer = max(answer, prefix_schedule.longest(config))
  needed = spec.max_prompt_len + answer
  if needed > teacher.config.max_length:
    raise ConfigError(
        f"rollout.rewrite.max_prompt_len {spec.max_prompt_len} plus the"
        f" longest rewriting of {answer} tokens is {needed}, which is more than"
        f" the {teacher.config.max_length} positions of {config.teacher.path};"
        " lower it, or rollout.rewrite.max_len."
    )


def _check_problems(
    config: Config,
    student: Model,
    problems: dict[str, evaluator.Problems],
    teacher: Model | None = None,
) -> None:
  """Checks sets that have a prompt length of their own.

  Args:
    config: the settings.
    student: its architecture.
    problems: the evaluation sets.
    teacher: the architecture of what scores answers; None if nothing does.

  Raises:
    ConfigError: a prompt and an answer have more tokens than a model can read.
  """
  readers = [(config.student, student)]
  if teacher is not None:
    readers.append((config.teacher, teacher))
  for name, found in problems.items():
    prompt, answer = found.batch.tokens.shape[1], config.evaluation.max_len
    for spec, model in readers:
      if prompt + answer > model.config.max_length:
        raise ConfigError(
            f"evaluation.sets.{name} has prompts of up to {prompt} tokens,"
            f" which with evaluation.max_len {answer} is {prompt + answer},"
            f" more than the {model.config.max_length} positions of"
            f" {spec.path}; lower evaluation.max_len or"
            f" evaluation.sets.{name}.max_prompt_len."
        )


def _check_same_everywhere(config: Config, workdir: pathlib.Path) -> None:
  """Checks that all processes were started alike.

  Raises:
    ConfigError: this one differs from process 0.
  """
  mine = config_lib.plain(config)
  mine |= {"workdir": str(workdir), "jax": jax.__version__}
  first = distributed.from_first("config", mine)
  if first != mine:
    name, theirs, ours = config_lib.first_difference(first, mine)
    raise ConfigError(
        f"{name} is {ours!r} in this process, and {theirs!r} in process 0;"
        " start all with the same command, but for --process_id."
    )


def _check_same_contents(contents: Contents) -> None:
  """Checks that all processes read the same.

  Raises:
    ConfigError: this one differs from process 0.
  """
  first = distributed.from_first("contents", contents)
  found = workdir_lib.contents_difference(first, contents)
  if found:
    raise ConfigError(
        f"Process 0 {found} in this process; give all hosts the same files."
    )


def check(config: Config, first: bool = False) -> Inputs:
  """Checks all settings and files against each other, but for weights.

  Nothing is written; see `workdir.claimed`.

  Args:
    config: the settings.
    first: whether the first training records are enough; then no data set of
      the hub is downloaded whole for them.

  Raises:
    UserError: one sentence that names what does not fit, and the mend.
  """
  mesh = sharding.make_mesh(config.mesh)
  check_batches(config, mesh)
  divergence.named(config.loss.exact.divergence)  # Or there is none.
  student, teacher = _read_models(config, mesh)
  if config.lora.path:
    lora.check_config(config.lora)
  if teacher is not None:
    check_refresh(config, student.config, teacher.config)
  fed = _load_tokenizers(config, student, teacher)
  _check_lengths(config, student, teacher)
  problems = {}
  if config.data.train.is_gym:  # Training leaves out what they ask.
    problems = _load_problems(config, fed[0].tokenizer)
  data = PromptIterator(
      config.data,
      fed[0].tokenizer,
      seed=config.seed,
      completion_len=config.rollout.max_len if config.reads_completions else 0,
      teacher_tokenizer=fed[-1].tokenizer if teacher else None,
      first=first,
      asked=[found.batch for found in problems.values()],
  )
  for suffix in data.suffixes:
    prompts.check(
        dataclasses.replace(config.data, suffix=suffix),
        data.question,
        *fed,
        teacher_question=data.teacher_question,
    )
  rewriting = rewriting_of(config, fed)
  if rewriting is not None:
    rewriting.check(data.suffixes)
  problems = problems or _load_problems(config, fed[0].tokenizer)
  scores = bool(config.evaluation.scored)
  _check_problems(config, student, problems, teacher if scores else None)
  return Inputs(mesh, fed, student, teacher, data, problems)


def read_evaluation(
    config: Config, mesh: jax.sharding.Mesh
) -> tuple[Model, Tokenizer, dict[str, evaluator.Problems]]:
  """Returns what an evaluation of the student reads besides weights, checked.

  Args:
    config: the settings; of the training prompts only the lengths and what
      stands around a prompt count.
    mesh: the device mesh.

  Returns:
    The architecture, its tokenizer and the evaluation sets.

  Raises:
    UserError: one sentence that names what does not fit, and the mend.
  """
  spec = config.student
  model = make_model(hf.read_config(spec.path), spec, mesh)
  tokenizer = tokenizer_lib.load(spec.tokenizer_path, config.data.system)
  problems = _load_problems(config, tokenizer)
  _check_problems(config, model, problems)
  _check_weights(spec, model)
  return model, tokenizer, problems


def _load_problems(
    config: Config, tokenizer: Tokenizer
) -> dict[str, evaluator.Problems]:
  return {
      name: evaluator.load_problems(
          name,
          spec,
          tokenizer,
          config.data.max_prompt_len,
          config.data.suffix,
      )
      for name, spec in config.evaluation.sets.items()
  }


def _read_models(
    config: Config, mesh: jax.sharding.Mesh
) -> tuple[Model, Model | None]:
  student = make_model(
      lora.adapted(hf.read_config(config.student.path), config),
      config.student,
      mesh,
  )
  if config.method == "sft":
    return student, None
  spec = config.teacher
  return student, make_model(hf.read_config(spec.path), spec, mesh)


def _load_tokenizers(
    config: Config, student: Model, teacher: Model | None
) -> list[prompts.PromptReader]:
  """Loads the tokenizers of the models that there are."""
  models = {"student": (config.student, student)}
  if teacher is not None:
    models["teacher"] = (config.teacher, teacher)
  fed = [
      prompts.PromptReader(
          role,
          tokenizer_lib.load(spec.tokenizer_path, config.data.system),
          model.config.vocab_size,
      )
      for role, (spec, model) in models.items()
  ]
  if teacher is not None:
    tokenizer_lib.check_same(*(model.tokenizer for model in fed))
  return fed


def stop_ids(
    config: Config, tokenizers: Sequence[Tokenizer]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns what ends the student's answers, and the teacher's.

  Args:
    config: the settings.
    tokenizers: the student's tokenizer and, if there is one, the teacher's.
  """
  tokenizer, *others = tokenizers
  if not others:
    return tokenizer.stop_ids, ()
  if not config.loss.merge_stop_tokens:
    return tokenizer.stop_ids, others[0].stop_ids
  either = tuple(sorted({*tokenizer.stop_ids, *others[0].stop_ids}))
  return either, either


def rewriting_of(
    config: Config, fed: Sequence[prompts.PromptReader]
) -> Rewriting | None:
  """Returns how the teacher rewrites the student's answers; None if never.

  Args:
    config: the settings.
    fed: the student and the teacher, with their tokenizers.
  """
  if config.rollout.source != "rewrite":
    return None
  tokenizers = [model.tokenizer for model in fed]
  return Rewriting(config, *tokenizers, *stop_ids(config, tokenizers))


def prepare(config: Config, workdir: str | os.PathLike[str]) -> Setup:
  """Checks everything that can fail, and opens the data.

  Weights come last, since a hub model's are downloaded for that.

  Raises:
    UserError: one sentence that names what does not fit, and the mend.
  """
  workdir = pathlib.Path(workdir)
  _check_same_everywhere(config, workdir)
  inputs = check(config)
  mesh, student, teacher = inputs.mesh, inputs.student, inputs.teacher
  data, tokenizers = inputs.data, [model.tokenizer for model in inputs.fed]
  _check_weights(config.student, student)
  if config.lora.path:
    lora.check_weights(config.lora.path, student)
  if teacher is not None:
    _check_weights(config.teacher, teacher)
  contents = workdir_lib.read_contents(config, data.records, inputs.problems)
  _check_same_contents(contents)
  distributed.wait("setup")  # Nothing is written unless all could get so far.
  if jax.process_index() == 0:
    note = _dtype_note(config, mesh, student, teacher)
    for sentence in filter(None, [note, same_model_note(config), *data.notes]):
      print(f"Warning: {sentence}", flush=True)
  memory = distributed.from_first("memory", sharding.memory(mesh))
  models = Models.of(config, mesh, student, teacher, tokenizers, memory)
  return Setup(
      models,
      tokenizers[0],
      data,
      inputs.problems,
      contents,
      rewriting_of(config, inputs.fed),
  )


def export_student(
    config: Config,
    params: Params,
    stop_ids: tuple[int, ...],
    directory: pathlib.Path,
    workdir: pathlib.Path,
    step: int,
) -> None:
  """Writes the student as a Hugging Face model that ends as in the run.

  Args:
    config: the settings.
    params: the student's weights, adapters included.
    stop_ids: tokens that end the student's answers.
    directory: where to; it appears whole or not at all. Adapters are merged
      there, and before that written alone to a directory beside it.
    workdir: of the run, whose results go into the model card.
    step: the update after which the weights are.
  """
  lines = report.read_metrics(workdir / "metrics.jsonl")
  licence = page.licence(hf.resolve(config.student.path))
  stored_like, spec = config.teacher or config.student, config.evaluation
  weights, adapters = lora.split(params)
  if config.lora.rank:
    beside = page.adapter_directory(directory)
    lora.export(adapters, config.lora, config.student.path, beside)
  hf.export(
      weights,
      config.student.path,
      config.student.tokenizer_path,
      directory,
      hf.export_dtype(config.export.dtype, stored_like.path),
      hf.Serving(stop_ids, spec.temperature, spec.top_k, spec.top_p),
      page.card(config, lines, step, licence),
      adapters,
      config.lora.scale,
  )


def load_model(
    spec: ModelSpec,
    model: Model,
    mesh: jax.sharding.Mesh,
    seed: int,
    poll: Callable[[], None] = lambda: None,
) -> Params:
  """Loads weights into their shards, or draws random ones there.

  Args:
    spec: where they are, and where they go.
    model: the architecture, whose adapters do not count.
    mesh: the device mesh.
    seed: of random weights.
    poll: see `hf.load_params`.
  """
  model = model.base
  shardings = sharding.param_shardings(model.abstract_params(), mesh)
  if spec.offload:
    shardings = sharding.on_host(shardings)
  if spec.random_init:

    def init(key: jax.Array) -> Params:
      drawn = model.init(key)
      return jax.tree.map(lambda x: x.astype(spec.param_dtype), drawn)

    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
  return hf.load_params(
      spec.path, model, shardings, spec.param_dtype, poll
  )


def load_adapters(config: Config, model: Model) -> Params:
  """Loads the adapters of `lora.path`, or draws A at random with B zero."""

  def init(key: jax.Array) -> Params:
    return lora.split(model.init(key))[1]

  key = jax.random.key(config.seed)
  places = sharding.param_shardings(jax.eval_shape(init, key), model.mesh)
  if config.lora.path:
    return lora.load(config.lora.path, model, places)
  return jax.jit(init, out_shardings=places)(key)
