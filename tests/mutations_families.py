"""Planted bugs of the older and the plain families."""

from mutations import Mutation

MOE, GROUPED, ROPE, ATTENTION = "model/moe.py", "model/grouped.py", "model/rope.py", "model/attention.py"
FAMILY, SIZES, CONFIG = "model/family.py", "model/sizes.py", "model/config.py"
TEST = "test_families.py"
BOTH_WAYS = [f"{TEST}::test_what_is_published_gives_the_logits_and_tokens_of_transformers"]
V2 = [f"{TEST}::test_v2_weights_are_normalised_or_scaled_and_never_both"]

MUTATIONS = [
    Mutation(
        GROUPED,
        "if mask is None and query_BTHd.shape[1] < key.shape[1]:",
        "if False:",
        ["test_families.py::test_what_is_published_gives_the_logits_and_tokens_of_transformers"],
        "alone, every sixteenth token sees the first one only",
    ),
    Mutation(MOE, '"softmax" and self.config.norm_topk_prob', '"none"', V2, "V2 normalises and scales"),
    Mutation(MOE, "1 if bias is None else 2", "2", V2, "V2's groups are scored by their two best"),
    Mutation(MOE, 'if self.config.scoring_func == "sigmoid"', "if True", BOTH_WAYS, "V2's scores are V3's sigmoids"),
    Mutation(
        ATTENTION, "RMSNorm(self.rank, _EPS)", "RMSNorm(self.rank, 1e-2)", BOTH_WAYS, "the latent's eps is another"
    ),
    Mutation(GROUPED, ".transpose(-1, -2).flatten(-2)", ".flatten(-2)", BOTH_WAYS, "neighbours turn, not halves"),
    Mutation(
        GROUPED,
        "(x.repeat_interleave(group, dim=2) for x in (key, value))",
        "(x.repeat(1, 1, group, 1) for x in (key, value))",
        BOTH_WAYS,
        "heads read another group's keys in a prefill",
    ),
    Mutation(
        GROUPED,
        "mask.repeat_interleave(group, dim=1)",
        "mask.repeat(1, group, 1)",
        [*BOTH_WAYS, "test_families.py::test_a_cached_chunk_equals_the_whole"],
        "a query of a group has another's mask",
    ),
    Mutation(
        GROUPED,
        "query_BTHd.unflatten(2, (-1, group))",
        "query_BTHd.unflatten(2, (group, -1)).transpose(2, 3)",
        BOTH_WAYS,
        "heads read another group's keys when decoding",
    ),
    Mutation(
        ROPE, "return inverse * kept + inverse", "return inverse * 0 + inverse", BOTH_WAYS, "every wave is slowed"
    ),
    Mutation(FAMILY, "    qkv_bias=True,\n", "", BOTH_WAYS, "Qwen2's biases are left out"),
    Mutation(
        SIZES,
        "outputs = query + 2 * config.kv_heads * config.query_dim",
        "outputs = 3 * query",
        [f"{TEST}::test_sizes_count_what_is_there"],
        "shared keys are counted for every head",
    ),
    Mutation(
        CONFIG,
        "return 2 * self.kv_heads * self.query_dim",
        "return 2 * self.num_attention_heads * self.query_dim",
        [f"{TEST}::test_cache_numbers_per_token"],
        "the cache keeps shared keys for every head",
    ),
]
