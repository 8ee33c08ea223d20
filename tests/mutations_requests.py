"""Planted bugs of a request's life: what is asked, when it stops, what is thinking, who is refused."""

from mutations import Mutation

CORE, ENGINE, REQUEST, TRANSCRIPT = (f"engine/{name}.py" for name in ("core", "engine", "request", "transcript"))
TEST_CACHE, TEST_FAULTS, TEST_GENERATE = "test_engine_cache.py", "test_engine_faults.py", "test_engine_generate.py"
TEST_PREFIX, TEST_REQUESTS = "test_engine_prefix.py", "test_engine_requests.py"
QUEUE = [f"{TEST_FAULTS}::test_a_full_queue_refuses_with_the_counts_and_when_to_come_again"]
BUDGET = [f"{TEST_FAULTS}::test_a_thinking_budget_closes_the_thinking_and_goes_on_with_the_answer"]
GRAMMAR = [f"{TEST_FAULTS}::test_a_grammar_binds_the_answer_and_not_the_thinking"]
LEARNS = [f"{TEST_PREFIX}::test_each_of_n_completions_learns_about_the_prompt"]

MUTATIONS = [
    Mutation(
        ENGINE,
        "own = replace(asked, choice=choice)",
        "own = asked",
        [f"{TEST_PREFIX}::test_n_completions_compute_their_prompt_once"],
        "all completions of a prompt are the same",
    ),
    Mutation(
        REQUEST,
        "self.seed, self.wishes.choice, len(self.ids)",
        "self.seed, self.arrival, len(self.ids)",
        [f"{TEST_GENERATE}::test_seeds_and_choices_tell_requests_apart"],
        "the noise depends on when a request came",
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
        "held = (self.core.pool.count - 1) * BLOCK",
        "held = self.core.pool.count * BLOCK",
        [f"{TEST_CACHE}::test_a_prompt_that_the_cache_cannot_hold_is_refused_with_the_counts"],
        "a request is taken that has no block left to copy a shared one",
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
        ENGINE,
        "waiting + requests > limits.max_queue + free:",
        "waiting + requests >= limits.max_queue + free:",
        QUEUE,
        "one request less may wait than was said",
    ),
    Mutation(
        ENGINE,
        "free = max(0, self.max_batch - len(queue.running))",
        "free = 0",
        QUEUE,
        "the queue is full while rows are free",
    ),
    Mutation(
        ENGINE,
        "queue.waiting_tokens + tokens > most:",
        "queue.waiting_tokens + tokens >= most:",
        QUEUE,
        "one prompt token less may wait than was said",
    ),
    Mutation(
        ENGINE,
        "if most is not None and queue.waiting and queue",
        "if most is not None and queue",
        [f"{TEST_FAULTS}::test_the_first_of_an_empty_queue_is_taken_whatever_its_length"],
        "a prompt longer than the queue is refused by an idle engine, for ever",
    ),
    Mutation(
        CORE,
        "request.deadline = time.monotonic() + request.wishes.deadline_s",
        "request.deadline = request.wishes.deadline_s",
        [f"{TEST_FAULTS}::test_a_deadline_ends_a_request_wherever_it_is"],
        "a deadline counts from when the machine was started",
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
    Mutation(
        REQUEST,
        "self._thought() >= budget:",
        "self._thought() > budget:",
        BUDGET,
        "one token of thinking more than was allowed",
    ),
    Mutation(
        REQUEST,
        "        elif self._grammar is not None:\n            mask",
        "        if self._grammar is not None:\n            mask",
        GRAMMAR,
        "the thinking, too, must follow the answer's grammar",
    ),
    Mutation(
        REQUEST,
        "elif self._grammar is not None and answering:",
        "elif self._grammar is not None:",
        GRAMMAR,
        "the grammar of the answer goes on with tokens of the thinking",
    ),
    Mutation(
        REQUEST,
        "answering = not self._thinks()\n        self.ids.append(choice.token)",
        "self.ids.append(choice.token)\n        answering = True",
        GRAMMAR,
        "the mark that ends the thinking counts as the answer's beginning",
    ),
    Mutation(
        REQUEST,
        "self.routing = list(leader.routing or ())",
        "pass",
        LEARNS,
        "the routing of all completions but the first begins after the prompt",
    ),
    Mutation(
        REQUEST,
        "self.embedding = leader.embedding",
        "pass",
        LEARNS,
        "only the first completion has the prompt's embedding",
    ),
    Mutation(
        REQUEST,
        "self.cached, self.hits = len(leader.ids) - 1, len(leader.ids)",
        "self.cached = len(leader.ids) - 1",
        [f"{TEST_PREFIX}::test_n_completions_compute_their_prompt_once"],
        "completions that share a prompt seem to have computed it",
    ),
    Mutation(
        REQUEST,
        "self._taken = (len(self._transcript.reasoning), len(self._transcript.text))",
        "self._taken = (thought, len(self._transcript.text))",
        [f"{TEST_REQUESTS}::test_stream_gives_the_same_text_piece_by_piece"],
        "streamed thinking is given out again",
    ),
    Mutation(
        TRANSCRIPT,
        "keep = min(found) if found else len(answer) - self._open(answer)",
        "keep = min(found) if found else len(answer)",
        [f"{TEST_REQUESTS}::test_a_stop_string_ends_the_text_before_it_wherever_tokens_end"],
        "a stop string across tokens is half given out",
    ),
    Mutation(
        TRANSCRIPT,
        "        if not self._add(*self._split.flush()):\n            self.text.append(self._held)",
        "        self._add(*self._split.flush())",
        [f"{TEST_REQUESTS}::test_streamed_text_is_cut_exactly_at_the_first_stop"],
        "text that looked like a stop string is lost at the end",
    ),
    Mutation(
        TRANSCRIPT,
        "self.thought += self._split.thinking\n",
        "self.thought += self._split.thinking and token not in self._split._marks\n",
        BUDGET,
        "the mark that ends the thinking is not counted with it",
    ),
]
