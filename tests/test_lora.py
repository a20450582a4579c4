"""LoRA: adapters beside a frozen student, from the first logits to the export.

A dense reference in float64 merges them by hand; runs share one copy of the
weights, resume exactly, and leave what PEFT reads.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toys

from prefix_distill import config as config_lib
from prefix_distill import model_commands
from prefix_distill import sharding
from prefix_distill.config import CheckpointSpec
from prefix_distill.config import LoraSpec
from prefix_distill.config import MeshSpec
from prefix_distill.config import ModelSpec
from prefix_distill.config import OptimizerSpec
from prefix_distill.distill import loss as loss_lib
from prefix_distill.distill.loss import ExactLoss
from prefix_distill.distill.loss import SampledLoss
from prefix_distill.errors import ConfigError
from prefix_distill.errors import UserError
from prefix_distill.models import huggingface as hf
from prefix_distill.models import lora
from prefix_distill.models.config import Lora
from prefix_distill.models.config import num_adapters
from prefix_distill.models.config import num_params
from prefix_distill.models.config import PRODUCTS
from prefix_distill.models.config import QWEN3_1_7B
from prefix_distill.models.transformer import Model
from prefix_distill.plan import cost
from prefix_distill.plan import planner
from prefix_distill.plan import programs as plan_programs
from prefix_distill.report import flops
from prefix_distill.report import page
from prefix_distill.report import report
from prefix_distill.rollout import generate
from prefix_distill.train import loop
from prefix_distill.train import setup as setup_lib
from prefix_distill.train import step as step_lib

_GOLDEN = pathlib.Path(__file__).parent / "golden"
_NAMES = ("qwen3", "qwen2", "llama3_rope", "smollm3")
_ONE = sharding.make_mesh(MeshSpec(), jax.devices()[:1])
_SPEC = LoraSpec(3, alpha=6.0)
_LENGTHS, _COLUMNS = [1, 3, 6, 2], 6
PROMPTS, ROLLOUT = toys.prompts(4), toys.rollout(_LENGTHS, _COLUMNS)


def _trained(params, seed=1):
  """Returns the same tree with adapters that change something."""
  base, adapters = lora.split(params)
  rng = np.random.default_rng(seed)
  drawn = jax.tree.map(
      lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32),
      adapters,
  )
  return lora.join(base, drawn)


def _toy(rank=3, scale=2.0, targets=Lora.targets, **changes):
  """Returns a toy student, and weights whose adapters act."""
  found = Lora(rank, scale, targets)
  model, params = toys.model(lora=found, **changes)
  return model, _trained(params)


def _golden(name):
  """Returns a model of a family with adapters that act, and its directory."""
  source, spec = str(_GOLDEN / name), LoraSpec(2, alpha=3.0)
  config = toys.run_config(source, source, lora=spec)
  model = Model(lora.adapted(hf.read_config(source), config), mesh=_ONE)
  base = setup_lib.load_model(config.student, model, _ONE, 0)
  adapters = setup_lib.load_adapters(config, model)
  return model, _trained(lora.join(base, adapters)), source, spec


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, mask):
  return model.logits(params, model.apply(params, tokens, mask))


@functools.partial(jax.jit, static_argnums=0)
def _sampled(model, params):
  settings = generate.SamplerConfig(toys.STOPS, toys.PAD, toys.NUM_TOKENS)
  return generate.sample(
      model,
      settings,
      8,
      params,
      PROMPTS,
      jax.random.key(3),
      generate.Draw.of(8),
  )


def _merged(params, scale):
  """Returns dense weights of the base's shapes."""
  base, adapters = lora.split(params)
  layers = {}
  for part, weights in base["layers"].items():
    layers[part] = dict(weights)
    for name in weights:
      a, b = (
          adapters["layers"].get(part, {}).get(f"{name}_{x}") for x in "ab"
      )
      if a is None:
        continue
      count, rank = a.shape[:2]
      change = b.reshape(count, -1, rank) @ a.reshape(count, rank, -1)
      weight = weights[name]
      layers[part][name] = weight + scale * change.reshape(weight.shape)
  return base | {"layers": layers}


@pytest.mark.parametrize(
    "family, tied", [("qwen3", True), ("qwen2", False), ("llama", False)]
)
def test_the_student_begins_as_its_base(family, tied):
  changes = {"family": family, "tied": tied}
  plain, weights = toys.model(**changes)
  model, params = toys.model(lora=Lora(4, 2.0), **changes)
  base, adapters = lora.split(params)
  assert jax.tree.all(jax.tree.map(np.array_equal, base, weights))
  assert model.base == plain
  for path, x in jax.tree_util.tree_flatten_with_path(adapters)[0]:
    name = sharding.path_name(path)
    assert bool(np.any(x)) is name.endswith("_a"), name
  given = PROMPTS.tokens, PROMPTS.mask
  ours, theirs = _logits(model, params, *given), _logits(plain, base, *given)
  np.testing.assert_array_equal(ours, theirs)
  for x, y in zip(
      jax.tree.leaves(_sampled(model, params)),
      jax.tree.leaves(_sampled(plain, base)),
      strict=True,
  ):
    np.testing.assert_array_equal(x, y)


def test_rank_0_is_the_code_without_adapters():
  config = toys.run_config("student", "teacher")
  assert config.lora == LoraSpec() and config.lora.rank == 0
  architecture = toys.model_config()
  assert lora.adapted(architecture, config) == architecture
  assert num_adapters(architecture) == 0
  # And a tree without adapters is only trained weights.
  _, params = toys.model()
  assert lora.split(params) == (params, {})
  assert lora.join(None, params) == params


@pytest.mark.parametrize(
    "family, targets",
    [("qwen3", Lora.targets), ("qwen2", ("query", "down")),
     ("llama", Lora.targets)],
)
def test_adapters_compute_what_merged_weights_do(family, targets):
  model, params = _toy(targets=targets, family=family)
  dense = _merged(params, 2.0)
  given = PROMPTS.tokens, PROMPTS.mask
  ours = np.asarray(_logits(model, params, *given))[PROMPTS.mask]
  theirs = np.asarray(_logits(model.base, dense, *given))[PROMPTS.mask]
  before = _logits(model.base, lora.split(params)[0], *given)
  assert np.abs(np.asarray(before)[PROMPTS.mask] - theirs).max() > 0.1
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
  # And token by token, over the cache.
  drawn, wanted = _sampled(model, params), _sampled(model.base, dense)
  np.testing.assert_array_equal(drawn.tokens, wanted.tokens)
  np.testing.assert_allclose(
      drawn.log_probs, wanted.log_probs, rtol=0, atol=1e-5
  )


def _norm(x, scale, eps):
  return x * (jnp.mean(x**2, -1, keepdims=True) + eps) ** -0.5 * scale


def _rotated(x, theta):
  """Rotates [T, N, H], channel i with channel i + H / 2."""
  half = x.shape[-1] // 2
  angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _reference(c, params, tokens):
  """Returns log-probabilities of the real tokens for one row: [T, V]."""
  x, causal = params["embed"]["weight"][tokens], np.tri(len(tokens), dtype=bool)
  for i in range(c.num_layers):
    layer = jax.tree.map(lambda p, i=i: p[i], params["layers"])
    w, norms = layer["attention"], {}
    y = _norm(x, layer["attention_norm"]["scale"], c.norm_eps)
    for name in ("query", "key", "value"):
      z = jnp.einsum("td,nhd->tnh", y, w[name])
      z = z + w.get(f"{name}_bias", 0.0)
      if f"{name}_norm" in w:
        z = _norm(z, w[f"{name}_norm"]["scale"], c.norm_eps)
      if name != "value":
        z = _rotated(z, c.rope.theta)
      norms[name] = jnp.repeat(z, c.num_heads // z.shape[1], axis=1)
    scores = jnp.einsum("tnh,snh->nts", norms["query"], norms["key"])
    scores = jnp.where(causal, scores * c.head_dim**-0.5, -jnp.inf)
    share = jax.nn.softmax(scores, axis=-1)
    y = jnp.einsum("nts,snh->tnh", share, norms["value"])
    x = x + jnp.einsum("tnh,dnh->td", y, w["out"])
    y, w = _norm(x, layer["mlp_norm"]["scale"], c.norm_eps), layer["mlp"]
    gate = jax.nn.silu(y @ w["gate"].T)
    x = x + (gate * (y @ w["up"].T)) @ w["down"].T
  x = _norm(x, params["final_norm"]["scale"], c.norm_eps)
  table = params["embed" if c.tied else "head"]["weight"]
  return jax.nn.log_softmax((x @ table.T)[:, : toys.NUM_TOKENS])


def _dense_loss(model, teacher, base, teacher_params, form, adapters):
  """Sums the loss over prefix tokens, in the dtype of the weights."""
  dense = _merged(lora.join(base, adapters), model.config.lora.scale)
  total = 0.0
  for row in range(len(_LENGTHS)):
    prompt, prefix = (
        np.asarray(x.tokens)[row][np.asarray(x.mask)[row]]
        for x in (PROMPTS, ROLLOUT)
    )
    tokens = np.concatenate([prompt, prefix[:-1]])
    first = len(prompt) - 1
    log_p = _reference(model.config, dense, tokens)[first:]
    log_q = _reference(teacher.config, teacher_params, tokens)[first:]
    if form == "exact":
      total += jnp.sum(jnp.exp(log_p) * (log_p - log_q))
      continue
    at = np.arange(len(prefix)), prefix
    drawn = np.asarray(ROLLOUT.log_probs, np.float64)[row, : len(prefix)]
    verdict = jax.lax.stop_gradient(log_p[at] - log_q[at])
    total += jnp.sum(jnp.exp(log_p[at] - drawn) * verdict)
  return total


@pytest.mark.parametrize(
    "family, form", [("qwen3", "exact"), ("qwen2", "sampled")]
)
def test_gradients_are_those_of_a_dense_float64_reference(family, form):
  targets = ("query", "key", "value", "out", "gate", "up", "down")
  model, params = _toy(targets=targets, family=family)
  teacher, teacher_params = toys.model(1, family=family)
  base, adapters = lora.split(params)
  dist = toys.distribution()
  loss = ExactLoss(dist) if form == "exact" else SampledLoss(dist)
  scored = functools.partial(
      step_lib.distillation_loss,
      model,
      loss,
      step_lib.Watch(4 * _COLUMNS, toys.STOPS),
      step_lib.Window(),
  )

  @jax.jit
  def ours(adapters, base):
    scores = loss_lib.score(teacher, loss, teacher_params, PROMPTS, ROLLOUT)
    head = teacher.head(teacher_params) if form == "exact" else None
    inputs = step_lib.Microbatch(PROMPTS, ROLLOUT, scores)
    return step_lib.gradient(scored, adapters, head, inputs, base=base)

  found = ours(adapters, base)
  with jax.enable_x64(True):
    base, adapters, teacher_params = jax.tree.map(
        lambda x: np.asarray(x, np.float64), (base, adapters, teacher_params)
    )
    value, wanted = jax.jit(
        jax.value_and_grad(
            functools.partial(
                _dense_loss, model, teacher, base, teacher_params, form
            )
        )
    )(adapters)
    assert value.dtype == np.float64
    wanted = jax.tree.map(np.asarray, wanted)
  if form == "exact":
    assert float(found.sums["loss"][0]) == pytest.approx(float(value), rel=1e-5)
  flat = jax.tree_util.tree_flatten_with_path(wanted)[0]
  for (path, theirs), mine in zip(
      flat, jax.tree.leaves(found.grads), strict=True
  ):
    most = np.abs(theirs).max()
    assert most > 1e-3, path
    np.testing.assert_allclose(
        mine, theirs, rtol=0, atol=2e-5 * max(most, 1), err_msg=str(path)
    )


@pytest.mark.parametrize("name", _NAMES)
def test_a_merged_export_equals_the_adapters(name, tmp_path):
  model, params, source, spec = _golden(name)
  out = tmp_path / "out"
  base, adapters = lora.split(params)
  hf.export(
      base,
      source,
      source,
      out,
      "float32",
      adapters=adapters,
      scale=spec.scale,
  )
  plain = hf.load_params(
      str(out),
      model.base,
      sharding.param_shardings(model.base.abstract_params(), _ONE),
  )
  expected = np.load(_GOLDEN / name / "expected.npz")
  tokens, mask = expected["tokens"], expected["mask"]
  given = jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
  ours = np.asarray(_logits(model, params, *given))[mask]
  theirs = np.asarray(_logits(model.base, plain, *given))[mask]
  first = _logits(model.base, lora.split(params)[0], *given)
  assert np.abs(np.asarray(first)[mask] - theirs).max() > 0.05
  most = np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * most)
  # Nothing but the products changed: tables, norms and biases are the same.
  old, new = (
      safetensors.numpy.load_file(pathlib.Path(d) / hf.SINGLE)
      for d in (source, out)
  )
  ends = tuple(f"{product}.weight" for product in PRODUCTS)
  for tensor, array in new.items():
    same = np.array_equal(old[tensor].astype(np.float32), array)
    assert same is not tensor.endswith(ends), tensor


@pytest.mark.parametrize("name", _NAMES)
def test_adapters_go_through_pefts_files_and_come_back(name, tmp_path):
  model, params, source, spec = _golden(name)
  _, adapters = lora.split(params)
  lora.export(adapters, spec, source, tmp_path / "adapter")
  arrays = safetensors.numpy.load_file(tmp_path / "adapter" / lora.WEIGHTS)
  c = model.config
  stem = "base_model.model.model.layers.1."
  shapes = {
      "self_attn.q_proj.lora_A": (2, c.dim),
      "self_attn.q_proj.lora_B": (c.num_heads * c.head_dim, 2),
      "self_attn.o_proj.lora_A": (2, c.num_heads * c.head_dim),
      "self_attn.v_proj.lora_B": (c.num_kv_heads * c.head_dim, 2),
      "mlp.down_proj.lora_A": (2, c.mlp_dim),
      "mlp.up_proj.lora_B": (c.mlp_dim, 2),
  }
  for end, shape in shapes.items():
    assert arrays[f"{stem}{end}.weight"].shape == shape
  assert len(arrays) == 2 * 7 * c.num_layers
  settings = json.loads((tmp_path / "adapter" / lora.CONFIG).read_text())
  assert (settings["r"], settings["lora_alpha"]) == (2, 3)
  assert settings["target_modules"] == sorted(PRODUCTS)
  start = dataclasses.replace(spec, path=str(tmp_path / "adapter"))
  config = toys.run_config(source, source, lora=start)
  lora.check_config(start)
  lora.check_weights(start.path, model)
  again = setup_lib.load_adapters(config, model)
  assert jax.tree.all(jax.tree.map(np.array_equal, adapters, again))


def _refused(tmp_path, spec, settings=(), arrays=None, text=""):
  model, params, source, written = _golden("qwen3")
  where = tmp_path / "adapter"
  lora.export(lora.split(params)[1], written, source, where)
  file = where / lora.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | dict(settings)))
  if arrays is not None:
    found = safetensors.numpy.load_file(where / lora.WEIGHTS)
    arrays(found)
    safetensors.numpy.save_file(found, where / lora.WEIGHTS)
  start = dataclasses.replace(spec or written, path=str(where))
  with pytest.raises(UserError, match=text) as error:
    lora.check_config(start)
    lora.check_weights(start.path, model)
    setup_lib.load_adapters(toys.run_config(source, source, lora=start), model)
  assert str(error.value).endswith(".") and str(error.value).isprintable()


_A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"use_dora": True}, "use_dora True, which is not implemented"),
        ({"use_rslora": True}, "use_rslora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"peft_type": "LOHA"}, "only 'LORA' is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": 4}, "lora.rank is 2, but the adapters of lora.path have 4"),
        ({"lora_alpha": 16}, "lora.alpha is 3.0, .* have 16 .*set lora.alpha"),
        ({"target_modules": ["q_proj"]}, "lora.targets is .* have .'q_proj',."),
        ({"target_modules": "all-linear"}, "have 'all-linear'"),
    ],
)
def test_adapters_of_another_kind_are_refused(settings, text, tmp_path):
  _refused(tmp_path, None, settings, text=text)


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda x: x.pop(_A), f"lacks the tensor {_A}"),
        (lambda x: x.update({_A: x[_A][:, :-1]}), "has shape"),
        (lambda x: x.update({_A: x[_A] * np.nan}), "NaN or infinite"),
        (lambda x: x.update({_A: x[_A].astype(np.int8)}), "of dtype I8"),
        (lambda x: x.update(more=x[_A]), "has the tensor more"),
    ],
)
def test_damaged_adapters_are_refused_by_name(damage, text, tmp_path):
  _refused(tmp_path, None, arrays=damage, text=text)


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"lora": {"rank": 4, "targets": ("q_proj", "head")}},
            "lora.targets.1 is 'head'; use one of 'q_proj'",
        ),
        ({"lora": {"rank": 4, "targets": ()}}, "lora.targets is (); name one"),
        ({"lora": {"rank": 4, "targets": ("q_proj",) * 2}}, "each once"),
        ({"lora": {"rank": -1}}, "lora.rank is -1; set it to 0 or more."),
        ({"lora": {"alpha": 3.0}}, "lora.alpha is 3.0 but lora.rank is 0"),
        ({"lora": {"path": "a"}}, "lora.path is 'a' but lora.rank is 0"),
        (
            {"lora": {"rank": 4}, "optimizer": {"offload": True}},
            "set optimizer.offload to False",
        ),
        (
            {"lora": {"rank": 4}, "teacher": {"path": "s", "offload": True}},
            "set teacher.offload to False",
        ),
        (
            {"lora": {"rank": 4}, "teacher": {"refresh": 2}},
            "teacher.refresh is 2 but lora.rank is 4",
        ),
        ({"student": {"param_dtype": "bfloat16"}}, "student.param_dtype"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, text):
  values = config_lib.to_dict(toys.run_config("s", "t"))
  for group, fields in changes.items():
    values[group] = values[group] | fields
  with pytest.raises(ConfigError) as error:
    config_lib.from_dict(values)
  assert text in str(error.value)


def test_a_rank_above_a_products_sides_is_refused():
  source = str(_GOLDEN / "qwen3")
  most = hf.read_config(source)
  side = most.num_kv_heads * most.head_dim
  config = toys.run_config(source, source, lora=LoraSpec(side))
  assert lora.adapted(most, config).lora.rank == side
  config = toys.run_config(source, source, lora=LoraSpec(side + 1))
  with pytest.raises(
      ConfigError, match=f"lora.rank is {side + 1}, but k_proj of .* {side};"
  ):
    lora.adapted(most, config)


@pytest.mark.parametrize(
    "changes, shared",
    [
        ({}, True),
        ({"compute_dtype": "bfloat16"}, True),
        ({"path": "t"}, False),
        ({"param_dtype": "bfloat16"}, False),
        ({"random_init": True}, False),
    ],
)
def test_one_model_is_one_copy(changes, shared):
  config = toys.run_config("s", "s", lora=LoraSpec(2))
  teacher = dataclasses.replace(config.teacher, **changes)
  assert dataclasses.replace(config, teacher=teacher).shares_weights is shared
  plain = toys.run_config("s", "s")
  assert not plain.shares_weights


def test_a_frozen_base_may_lie_in_bfloat16():
  config = toys.run_config(
      "s", "s", lora=LoraSpec(2), optimizer=OptimizerSpec(1e-3)
  )
  spec = ModelSpec("s", param_dtype="bfloat16")
  both = dataclasses.replace(config, student=spec, teacher=spec)
  assert both.shares_weights


_TARGETS = (Lora.targets, ("query", "value"))


@pytest.mark.parametrize("targets", _TARGETS, ids=["all", "two"])
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_an_update_costs_what_the_ledger_says(remat, targets):
  rows, prompt, sampled = 4, 16, 33
  config = toys.model_config(
      dim=64,
      mlp_dim=128,
      num_heads=4,
      num_kv_heads=2,
      head_dim=16,
      num_layers=3,
      vocab_size=128,
      lora=Lora(4, 1.0, targets),
  )
  model, dist = Model(config, remat=remat), toys.distribution()

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  batch = dataclasses.replace(
      PROMPTS,
      tokens=array(rows, prompt, dtype=jnp.int32),
      mask=array(rows, prompt, dtype=bool),
      index=array(rows, dtype=jnp.int32),
  )
  whole = array(rows, sampled)
  rollout = dataclasses.replace(
      ROLLOUT,
      tokens=array(rows, sampled, dtype=jnp.int32),
      mask=array(rows, sampled, dtype=bool),
      log_probs=whole,
      behavior_log_probs=whole,
  )
  loss = functools.partial(step_lib.supervised_loss, model, dist, 2**28)
  base, adapters = lora.split(model.abstract_params())

  def gradient(adapters, base, batch, rollout):
    inputs = step_lib.Microbatch(batch, rollout)
    return step_lib.gradient(loss, adapters, None, inputs, base=base)

  traced = jax.jit(gradient).trace(adapters, base, batch, rollout)
  lengths = flops.Lengths(np.full(rows, prompt), np.full(rows, sampled))
  ledger = flops.supervised(config, lengths, remat)
  tokens = prompt + sampled - 1
  width = config.num_layers * config.num_heads * config.head_dim
  hidden = rows * 4 * width * tokens * (tokens - 1) / 2
  passes = 3 + (remat != "none")
  if remat == "dots" and "out" not in targets:
    passes -= 0.5  # The second product of the attention is not needed again.
  wanted = ledger.forward + ledger.backward + passes * hidden
  found = cost.flops(traced.jaxpr, 1)
  assert found == pytest.approx(wanted, rel=1e-9)
  # Of the whole student it is more, and so is the optimizer's step.
  full = flops.supervised(
      dataclasses.replace(config, lora=None), lengths, remat
  )
  assert ledger.backward < 0.85 * full.backward
  assert ledger.optimizer == flops.ADAMW_OPERATIONS * num_adapters(config)
  assert ledger.optimizer < 0.2 * full.optimizer


def _config(path, steps=4, **changes):
  """A run that teaches a model what it would say if it knew the answer."""
  config = toys.run_config(
      path,
      path,
      steps=steps,
      lora=LoraSpec(2, alpha=4.0),
      checkpoint=CheckpointSpec(every=1, keep=9),
      **changes,
  )
  data = dataclasses.replace(
      config.data,
      teacher_prompt="{question} It is {answer}.",
      max_teacher_prompt_len=112,
  )
  sets = dataclasses.replace(config.evaluation, teacher=False)
  return dataclasses.replace(config, data=data, evaluation=sets)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return toys.write_model(tmp_path_factory.mktemp("model") / "m", 0, "capable")


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
  """A run of four updates that was never stopped."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  loop.train(_config(path), workdir)
  return workdir


def _lines(workdir):
  timed = ("seconds", "tokens_per_second", "compilations")
  return [
      {k: v for k, v in json.loads(line).items() if not k.startswith(timed)}
      for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]


def test_a_run_learns_and_leaves_both_exports(whole, path):
  updates = [x for x in _lines(whole) if "kl" in x]
  assert [x["step"] for x in updates] == [1, 2, 3, 4]
  assert updates[0]["kl"] > 0
  for name in ("export/model.safetensors", "export/tokenizer.json"):
    assert (whole / name).is_file()
  spec = dataclasses.replace(
      _config(path).lora, path=str(whole / "export-adapter")
  )
  lora.check_config(spec)
  adapters = safetensors.numpy.load_file(
      whole / "export-adapter" / lora.WEIGHTS
  )
  old, new = (
      safetensors.numpy.load_file(pathlib.Path(d) / hf.SINGLE)
      for d in (path, whole / "export")
  )
  up = "model.layers.0.mlp.up_proj"
  a, b = (
      adapters[f"base_model.model.{up}.lora_{x}.weight"] for x in ("A", "B")
  )
  assert np.abs(b).max() > 1e-3
  np.testing.assert_allclose(
      new[f"{up}.weight"], old[f"{up}.weight"] + 2.0 * b @ a, atol=1e-6
  )
  name = "model.embed_tokens.weight"
  np.testing.assert_array_equal(new[name], old[name])


def test_a_run_says_that_it_trains_adapters(whole, path, tmp_path, capsys):
  config, words = _config(path), "LoRA of rank 2"
  assert words in report.headline(config, {}, whole)
  full = dataclasses.replace(config, lora=LoraSpec())
  assert "LoRA" not in report.headline(full, {}, whole)
  for file in ("report/report.html", "export/README.md"):
    assert words in (whole / file).read_text("utf-8")
  capsys.readouterr()
  page.write(whole)
  assert f"adapter in {whole}/export-adapter." in capsys.readouterr().out
  to = tmp_path / "m"
  model_commands._export(
      model_commands.parse("export", [f"--workdir={whole}", f"--to={to}"])
  )
  assert f"to {to}, its adapter to {to}-adapter." in capsys.readouterr().out


def test_checkpoints_hold_adapters_alone(whole):
  file = whole / "checkpoints" / "4" / "host" / "metadata"
  saved = json.loads(file.read_text())["checksums"]
  kinds = {name.rpartition("_")[2] for name in saved if "layers" in name}
  assert kinds == {"a", "b"}
  rest = {name for name in saved if "layers" not in name}
  assert all(name == "step" or name.endswith("count") for name in rest), rest
  assert sum(name.startswith("params/") for name in saved) == 14


def test_a_stopped_run_goes_on_exactly(whole, path, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  for step in (3, 4):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  for name in ("export", "export-adapter"):
    shutil.rmtree(workdir / name)
  loop.train(_config(path), workdir)
  assert _lines(workdir) == _lines(whole)
  for name in ("export", "export-adapter"):
    for file in (whole / name).glob("*.safetensors"):
      assert file.read_bytes() == (workdir / name / file.name).read_bytes()


def test_an_export_of_a_checkpoint_is_the_runs(whole, tmp_path):
  out = tmp_path / "out"
  assert model_commands.export(whole, "last", out) == 4
  for ours, theirs in (
      (out, whole / "export"),
      (tmp_path / "out-adapter", whole / "export-adapter"),
  ):
    for file in theirs.glob("*.safetensors"):
      mine, wanted = (
          safetensors.numpy.load_file(d / file.name) for d in (ours, theirs)
      )
      assert mine.keys() == wanted.keys()
      for name in wanted:
        np.testing.assert_array_equal(mine[name], wanted[name])
  with pytest.raises(UserError, match="out2-adapter is there already"):
    (tmp_path / "out2-adapter").mkdir()
    model_commands.export(whole, "last", tmp_path / "out2")


def test_a_run_that_begins_with_adapters_begins_where_they_ended(
    whole, path, tmp_path
):
  config = _config(path, steps=0)
  start = dataclasses.replace(
      config.lora, path=str(whole / "export-adapter")
  )
  loop.train(dataclasses.replace(config, lora=start), tmp_path / "run")
  ours, theirs = (
      safetensors.numpy.load_file(d / "export" / hf.SINGLE)
      for d in (tmp_path / "run", whole)
  )
  for name, array in theirs.items():
    np.testing.assert_array_equal(ours[name], array)
  contents = json.loads((tmp_path / "run" / "contents.json").read_text())
  assert f"lora.path/{lora.WEIGHTS}" in contents


def _copies(shape):
  """Counts the arrays of a shape that are in the memory."""
  return sum(x.shape == shape for x in jax.live_arrays())


def test_the_memory_holds_one_copy_of_the_base(path, tmp_path):
  config = _config(path)
  setup = setup_lib.prepare(config, tmp_path)
  student = setup.models.student
  shapes = {
      "layers": student.base.abstract_params()["layers"]["mlp"]["up"].shape,
      "table": student.base.abstract_params()["embed"]["weight"].shape,
  }
  before = {name: _copies(shape) for name, shape in shapes.items()}
  # `gate` has the shape of `up`, and the head that of the table.
  wanted = {"layers": 2, "table": 2}
  assert not student.config.tied
  run = loop.Run(setup, tmp_path)
  try:
    old = jax.tree.map(np.asarray, run.base)
    for step in range(2):
      now = {name: _copies(shape) for name, shape in shapes.items()}
      assert {n: now[n] - before[n] for n in now} == wanted
      run.update(step)
    assert run.teacher_params is run.base
    assert jax.tree.all(jax.tree.map(np.array_equal, old, run.base))
    # The plan counts the same: what lies there, and once.
    held = planner.bytes_held(
        plan_programs.Plan(run.models, run.programs)
    )
    c, size = student.config, 4
    assert held == {
        "student": size * (num_params(c) + num_adapters(c)),
        "teacher": 0.0,
        "moments": 2 * size * num_adapters(c) + 2 * size,  # Two counters.
    }
    trees = (run.base, run.state)
    assert sum(held.values()) + size == sum(
        x.nbytes for x in jax.tree.leaves(trees)
    )
    resting = sharding.bytes_per_device(run.programs.resting())
    assert resting == sum(held.values()) + size
  finally:
    run.programs.close()


def test_the_plan_counts_the_base_once_beside_every_program(path):
  plan = plan_programs.build(_config(path), jax.devices()[:1])
  c = plan.models.student.config
  base = 4 * num_params(c)
  for stage in plan.stages(8):
    if stage.name not in plan_programs.ORDER:
      continue
    beside = sharding.bytes_per_device(plan.beside(stage))
    taken = {"gradient", "prefill", "layout", "score"}
    least = 0 if stage.name in taken else base
    most = least + 16 * num_adapters(c) + 64
    assert least <= beside <= most, stage.name
  for stage in plan.evaluation():
    beside = sharding.bytes_per_device(plan.beside(stage))
    assert base <= beside < base + 16 * num_adapters(c) + 64
  half = dataclasses.replace(
      _config(path), teacher=ModelSpec(path, param_dtype="bfloat16")
  )
  other = plan_programs.build(half, jax.devices()[:1])
  assert planner.bytes_held(other)["teacher"] == base / 2


def test_a_mesh_is_chosen_by_what_is_trained():
  config = toys.run_config("s", "s", lora=LoraSpec(64))
  found = dataclasses.replace(QWEN3_1_7B, lora=Lora(64))
  assert num_adapters(found) == 28 * 64 * (
      2 * (2048 + 2048) + 2 * (1024 + 2048) + 3 * (6144 + 2048)
  )
  assert num_adapters(found) < 0.05 * num_params(found)
  config = dataclasses.replace(
      config, data=dataclasses.replace(config.data, batch_size=512)
  )
  machine = plan_programs.parse_machine("h100:16")
  mesh = planner.suggest_mesh(config, found, QWEN3_1_7B, machine)
  assert mesh == MeshSpec(2, 8, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  directory = str(tmp_path_factory.mktemp("devices"))
  process = toys.start("lora_devices.py", directory, devices=8)
  (out,) = toys.finish([process], 600)
  return [json.loads(line) for line in out.splitlines()]


def test_eight_devices_compute_what_one_does(runs):
  one, *others = runs
  assert len(others) == 3
  assert min(one["kl"]) > 0 and min(one["norms"]) > 1e-3
  for run in others:
    assert run["tokens"] == one["tokens"]
    np.testing.assert_allclose(run["kl"], one["kl"], rtol=1e-5)
    np.testing.assert_allclose(run["norms"], one["norms"], rtol=1e-5)
    np.testing.assert_allclose(run["sums"], one["sums"], rtol=0, atol=1e-4)


def test_adapters_are_split_with_their_products(runs):
  one, cube, both, fsdp = runs
  assert one["share"] == one["base_share"] == 1
  # In a cube half of the numbers are split over fsdp, and half over tensor.
  for run, least, most in ((cube, 0.4, 0.75), (fsdp, 0.1, 0.75)):
    assert least < run["share"] < most, run["share"]
    assert run["base_share"] < 0.3
  assert both["shared"] and cube["shared"]


@pytest.mark.torch
@pytest.mark.parametrize("name", _NAMES)
def test_peft_and_transformers_compute_the_same(name, tmp_path):
  from golden import make_golden
  import peft as their_peft
  import torch
  import transformers

  model, params, source, spec = _golden(name)
  base, adapters = lora.split(params)
  lora.export(adapters, spec, source, tmp_path / "adapter")
  hf.export(
      base,
      source,
      source,
      tmp_path / "merged",
      "float32",
      adapters=adapters,
      scale=spec.scale,
  )
  expected = np.load(_GOLDEN / name / "expected.npz")
  tokens, mask = expected["tokens"], expected["mask"]
  given = jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
  ours = np.asarray(_logits(model, params, *given))[mask]

  def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )

  adapted = their_peft.PeftModel.from_pretrained(
      load(source), tmp_path / "adapter"
  )
  for theirs in (adapted.eval(), load(tmp_path / "merged")):
    wanted = make_golden.expected(theirs, tokens, mask)["logits"][mask]
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)
  # And what PEFT writes is read.
  adapted.save_pretrained(tmp_path / "theirs")
  start = dataclasses.replace(spec, path=str(tmp_path / "theirs"))
  lora.check_config(start)
  lora.check_weights(start.path, model)
  again = setup_lib.load_adapters(
      toys.run_config(source, source, lora=start), model
  )
  assert jax.tree.all(
      jax.tree.map(np.array_equal, lora.split(params)[1], again)
  )
