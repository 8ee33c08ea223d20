"""Planted bugs of speculation: guesses must change how fast tokens come, never which, and only where it pays."""

from mutations import Mutation

CORE, REQUEST, SPECULATE, STEP = (f"engine/{name}.py" for name in ("core", "request", "speculate", "step"))
TEST = "test_engine_speculate.py"
RIGHT = [f"{TEST}::test_right_drafts_are_all_accepted_and_save_their_steps"]
WRONG = [f"{TEST}::test_wrong_drafts_are_counted_and_none_is_accepted"]
MTP = [f"{TEST}::test_mtp_drafts_are_what_the_module_says_about_the_whole_sequence"]
PACE = [f"{TEST}::test_a_request_stops_guessing_when_it_does_not_pay"]
BOTH = [f"{TEST}::test_pace_measures_both_ways"]
NGRAM = [f"{TEST}::test_repeated_text_is_guessed_from_its_last_occurrence"]
OFF = [f"{TEST}::test_an_engine_turns_bad_drafts_off_by_itself"]

MUTATIONS = [
    Mutation(
        STEP,
        "request.drafts[number] == choice.token",
        "request.drafts[number] >= 0",
        WRONG,
        "guesses are accepted without a look at the token that was drawn",
    ),
    Mutation(
        STEP,
        "[line.first + number for line in asked]",
        "[line.first for line in asked]",
        RIGHT,
        "the token after a guess is drawn from the distribution before it",
    ),
    Mutation(
        STEP,
        "if not request.done and number + 1 < line.count",
        "if number + 1 < line.count",
        [f"{TEST}::test_a_stop_among_accepted_drafts_is_the_last_token"],
        "tokens come after the one that ended the request",
    ),
    Mutation(
        CORE,
        "work.request.cached = min(work.start + work.count, len(work.request.ids) - 1)",
        "work.request.cached = work.start + work.count",
        [f"{TEST}::test_entries_of_wrong_drafts_do_not_count_as_cached"],
        "the entries of guesses that did not come count as cached",
    ),
    Mutation(
        CORE,
        "request.accepted += max(0, came - 1)",
        "request.accepted += came",
        RIGHT,
        "the token that came anyway counts as an accepted guess",
    ),
    Mutation(
        CORE,
        "            request.drafts = []\n            request.cached = len(request.ids) - 1",
        "            request.cached = len(request.ids) - 1",
        OFF,
        "guesses that did not come are guessed again",
    ),
    Mutation(
        CORE,
        "due = work.start + work.count - len(request.ids) + 1",
        "due = min(1, work.start + work.count - len(request.ids) + 1)",
        RIGHT,
        "guesses are computed and never looked at",
    ),
    Mutation(
        CORE,
        "request.speculating = self.pace.pays(request, len(works))",
        "request.speculating = True",
        OFF,
        "guesses that cost more than they win go on",
    ),
    Mutation(
        REQUEST,
        "+ self.drafts[max(0, start - known) : max(0, start + count - known)]",
        "+ self.drafts[max(0, start - known) + 1 : max(0, start + count - known) + 1]",
        RIGHT,
        "the first guess is left out of the pass, and the later ones stand in its place",
    ),
    Mutation(
        REQUEST,
        "experts_NK[: max(0, end - start)]",
        "experts_NK",
        [f"{TEST}::test_routing_leaves_out_the_guesses_that_did_not_come"],
        "routing has rows of guesses that did not come, and replay goes wrong after them",
    ),
    Mutation(
        SPECULATE,
        "w.request.sequence(w.start + 1, w.count)",
        "w.request.sequence(w.start, w.count)",
        MTP,
        "the module is given the token itself in place of the next one",
    ),
    Mutation(
        SPECULATE,
        "request.wishes.choice, len(request.ids) + number)",
        "request.wishes.choice, len(request.ids) + number + 1)",
        MTP,
        "a guess is drawn with the noise of the token after it",
    ),
    Mutation(
        SPECULATE,
        "hidden[id(work.request)] = row_D[None]",
        "hidden[id(work.request)] = hidden[id(work.request)][-1:]",
        [f"{TEST}::test_a_second_guess_is_made_from_the_first_and_the_modules_own_output"],
        "a second guess is made from the hidden state of the first",
    ),
    Mutation(
        SPECULATE,
        "ends = [(work, span.stop - 1) for",
        "ends = [(work, span.start) for",
        MTP,
        "after a prompt the module guesses what follows its first token",
    ),
    Mutation(
        SPECULATE,
        "plain = replace(request.sampling, **_NEUTRAL)",
        "plain = request.sampling",
        [f"{TEST}::test_mtp_guesses_without_what_only_the_next_token_may_know"],
        "guesses under a grammar or penalties fail for what only a real token has",
    ),
    Mutation(
        SPECULATE,
        "if after.start < len(work.request.blocks) * BLOCK:",
        "if after.start <= len(work.request.blocks) * BLOCK:",
        [f"{TEST}::test_a_guess_takes_no_new_block"],
        "a guess is written where the request has no block",
    ),
    Mutation(
        SPECULATE,
        "for end in range(max(self.size, request.indexed), len(ids)):",
        "for end in range(max(self.size, request.indexed), len(ids) + 1):",
        NGRAM,
        "the last tokens are found at the end of the text, where nothing follows",
    ),
    Mutation(
        SPECULATE,
        "seen[tuple(ids[end - self.size : end])] = end",
        "seen.setdefault(tuple(ids[end - self.size : end]), end)",
        [f"{TEST}::test_of_several_occurrences_the_last_one_counts"],
        "what is guessed followed long ago, not the last time",
    ),
    Mutation(
        SPECULATE,
        "request.ids[found : found + min(self.tokens, room(request))]",
        "request.ids[found + 1 : found + 1 + min(self.tokens, room(request))]",
        NGRAM,
        "guesses from repeated text are one token ahead",
    ),
    Mutation(
        SPECULATE,
        "return request.limit - len(request.choices) - 1",
        "return request.limit - len(request.choices)",
        WRONG,
        "a token is guessed that may not come any more",
    ),
    Mutation(
        SPECULATE,
        "return MTPDrafter.layers if",
        "return 0 if",
        ["test_engine_cache.py::test_a_token_costs_latent_and_rope_times_layers"],
        "the cache has no layer for the module",
    ),
    Mutation(
        SPECULATE,
        "* plain >= drafted - plain",
        "* plain <= drafted - plain",
        PACE,
        "guessing stops where it pays and goes on where it does not",
    ),
    Mutation(
        SPECULATE,
        "* plain >= drafted - plain",
        "* plain >= drafted",
        PACE,
        "the token that comes in any case is not counted",
    ),
    Mutation(
        SPECULATE,
        "if request.draft_passes < self.patience or",
        "if request.draft_passes > self.patience or",
        PACE,
        "the first wrong guess ends guessing",
    ),
    Mutation(
        SPECULATE,
        "known = self.drafted if drafted else self.plain",
        "known = self.plain if drafted else self.drafted",
        BOTH,
        "the times with and without guesses are swapped",
    ),
    Mutation(
        SPECULATE,
        "return self.passes % self.probe == 2",
        "return self.passes % self.probe != 2",
        BOTH,
        "nearly every pass goes without the guesses that were made",
    ),
]
