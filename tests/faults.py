"""Faults that the tests must see, of the kind that a person makes.

`test_faults` plants each in a copy of the package. An entry names no file of
the package, so that code may be moved; its text says where it belongs.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
  """A change that makes the package wrong.

  Attributes:
    name: what is wrong.
    old: text that occurs once in the package.
    new: what takes its place.
    tests: those of which at least one must fail, as pytest names them.
  """

  name: str
  old: str
  new: str
  tests: tuple[str, ...]


def _fault(name: str, old: str, new: str, *tests: str) -> Fault:
  return Fault(name, old, new, tuple(f"tests/test_{x}" for x in tests))


_DISTILL = (
    _fault(
        "the reverse KL is the forward one",
        "return jnp.exp(log_p) * (log_p - log_q)",
        "return jnp.exp(log_q) * (log_q - log_p)",
        "divergence.py::test_a_tail_bucket_sees_mass_that_leaves_the_top",
    ),
    _fault(
        "the forward KL is weighted by the student",
        "return jnp.exp(log_q) * (log_q - log_p)",
        "return jnp.exp(log_p) * (log_q - log_p)",
        "divergence.py::test_divergences_equal_a_calculation_by_hand[1.0]",
    ),
    _fault(
        "the mixture of the JSD has its weights swapped",
        "jnp.logaddexp(log_q + jnp.log(beta), log_p + jnp.log1p(-beta))",
        "jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))",
        "divergence.py::test_beta_of_0_half_and_1_are_forward_js_and_reverse",
    ),
    _fault(
        "divergences ignore the temperature",
        "scaled = logits.astype(jnp.float32) / dist.temperature",
        "scaled = logits.astype(jnp.float32)",
        "divergence.py::test_divergences_equal_a_calculation_by_hand[2.0]",
    ),
    _fault(
        "the gradient is not divided by the temperature",
        "gradient = (slopes - probs * total[..., None]) / dist.temperature",
        "gradient = slopes - probs * total[..., None]",
        "divergence.py::test_the_gradient_by_formula_is_that_of_autodiff"
        "[cool-reverse_kl]",
    ),
    _fault(
        "padded rows of the vocabulary have probability",
        "real = shard.ids(logits.shape[-1]) < dist.num_tokens\n"
        "  masks = (real, *",
        "real = shard.ids(logits.shape[-1]) >= 0\n  masks = (real, *",
        "divergence.py::"
        "test_vocabularies_of_different_padding_compare_on_the_real_ids"
        "[reverse_kl]",
    ),
    _fault(
        "stop tokens count as one event and one by one too",
        "single &= ~stop\n    groups",
        "groups",
        "divergence.py::"
        "test_the_name_of_the_stop_matters_only_if_stops_are_not_merged"
        "[reverse_kl]",
    ),
    _fault(
        "the tail of top-k is forgotten",
        "    groups.append(single & ~kept)\n",
        "",
        "divergence.py::test_a_tail_bucket_sees_mass_that_leaves_the_top",
    ),
    _fault(
        "top-k is of the other model",
        'if dist.top_k_of == "student" else',
        'if dist.top_k_of == "teacher" else',
        "divergence.py::test_values_and_gradients_equal_float64"
        "[student's top 3-reverse_kl]",
    ),
    _fault(
        "each token of an event gets all of the event's gradient",
        "jnp.where(members, group_slope * share, slopes)",
        "jnp.where(members, group_slope, slopes)",
        "divergence.py::test_the_gradient_by_formula_is_that_of_autodiff"
        "[merged-reverse_kl]",
    ),
    _fault(
        "k1 has the wrong sign",
        "return student - teacher\n",
        "return teacher - student\n",
        "loss.py::test_estimates_by_hand",
    ),
    _fault(
        "k3 has the ratio upside down",
        "log_ratio = teacher - student",
        "log_ratio = student - teacher",
        "loss.py::test_estimates_by_hand",
    ),
    _fault(
        "the policy gradient goes through the signal too",
        "jnp.exp(student - sampler) * jax.lax.stop_gradient(signal)",
        "jnp.exp(student - sampler) * signal",
        "loss.py::"
        "test_the_ratio_is_one_on_policy_and_the_estimate_has_no_gradient",
    ),
    _fault(
        "the direct loss differentiates the ratio",
        "jax.lax.stop_gradient(jnp.exp(student - sampler)) * signal",
        "jnp.exp(student - sampler) * signal",
        "loss.py::"
        "test_the_ratio_is_one_on_policy_and_the_estimate_has_no_gradient",
    ),
    _fault(
        "the floor bounds the reward from above",
        "teacher = jnp.maximum(",
        "teacher = jnp.minimum(",
        "relaxed.py::test_the_floor_bounds_the_reward_from_below_only",
    ),
    _fault(
        "dropped tokens still have a gradient",
        "      gradient = jnp.where(counted[:, None], gradient, 0)\n",
        "",
        "relaxed.py::test_losses_masks_and_gradients_equal_float64"
        "[exploration]",
    ),
    _fault(
        "dropped tokens are counted",
        '    weights = weights * (metrics["counted"] > 0)\n',
        "",
        "relaxed.py::test_microbatches_do_not_change_the_update[2]",
    ),
    _fault(
        "each batch of rollouts is sorted by itself",
        "return sum(jnp.sum(x >= least) for x in bits)",
        "return jnp.sum(bits[0] >= least)",
        "relaxed.py::test_the_top_share_is_that_of_all_arrays_together[0.2]",
    ),
    _fault(
        "an entry that is cut keeps its gradient",
        "return jnp.where(shares > most, most, shares)",
        "return shares - jax.lax.stop_gradient("
        "jnp.maximum(shares - most, 0))",
        "divergence.py::test_entries_are_cut_as_in_float64"
        "[plain-forward_kl]",
    ),
    _fault(
        "the ratio is that of the event and not of the token",
        "return loss(tokens, sampler,",
        "return loss(events, sampler,",
        "loss.py::test_a_stop_is_an_event_and_its_ratio_that_of_the_token",
    ),
    _fault(
        "the fused loss forgets the weights, and so the mask",
        "jnp.sum(values * weights), d_head",
        "jnp.sum(values), d_head",
        "chunked_head.py::test_cross_entropy_has_the_gradient_of_the_softmax",
    ),
    _fault(
        "the fused gradient forgets the weights",
        "d_logits = (d_logits * weights[:, None]).astype(dtype)",
        "d_logits = d_logits.astype(dtype)",
        "chunked_head.py::test_cross_entropy_has_the_gradient_of_the_softmax",
    ),
    _fault(
        "the fused gradient is not multiplied by what comes from above",
        "lambda g: (g * cotangents[0]).astype(g.dtype)",
        "lambda g: g",
        "chunked_head.py::test_a_chunked_loss_equals_the_dense_one[24-reverse_kl]",
    ),
    _fault(
        "the last chunk of tokens is left out",
        "jnp.where(used, jnp.arange(count) + 1, 0)",
        "jnp.where(used, jnp.arange(count), 0)",
        "chunked_head.py::test_positions_that_are_padding_in_all_rows_are_left_out",
    ),
    _fault(
        "chunks are joined rows first though they were cut positions first",
        "return jnp.swapaxes(x.reshape(length, rows, *x.shape[1:]), 0, 1)",
        "return x.reshape(rows, length, *x.shape[1:])",
        "chunked_head.py::test_token_scores_are_those_of_the_softmax",
    ),
    _fault(
        "metrics are at the temperature of sampling",
        "dataclasses.replace(self, temperature=1.0, top_k=0)",
        "dataclasses.replace(self, top_k=0)",
        "chunked_head.py::test_metrics_are_those_of_the_whole_distributions",
    ),
    _fault(
        "the teacher scores each position's next token",
        "TokenInputs(mask, mask, tokens),",
        "TokenInputs(mask, mask, jnp.roll(tokens, -1, 1)),",
        "chunked_head.py::test_token_scores_are_those_of_the_softmax",
    ),
    _fault(
        "the teacher reads the student's prompt instead of its own",
        "hidden = model.prefix_hidden(params, batch.for_teacher(), rollout)",
        "hidden = model.prefix_hidden(params, batch, rollout)",
        "teacher_prompt.py::"
        "test_the_teacher_scores_prefixes_after_its_own_prompt[3]",
    ),
    _fault(
        "logits are shifted against the tokens by one",
        "return hidden[:, batch.tokens.shape[1] - 1 :]",
        "return jnp.roll(hidden[:, batch.tokens.shape[1] - 1 :], -1, axis=1)",
        "teacher_prompt.py::"
        "test_the_teacher_scores_prefixes_after_its_own_prompt[3]",
    ),
    _fault(
        "the cap grows before the first update",
        "spec.increment * (step // spec.every)",
        "spec.increment * (step // spec.every + 1)",
        "prefix_length.py::test_the_default_is_the_papers_schedule",
    ),
    _fault(
        "an audit takes every position for equally frequent",
        "mass = np.nan_to_num(stats.kl) * stats.count / len(stats.lengths)",
        "mass = np.nan_to_num(stats.kl)",
        "prefix_schedule.py::"
        "test_an_audit_weighs_positions_by_the_rollouts_that_reach_them",
    ),
    _fault(
        "drift asks for reliability up to the cap itself",
        "last = max(cap - spec.increment, 1) - 1",
        "last = cap - 1",
        "prefix_schedule.py::test_drift_grows_holds_and_shrinks",
    ),
    _fault(
        "agreement remembers the oldest rollouts",
        "*new][-self.spec.memory_rollouts :]",
        "*new][: self.spec.memory_rollouts]",
        "length_rules.py::"
        "test_the_threshold_is_a_quantile_of_the_last_rollouts_with_a_window[0]",
    ),
    _fault(
        "rollouts shorter than a window are remembered",
        "for x in stats.minima if np.isfinite(x)]",
        "for x in stats.minima]",
        "length_rules.py::test_rollouts_that_are_all_short_cut_nothing",
    ),
    _fault(
        "rollouts are cut before enough are remembered",
        "or len(minima) < spec.min_rollouts:",
        "or not minima:",
        "length_rules.py::test_nothing_is_cut_before_50_updates_and_512_rollouts",
    ),
    _fault(
        "a rollout is cut where its agreement is seen",
        "start = seen - (low_windows - 1) - (window - 1)",
        "start = seen",
        "length_rules.py::"
        "test_rollouts_end_where_the_first_low_window_starts[8-4-0]",
    ),
    _fault(
        "the first window counts as the others",
        "low = (z < threshold) & (position >= window)",
        "low = z < threshold",
        "length_rules.py::"
        "test_the_first_window_is_exempt_and_nothing_is_cut_without_a_threshold",
    ),
    _fault(
        "low windows need not follow each other",
        "_last(low.astype(jnp.int32), low_windows) == low_windows",
        "jnp.cumsum(low, axis=1) == low_windows",
        "length_rules.py::test_low_windows_must_follow_each_other",
    ),
    _fault(
        "tokens behind a drift weigh nothing",
        "weights = left / self.spec.max_drifted + _LEAST_WEIGHT",
        "weights = left / self.spec.max_drifted",
        "length_rules.py::test_weights_fall_with_every_drifted_token[0]",
    ),
    _fault(
        "a plateau is that of the best signal",
        "      largest = max(\n",
        "      largest = min(\n",
        "length_rules.py::test_plateau_waits_while_the_worst_signal_falls",
    ),
    _fault(
        "a schedule's weights are left out of the loss",
        "    weights = weights * given\n",
        "    weights = weights * jnp.ones_like(given)\n",
        "length_rules.py::test_weights_scale_each_tokens_loss_and_gradient",
    ),
)

_ROLLOUT = (
    _fault(
        "a row draws one token more than the cap",
        "live=live & ~is_stop & (count < draw.cap)",
        "live=live & ~is_stop & (count <= draw.cap)",
        "rollout.py::"
        "test_the_mask_covers_up_to_and_with_the_stop_token_or_the_cap",
    ),
    _fault(
        "the mask leaves the stop token out",
        "      token,\n      live,\n",
        "      token,\n"
        "      live & ~jnp.isin(token, jnp.array(config.stop_ids)),\n",
        "rollout.py::"
        "test_the_mask_covers_up_to_and_with_the_stop_token_or_the_cap",
    ),
    _fault(
        "a row draws all of its tokens with one random number",
        "keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)",
        "keys = state.keys",
        "rollout.py::test_every_token_of_a_row_is_drawn_anew",
    ),
    _fault(
        "sampling ignores the temperature",
        "mask_padding(logits.astype(jnp.float32), num_tokens) / temperature",
        "mask_padding(logits.astype(jnp.float32), num_tokens)",
        "rollout.py::test_draws_follow_the_distribution",
    ),
    _fault(
        "padded ids are drawn",
        "return jnp.where(real, logits, -jnp.inf)",
        "return logits",
        "rollout.py::test_draws_follow_the_distribution",
    ),
    _fault(
        "top-p is off",
        "kept = (above < truncation.top_p)",
        "kept = (above < 1.0)",
        "rollout.py::test_truncation_keeps_the_most_probable_and_renormalises",
    ),
    _fault(
        "top-p leaves out the token that reaches it",
        "jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)",
        "jnp.cumsum(jnp.exp(ordered), axis=-1)",
        "rollout.py::test_truncation_keeps_the_most_probable_and_renormalises",
    ),
    _fault(
        "what is left of a distribution is not renormalised",
        "return jax.nn.log_softmax(left, axis=-1)",
        "return left",
        "rollout.py::test_truncation_keeps_the_most_probable_and_renormalises",
    ),
    _fault(
        "the log-probabilities of the two distributions are swapped",
        "for x in (distribution, allowed)",
        "for x in (allowed, distribution)",
        "rollout.py::test_truncated_rollouts_record_both_distributions",
    ),
    _fault(
        "scales of int8 ignore negative entries",
        "scale = jnp.max(jnp.abs(x), axis=-1) / _INT8_MAX",
        "scale = jnp.max(x, axis=-1) / _INT8_MAX",
        "models.py::test_what_goes_into_a_cache_lies_where_its_layout_says"
        "[int8-bkhm-bkmh]",
    ),
    _fault(
        "a prompt's padding predicts the first token",
        "last = jnp.maximum(lengths - 1, 0)\n",
        "last = jnp.full_like(lengths, tokens.shape[1] - 1)\n",
        "rollout.py::test_log_probs_are_the_teacher_forced_ones[1.0-1]",
    ),
    _fault(
        "decoded tokens are one position late",
        "Rotation.of(c.rope, c.head_dim, cache.lengths[:, None])",
        "Rotation.of(c.rope, c.head_dim, cache.lengths[:, None] + 1)",
        "rollout.py::test_log_probs_are_the_teacher_forced_ones[1.0-1]",
    ),
    _fault(
        "prompts are repeated one after the other, and rollouts are not",
        "jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), batch)",
        "jax.tree.map(lambda x: jnp.concatenate([x] * times), batch)",
        "rollout.py::test_log_probs_are_the_teacher_forced_ones[0.7-3]",
    ),
    _fault(
        "all rollouts of a prompt are the same",
        "jnp.tile(jnp.arange(n), rows)[:, None],",
        "jnp.zeros((rows * n, 1), jnp.int32),",
        "rollout.py::test_rollouts_of_a_prompt_are_neighbours_that_differ",
    ),
    _fault(
        "a row's key is its place in the batch",
        "jnp.repeat(batch.index.reshape(rows, -1), n, axis=0),",
        "jnp.repeat(jnp.arange(rows)[:, None], n, axis=0),",
        "rollout.py::test_a_row_does_not_depend_on_its_place_in_the_batch",
    ),
    _fault(
        "a run samples at temperature 1, whatever its settings",
        "draw = Draw.of(cap, self._temperature)",
        "draw = Draw.of(cap, 1.0)",
        "programs.py::"
        "test_a_run_samples_and_compares_as_its_settings_say",
    ),
    _fault(
        "a run samples without its top-p",
        "truncation=Truncation(spec.top_k, spec.top_p),\n"
        "      cache_dtype=spec.cache_dtype,",
        "truncation=Truncation(spec.top_k),\n"
        "      cache_dtype=spec.cache_dtype,",
        "programs.py::"
        "test_a_run_samples_and_compares_as_its_settings_say",
    ),
)

_TRAIN = (
    _fault(
        "every update samples with the same key",
        "jax.random.fold_in(self.key, step),",
        "self.key,",
        "methods.py::test_every_update_draws_rollouts_anew",
    ),
    _fault(
        "the loss compares at temperature 1, whatever the settings",
        "1.0 if config.is_supervised else config.rollout.temperature",
        "1.0",
        "programs.py::"
        "test_a_run_samples_and_compares_as_its_settings_say",
    ),
    _fault(
        "what was cut off is trained on",
        "    mask = chosen.trained\n",
        "    mask = mask & True\n",
        "programs.py::test_what_was_cut_off_is_not_trained_on",
    ),
    _fault(
        "the student answers in the teacher's place",
        "        params = self.on_device(teacher_params)\n",
        "        pass\n",
        "programs.py::test_answers_of_the_teacher_are_the_teachers",
    ),
    _fault(
        "given answers are one token longer than the cap",
        "given.mask[:, :length] & (jnp.arange(length) < cap)",
        "given.mask[:, :length] & (jnp.arange(length) <= cap)",
        "microbatch.py::test_given_answers_are_cut_at_the_cap",
    ),
    _fault(
        "parts are joined as they come instead of being dealt back",
        "np.stack(cards, axis=1).reshape(-1, *rest)",
        "np.concatenate(cards).reshape(-1, *rest)",
        "microbatch.py::test_parts_together_are_the_whole_in_its_order[2]",
    ),
    _fault(
        "the share of off-policy updates is that of the others",
        "if rng.random() < spec.source_share else",
        "if rng.random() > spec.source_share else",
        "prefix_schedule.py::test_a_share_of_the_updates_has_another_source",
    ),
    _fault(
        "the loss is a mean over tokens instead of rollouts",
        'total.sums["loss"][1] if normalize == "tokens" else total.rows',
        'total.sums["loss"][1]',
        "step.py::test_parts_do_not_change_the_update[rollouts-counts0]",
    ),
    _fault(
        "a mean by length divides by all of a rollout, whatever the window",
        "inside / jnp.maximum(jnp.sum(inside, axis=1, keepdims=True), 1)",
        "inside / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)",
        "step.py::test_a_mean_by_length_is_that_of_a_dense_reference",
    ),
    _fault(
        "a teacher that was refreshed is not saved",
        "self.teacher_params if self.totals.teacher_update else None,",
        "None,",
        "refresh.py::"
        "test_a_run_killed_between_refreshes_ends_as_one_that_was_not[5]",
    ),
    _fault(
        "the teacher is refreshed one update late",
        "if every and step and step % every == 0:",
        "if every and step > 1 and step % every == 1 % every:",
        "refresh.py::"
        "test_a_refresh_is_a_copy_and_compiles_nothing[False-float32]",
    ),
    _fault(
        "accumulated gradients are divided twice",
        "total = Gradient(grads, sums, rows)",
        "grads = jax.tree.map(lambda g: g / rows, grads)\n"
        "  total = Gradient(grads, sums, rows)",
        "step.py::test_parts_do_not_change_the_update[rollouts-counts0]",
    ),
    _fault(
        "the last micro-batch stands for all",
        "total = jax.tree.map(jnp.add, before, total)",
        "return total",
        "step.py::test_parts_do_not_change_the_update[rollouts-counts0]",
    ),
    _fault(
        "micro-batches are not divided by the global count",
        "lambda g: g / jnp.maximum(count, 1), total.grads",
        "lambda g: g, total.grads",
        "step.py::test_parts_do_not_change_the_update[tokens-counts1]",
    ),
    _fault(
        "the loss forgets the window and the mask",
        "weights = window.weights(mask)",
        "weights = jnp.ones_like(mask)",
        "step.py::test_a_window_trains_on_its_tokens_and_measures_all",
    ),
    _fault(
        "a window counts from the end of the row and not of its rollout",
        "length = jnp.sum(mask, axis=1, keepdims=True)",
        "length = mask.shape[1]",
        "step.py::test_a_window_chooses_positions_of_each_rollout",
    ),
    _fault(
        "bins of positions divide the bucket and not the longest answer",
        "bins = jnp.arange(mask.shape[1]) // bin_width(max_len)",
        "bins = jnp.arange(mask.shape[1]) // bin_width(mask.shape[1])",
        "step.py::test_position_bins_sum_to_the_whole",
    ),
    _fault(
        "the warm-up begins at a rate of zero",
        "      spec.learning_rate / spec.warmup_steps,",
        "      0.0,",
        "optimizer.py::"
        "test_the_rate_rises_evenly_to_the_peak_over_the_warm_up[constant]",
    ),
    _fault(
        "the warm-up takes one update more",
        "max(spec.warmup_steps - 1, 1)",
        "max(spec.warmup_steps, 1)",
        "optimizer.py::"
        "test_the_rate_rises_evenly_to_the_peak_over_the_warm_up[constant]",
    ),
    _fault(
        "norms and biases decay too",
        "      mask=matrices,\n",
        "",
        "optimizer.py::test_weight_decay_is_on_matrices_only[qwen3]",
    ),
    _fault(
        "the update is clipped instead of the gradient",
        "optax.chain(optax.clip_by_global_norm(spec.clip_norm), adamw)",
        "optax.chain(adamw, optax.clip_by_global_norm(spec.clip_norm))",
        "optimizer.py::"
        "test_the_clip_scales_the_whole_gradient_to_its_norm[1e-08]",
    ),
    _fault(
        "the ledger forgets the updates before",
        "flops=totals.flops + cost.total + share",
        "flops=cost.total + share",
        "ledger.py::test_lines_hold_sums_of_both_accountings_by_phase",
    ),
    _fault(
        "a resumed run begins the data anew",
        "      self.setup.data.set_state(found.data)\n",
        "",
        "methods.py::test_a_schedule_runs_and_is_resumed_where_it_was[drift]",
    ),
)

_DATA = (
    _fault(
        "every epoch has the same order",
        "stream = stream.repeat().map(self._encode)",
        "stream = stream.repeat(reseed_each_epoch=False).map(self._encode)",
        "data.py::"
        "test_every_record_comes_once_an_epoch_in_an_order_of_its_own",
    ),
    _fault(
        "the seed does not change the order",
        "range(self._epoch).seed(seed).shuffle()",
        "range(self._epoch).seed(0).shuffle()",
        "data.py::test_the_seed_decides_the_order",
    ),
    _fault(
        "the suffix is forgotten",
        "return text + suffix",
        "return text",
        "data.py::test_prompts_have_the_chat_form_and_the_suffix",
    ),
    _fault(
        "the prompt does not open the assistant's turn",
        "add_generation_prompt=add_generation_prompt",
        "add_generation_prompt=False",
        "data.py::test_prompts_have_the_chat_form_and_the_suffix",
    ),
    _fault(
        "prompts are padded on the right",
        "start = length - len(tokens) if left else 0",
        "start = 0",
        "data.py::test_prompts_are_whole_and_padded_on_the_left",
    ),
    _fault(
        "a prompt that is too long loses its end",
        "tokens = encode(question, suffix)\n",
        "tokens = encode(question, suffix)[:max_len]\n",
        "data.py::test_encode_prompt_gives_nothing_rather_than_a_part",
    ),
    _fault(
        "completions have no stop token",
        "tokens = [*tokenizer.encode(text), tokenizer.end_id]",
        "tokens = tokenizer.encode(text)",
        "data.py::test_completions_end_with_the_stop_token_and_padding",
    ),
    _fault(
        "prompts are cut on the wrong side",
        "tokens=batch.tokens[:, -length:], mask=batch.mask[:, -length:]",
        "tokens=batch.tokens[:, :length], mask=batch.mask[:, :length]",
        "data.py::test_a_batch_is_cut_to_its_last_columns",
    ),
    _fault(
        "the stream forgets where it was",
        'self._iterator.set_state(loaded["grain"])',
        'loaded.pop("grain")',
        "data.py::test_a_stream_goes_on_from_its_state[1]",
    ),
    _fault(
        "the teacher is asked the student's question",
        "tokenizer, theirs, room, suffix, own=True",
        "tokenizer, question, room, suffix, own=True",
        "teacher_prompt.py::test_the_template_takes_fields_as_they_are",
    ),
    _fault(
        "stop tokens of the generation config are ignored",
        "stops = {*hf.stop_ids(directory, len(pretrained)), end} - {None}",
        "stops = {end} - {None}",
        "data.py::test_stop_tokens_come_from_tokenizer_and_generation_config",
    ),
    _fault(
        "a stop token in a question ends the user's turn",
        "if not any(self._markup_in(message) for message in messages):",
        "if messages:",
        "messages.py::test_text_that_looks_like_a_token_is_plain_text",
    ),
    _fault(
        "a list becomes what Python writes",
        "  if not isinstance(found, str):\n    raise _refuse(found, name,"
        " where, _NO_TEXT)\n  return found\n\n\ndef answer(",
        "  return str(found)\n\n\ndef answer(",
        "malformed_data.py::test_one_sentence_or_a_right_reading",
    ),
    _fault(
        "the earlier turns are left out of the teacher's prompt",
        'return [*question[:-1], {"role": "user", "content": text}]',
        'return [{"role": "user", "content": text}]',
        "messages.py::test_the_teachers_prompt_takes_the_last_turns_place",
    ),
    _fault(
        "a completion opens its thoughts a second time",
        'text, noted = start[len(opening.strip()) :], ["opened"]',
        'noted = ["opened"]',
        "messages.py::test_a_completion_follows_its_prompt",
    ),
    _fault(
        "problems of the test split are trained on",
        'if _split(drawn.question, _MATH_PERCENT) == split:',
        "if drawn.question:",
        "math_task.py::test_the_hash_of_the_text_decides_the_split",
    ),
)

_GYM = (
    _fault(
        "splits of reasoning-gym share their entries",
        "number = len(GYM_SPLITS) * index + self._split",
        "number = len(GYM_SPLITS) * index",
        "reasoning_gym.py::test_every_split_takes_seeds_of_its_own_whatever_the"
        "_seed_is",
    ),
    _fault(
        "the order of sets differs from process to process",
        '"PYTHONHASHSEED": "0", ',
        "",
        "reasoning_gym.py::test_a_record_depends_on_its_number_alone",
    ),
    _fault(
        "a question of reasoning-gym depends on those before it",
        "  random.seed(seed + number)\n",
        "",
        "reasoning_gym.py::test_a_record_depends_on_its_number_alone",
    ),
    _fault(
        "training asks what an evaluation asks",
        'raise Dropped("asked")',
        "pass",
        "reasoning_gym.py::test_training_does_not_ask_what_an_evaluation_asks",
    ),
    _fault(
        "an answer that is partly right is right",
        "correct = scores >= 1 - 1e-9",
        "correct = scores > 0",
        "reasoning_gym.py::test_scores_are_partial_and_only_1_is_right",
    ),
)

_KEEPING = (
    _fault(
        "checksums are saved and not compared",
        'if host["checksums"].get(name) != sums:',
        "if False:",
        "checkpoint.py::test_damage_is_seen_and_the_one_before_restored"
        "[a bit of the arrays at 25%]",
    ),
    _fault(
        "the host's state is taken as it is",
        "if _sealed(values) != host:",
        "if False:",
        "checkpoint.py::test_damage_is_seen_and_the_one_before_restored"
        "[other sums of the host]",
    ),
    _fault(
        "what is not finite is saved",
        "    if not_finite:\n      raise CheckpointError(",
        "    if False:\n      raise CheckpointError(",
        "checkpoint.py::test_what_is_not_finite_is_not_saved[nan]",
    ),
    _fault(
        "checksums do not see where an element is",
        "factor = position * jnp.uint32(2 * _A % 2**32) + jnp.uint32(1)",
        "position = jnp.zeros_like(position)\n"
        "  factor = position + jnp.uint32(1)",
        "checkpoint.py::test_a_checksum_sees_flipped_signs_and_swaps",
    ),
    _fault(
        "the best checkpoint is deleted",
        '      kept.add(distributed.from_first("best", found))\n',
        "      del found\n",
        "checkpoint.py::"
        "test_the_best_is_kept_and_none_goes_before_its_verdict"
        "[accuracies0-kept0]",
    ),
    _fault(
        "a run that lives loses its workdir to the next",
        "if holder is not None and not self._is_dead(holder):",
        "if False:",
        "workdir.py::test_a_lock_is_held_and_released",
    ),
    _fault(
        "a process id that was used again holds a workdir for ever",
        "    return _process_start(pid) == start\n",
        '    return _process_start(pid) != ""\n',
        "workdir.py::test_a_process_id_that_was_used_again_is_another_process",
    ),
    _fault(
        "a resumed run reads other data",
        "if before != after:\n",
        "if False:\n",
        "workdir.py::test_other_contents_are_refused",
    ),
    _fault(
        "a dump is shown besides the sentence",
        "hides = fatal or _SERVICE in line",
        "hides = _SERVICE in line",
        "lost_process.py::"
        "test_a_dump_becomes_a_sentence_that_names_the_lost",
    ),
    _fault(
        "answers go on to a file that failed",
        "      if failed:\n        return\n",
        "",
        "rollout.py::test_answers_that_cannot_be_kept_are_said_once",
    ),
)

_REWRITING = (
    _fault(
        "a rewriting that was cut is learned",
        "if not body or body[-1] not in self.teacher_stop_ids:",
        "if not body:",
        "rewriting.py::test_a_rewriting_that_fails_says_why",
    ),
    _fault(
        "rewritten tokens are decoded and encoded again",
        "return Taken((*body, stop))",
        "return Taken((*self.teacher.encode(self.teacher.decode(body)), stop))",
        "rewriting.py::test_what_is_learned_is_what_was_sampled",
    ),
    _fault(
        "masked rows count in the mean over rollouts",
        "rows = jnp.sum(jnp.any(mask, axis=1), dtype=jnp.int32)",
        "rows = jnp.int32(mask.shape[0])",
        "rewriting.py::test_the_gradient_is_that_of_a_dense_float64_reference",
    ),
    _fault(
        "an update without a token moves the weights",
        "finite & (total.rows > 0),",
        "finite,",
        "rewriting.py::test_if_all_rewritings_fail_nothing_is_learned",
    ),
)

_LORA = (
    _fault(
        "adapters forget their scale",
        "return out + lora.scale * linear(low, ",
        "return out + linear(low, ",
        "lora.py::test_adapters_compute_what_merged_weights_do[qwen3-targets0]",
    ),
    _fault(
        "adapters change the student from the start",
        "nnx.Param(jnp.zeros((*outputs, lora.rank)))",
        "nnx.Param(jnp.ones((*outputs, lora.rank)))",
        "lora.py::test_the_student_begins_as_its_base[qwen3-True]",
    ),
    _fault(
        "a merged export forgets the scale",
        "whole.astype(np.float32) + scale * (b @ a)",
        "whole.astype(np.float32) + b @ a",
        "lora.py::test_a_merged_export_equals_the_adapters[qwen3]",
    ),
    _fault(
        "a shared teacher is loaded once more",
        "      self.teacher_params = self.base\n    elif models.teacher",
        "      pass\n    if models.teacher",
        "lora.py::test_the_memory_holds_one_copy_of_the_base",
    ),
    _fault(
        "weights that are not trained cost as much as those that are",
        '"backward": 2 * once - frozen + again,',
        '"backward": 2 * once + again,',
        "lora.py::test_an_update_costs_what_the_ledger_says[none-all]",
    ),
)

_PLAN = (
    _fault(
        "SeqKD is planned as if its teacher stayed",
        "return Plan(learning, Programs(learning), built)",
        "return Plan(built, Programs(built), built)",
        "plan.py::"
        "test_a_plan_of_seqkd_is_of_the_teachers_answers_and_then_without_it",
    ),
)

FAULTS = (
    *_DISTILL,
    *_ROLLOUT,
    *_TRAIN,
    *_DATA,
    *_GYM,
    *_KEEPING,
    *_LORA,
    *_REWRITING,
    *_PLAN,
)
