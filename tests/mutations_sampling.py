"""Planted bugs of sampling: what is drawn from, the noise, the fast choice, grammars."""

from mutations import Mutation

SAMPLING, GRAMMAR = "engine/sampling.py", "engine/grammar.py"
DRAW = "test_engine_sampling.py"
FAST, GRAM = "test_engine_choose.py", "test_engine_grammar.py"
BRUTE = f"{DRAW}::test_distribution_equals_brute_force"

ROWS = f"{FAST}::test_every_row_of_a_batch_is_what_the_specification_says_of_it_alone"
LARGE = f"{FAST}::test_large_vocabularies_are_drawn_from_as_specified"
PENALTIES = f"{FAST}::test_penalties_and_bias_equal_brute_force"

MUTATIONS = [
    Mutation(
        SAMPLING,
        "key = np.array([seed % _WORD, choice % _WORD], dtype=np.uint64)",
        "key = np.array([(seed + choice) % _WORD, 0], dtype=np.uint64)",
        [f"{DRAW}::test_noise_depends_on_every_part_of_the_key_and_on_nothing_else"],
        "choice 1 of seed 4 repeats choice 0 of seed 5",
    ),
    Mutation(
        SAMPLING,
        "counter = np.array([0, position, 0, 0], dtype=np.uint64)",
        "counter = np.array([position, 0, 0, 0], dtype=np.uint64)",
        [f"{DRAW}::test_noise_depends_on_every_part_of_the_key_and_on_nothing_else"],
        "a position reuses its neighbour's noise, shifted by four tokens",
    ),
    Mutation(
        SAMPLING,
        "    for _ in range(2):\n",
        "    for _ in range(1):\n",
        [f"{DRAW}::test_noise_is_gumbel_distributed"],
        "exponential noise instead of Gumbel",
    ),
    Mutation(
        SAMPLING,
        "[before >= sampling.top_p]",
        "[before + weights[ranked[1:]] / weights[kept].sum() >= sampling.top_p]",
        [BRUTE],
        "top-p drops the token that reaches it",
    ),
    Mutation(
        SAMPLING,
        "scaled - np.log(weights[kept].sum()), -np.inf)",
        "scaled - np.log(weights.sum()), -np.inf)",
        [BRUTE],
        "log-probabilities of a truncated distribution are not renormalised",
    ),
    Mutation(
        SAMPLING,
        "kept[order[sampling.top_k :]] = False",
        "kept[order[sampling.top_k - 1 :]] = False",
        [BRUTE],
        "top-k keeps one too few",
    ),
    Mutation(
        SAMPLING,
        "    if not math.isfinite(highest):",
        "    if False:",
        [f"{DRAW}::test_logits_that_are_not_finite_are_named"],
        "broken weights babble",
    ),
    Mutation(
        SAMPLING,
        "seen > 0, seen / sampling",
        "seen < 0, seen / sampling",
        [PENALTIES],
        "the repetition penalty makes unlikely tokens that were seen likelier",
    ),
    Mutation(
        SAMPLING,
        "sampling.presence_penalty * (counts > 0)",
        "sampling.presence_penalty",
        [PENALTIES],
        "the presence penalty counts the prompt",
    ),
    Mutation(
        SAMPLING,
        "        self._counts[slot] += 1\n",
        "        self._counts[slot] = 1\n",
        [PENALTIES],
        "the frequency penalty is a second presence penalty",
    ),
    Mutation(
        SAMPLING,
        "self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])",
        "self._counts = np.zeros_like(self._ids)",
        [f"{FAST}::test_a_long_history_counts_every_token"],
        "after a while every count starts anew",
    ),
    Mutation(
        SAMPLING,
        "kept &= weights >= sampling.min_p",
        "kept &= weights / weights[kept].sum() >= sampling.min_p",
        [f"{FAST}::test_min_p_keeps_what_is_probable_enough_beside_the_likeliest"],
        "min-p is measured against everything, not against the likeliest",
    ),
    Mutation(
        SAMPLING,
        "np.flatnonzero(weights >= sampling.min_p)",
        "np.flatnonzero(weights > sampling.min_p)",
        [ROWS],
        "min-p 1 keeps nothing in the fast choice",
    ),
    Mutation(
        SAMPLING,
        "if drawn and 0 < sampling.top_k",
        "if 0 < sampling.top_k",
        [ROWS],
        "greedy log-probabilities are of a truncated distribution",
    ),
    Mutation(
        SAMPLING,
        "np.flatnonzero(scaled >= math.log((1 - top_p) / len(scaled) * total))",
        "np.flatnonzero(scaled >= math.log((1 - top_p) / 16 * total))",
        [LARGE],
        "top-p misses the many tokens of a flat distribution",
    ),
    Mutation(
        SAMPLING,
        "below = share[edge_bin - 1] if edge_bin else 0.0",
        "below = share[edge_bin]",
        [LARGE],
        "top-p of a flat distribution drops its edge",
    ),
    Mutation(
        SAMPLING,
        "        near = np.arange(len(scaled))\n",
        "        return near\n",
        [LARGE],
        "top-p just below 1 drops what rounding leaves over",
    ),
    Mutation(
        SAMPLING,
        "bits.advance(block - at)",
        "bits.advance(block)",
        [f"{FAST}::test_noise_at_a_few_ids_is_the_noise_of_the_vocabulary"],
        "the noise of a token depends on what else was kept",
    ),
    Mutation(
        SAMPLING,
        "        logits = logits[ids]\n    if not",
        "        logits = logits.copy()\n    if not",
        [ROWS],
        "a masked row chooses a token it must not",
    ),
    Mutation(
        SAMPLING,
        "chosen.update(zip(some, _greedy(logits_NV[some], [rows[n] for n in some]), strict=True))",
        "chosen.update(zip(some, _greedy(logits_NV[: len(some)], [rows[n] for n in some]), strict=True))",
        [ROWS],
        "greedy rows take the logits of others",
    ),
    Mutation(
        SAMPLING,
        "            except UserError as error:\n                chosen[n] = error\n",
        "            except UserError as error:\n                return [error] * len(rows)\n",
        [f"{FAST}::test_a_broken_row_gets_its_own_error_and_disturbs_no_other"],
        "one broken row ends every request of the batch",
    ),
    Mutation(
        GRAMMAR,
        "mask[self._eos_ids] = ends",
        "mask[self._eos_ids] = True",
        [f"{GRAM}::test_what_may_come_next_is_what_some_text_goes_on_with"],
        "an answer may end before its grammar is satisfied",
    ),
    Mutation(
        GRAMMAR,
        "        return self._compiled[grammar].copy()",
        "        return self._compiled[grammar]",
        [f"{GRAM}::test_states_of_one_grammar_go_on_independently"],
        "two requests share the state of their grammar",
    ),
    Mutation(
        GRAMMAR,
        "self._compiled.popitem(last=False)",
        "self._compiled.popitem()",
        [f"{GRAM}::test_only_the_grammars_used_last_are_kept"],
        "a full cache of grammars drops the newest",
    ),
    Mutation(
        GRAMMAR,
        "            self._mask = None\n",
        "            pass\n",
        [f"{GRAM}::test_every_answer_under_a_regex_matches_it_whole"],
        "the mask of the first token is used for all",
    ),
    Mutation(
        GRAMMAR,
        "(depth := _depth(schema)) > _MOST_DEPTH",
        "(depth := _depth(schema)) > 10 * _MOST_DEPTH",
        [f"{GRAM}::test_texts_that_are_not_allowed_are_named"],
        "schemas may be nested without end",
    ),
    Mutation(
        GRAMMAR,
        "limits=limits)",
        "limits=None)",
        [f"{GRAM}::test_what_costs_too_much_is_refused_on_one_line"],
        "a bomb holds up everybody, and its error has many lines",
    ),
]
