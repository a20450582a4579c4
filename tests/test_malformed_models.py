"""Model directories that are malformed: refused in a sentence, or computed."""

import os

import jax
import malformed
import numpy as np
import pytest

from prefix_distill.errors import UserError
from prefix_distill.models import huggingface as hf
from prefix_distill.models.transformer import Model

_REFUSED = [name for name, case in malformed.CASES.items() if case.says]
_LOADED = [name for name, case in malformed.CASES.items() if not case.says]


def _load(directory):
  config = hf.read_config(str(directory))
  hf.check_weights(str(directory), config)
  model = Model(config)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = jax.tree.map(lambda _: one, model.abstract_params())
  return model, hf.load_params(str(directory), model, shardings)


def _logits(model, params):
  tokens = malformed.TOKENS

  @jax.jit
  def compute(params):
    hidden = model.apply(params, tokens, np.ones(tokens.shape, bool))
    return model.logits(params, hidden[:, -malformed.LAST :])

  return np.asarray(compute(params))


def _check_sentence(error, directory):
  sentence = str(error.value)
  assert str(directory) in sentence
  assert "\n" not in sentence and sentence.endswith(".")
  return sentence


def test_there_are_many():
  assert len(_REFUSED) >= 200
  assert len(_LOADED) >= 50


@pytest.mark.parametrize("name", _REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(name, tmp_path):
  directory = malformed.make(name, tmp_path / "model")
  with pytest.raises(UserError) as error:
    _load(directory)
  sentence = _check_sentence(error, directory)
  assert malformed.CASES[name].says in sentence


@pytest.mark.parametrize("name", _LOADED)
def test_what_loads_is_what_transformers_computes(name, tmp_path):
  wanted = np.load(malformed.LOGITS)[name]
  found = _logits(*_load(malformed.make(name, tmp_path / "model")))
  np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "make", (malformed.make_at_random, malformed.make_rope_at_random)
)
def test_files_made_at_random_load_or_are_refused(make, tmp_path):
  refused = 0
  for seed in range(200):
    directory = make(seed, tmp_path / str(seed))
    try:
      _load(directory)
    except UserError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 60


@pytest.mark.torch
@pytest.mark.parametrize("name", _LOADED)
def test_what_loads_is_what_transformers_computes_live(name, tmp_path):
  directory = malformed.make(name, tmp_path / "model")
  wanted = malformed.torch_logits(directory)
  found = _logits(*_load(directory))
  np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.torch
@pytest.mark.parametrize(
    "make", (malformed.make_at_random, malformed.make_rope_at_random)
)
def test_nothing_that_loads_is_a_silent_difference(make, tmp_path):
  loaded = 0
  for seed in range(100):
    directory = make(seed, tmp_path / str(seed))
    try:
      model, params = _load(directory)
    except UserError:
      continue
    loaded += 1
    wanted = malformed.torch_logits(directory)
    found = _logits(model, params)
    np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=str(seed))
  assert loaded >= 10


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
  directory = malformed.make("is_causal true", tmp_path / "model")
  (directory / "config.json").chmod(0)
  with pytest.raises(UserError) as error:
    _load(directory)
  _check_sentence(error, directory)
