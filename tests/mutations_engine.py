"""Planted bugs of generation: whom blocks belong to, what one pass computes, what the prefix cache finds."""

from mutations import Mutation

BATCH, BLOCKS, CACHE, PREFIX, STEP = (f"engine/{name}.py" for name in ("batch", "blocks", "cache", "prefix", "step"))
TEST_BATCH, TEST_CACHE, TEST_GENERATE = "test_engine_batch.py", "test_engine_cache.py", "test_engine_generate.py"
TEST_INVARIANT, TEST_PREFIX = "test_engine_invariant.py", "test_engine_prefix.py"
TEST_REQUESTS, TEST_SCHEDULER = "test_engine_requests.py", "test_engine_scheduler.py"
MIXED = [f"{TEST_BATCH}::test_one_pass_over_every_kind_of_work_equals_whole_ones"]
POOL = [f"{TEST_SCHEDULER}::test_the_pool_against_a_model"]
KEYS = [f"{TEST_SCHEDULER}::test_keys_depend_on_all_tokens_before_and_on_the_tenant"]
ALL_THERE = [f"{TEST_PREFIX}::test_a_prompt_that_is_all_there_computes_one_token_or_the_last_block"]
SECOND = [f"{TEST_PREFIX}::test_a_second_turn_computes_only_its_new_tokens"]
TENANTS = [f"{TEST_PREFIX}::test_tenants_do_not_find_each_others_prefixes"]
WHOLE = [f"{TEST_PREFIX}::test_prompt_logprobs_and_embedding_are_those_of_the_whole_pass"]
OF_N = [f"{TEST_INVARIANT}::test_of_n_completions_each_has_the_bits_of_its_own"]
FILLER = [f"{TEST_INVARIANT}::test_what_fills_a_tile_up_reaches_nobody"]
TILES = [f"{TEST_INVARIANT}::test_tiles_cover_a_work_and_end_where_blocks_do"]
PASSES = [f"{TEST_INVARIANT}::test_every_pass_is_one_block_of_one_request_in_fixed_order"]

MUTATIONS = [
    Mutation(
        CACHE,
        "width = config.cache_width if self.format is None",
        "width = config.cache_width + 1 if self.format is None",
        [f"{TEST_CACHE}::test_v3_costs_70272_bytes_a_token_in_bf16"],
        "a token costs more than latent and rope",
    ),
    Mutation(
        CACHE,
        "self.storage[:, target] = self.storage[:, source]",
        "self.storage[0, target] = self.storage[0, source]",
        [f"{TEST_CACHE}::test_a_copied_block_is_equal_and_its_own"],
        "a copied block lacks all layers but the first",
    ),
    Mutation(
        CACHE,
        "self.storage[:, block] = payload.view(self.storage.dtype)",
        "self.storage[:, block] = payload.flip(0).view(self.storage.dtype)",
        [f"{TEST_CACHE}::test_a_payload_restores_a_block"],
        "a block from disk is read backwards",
    ),
    Mutation(
        CACHE,
        "entry_NC.to(self.dtype) if self.format is None",
        "entry_NC.to(self.dtype) * (slots_N[:, None] % BLOCK > 0) if self.format is None",
        MIXED,
        "the first token of every block has no entry",
    ),
    Mutation(
        CACHE,
        "self.layers * self.storage.shape[-1]",
        "self.storage.shape[-1]",
        [f"{TEST_CACHE}::test_memory_is_what_was_given_or_what_all_rows_need"],
        "the cache takes a layer's memory for each layer too much",
    ),
    Mutation(
        BLOCKS,
        "hashlib.sha256(tenant.encode())",
        "hashlib.sha256(b'')",
        KEYS,
        "a tenant finds out by timing what another one asked",
    ),
    Mutation(
        BLOCKS,
        'sha256(key + array("q", ids).tobytes())',
        'sha256(array("q", ids).tobytes())',
        KEYS,
        "a block is found by its own tokens, whatever came before them",
    ),
    Mutation(
        BLOCKS,
        "popitem(last=False)",
        "popitem()",
        [*POOL, f"{TEST_PREFIX}::test_the_longest_unused_prefix_goes_first"],
        "the prefix used last goes first",
    ),
    Mutation(
        BLOCKS,
        "popitem(last=False)\n            self._withdraw(block)",
        "popitem(last=False)",
        POOL,
        "a block that was given away is still found under its old key",
    ),
    Mutation(
        BLOCKS,
        "self._references[block] += 1",
        "self._references[block] = 1",
        [*POOL, f"{TEST_PREFIX}::test_n_completions_compute_their_prompt_once"],
        "sharing does not count: the first to leave frees the others' block",
    ),
    Mutation(
        BLOCKS,
        "        self._kept.pop(block, None)\n",
        "",
        POOL,
        "a block found again may still be given away",
    ),
    Mutation(
        BLOCKS,
        "if self._references[block] == 0:\n",
        "if self._references[block] == 0:\n            self.withdraw(block)\n",
        SECOND,
        "prefixes are forgotten as soon as nobody uses them",
    ),
    Mutation(
        BLOCKS,
        "if key in self._by_key or block in self._keys:",
        "if block in self._keys:",
        [f"{TEST_SCHEDULER}::test_equal_blocks_are_published_once"],
        "a second equal block takes the first one's key, which then withdraws the wrong one",
    ),
    Mutation(
        BLOCKS,
        "        self._free += self._kept\n",
        "",
        POOL,
        "forgetting prefixes loses their blocks",
    ),
    Mutation(
        BATCH,
        "mask_BTS = torch.arange(slots, device=device) <= positions_BT",
        "mask_BTS = torch.arange(slots, device=device) < positions_BT",
        MIXED,
        "a decoded token does not see itself",
    ),
    Mutation(
        BATCH,
        "starts_B = torch.tensor([work.start for work in works], device=device)",
        "starts_B = torch.tensor([longest for _ in works], device=device)",
        MIXED,
        "a short row that decodes beside a longer one sees slots that are not its own",
    ),
    Mutation(
        BATCH,
        "positions_BT = starts_B[:, None] + torch.arange(width, device=device)",
        "positions_BT = starts_B[:, None] + torch.full((width,), width - 1)",
        MIXED,
        "tokens of a chunk see the later ones",
    ),
    Mutation(
        BATCH,
        "table_BM = np.zeros((len(works), count), dtype=np.int64)",
        "table_BM = np.ones((len(works), count), dtype=np.int64)",
        [f"{TEST_BATCH}::test_no_pass_reads_what_is_nobodys_or_anothers"],
        "what fills a short table up is somebody's block",
    ),
    Mutation(
        BATCH,
        "for place in range(work.start, work.start + work.count)]\n    slots",
        "for place in range(work.start + (work.start > 0), work.start + (work.start > 0) + work.count)]\n    slots",
        MIXED,
        "positions of a chunk are one too far",
    ),
    Mutation(
        BATCH,
        "return Batch(ordered, spans",
        "return Batch(list(works), spans",
        MIXED,
        "requests get each other's hidden states",
    ),
    Mutation(
        BATCH,
        "start += rows * width\n",
        "start += rows\n",
        MIXED,
        "the second part of a pass takes tokens of the first",
    ),
    Mutation(
        BATCH,
        "if place in new else place for place in range(BLOCK)]",
        "if place in new else _slot(work, first + place) for place in range(BLOCK)]",
        FILLER,
        "what fills a tile up is written over the request's own entries",
    ),
    Mutation(
        BATCH,
        "if place in new else place for place in range(BLOCK)]",
        "if place in new else BLOCK + place for place in range(BLOCK)]",
        FILLER,
        "what fills a tile up is written into somebody's block",
    ),
    Mutation(
        BATCH,
        "mask_BTS = (slots_S <= torch.arange(first, first + BLOCK",
        "mask_BTS = (slots_S <= torch.arange(first + BLOCK - 1, first + 2 * BLOCK - 1",
        FILLER,
        "in a tile a token sees what fills it up",
    ),
    Mutation(
        BATCH,
        "range((work.start // BLOCK + 1) * BLOCK, work.start",
        "range(work.start + BLOCK, work.start",
        TILES,
        "tiles do not end where blocks do",
    ),
    Mutation(
        STEP,
        "batches = [tile(self.cache, part) for part in parts] if self.invariant",
        "batches = [flat(self.cache, works)] if self.invariant",
        PASSES,
        "with batch_invariant the size of a pass depends on who else runs",
    ),
    Mutation(
        STEP,
        "with _evaluating(self.model), dispatch.fixed_order(self.invariant):",
        "with _evaluating(self.model), dispatch.fixed_order(False):",
        PASSES,
        "with batch_invariant an expert's sums depend on how many rows it got",
    ),
    Mutation(
        STEP,
        "return torch.cat([self.model.decoder.logits(row_1D.clone()) for row_1D in hidden_ND.split(1)])",
        "return self.model.decoder.logits(hidden_ND)",
        OF_N,
        "with batch_invariant the scores depend on how many requests get a token",
    ),
    Mutation(
        STEP,
        "        model.eval()\n",
        "        pass\n",
        [f"{TEST_GENERATE}::test_a_model_in_training_mode_is_left_as_it_was"],
        "generated tokens count as expert load in training",
    ),
    Mutation(
        STEP,
        "ids = torch.tensor(request.ids[work.start + 1 : work.start + 1 + inside]",
        "ids = torch.tensor(request.ids[work.start : work.start + inside]",
        WHOLE,
        "a prompt's log-probabilities are those of each token after itself",
    ),
    Mutation(
        STEP,
        "hidden_ND[last - work.start].float()",
        "hidden_ND[-1].float()",
        [f"{TEST_GENERATE}::test_refresh_in_the_middle_changes_nothing_about_the_prompt"],
        "the embedding is that of the last token computed, not of the prompt's",
    ),
    Mutation(
        STEP,
        "record(routing or {}, span, work.start)",
        "record(routing or {}, slice(0, span.stop - span.start), work.start)",
        [f"{TEST_REQUESTS}::test_routing_is_recorded_per_request_and_can_be_replayed"],
        "routing of ragged prompts is taken from other rows",
    ),
    Mutation(
        PREFIX,
        "key = root_key(request.wishes.tenant)\n        while self.enabled",
        'key = root_key("")\n        while self.enabled',
        TENANTS,
        "a tenant looks for its prefixes among those of nobody",
    ),
    Mutation(
        PREFIX,
        "while self.enabled and not request.wishes.needs_whole_prompt:",
        "while self.enabled:",
        [f"{TEST_PREFIX}::test_who_asks_about_the_prompt_gets_it_computed"],
        "what is asked about a prompt lacks the part that was cached",
    ),
    Mutation(
        PREFIX,
        "min(len(request.blocks) * BLOCK, len(request.ids) - 1)",
        "min(len(request.blocks) * BLOCK, len(request.ids) - 2)",
        ALL_THERE,
        "of a prompt that is all there two tokens are computed",
    ),
    Mutation(
        PREFIX,
        "range(len(request.keys), request.cached // BLOCK)",
        "range(len(request.keys), len(request.ids) // BLOCK)",
        [f"{TEST_GENERATE}::test_prefill_in_chunks_changes_nothing"],
        "blocks are published before all their tokens are computed",
    ),
    Mutation(
        PREFIX,
        "            self.pool.share(block)\n",
        "",
        SECOND,
        "a block that was found is not counted as used",
    ),
    Mutation(
        PREFIX,
        "        self.cache.load(block, payload)\n",
        "",
        [f"{TEST_PREFIX}::test_prefixes_survive_a_restart"],
        "a block found on disk is used without being read",
    ),
]
