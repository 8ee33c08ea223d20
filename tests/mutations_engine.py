"""Planted bugs of generation: the scheduler, the cache, stop strings."""

from mutations import Mutation

CACHE, ENGINE, REQUEST = "engine/cache.py", "engine/engine.py", "engine/request.py"
TEST_CACHE, TEST_GENERATE = "test_engine_cache.py", "test_engine_generate.py"
TEST_REQUESTS, TEST_GAP = "test_engine_requests.py", "test_engine_gap.py"
BATCH = f"{TEST_GENERATE}::test_any_batch_gives_what_each_request_gives_alone"
GREEDY = f"{TEST_GENERATE}::test_greedy_is_the_argmax_of_the_uncached_forward"

MUTATIONS = [
    Mutation(
        CACHE,
        "self.width = config.cache_width",
        "self.width = config.cache_width + 1",
        [f"{TEST_CACHE}::test_v3_costs_70272_bytes_a_token_in_bf16"],
        "a token costs more than latent and rope",
    ),
    Mutation(
        CACHE,
        "storage[:, :have_rows, :have_slots] = self.storage",
        "storage[:, :have_rows, :1] = self.storage[:, :, :1]",
        [f"{TEST_CACHE}::test_growth_keeps_every_row"],
        "growing loses what was cached",
    ),
    Mutation(
        CACHE,
        "self.storage[:, target, :length] = self.storage[:, source, :length]",
        "self.storage[:, target, : length - 1] = self.storage[:, source, : length - 1]",
        [BATCH, f"{TEST_CACHE}::test_move_overwrites_one_row_and_leaves_the_others"],
        "a moved row loses its last token",
    ),
    Mutation(
        ENGINE,
        "self.cache.move(len(self._running), row, last.cached)",
        "pass",
        [BATCH],
        "compaction forgets the cache",
    ),
    Mutation(
        ENGINE,
        "for row in reversed(range(len(moved))):",
        "for row in range(len(moved)):",
        [f"{TEST_REQUESTS}::test_rows_that_finish_together_all_leave_and_the_others_stay"],
        "of two rows that finish together one pushes a running one out",
    ),
    Mutation(
        ENGINE,
        "torch.tensor([len(new) - 1 for new in pending], device=device)",
        "torch.tensor([width - 1 for _ in pending], device=device)",
        [GREEDY],
        "short prompts are continued from their padding",
    ),
    Mutation(
        ENGINE,
        "starts_B = torch.tensor([request.cached for request in requests], device=device)",
        "starts_B = torch.tensor([max(r.cached for r in requests)] * len(requests), device=device)",
        [GREEDY],
        "all rows decode at the longest row's position",
    ),
    Mutation(
        ENGINE,
        "request.choice, len(request.ids))",
        "request.choice, row)",
        [f"{BATCH}"],
        "the noise depends on the row in the batch",
    ),
    Mutation(
        ENGINE,
        "            request.forget()\n",
        "",
        [f"{TEST_GENERATE}::test_refresh_recomputes_with_the_new_weights"],
        "refresh keeps what the old weights computed",
    ),
    Mutation(
        ENGINE,
        "        model.eval()\n",
        "        pass\n",
        [f"{TEST_GENERATE}::test_a_model_in_training_mode_is_left_as_it_was"],
        "generated tokens count as expert load in training",
    ),
    Mutation(
        ENGINE,
        "if limit > room or room < 1:",
        "if room < 1:",
        [f"{TEST_REQUESTS}::test_context_overflow_names_the_counts"],
        "the context overflows silently",
    ),
    Mutation(
        ENGINE,
        "return [*self.tokenizer.start_ids, *self.tokenizer.encode(prompt)]",
        "return self.tokenizer.encode(prompt)",
        [f"{TEST_REQUESTS}::test_a_text_prompt_starts_with_bos_and_ends_at_eos"],
        "a text prompt lacks its BOS",
    ),
    Mutation(
        ENGINE,
        "if tokenizer is None else tokenizer.eos_ids",
        "if tokenizer is None else frozenset({tokenizer.eos_id})",
        [f"{TEST_REQUESTS}::test_a_family_without_bos_gets_none_and_any_end_of_turn_stops"],
        "a reply that ends by another of the model's end tokens runs on",
    ),
    Mutation(
        ENGINE,
        "        finally:\n            for request in active:\n                self.cancel(request)",
        "        finally:\n            pass",
        [f"{TEST_REQUESTS}::test_closing_a_stream_or_generation_cancels_what_it_started"],
        "a caller that goes away leaves its requests running",
    ),
    Mutation(
        REQUEST,
        "experts_NK[row * width : row * width + count]",
        "experts_NK[row * count : row * count + count]",
        [
            f"{TEST_REQUESTS}::test_routing_is_recorded_per_request_and_can_be_replayed",
            f"{TEST_GAP}::test_logprob_gap_with_replayed_routing",
        ],
        "routing of ragged prompts is taken from other rows",
    ),
    Mutation(
        REQUEST,
        "keep = min(found) if found else len(answer) - self._open(answer)",
        "keep = min(found) if found else len(answer)",
        [f"{TEST_REQUESTS}::test_a_stop_string_ends_the_text_before_it_wherever_tokens_end"],
        "a stop string across tokens is half given out",
    ),
    Mutation(
        REQUEST,
        "        if not self._add(*self._split.flush()):\n            self.text.append(self._held)",
        "        self._add(*self._split.flush())",
        [f"{TEST_REQUESTS}::test_streamed_text_is_cut_exactly_at_the_first_stop"],
        "text that looked like a stop string is lost at the end",
    ),
    Mutation(
        REQUEST,
        "elif len(self.choices) == self.limit:",
        "elif len(self.choices) > self.limit:",
        [f"{TEST_REQUESTS}::test_max_tokens_ends_with_length"],
        "one token more than asked for",
    ),
    Mutation(
        REQUEST,
        "token_ids=self.ids[self.prompt_tokens :],",
        "token_ids=self.ids[self.prompt_tokens : -1],",
        [f"{TEST_REQUESTS}::test_stop_ids_and_ignore_eos"],
        "the token that ended a completion is missing",
    ),
]
