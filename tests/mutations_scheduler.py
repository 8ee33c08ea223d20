"""Planted bugs of the scheduler and the loop: who runs, who waits, who gives back blocks, and who fails."""

from mutations import Mutation

CORE, SCHEDULER, STATS = "engine/core.py", "engine/scheduler.py", "engine/stats.py"
TEST_FAULTS, TEST_GENERATE, TEST_PREFIX = "test_engine_faults.py", "test_engine_generate.py", "test_engine_prefix.py"
TEST_PLAN, TEST_SCHEDULER = "test_engine_plan.py", "test_engine_scheduler.py"
ALL_THERE = [f"{TEST_PREFIX}::test_a_prompt_that_is_all_there_computes_one_token_or_the_last_block"]
OF_N = [f"{TEST_PREFIX}::test_n_completions_compute_their_prompt_once"]
ROWS = [f"{TEST_PREFIX}::test_more_completions_than_rows_find_the_prompt_later"]
LEADER = [f"{TEST_PLAN}::test_who_waits_for_a_prompt_goes_on_when_its_leader_is_cancelled"]
BUDGET = [f"{TEST_PLAN}::test_a_step_computes_no_more_than_its_budget"]
ORDER = [f"{TEST_PLAN}::test_nobody_joins_without_blocks_and_nobody_overtakes"]
SHORT = [f"{TEST_SCHEDULER}::test_a_short_prompt_goes_before_the_rest_of_a_long_one"]
FULL = [f"{TEST_SCHEDULER}::test_a_full_cache_preempts_the_last_and_loses_nothing"]
FINITE = [f"{TEST_FAULTS}::test_numbers_that_are_not_finite_end_their_request_and_reach_no_other"]
RAISES = [f"{TEST_FAULTS}::test_a_pass_that_raises_ends_only_the_request_that_made_it"]
DEADLINE = [f"{TEST_FAULTS}::test_a_deadline_ends_a_request_wherever_it_is"]
HANGING = [f"{TEST_FAULTS}::test_a_hanging_step_is_told_once_and_seen_by_other_threads"]
STATISTICS = [f"{TEST_FAULTS}::test_statistics_add_up"]

MUTATIONS = [
    Mutation(
        SCHEDULER,
        "            self.waiting.remove(request)\n        self._release(request)",
        "            self.waiting.remove(request)",
        [f"{TEST_SCHEDULER}::test_a_cancelled_request_frees_its_blocks_at_once"],
        "who is cancelled keeps its blocks for ever",
    ),
    Mutation(
        SCHEDULER,
        "        request.forget()\n        insort(self.waiting, request, key=lambda other: other.arrival)",
        "        request.forget()\n        self.waiting.append(request)",
        [f"{TEST_PLAN}::test_who_gave_back_its_blocks_waits_in_its_place_by_arrival"],
        "who gave back its blocks waits behind all that came later",
    ),
    Mutation(
        SCHEDULER,
        "        request.forget()\n",
        "        request.blocks = []\n",
        [f"{TEST_GENERATE}::test_refresh_recomputes_with_the_new_weights"],
        "refresh keeps what the old weights computed",
    ),
    Mutation(
        SCHEDULER,
        "        for block in leader.blocks:\n            self.pool.share(block)\n",
        "",
        OF_N,
        "a shared prompt's blocks are freed by the first that ends",
    ),
    Mutation(
        SCHEDULER,
        "        if len(self.running) == self.max_batch:\n            return False\n",
        "",
        ROWS,
        "completions of one prompt take more rows than there are",
    ),
    Mutation(
        SCHEDULER,
        "return [work for work in works if work.request in self.running]",
        "return works",
        [f"{TEST_PLAN}::test_work_of_who_had_to_give_back_its_blocks_is_not_run"],
        "a pass computes tokens of a request that has no blocks any more",
    ),
    Mutation(
        SCHEDULER,
        "self._prompts(self.budget - sum(self.cost.of(work.count, work.start) for work in works))",
        "self._prompts(self.budget)",
        BUDGET,
        "decoding costs nothing: a step takes as long again",
    ),
    Mutation(
        SCHEDULER,
        "self._prompts(self.budget - sum(self.cost.of(work.count, work.start) for work in works))",
        "self._prompts(1e9)",
        BUDGET,
        "a long prompt is computed in one step, and all others wait for it",
    ),
    Mutation(
        SCHEDULER,
        "                budget -= self.cost.of(count, request.cached)\n",
        "",
        BUDGET,
        "each of several prompts takes the whole budget",
    ),
    Mutation(
        SCHEDULER,
        "budget < self.cost.of(BLOCK, request.cached)",
        "budget < 0",
        BUDGET,
        "the last prompt of a step gets a block that the budget has not",
    ),
    Mutation(
        SCHEDULER,
        "if request not in self.running or (works and budget",
        "if request not in self.running or (budget",
        [f"{TEST_SCHEDULER}::test_an_exhausted_budget_still_moves_the_prompts_on"],
        "while many decode no prompt moves on",
    ),
    Mutation(
        SCHEDULER,
        "rest.sort(key=lambda request: (request.pending, request.arrival))",
        "rest.sort(key=lambda request: request.arrival)",
        SHORT,
        "a short prompt waits for all of a long one",
    ),
    Mutation(
        SCHEDULER,
        "if self._passed_over >= _PATIENCE:",
        "if self._passed_over >= 10**9:",
        [f"{TEST_SCHEDULER}::test_a_long_prompt_is_not_passed_over_for_ever"],
        "a long prompt starves while short ones come",
    ),
    Mutation(
        SCHEDULER,
        "self._passed_over = 0 if served else self._passed_over + 1",
        "self._passed_over += 1",
        SHORT,
        "after a few steps the oldest prompt always goes first",
    ),
    Mutation(
        SCHEDULER,
        "force=request is self.running[0]",
        "force=False",
        [f"{TEST_PLAN}::test_work_of_who_had_to_give_back_its_blocks_is_not_run"],
        "the first of all waits for blocks that later ones hold",
    ),
    Mutation(
        SCHEDULER,
        "            if request.leader is not None:\n                continue\n",
        "",
        OF_N,
        "the prompt of n completions is computed n times",
    ),
    Mutation(
        SCHEDULER,
        "            if self.running and needed > self.pool.available:\n                return\n",
        "",
        ORDER,
        "requests join for whom there are no blocks, only to give them back",
    ),
    Mutation(
        SCHEDULER,
        "            if self.running and needed > self.pool.available:\n                return\n",
        "            if self.running and needed > self.pool.available:\n                continue\n",
        ORDER,
        "short requests overtake a long one for as long as they come",
    ),
    Mutation(
        SCHEDULER,
        "if held is not None and self.pool.references(held) == 1 and not self.pool.published(held):",
        "if held is not None and self.pool.references(held) == 1:",
        ALL_THERE,
        "a published block is written to, and others read what they did not ask for",
    ),
    Mutation(
        SCHEDULER,
        "if held is not None and self.pool.references(held) == 1 and not self.pool.published(held):",
        "if held is not None and not self.pool.published(held):",
        OF_N,
        "completions of one prompt write into the block they share",
    ),
    Mutation(
        SCHEDULER,
        "                self._copy(held, block)\n",
        "",
        ALL_THERE,
        "who needs a block of its own gets an empty one",
    ),
    Mutation(
        SCHEDULER,
        "                self.pool.release(held)\n",
        "",
        ALL_THERE,
        "a block that was copied is never free again",
    ),
    Mutation(
        SCHEDULER,
        "victim = self.running[-1]",
        "victim = self.running[0]",
        FULL,
        "the first to come gives back its blocks, and nothing gets done",
    ),
    Mutation(
        SCHEDULER,
        "while not self._reserve(request, count):",
        "while not self._reserve(request, count, force=True):",
        [f"{TEST_FAULTS}::test_after_a_failure_even_the_last_gets_its_blocks"],
        "after a failure the last takes its own blocks, again and again",
    ),
    Mutation(
        SCHEDULER,
        "for block in reversed(request.blocks):",
        "for block in request.blocks:",
        [f"{TEST_PREFIX}::test_the_end_of_a_prefix_goes_before_its_beginning"],
        "the beginning of a prefix goes first, and with it all of it",
    ),
    Mutation(
        SCHEDULER,
        "return count + min(pairs * self.near, pairs * self.far + (depth + count) * self.expand)",
        "return count + pairs * self.near",
        [f"{TEST_SCHEDULER}::test_the_cheaper_form_of_attention_sets_the_cost"],
        "long chunks seem dearer than they are",
    ),
    Mutation(
        CORE,
        "lines += [Line(other, first, 1, len(other.ids)) for other in self._followers(request)]",
        "lines += [Line(other, 0, 1, len(other.ids)) for other in self._followers(request)]",
        [f"{TEST_PREFIX}::test_n_completions_of_several_prompts_begin_with_their_own"],
        "completions of one prompt begin with a token of another",
    ),
    Mutation(
        CORE,
        "if not request.done and self.scheduler.fork(leader, request):",
        "if self.scheduler.fork(leader, request):",
        LEADER,
        "a completion that was cancelled before its prompt was computed takes the others with it",
    ),
    Mutation(
        CORE,
        "            follower.leader = None\n        request.followers = []",
        "            pass\n        request.followers = []",
        LEADER,
        "who waits for the prompt of a cancelled request waits for ever",
    ),
    Mutation(
        CORE,
        "                self.counters.prompt_tokens += request.prompt_tokens\n",
        "",
        OF_N,
        "more tokens are found in the cache than were asked for",
    ),
    Mutation(
        CORE,
        "first = request.hits is None",
        "first = True",
        FULL,
        "the prompt of a request that gave back its blocks counts twice",
    ),
    Mutation(
        CORE,
        "            if work.request.error is None:\n",
        "            if True:\n",
        FINITE,
        "others find what a failed request left in its blocks",
    ),
    Mutation(
        CORE,
        "            self.pool.withdraw(block)\n",
        "            pass\n",
        FINITE,
        "blocks that were wiped are still found",
    ),
    Mutation(
        CORE,
        "[block for block in request.blocks if self.pool.references(block) == 1]",
        "request.blocks",
        [f"{TEST_FAULTS}::test_a_failed_request_leaves_shared_blocks_as_they_are"],
        "a failed request wipes blocks that others still read",
    ),
    Mutation(
        CORE,
        "        self.cache.clear([block for block in request.blocks if self.pool.references(block) == 1])\n",
        "",
        FINITE,
        "numbers that are not finite stay in blocks that others get",
    ),
    Mutation(
        CORE,
        "        moved += [work.request for work in works if work.request.done and work.request not in moved]\n",
        "",
        FINITE,
        "a request that failed keeps its row and its blocks",
    ),
    Mutation(
        CORE,
        "            work.request.suspect = True\n",
        "",
        RAISES,
        "after a failure the same pass is tried again for ever",
    ),
    Mutation(
        CORE,
        "            request.suspect = False\n",
        "",
        [f"{TEST_FAULTS}::test_a_failure_while_decoding_leaves_the_others_whole"],
        "after a failure requests run one after the other",
    ),
    Mutation(
        CORE,
        "if r.deadline is not None and r.deadline < now",
        "if r.deadline is not None and r.deadline < 0",
        DEADLINE,
        "deadlines are ignored",
    ),
    Mutation(
        CORE,
        "r for r in self.scheduler.waiting + self.scheduler.running if",
        "r for r in self.scheduler.running if",
        DEADLINE,
        "who waits is not ended at its deadline",
    ),
    Mutation(
        CORE,
        "        self.pool.forget()\n",
        "",
        [f"{TEST_PREFIX}::test_refresh_drops_every_prefix"],
        "refresh keeps prefixes of the old weights",
    ),
    Mutation(
        CORE,
        "        self.prefix.disk = self._disk()\n",
        "",
        [f"{TEST_PREFIX}::test_refresh_parts_with_what_the_old_weights_left_on_disk"],
        "refresh finds prefixes of the old weights on disk",
    ),
    Mutation(
        CORE,
        "for request in list(self.scheduler.running):\n            self.scheduler.requeue(request)",
        "for request in list(self.scheduler.running):\n            pass",
        [f"{TEST_GENERATE}::test_refresh_recomputes_with_the_new_weights"],
        "running requests go on from what the old weights computed",
    ),
    Mutation(
        CORE,
        "- before\n            self.counters.step",
        "\n            self.counters.step",
        STATISTICS,
        "tokens are counted again in every step",
    ),
    Mutation(
        STATS,
        "self.ended, self.began = time.monotonic(), None",
        "self.ended = time.monotonic()",
        HANGING,
        "a step that has ended seems to run for ever",
    ),
    Mutation(
        STATS,
        "if began is not None and began != told and running > self._limit_s:",
        "if began is not None and running > self._limit_s:",
        HANGING,
        "a step that hangs is told many times",
    ),
    Mutation(
        STATS,
        "(self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)",
        "(self.ends[-1] - self.ends[0])",
        [f"{TEST_FAULTS}::test_when_to_come_again_is_the_time_between_two_that_leave"],
        "who is refused is sent away for as long as the last 32 requests took",
    ),
]
