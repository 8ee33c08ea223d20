"""Planted bugs of sampling: what is drawn from, the noise, the fast choice, grammars."""

from mutations import Mutation

SAMPLING, GRAMMAR = "engine/sampling.py", "engine/grammar.py"
DRAW = "test_engine_sampling.py"
BRUTE = f"{DRAW}::test_distribution_equals_brute_force"

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
]
