"""A request's life: joining, streaming, stopping, leaving, and what is refused. The tokens come from a script."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_model import ScriptedModel
from text_families import FAMILIES
from text_samples import trained
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Engine, Sampling
from finback.engine.request import Transcript
from finback.errors import UserError

TOKENIZER = trained()
QUESTION = [{"role": "user", "content": "What is 1 + 1?"}]


def scripted(reply: list[int], prompt: list[int], **options) -> Engine:
    """An engine whose model answers a prompt of this length with `reply`."""
    script = [0] * 512
    script[len(prompt) : len(prompt) + len(reply)] = reply
    return Engine(ScriptedModel(script), TOKENIZER, **options)


def complete(text: str, prompt: str = "hm", sampling: Sampling | None = None, eos: bool = True):
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
    reply = TOKENIZER.encode(text) + [TOKENIZER.eos_id] * eos
    (completion,) = scripted(reply, ids).generate([prompt], sampling or Sampling(temperature=0, max_tokens=60))
    return completion


def chat(reasoning: str, answer: str, **settings):
    from finback.text import example_ids

    message = {"role": "assistant", "content": answer, "reasoning": reasoning}
    prompt, reply = example_ids(TOKENIZER, [*QUESTION, message])
    sampling = Sampling(temperature=0, max_tokens=100, **settings)
    return scripted(reply, prompt), sampling, reply


def test_a_text_prompt_starts_with_bos_and_ends_at_eos():
    completion = complete("It is 42.")
    assert (completion.text, completion.reasoning, completion.finish_reason) == ("It is 42.", "", "stop")
    assert completion.prompt_tokens == 1 + len(TOKENIZER.encode("hm"))
    assert completion.token_ids == [*TOKENIZER.encode("It is 42."), TOKENIZER.eos_id]
    assert len(completion.logprobs) == len(completion.token_ids)


def test_a_family_without_bos_gets_none_and_any_end_of_turn_stops():
    qwen = FAMILIES["Qwen2.5"].tokenizer()
    for end in ("<|im_end|>", "<|endoftext|>"):
        script = [0] * len(qwen.encode("hm")) + qwen.encode("It is 42.") + [qwen.marks[end]]
        engine = Engine(ScriptedModel(script, qwen.vocab_size), qwen)
        (completion,) = engine.generate(["hm"], Sampling(temperature=0, max_tokens=50))
        assert completion.prompt_tokens == len(qwen.encode("hm"))
        assert (completion.text, completion.finish_reason) == ("It is 42.", "stop")
        assert completion.token_ids[-1] == qwen.marks[end]


def test_a_chat_is_split_into_thinking_and_answer():
    engine, sampling, reply = chat("1 and 1\nmake 2.", "It is 2.")
    (completion,) = engine.generate([QUESTION], sampling)
    assert (completion.reasoning, completion.text) == ("1 and 1\nmake 2.", "It is 2.")
    assert completion.token_ids == reply


def test_think_false_opens_the_answer_at_once():
    from finback.text import prompt_ids

    prompt = prompt_ids(TOKENIZER, QUESTION, think=False)
    engine = scripted([*TOKENIZER.encode("Two."), TOKENIZER.eos_id], prompt)
    (completion,) = engine.generate([QUESTION], Sampling(temperature=0), think=False)
    assert (completion.text, completion.reasoning, completion.prompt_tokens) == ("Two.", "", len(prompt))


@pytest.mark.parametrize("stop", ["answer is", "1577", "77.", "T", "7", ".", "\n\nThe"])
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(stop):
    text = "347 + 1230 = 1577.\n\nThe answer is 1577."
    completion = complete(text, sampling=Sampling(temperature=0, max_tokens=60, stop=stop))
    assert (completion.text, completion.finish_reason) == (text.partition(stop)[0], "stop")
    assert TOKENIZER.decode(completion.token_ids).startswith(completion.text + stop)
    assert TOKENIZER.eos_id not in completion.token_ids


def test_the_first_of_several_stop_strings_counts():
    completion = complete("abc def ghi", sampling=Sampling(temperature=0, max_tokens=60, stop=("ghi", "ef", "def")))
    assert completion.text == "abc "


def test_stop_strings_are_not_looked_for_in_the_thinking():
    engine, sampling, _ = chat("we STOP here", "we go on STOP now", stop="STOP")
    (completion,) = engine.generate([QUESTION], sampling)
    assert (completion.reasoning, completion.text) == ("we STOP here", "we go on ")


@given(st.text("ab", max_size=14), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_streamed_text_is_cut_exactly_at_the_first_stop(text, stops):
    """However the text arrives: nothing of a stop string is given out, and nothing else is kept back at the end."""
    transcript = Transcript(TOKENIZER, [], tuple(stops))
    borders = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    ended = any(transcript.push(token) for char in text for token in TOKENIZER.encode(char))
    if not ended:
        transcript.close()
    # The stop that is complete first wins; of two that end together, the one that begins first.
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert ended == bool(borders)
    assert "".join(transcript.text) == (text[: ends[0][1]] if ended else text)


def test_max_tokens_ends_with_length():
    completion = complete("one two three", sampling=Sampling(temperature=0, max_tokens=3))
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")
    assert completion.text == TOKENIZER.decode(TOKENIZER.encode("one two three")[:3])


def test_max_tokens_none_fills_the_context():
    model = ScriptedModel([5], context=256)
    (completion,) = Engine(model).generate([[7, 8, 9]], Sampling(temperature=0, max_tokens=None))
    assert (len(completion.token_ids), completion.finish_reason) == (253, "length")


def test_stop_ids_and_ignore_eos():
    model = ScriptedModel([2, 3, 4, 1, 5, 6])  # 1 is the EOS of the configuration
    prompt = [[2]]
    (stopped,) = Engine(model).generate(prompt, Sampling(temperature=0, stop_ids=(4,)))
    assert (stopped.token_ids, stopped.finish_reason) == ([3, 4], "stop")
    (ended,) = Engine(model).generate(prompt, Sampling(temperature=0))
    assert (ended.token_ids, ended.finish_reason) == ([3, 4, 1], "stop")
    (on,) = Engine(model).generate(prompt, Sampling(temperature=0, ignore_eos=True, max_tokens=5))
    assert (on.token_ids, on.finish_reason) == ([3, 4, 1, 5, 6], "length")


def test_stream_gives_the_same_text_piece_by_piece():
    engine, sampling, _ = chat("Größe 🐳\nis next.", "It is 🐋.\nTrue.")
    pieces = list(engine.stream(QUESTION, sampling))
    whole = pieces[-1].completion
    assert len(pieces) > 5
    assert all(piece.completion is None for piece in pieces[:-1])
    assert "".join(piece.reasoning for piece in pieces) == whole.reasoning == "Größe 🐳\nis next."
    assert "".join(piece.text for piece in pieces) == whole.text == "It is 🐋.\nTrue."
    assert not engine.busy


def test_text_without_a_tokenizer_is_empty_and_ids_are_all_there():
    (completion,) = Engine(ScriptedModel([5, 6, 7])).generate([[9]], Sampling(temperature=0, max_tokens=4))
    assert (completion.text, completion.reasoning, completion.token_ids) == ("", "", [6, 7, 5, 6])


def test_rows_are_taken_in_order_and_freed_at_once():
    engine = Engine(ScriptedModel([5]), max_batch=2)
    long, short, third = (engine.submit([7], Sampling(temperature=0, max_tokens=n)) for n in (6, 2, 1))
    assert engine.step() == [long, short]
    assert engine.step() == [long, short]
    assert short.done and not long.done
    assert engine.step() == [long, third]
    assert third.done
    assert engine.step() == [long]
    # Two requests were prefilled in one pass, then decoded in one pass.
    assert engine.model.decoder.passes[:2] == [(1, 2), (1, 2)]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=7))
def test_rows_that_finish_together_all_leave_and_the_others_stay(lengths):
    engine = Engine(ScriptedModel([5]), max_batch=5)
    requests = [engine.submit([7], Sampling(temperature=0, max_tokens=n)) for n in lengths]
    for _ in range(sum(lengths)):
        engine.step()
    assert [len(request.choices) for request in requests] == lengths
    assert all(request.done for request in requests) and not engine.busy


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancel_frees_the_row_and_harms_no_other(steps):
    model = tiny_model(tiny())
    prompts = [tokens(n, seed=n).tolist() for n in (9, 4, 14, 6)]
    greedy = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
    alone = {c.index: c.token_ids for c in Engine(model).generate(prompts, greedy)}
    for victim in range(4):
        engine = Engine(model, max_batch=2)
        requests = [engine.submit(prompt, greedy) for prompt in prompts]
        for _ in range(steps):
            engine.step()
        engine.cancel(requests[victim])
        assert requests[victim].completion().finish_reason == "cancelled"
        assert requests[victim] not in engine.step()
        while engine.busy:
            assert len(engine.step()) <= 2
        for index, request in enumerate(requests):
            assert index == victim or request.completion().token_ids == alone[index]
        assert requests[victim].completion().token_ids == alone[victim][: len(requests[victim].choices)]
        engine.cancel(requests[victim])  # twice is harmless


def test_closing_a_stream_or_generation_cancels_what_it_started():
    engine, sampling, _ = chat("some thought", "some text")
    stream = engine.stream(QUESTION, sampling)
    next(stream)
    assert engine.busy
    stream.close()
    assert not engine.busy
    engine = Engine(ScriptedModel([5]), max_batch=2)
    generation = engine.generate([[7], [7, 7], [7]], [Sampling(temperature=0, max_tokens=n) for n in (2, 50, 50)])
    assert next(generation).index == 0
    assert engine.busy
    generation.close()
    assert not engine.busy


def test_generate_reports_the_index_of_each_prompt_as_they_finish():
    lengths = [9, 2, 5, 1, 7, 3]
    each = [Sampling(temperature=0, max_tokens=n) for n in lengths]
    done = list(Engine(ScriptedModel([5]), max_batch=6).generate([[7]] * 6, each))
    assert [c.index for c in done] == sorted(range(6), key=lambda i: lengths[i])
    assert [len(c.token_ids) for c in done] == sorted(lengths)


def test_generate_takes_more_prompts_than_rows():
    done = list(Engine(ScriptedModel([5]), max_batch=3).generate([[7]] * 40, Sampling(temperature=0, max_tokens=2)))
    assert sorted(c.index for c in done) == list(range(40))
    assert list(Engine(ScriptedModel([5])).generate([])) == []


def test_context_overflow_names_the_counts():
    engine = Engine(ScriptedModel([5], context=256))
    with pytest.raises(UserError, match=r"prompt has 200 tokens and max_tokens is 57.* context of 256"):
        engine.submit([7] * 200, Sampling(max_tokens=57))
    engine.submit([7] * 200, Sampling(max_tokens=56))
    with pytest.raises(UserError, match=r"256 tokens .* context of 256"):
        engine.submit([7] * 256, Sampling(max_tokens=None))


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "empty"),
        ([3, 600], "token id 600; .* 0 to 599"),
        ([-1], "token id -1"),
        ("hm", "no tokenizer"),
        (QUESTION, "no tokenizer"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_before_anything_runs(prompt, message):
    engine = Engine(ScriptedModel([5]))
    with pytest.raises(UserError, match=message):
        list(engine.generate([[7], prompt]))
    assert not engine.busy and not engine.model.decoder.passes


def test_options_that_do_not_fit_are_refused():
    engine = Engine(ScriptedModel([5]))
    with pytest.raises(UserError, match="stop_ids"):
        engine.submit([7], Sampling(stop="x"))
    with pytest.raises(UserError, match="2 entries for 1 prompts"):
        list(engine.generate([[7]], [Sampling(), Sampling()]))
    with pytest.raises(UserError, match="list of prompts"):
        list(engine.generate("hm"))
    with pytest.raises(UserError, match="max_batch is 0"):
        Engine(ScriptedModel([5]), max_batch=0)
    with pytest.raises(UserError, match="do not belong together"):
        Engine(ScriptedModel([5], vocabulary=TOKENIZER.vocab_size - 1), TOKENIZER)


def test_routing_is_recorded_per_request_and_can_be_replayed():
    model = tiny_model(tiny())
    prompts = [tokens(n, seed=n).tolist() for n in (8, 3, 5)]
    plain, recorded = (
        sorted(
            Engine(model).generate(prompts, Sampling(max_tokens=5, ignore_eos=True), routing=r), key=lambda c: c.index
        )
        for r in (False, True)
    )
    for prompt, without, completion in zip(prompts, plain, recorded, strict=True):
        assert without.routing is None
        ids = torch.tensor([prompt + completion.token_ids[:-1]])
        expected: dict[int, torch.Tensor] = {}
        model(ids, routing=expected)
        assert completion.routing.keys() == expected.keys() == {1, 2}
        for layer, experts in expected.items():
            assert torch.equal(completion.routing[layer].sort(-1).values, experts.sort(-1).values)
