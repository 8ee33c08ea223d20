"""What the engine generates, held against full uncached forward passes of the same model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Completion, Engine, Options, Sampling

CONFIG = tiny()
# These weights amplify rounding to 2e-5 of log-probability; test_engine_gap.py holds the tight bound.
TOLERANCE = 1e-4
GREEDY = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
LENGTHS = (7, 1, 30, 3, 12, 5, 18, 2)
PROMPTS = [tokens(length, seed=length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG)


def run(model, prompts, sampling, **options) -> list[Completion]:
    """Completions in the order of the prompts."""
    engine = Engine(model, max_batch=options.pop("max_batch", 16), options=options.pop("engine", None))
    done = list(engine.generate(prompts, sampling, **options))
    assert sorted(c.index for c in done) == list(range(len(prompts)))
    return sorted(done, key=lambda c: c.index)


def uncached(model, prompt: list[int], completion: Completion) -> torch.Tensor:
    """Logits that each new token was chosen from, by one forward pass over the whole sequence, [new, V]."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids]))[0]
    return logits[len(prompt) - 1 : -1]


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_group": 4, "topk_group": 2}, {"kv_lora_rank": 4}])
def test_greedy_is_the_argmax_of_the_uncached_forward(changes):
    model = tiny_model(tiny(**changes), seed=1)
    for prompt, completion in zip(PROMPTS, run(model, PROMPTS, GREEDY, max_batch=3), strict=True):
        assert len(completion.token_ids) == 24
        assert completion.token_ids == uncached(model, prompt, completion).argmax(-1).tolist()


def test_logprobs_are_those_of_the_uncached_forward(model):
    for temperature in (0, 1, 0.6):
        sampling = Sampling(max_tokens=24, temperature=temperature, top_p=1, logprobs=3, ignore_eos=True)
        for prompt, completion in zip(PROMPTS, run(model, PROMPTS, sampling), strict=True):
            expected = torch.log_softmax(uncached(model, prompt, completion) / (temperature or 1), dim=-1)
            chosen = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=TOLERANCE, rtol=0)
            top = torch.tensor([[p for _, p in alternatives] for alternatives in completion.top_logprobs])
            torch.testing.assert_close(top, expected.topk(3).values, atol=TOLERANCE, rtol=0)
            ids = torch.tensor([[i for i, _ in alternatives] for alternatives in completion.top_logprobs])
            torch.testing.assert_close(expected.gather(1, ids), top, atol=TOLERANCE, rtol=0)


def test_logprobs_of_a_truncated_distribution_are_renormalised(model):
    sampling = Sampling(max_tokens=24, temperature=0.9, top_k=5, ignore_eos=True, top_p=1)
    (completion,) = run(model, PROMPTS[:1], sampling)
    for logits, token, logprob in zip(
        uncached(model, PROMPTS[0], completion), completion.token_ids, completion.logprobs, strict=True
    ):
        kept = logits.topk(5)
        assert token in kept.indices
        expected = logits[token] / 0.9 - torch.logsumexp(kept.values / 0.9, 0)
        assert logprob == pytest.approx(expected.item(), abs=TOLERANCE)


@settings(max_examples=12)
@given(st.data())
def test_any_batch_gives_what_each_request_gives_alone(data):
    """Ragged prompts, own lengths, seeds and temperatures; rows are freed and taken at all times."""
    model = tiny_model(CONFIG, seed=2)
    count = data.draw(st.integers(2, 9))
    prompts = [tokens(data.draw(st.integers(1, 40)), seed=i).tolist() for i in range(count)]
    each = [
        Sampling(
            max_tokens=data.draw(st.integers(1, 20)), temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=i % 3
        )
        for i in range(count)
    ]
    together = run(model, prompts, each, max_batch=data.draw(st.integers(1, 4)))
    for prompt, sampling, completion in zip(prompts, each, together, strict=True):
        (alone,) = run(model, [prompt], sampling)
        assert completion.token_ids == alone.token_ids
        assert completion.finish_reason == alone.finish_reason
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=TOLERANCE)


def test_prefill_in_chunks_changes_nothing(model):
    prompts = [*PROMPTS, tokens(150, seed=1).tolist()]
    whole = run(model, prompts, GREEDY, engine=Options(step_tokens=2000))
    assert [c.token_ids for c in run(model, prompts, GREEDY, engine=Options(step_tokens=16))] == [
        c.token_ids for c in whole
    ]


def test_seeds_and_choices_tell_requests_apart(model):
    def draw(seed, choice=0):
        engine = Engine(model)
        request = engine.submit(PROMPTS[0], Sampling(max_tokens=20, temperature=1, seed=seed), choice=choice)
        while engine.busy:
            engine.step()
        return tuple(request.completion().token_ids)

    assert draw(1) == draw(1)
    assert len({draw(1), draw(2), draw(1, choice=1), draw(None), draw(None)}) == 5


def test_refresh_recomputes_with_the_new_weights(model):
    """Changed weights in the middle: every later token is what the new model says about the whole sequence."""
    old = run(model, PROMPTS[:3], GREEDY)
    changing = tiny_model(CONFIG)
    engine = Engine(changing, max_batch=2)
    requests = [engine.submit(prompt, GREEDY) for prompt in PROMPTS[:3]]
    for _ in range(10):
        engine.step()
    before = [len(request.ids) for request in requests]
    changing.load_state_dict(tiny_model(CONFIG, seed=7).state_dict())
    engine.refresh()
    while engine.busy:
        engine.step()
    for request, length, reference in zip(requests, before, old, strict=True):
        tail = request.ids[length:]
        with torch.no_grad():
            logits = changing(torch.tensor([request.ids]))[0]
        assert tail == logits[length - 1 : -1].argmax(-1).tolist()
        assert tail != reference.token_ids[-len(tail) :]


def test_refresh_in_the_middle_changes_nothing_about_the_prompt(model):
    """What is computed again with it goes on beyond its end."""
    wishes = {"prompt_logprobs": True, "embedding": True, "routing": True}
    once = next(Engine(model).generate([PROMPTS[2]], GREEDY, **wishes))
    engine = Engine(model)
    request = engine.submit(PROMPTS[2], GREEDY, **wishes)
    for _ in range(10):
        engine.step()
    engine.refresh()
    for _ in range(30):
        engine.step()
    again = request.completion()
    assert again.token_ids == once.token_ids
    assert again.prompt_logprobs == pytest.approx(once.prompt_logprobs, abs=TOLERANCE)
    torch.testing.assert_close(again.embedding, once.embedding, atol=TOLERANCE, rtol=TOLERANCE)
    for layer, experts in once.routing.items():
        assert torch.equal(again.routing[layer].sort(-1).values, experts.sort(-1).values)


def test_a_model_in_training_mode_is_left_as_it_was(model):
    training = tiny_model(CONFIG).train()
    assert [c.token_ids for c in run(training, PROMPTS, GREEDY)] == [c.token_ids for c in run(model, PROMPTS, GREEDY)]
    assert training.training and all(module.training for module in training.modules())
    assert all(router.load.sum() == 0 for _, router in training.routers())


def test_bfloat16_keeps_its_cache_in_bfloat16():
    model = tiny_model(CONFIG).bfloat16()
    engine = Engine(model, max_batch=4)
    done = list(engine.generate(PROMPTS, Sampling(max_tokens=8, ignore_eos=True)))
    assert engine.core.cache.storage.dtype == torch.bfloat16
    assert all(math.isfinite(p) for completion in done for p in completion.logprobs)
