"""Training data: endless, the same for the same seed, never a held-out problem, and continued exactly."""

import json
from functools import cache
from pathlib import Path

import pytest
import tiny_recipe
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_recipe import stage

from finback.errors import UserError
from finback.kernels.reference import IGNORED
from finback.tasks import TASKS, is_held_out
from finback.text import Tokenizer
from finback.train import data
from finback.train.data import NOBODY, Conversations, Examples
from finback.train.pretrain import PretrainStream
from finback.train.run import make_tokenizer
from finback.train.sft import SftStream


@cache
def tokenizer() -> Tokenizer:
    text = ["Sort 12, 7 and 305 from small to large.", "How many r's are in strawberry?"]
    return Tokenizer.train(text, 300)


class Numbered:
    """Example i: a prompt of i, then a reply of i, in lengths that vary; ids count through everything."""

    def __init__(self, lengths=(5, 17, 3, 29, 8, 40, 11)) -> None:
        self.lengths = lengths

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        length = self.lengths[i % len(self.lengths)]
        prompt = 1 + i % (length - 1)
        ids = [1000 * i + n for n in range(length)]
        return ids[:prompt], ids[prompt:]


def test_an_example_follows_from_seed_stage_and_index_alone():
    first = Conversations(stage(tasks={"sorting": 1.0, "letters": 1.0}, multi_turn=0.5, no_think=0.5), 7)
    forward = [first[i] for i in range(20)]
    assert [first[i] for i in reversed(range(20))] == forward[::-1]
    assert [
        Conversations(stage(tasks={"sorting": 1.0, "letters": 1.0}, multi_turn=0.5, no_think=0.5), 7)[i]
        for i in range(20)
    ] == forward
    assert Conversations(stage(), 8)[0] != Conversations(stage(), 7)[0]
    assert Conversations(stage(name="t"), 7)[0] != Conversations(stage(), 7)[0]
    assert len({json.dumps(example) for example in forward}) > 15


def test_no_held_out_problem_is_ever_drawn(monkeypatch):
    drawn = []
    real = data.draw
    monkeypatch.setattr(data, "draw", lambda *args: drawn.append(real(*args)) or drawn[-1])
    conversations = Conversations(stage(tasks=dict.fromkeys(TASKS, 1.0), easier=0.5), 1)
    for i in range(300):
        conversations[i]
    assert {problem.task for problem in drawn} == set(TASKS)
    assert not any(is_held_out(problem) for problem in drawn)


def test_the_mixture_is_what_the_recipe_says(monkeypatch):
    drawn = []
    real = data.draw
    monkeypatch.setattr(data, "draw", lambda *args: drawn.append(real(*args)) or drawn[-1])
    mixed = stage(tasks={"sorting": 3.0, "letters": 1.0, "bases": 0.0}, no_think=0.25, multi_turn=0.5, easier=0.4)
    examples = [Conversations(mixed, 5)[i] for i in range(600)]
    turns = [len(messages) // 2 for messages, _ in examples]
    assert 0.19 < sum(not think for _, think in examples) / 600 < 0.31
    assert 0.43 < sum(n > 1 for n in turns) / 600 < 0.57 and set(turns) == {1, 2, 3}
    share = sum(problem.task == "sorting" for problem in drawn) / len(drawn)
    assert 0.70 < share < 0.80 and {problem.task for problem in drawn} == {"sorting", "letters"}
    usual = TASKS["sorting"].default
    levels = [problem.difficulty for problem in drawn if problem.task == "sorting"]
    assert set(levels) == set(range(1, usual + 1))
    assert 0.34 < sum(level < usual for level in levels) / len(levels) < 0.46


def test_only_the_last_reply_of_a_conversation_thinks_and_only_where_it_should():
    conversations = Conversations(stage(no_think=0.5, multi_turn=0.7), 2)
    for i in range(40):
        messages, think = conversations[i]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert not any("reasoning" in message for message in messages[:-1])
        assert bool(messages[-1].get("reasoning")) == think


def test_examples_are_the_chat_format(tmp_path):
    words = tokenizer()
    conversations = Conversations(stage(no_think=0.5), 2)
    examples = Examples(conversations, words)
    for i in range(10):
        (question, answer), think = conversations[i]
        prompt, reply = examples[i]
        assert prompt[0] == words.bos_id and prompt.count(words.bos_id) == 1
        assert words.decode(prompt[1:]) == question["content"] + ("\n" if think else "")
        assert reply[-1] == words.eos_id and (words.end_think_id in reply) == think
        thought = f"{answer['reasoning']}\n\n\n" if think else ""
        assert words.decode(reply) == thought + answer["content"]


@pytest.mark.parametrize(("sequence", "ahead"), [(16, 1), (16, 2), (7, 3), (64, 2)])
def test_pretraining_predicts_every_token_of_the_joined_examples_once(sequence, ahead):
    stream = PretrainStream(Numbered(), 3, sequence, ahead, {})
    batches = [stream.batch() for _ in range(5)]
    joined = [token for i in range(100) for part in Numbered()[i] for token in part]
    for offset in range(1, ahead + 1):
        predicted = torch.cat([batch.targets(offset) for batch in batches]).flatten().tolist()
        assert predicted == joined[offset : offset + len(predicted)]
    for batch in batches:
        assert batch.positions_BT is None  # attention crosses examples
        assert torch.equal(batch.owners_BW, batch.ids_BW // 1000)
        assert batch.tokens() == 3 * sequence
    read = torch.cat([batch.ids_BW[:, :sequence] for batch in batches]).flatten().tolist()
    assert read == joined[: len(read)]


@pytest.mark.parametrize(("sequence", "ahead"), [(64, 1), (64, 2), (40, 3)])
def test_sft_packs_whole_examples_that_do_not_see_each_other(sequence, ahead):
    stream = SftStream(Numbered(), 2, sequence, ahead, -5, {})
    seen = []
    for _ in range(30):
        batch = stream.batch()
        assert batch.positions_BT is not None and batch.ids_BW.shape == (2, sequence + ahead)
        for row in range(2):
            ids, owners = batch.ids_BW[row].tolist(), batch.owners_BW[row].tolist()
            there = [i for i in dict.fromkeys(owners) if i != NOBODY]
            seen += there
            content = [token for i in there for part in Numbered()[i] for token in part]
            assert len(content) <= sequence + 1
            assert ids == content + [-5] * (sequence + ahead - len(content))
            starts = [n for n, token in enumerate(ids) if token % 1000 == 0 and token >= 0]
            positions = batch.positions_BT[row].tolist()
            for n in range(min(len(content), sequence)):
                assert positions[n] == ids[n] % 1000
            assert all(position == 0 for position in positions[len(content) :])
            assert len(starts) == len(there)
    assert len(set(seen)) == len(seen)
    assert set(range(len(seen) - 80)) <= set(seen)  # nothing waits for ever


def test_sft_learns_exactly_the_replies():
    for ahead in (1, 2):
        batch = SftStream(Numbered(), 2, 64, ahead, -5, {}).batch()
        examples = Numbered()
        for offset in range(1, ahead + 1):
            targets = [t for t in batch.targets(offset).flatten().tolist() if t != IGNORED]
            expected = []
            for row in range(2):
                for i in dict.fromkeys(batch.owners_BW[row].tolist()):
                    if i != NOBODY:
                        prompt, reply = examples[i]
                        # the first reply tokens can only be predicted from `offset` tokens before them
                        expected += reply[max(0, offset - len(prompt)) :]
            assert targets == expected


def test_sft_leaves_out_what_does_not_fit_and_counts_it():
    stream = SftStream(Numbered((5, 30)), 1, 20, 1, -5, {})
    owners = {i for _ in range(20) for i in stream.batch().examples()}
    assert owners and all(i % 2 == 0 for i in owners)
    assert stream.state["dropped"] == stream.state["next"] // 2
    with pytest.raises(UserError, match="sequence = 3"):
        SftStream(Numbered((5, 30)), 1, 3, 1, -5, {}).batch()


@settings(max_examples=30)
@given(before=st.integers(0, 6), kind=st.sampled_from(["pretrain", "sft"]), rows=st.integers(1, 3))
def test_a_stream_continues_from_its_state_through_json(before, kind, rows):
    def stream(state):
        if kind == "pretrain":
            return PretrainStream(Numbered(), rows, 24, 2, state)
        return SftStream(Numbered(), rows, 48, 2, -5, state)

    whole = stream({})
    for _ in range(before):
        whole.batch()
    resumed = stream(json.loads(json.dumps(whole.state)))
    for _ in range(3):
        ours, theirs = whole.batch(), resumed.batch()
        assert torch.equal(ours.ids_BW, theirs.ids_BW) and torch.equal(ours.predicted_BW, theirs.predicted_BW)
        assert torch.equal(ours.owners_BW, theirs.owners_BW)
        assert whole.state == resumed.state
    assert len(json.dumps(whole.state)) < 1000


def test_parts_are_the_rows_of_the_batch_in_order():
    for stream in (PretrainStream(Numbered(), 4, 16, 2, {}), SftStream(Numbered(), 4, 48, 2, -5, {})):
        batch = stream.batch()
        parts = batch.parts(2)
        assert torch.equal(torch.cat([part.targets(1) for part in parts]), batch.targets(1))
        assert [part.ids_BW.shape[0] for part in parts] == [2, 2]
        if batch.positions_BT is not None:
            assert torch.equal(torch.cat([part.positions_BT for part in parts]), batch.positions_BT)


def test_a_tokenizer_trained_twice_is_the_same_and_is_kept(tmp_path):
    recipe = tiny_recipe.load(tmp_path)
    first = make_tokenizer(recipe, tmp_path / "a")
    second = make_tokenizer(recipe, tmp_path / "b")
    kept = Path(tmp_path / "a" / "tokenizer" / "tokenizer.json").read_bytes()
    assert kept == Path(tmp_path / "b" / "tokenizer" / "tokenizer.json").read_bytes()
    again = make_tokenizer(recipe, tmp_path / "a")
    text = "Sort 3, 12 and 7."
    assert first.encode(text) == second.encode(text) == again.encode(text)
