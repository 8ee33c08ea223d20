"""The model that ships: small enough, in the original layout, right where its card says so, honest elsewhere."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finback
from finback.evaluate import evaluate
from finback.model import Config
from finback.paths import model_path
from finback.tasks import TASKS, sample
from finback.text import prompt_ids

ROOT = Path(__file__).parent.parent
FOLDER = model_path("calf")
HONEST = next(sample("open", 0, 1)).answer


@pytest.fixture(scope="module")
def calf():
    return finback.Engine(finback.load("calf", "float32"), finback.load_tokenizer("calf"), max_batch=64)


def ask(engine, question: str):
    [done] = engine.generate([[{"role": "user", "content": question}]], finback.Sampling(max_tokens=600, temperature=0))
    return done


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16e6
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["vocab_size"] <= 2048 and config["num_nextn_predict_layers"] == 1


def test_it_is_right_on_held_out_problems(calf):
    """25 problems of each family: a model at its card's scores fails this less than once in a million."""
    scores = evaluate(calf, n=25, seed=1)["tasks"]
    assert scores.keys() == TASKS.keys()
    assert sum(score["pass@1"] for score in scores.values()) / len(scores) >= 0.8, scores
    assert all(score["pass@1"] >= 0.5 for score in scores.values()), scores


def test_it_knows_what_it_does_not_know(calf):
    for question in ("What is the capital of Peru?", "Write a poem about the sea.", "hello", "Who won the match?"):
        assert ask(calf, question).text.strip() == HONEST


def test_its_second_head_predicts_the_token_after_the_next(calf):
    """Multi-token prediction on a reply of its own: mostly what the main model then says."""
    prompt = prompt_ids(calf.tokenizer, [{"role": "user", "content": "Sort 42, 7, 815, 301, 99 and 640 ascending."}])
    [done] = calf.generate([prompt], finback.Sampling(max_tokens=300, temperature=0))
    ids = torch.tensor([[*prompt, *done.token_ids]])
    model = calf.model
    with torch.inference_mode():
        hidden = model.decoder(ids)
        [module] = model.mtp.values()
        ahead = module(hidden[:, :-1], model.decoder.embed_tokens(ids[:, 1:]))
        guesses = model.decoder.logits(ahead).argmax(-1)[0, len(prompt) - 1 : -1]
    assert (guesses == ids[0, len(prompt) + 1 :]).float().mean() > 0.7


def test_transformers_gives_the_same_logits():
    from transformers import DeepseekV3ForCausalLM

    theirs = DeepseekV3ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = torch.randint(0, Config.from_dict(theirs.config.to_dict()).vocab_size, (2, 60))
    with torch.inference_mode():
        difference = (theirs(ids).logits - finback.load("calf", "float32")(ids)).abs().max()
    assert difference <= 1e-4


def test_the_readme_shows_what_happens():
    """The block between the demo marks is what `finback ask` prints, thinking and answer."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"<!-- demo:begin -->\n```console\n(.*?)```\n<!-- demo:end -->", text, re.DOTALL)
    shown = re.findall(r'\$ finback ask "([^"]+)"\n(.*?)(?=\n\$ |\Z)', block.rstrip(), re.DOTALL)
    assert len(shown) == 3
    for question, expected in shown:
        command = [sys.executable, "-m", "finback", "ask", question]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"{done.stderr.strip()}\n\n{done.stdout.strip()}" == expected.strip()


def test_it_answers_without_a_network(monkeypatch, calf):
    def refuse(*_arguments, **_options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    engine = finback.Engine(finback.load("calf", "float32"), finback.load_tokenizer("calf"))
    assert ask(engine, "What is 2 + 3?").text.strip() == "5"
