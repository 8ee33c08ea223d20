"""Planted bugs of how cached entries are stored: their formats, and the blocks kept on disk."""

from mutations import Mutation

FORMAT, MARK = "kernels/cache_format.py", "engine/fingerprint.py"
TEST_FORMAT, TEST_MARK = "test_kernels_cache_format.py", "test_engine_fingerprint.py"
BOUND = f"{TEST_FORMAT}::test_error_is_bounded_number_by_number"
ALONE = f"{TEST_FORMAT}::test_rows_stand_alone"

MUTATIONS = [
    Mutation(
        FORMAT,
        "return scaled.round_()",
        "return scaled",
        [BOUND],
        "int8 entries are cut towards zero, which doubles their error and shrinks every latent",
    ),
    Mutation(
        FORMAT,
        "grouped.abs().amax(-1)",
        "grouped.amax(-1)",
        [BOUND],
        "large negative numbers of a latent overflow their code",
    ),
    Mutation(
        FORMAT,
        "amax(-1).clamp_",
        "amax((-1, -2), keepdim=True).squeeze(-1).expand(grouped.shape[:-1]).clone().clamp_",
        [f"{TEST_FORMAT}::test_large_and_small_groups_keep_their_own_scale"],
        "one scale for a whole token: small groups of a latent become zero",
    ),
    Mutation(
        FORMAT,
        "_TINY = 1e-12",
        "_TINY = 1e-6",
        [BOUND],
        "a latent of small numbers is stored as zero",
    ),
    Mutation(
        FORMAT,
        "bitwise_and_(-0x4080)",
        "bitwise_and_(0x7F80)",
        [f"{TEST_FORMAT}::test_every_code_of_e4m3_is_read_as_torch_reads_it"],
        "negative FP8 entries lose their sign",
    ),
    Mutation(
        FORMAT,
        "self._roped(out_NB).copy_(entry_NC[..., self.latent :])",
        "self._roped(out_NB).copy_(entry_NC[..., : self.rope])",
        [f"{TEST_FORMAT}::test_the_roped_key_is_kept_to_bfloat16"],
        "the roped key of the cache is a part of the latent",
    ),
    Mutation(
        FORMAT,
        "-(-latent // groups)",
        "latent // groups",
        [BOUND],
        "numbers at the end of a latent that its groups do not divide are lost",
    ),
    Mutation(
        FORMAT,
        "rows_NB[rows], rows_NC[rows]",
        "rows_NB[: len(rows_NC[rows])], rows_NC[rows]",
        [ALONE],
        "a cache larger than one tile is the first tile over and over",
    ),
    Mutation(
        MARK,
        "table.sum(1).view(torch.uint8), ",
        "",
        [f"{TEST_MARK}::test_numbers_that_change_places_change_it"],
        "rows of a matrix that change places leave the fingerprint as it was",
    ),
    Mutation(
        MARK,
        "parts = [raw[whole:]]",
        "parts = [raw[:0]]",
        [f"{TEST_MARK}::test_any_flipped_bit_changes_it"],
        "norms and the ends of tensors are not in the fingerprint",
    ),
    Mutation(
        MARK,
        ", *model.named_buffers())",
        ",)",
        [f"{TEST_MARK}::test_every_parameter_and_buffer_counts"],
        "quantised weights, which are buffers, are not in the fingerprint",
    ),
]
