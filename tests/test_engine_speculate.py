"""Speculation: drafts change how fast tokens come, never which, and only stay on where they pay."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import ScriptedModel
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Engine, Options, Sampling
from finback.engine.blocks import BLOCK
from finback.engine.sampling import choose
from finback.engine.speculate import Advance, NgramDrafter, Pace, room, wants
from finback.errors import UserError

CONFIG = tiny(num_nextn_predict_layers=1)
MODEL = tiny_model(CONFIG, seed=3)
PROMPTS = [tokens(n, seed=n).tolist() for n in (4, 20, 37)]


class Oracle:
    """Knows what will come, and says it wrongly with probability 1 - rate."""

    layers = 0

    def __init__(self, known: dict[int, list[int]], rate: float, tokens: int) -> None:
        self.known, self.rate, self.tokens, self.random = known, rate, tokens, random.Random(0)

    def draft(self, advances) -> None:
        for request in (advance.request for advance in advances):
            if wants(request):
                ahead = self.known[request.prompt_tokens][len(request.ids) :][: min(self.tokens, room(request))]
                request.drafts = [t if self.random.random() < self.rate else (t + 1) % 53 for t in ahead]


def run(sampling, prompts=PROMPTS, drafter=None, **options):
    settings = Options(batch_invariant=True, adaptive=False, **options)
    engine = Engine(MODEL, max_batch=4, options=settings, drafter=drafter)
    done = sorted(engine.generate(prompts, sampling), key=lambda c: c.index)
    return done, engine.stats()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_drafts_of_any_quality_change_no_token_and_no_bit(data):
    """At any temperature, with penalties, a stop in the middle of accepted drafts, and the end of the budget."""
    sampling = Sampling(
        max_tokens=data.draw(st.integers(1, 30)),
        temperature=data.draw(st.sampled_from([0.0, 0.6, 1.3])),
        top_p=data.draw(st.sampled_from([0.8, 1.0])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 1.5])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
        stop_ids=data.draw(st.sampled_from([(), tuple(range(10, 18))])),
        seed=data.draw(st.integers(0, 5)),
        logprobs=2,
    )
    plain, _ = run(sampling)
    known = {len(p): [*p, *c.token_ids] for p, c in zip(PROMPTS, plain, strict=True)}
    drafter = Oracle(known, data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])), data.draw(st.integers(1, 5)))
    drafted, _ = run(sampling, drafter=drafter)
    for one, other in zip(plain, drafted, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert [p.hex() for p in one.logprobs] == [p.hex() for p in other.logprobs]
        assert one.top_logprobs == other.top_logprobs


@pytest.mark.parametrize("count", [1, 3])
def test_right_drafts_are_all_accepted_and_save_their_steps(count):
    sampling = Sampling(max_tokens=24, temperature=1, ignore_eos=True)
    plain, before = run(sampling, PROMPTS[:1])
    known = {len(PROMPTS[0]): [*PROMPTS[0], *plain[0].token_ids]}
    (drafted,), after = run(sampling, PROMPTS[:1], drafter=Oracle(known, 1.0, count))
    assert drafted.token_ids == plain[0].token_ids
    assert after.acceptance == 1.0
    assert drafted.drafted == drafted.accepted == after.drafted
    assert before.steps == 24 and after.steps == 1 + -(-23 // (count + 1))


def test_wrong_drafts_are_counted_and_none_is_accepted():
    plain, _ = run(Sampling(max_tokens=12, temperature=1, ignore_eos=True), PROMPTS[:1])
    known = {len(PROMPTS[0]): [*PROMPTS[0], *plain[0].token_ids]}
    (drafted,), stats = run(Sampling(max_tokens=12, temperature=1, ignore_eos=True), PROMPTS[:1], Oracle(known, 0.0, 2))
    assert (drafted.accepted, stats.accepted, stats.steps) == (0, 0, 12)
    assert drafted.drafted == 2 * 9 + 1, "two a step, as far as tokens may still come"


@pytest.mark.parametrize("temperature", [0, 1])
def test_mtp_drafts_are_what_the_module_says_about_the_whole_sequence(temperature):
    """Against an uncached pass of decoder and module over everything; drawn with the key of the token they guess."""
    engine = Engine(MODEL, max_batch=3, options=Options(speculate="mtp", adaptive=False, step_tokens=16))
    sampling = Sampling(max_tokens=20, temperature=temperature, seed=4, ignore_eos=True)
    requests = [engine.submit(p, sampling) for p in PROMPTS]
    (module,) = MODEL.mtp.values()
    checked = 0
    while engine.busy:
        engine.step()
        for request in requests:
            if request.drafts and not request.done:
                ids = torch.tensor([request.ids])
                with torch.no_grad():
                    hidden = MODEL.decoder(ids)[:, :-1]
                    logits = MODEL.decoder.logits(module(hidden, MODEL.decoder.embed_tokens(ids[:, 1:])))[0, -1]
                assert request.drafts == [choose(logits.numpy(), sampling, 4, 0, len(request.ids)).token]
                checked += 1
    assert checked > 20


def test_mtp_guesses_further_tokens_from_its_own_output():
    engine = Engine(MODEL, options=Options(speculate="mtp", draft_tokens=3, adaptive=False))
    (completion,) = engine.generate(PROMPTS[:1], Sampling(max_tokens=30, temperature=0, ignore_eos=True))
    plain = next(Engine(MODEL).generate(PROMPTS[:1], Sampling(max_tokens=30, temperature=0, ignore_eos=True)))
    assert completion.token_ids == plain.token_ids
    assert completion.drafted > 40


@pytest.mark.filterwarnings("error:speculation failed")
@pytest.mark.parametrize("length, guesses", [(14, 3), (15, 2), (16, 1), (31, 2), (32, 1)])
def test_a_guess_takes_no_new_block(length, guesses):
    """Behind the end of the request's blocks the module has nowhere to write: it stops guessing there."""
    engine = Engine(MODEL, options=Options(speculate="mtp", draft_tokens=3, adaptive=False))
    request = engine.submit(tokens(length, seed=1).tolist(), Sampling(max_tokens=20, temperature=0, ignore_eos=True))
    engine.step()
    assert len(request.drafts) == guesses and len(request.blocks) == -(-length // BLOCK)


def test_a_second_guess_is_made_from_the_first_and_the_modules_own_output():
    """Against one uncached pass of the module over the decoder's hidden states and, at the end, its own."""
    engine = Engine(MODEL, options=Options(speculate="mtp", draft_tokens=2, adaptive=False))
    request = engine.submit(PROMPTS[1], Sampling(max_tokens=20, temperature=0, ignore_eos=True))
    (module,) = MODEL.mtp.values()
    checked = 0
    for _ in range(20):
        engine.step()
        if len(request.drafts) == 2 and not request.done:
            ids = torch.tensor([[*request.ids, request.drafts[0]]])
            with torch.no_grad():
                hidden, embeds = MODEL.decoder(ids[:, :-2]), MODEL.decoder.embed_tokens(ids[:, 1:])
                first = module(hidden, embeds[:, :-1])[:, -1:]
                logits = MODEL.decoder.logits(module(torch.cat((hidden, first), 1), embeds))[0, -1]
            assert request.drafts[1] == logits.argmax().item()
            checked += 1
    assert checked > 5


def test_mtp_guesses_without_what_only_the_next_token_may_know():
    """A penalty or a bias counts for the token, not for the guess: it is asked without them."""
    plain = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    for more in ({"logit_bias": {9: 100.0}}, {"repetition_penalty": 1.5}, {"frequency_penalty": 2.0}):
        engine = Engine(MODEL, options=Options(speculate="mtp", adaptive=False))
        request = engine.submit(PROMPTS[0], replace(plain, **more))
        engine.step()
        ids = torch.tensor([request.ids])
        (module,) = MODEL.mtp.values()
        with torch.no_grad():
            out = module(MODEL.decoder(ids)[:, :-1], MODEL.decoder.embed_tokens(ids[:, 1:]))
            assert request.drafts == [MODEL.decoder.logits(out)[0, -1].argmax().item()]
        for _ in range(8):
            engine.step()
        assert len(request.choices) == 8 and request.error is None


def test_a_stop_among_accepted_drafts_is_the_last_token():
    plain = next(Engine(MODEL).generate(PROMPTS[:1], Sampling(max_tokens=24, temperature=1, ignore_eos=True)))
    stop = next(n for n in range(6, 24) if plain.token_ids[n] not in plain.token_ids[:n])
    known = {len(PROMPTS[0]): [*PROMPTS[0], *plain.token_ids]}
    sampling = Sampling(max_tokens=24, temperature=1, ignore_eos=True, stop_ids=(plain.token_ids[stop],))
    (drafted,), _ = run(sampling, PROMPTS[:1], drafter=Oracle(known, 1.0, 20))
    assert drafted.token_ids == plain.token_ids[: stop + 1] and drafted.finish_reason == "stop"


def test_entries_of_wrong_drafts_do_not_count_as_cached():
    """After every step exactly the last token is left to be computed, whatever was guessed."""
    plain = next(Engine(MODEL).generate(PROMPTS[:1], Sampling(max_tokens=24, temperature=0, ignore_eos=True)))
    known = {len(PROMPTS[0]): [*PROMPTS[0], *plain.token_ids]}
    engine = Engine(MODEL, options=Options(adaptive=False), drafter=Oracle(known, 0.5, 4))
    request = engine.submit(PROMPTS[0], Sampling(max_tokens=24, temperature=0, ignore_eos=True))
    for _ in range(24):
        engine.step()
        assert request.done or request.pending == 1
    assert request.completion().token_ids == plain.token_ids


def test_routing_leaves_out_the_guesses_that_did_not_come():
    """Drafts of every kind: all wrong, some wrong, all right; a pass that crosses a block, and the last token."""
    sampling = Sampling(max_tokens=30, temperature=0, ignore_eos=True)
    plain = next(Engine(MODEL).generate(PROMPTS[:1], sampling))
    known = {len(PROMPTS[0]): [*PROMPTS[0], *plain.token_ids]}
    ids = torch.tensor([known[len(PROMPTS[0])][:-1]])
    expected: dict[int, torch.Tensor] = {}
    MODEL.decoder(ids, routing=expected)
    for rate, invariant in ((0.0, False), (0.7, False), (1.0, False), (0.7, True)):
        options = Options(adaptive=False, batch_invariant=invariant)
        engine = Engine(MODEL, options=options, drafter=Oracle(known, rate, 5))
        (drafted,) = engine.generate(PROMPTS[:1], sampling, routing=True)
        assert drafted.drafted > 0 and drafted.routing.keys() == expected.keys()
        for layer, experts in expected.items():
            assert torch.equal(drafted.routing[layer].sort(-1).values, experts.sort(-1).values)


def test_mtp_needs_a_model_that_has_it():
    with pytest.raises(UserError, match="no multi-token prediction module"):
        Engine(tiny_model(tiny()), options=Options(speculate="mtp"))
    assert isinstance(Engine(tiny_model(tiny()), options=Options(speculate="auto")).core.drafter, NgramDrafter)


def test_repeated_text_is_guessed_from_its_last_occurrence():
    script = [2 + i % 7 for i in range(512)]
    engine = Engine(ScriptedModel(script), options=Options(speculate="ngram", adaptive=False))
    (completion,) = engine.generate([script[:12]], Sampling(max_tokens=50, temperature=0))
    assert completion.token_ids == script[12:62]
    stats = engine.stats()
    assert stats.acceptance == 1.0 and stats.steps <= 1 + -(-49 // 5)


def test_of_several_occurrences_the_last_one_counts():
    ids = [1, 2, 3, 40, 9, 1, 2, 3, 41, 8, 1, 2, 3]
    request = Engine(MODEL).submit(ids, Sampling(max_tokens=9))
    request.cached = len(ids) - 1
    drafter = NgramDrafter(tokens=2)
    drafter.draft([Advance(request, 0, torch.zeros(1))])
    assert request.drafts == [41, 8]


def test_a_request_stops_guessing_when_it_does_not_pay():
    """The clock says that a pass with drafts takes twice as long: half of them must come."""
    pace = Pace(patience=4)
    pace.note(1, False, 1.0)
    pace.note(1, True, 2.0)
    request = Engine(MODEL).submit([3], Sampling(max_tokens=9))
    request.draft_passes, request.accepted = 3, 0
    assert pace.pays(request, 1), "too early to tell"
    for passes, accepted, pays in [(10, 9, False), (10, 10, True), (10, 15, True), (10, 0, False)]:
        request.draft_passes, request.accepted = passes, accepted
        assert pace.pays(request, 1) == pays
    assert pace.pays(request, 7), "nothing is known about so many rows"


def test_pace_measures_both_ways():
    pace = Pace(probe=8)
    turns = [pace.plain_turn() for _ in range(24)]
    assert sum(turns) == 3
    for seconds in (1.0, 2.0):
        pace.note(4, True, seconds)
    assert pace.drafted == {4: pytest.approx(1.2)} and pace.plain == {}


def test_an_engine_turns_bad_drafts_off_by_itself():
    """Wrong guesses cost their passes; the request goes on without them and its tokens are the same."""
    plain = next(Engine(MODEL).generate(PROMPTS[:1], Sampling(max_tokens=200, ignore_eos=True)))
    known = {len(PROMPTS[0]): [*PROMPTS[0], *plain.token_ids]}
    engine = Engine(MODEL, options=Options(adaptive=True), drafter=Oracle(known, 0.0, 3))
    engine.core.pace.plain[1], engine.core.pace.drafted[1] = 1.0, 100.0
    (completion,) = engine.generate(PROMPTS[:1], Sampling(max_tokens=200, ignore_eos=True))
    assert completion.token_ids == plain.token_ids
    assert completion.drafted <= 3 * 17
