"""Promise 1: what generation says about its tokens is what training says, batched, ragged, cached and absorbed."""

from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from tiny_model import tiny, tiny_model, tokens

from finback.engine import Completion, Engine, Sampling
from finback.kernels import dispatch
from finback.model import Config, Model

CONFIG = tiny(n_group=2, topk_group=1, num_hidden_layers=4, kv_lora_rank=24)
SAMPLING = Sampling(max_tokens=190, temperature=1, top_p=1, ignore_eos=True)
MOE_LAYERS = (1, 2, 3)


@dataclass
class Run:
    model: Model
    prompts: list[list[int]]
    completions: list[Completion]


def with_near_ties(config: Config) -> Model:
    """A model in which every other expert is a twin of its neighbour to the router, equal up to rounding.

    Its matrices are half as large as the other tests' (standard deviation 0.75 / sqrt(width), still 20 times the
    paper's): with those the training pass alone is 2e-5 away from its own result in float64.
    """
    model = tiny_model(config, seed=5)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "gate.weight" not in name:
            parameter.data *= 0.5
    for _, router in model.routers():
        with torch.no_grad():
            router.weight[1::2] = router.weight[::2]
            router.weight[1::2, 0] += 3e-8
            router.e_score_correction_bias[1::2] = router.e_score_correction_bias[::2]
    return model


@pytest.fixture(scope="module")
def generated() -> Run:
    model = with_near_ties(CONFIG)
    prompts = [tokens(1 + 7 * i % 50, seed=i).tolist() for i in range(56)]
    with patch.object(dispatch, "latent_attention", wraps=dispatch.latent_attention) as absorbed:
        done = list(Engine(model, max_batch=19).generate(prompts, SAMPLING, routing=True))
    assert absorbed.call_count >= SAMPLING.max_tokens, "decoding did not use the absorbed form"
    return Run(model, prompts, sorted(done, key=lambda completion: completion.index))


def sequences(run: Run):
    for prompt, completion in zip(run.prompts, run.completions, strict=True):
        # The last token was never an input, so it has no routing.
        yield len(prompt), torch.tensor([prompt + completion.token_ids[:-1]]), completion


def trained_logprobs(model: Model, ids: torch.Tensor, start: int, completion: Completion, routing) -> torch.Tensor:
    """Log-probabilities of the new tokens by the forward pass of training: full, naive, differentiable."""
    logits = model.train()(ids, routing=routing)[0, start - 1 :]
    assert logits.requires_grad
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].detach()


def test_logprob_gap_with_replayed_routing(generated):
    tokens_seen, widest = 0, 0.0
    for start, ids, completion in sequences(generated):
        replayed = dict(completion.routing)
        assert {layer: len(chosen) for layer, chosen in replayed.items()} == dict.fromkeys(MOE_LAYERS, ids.shape[1])
        expected = trained_logprobs(generated.model, ids, start, completion, replayed)
        widest = max(widest, (torch.tensor(completion.logprobs) - expected).abs().max().item())
        tokens_seen += len(completion.token_ids)
    assert tokens_seen >= 10_000
    assert widest <= 1e-5


def test_every_flip_without_replay_is_a_near_tie(generated):
    """Layers before the judged one are replayed, so that a flip there is its own and not the echo of an earlier one."""
    model = generated.model.eval()
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        router.register_forward_hook(lambda module, args, out: seen.update({module.layer: args[0].flatten(0, 1)}))
        for _, router in model.routers()
    ]
    flips = []
    with torch.no_grad():
        for _, ids, completion in sequences(generated):
            for judged in MOE_LAYERS:
                routing = {layer: chosen for layer, chosen in completion.routing.items() if layer < judged}
                model(ids, routing=routing)
                ours, theirs = (r[judged].sort(-1).values for r in (routing, completion.routing))
                margins = selection_margin(model, judged, seen[judged])
                flips += margins[(ours != theirs).any(-1)].tolist()
    for hook in hooks:
        hook.remove()
    assert flips, "twins of the router were never told apart differently: the test shows nothing"
    assert max(flips) < 1e-6


def selection_margin(model: Model, layer: int, x_ND: torch.Tensor) -> torch.Tensor:
    """The least distance of a token's scores from another choice, of a group or of an expert in the best group."""
    router = model.get_submodule(f"decoder.layers.{layer}.mlp.gate")
    scores_NGE = ((x_ND.double() @ router.weight.T.double()).sigmoid() + router.e_score_correction_bias).unflatten(
        1, (2, 4)
    )
    group_scores = scores_NGE.sort(-1, descending=True).values[..., :2].sum(-1)
    best = scores_NGE[torch.arange(len(scores_NGE)), group_scores.argmax(-1)].sort(-1, descending=True).values
    return torch.minimum((group_scores[:, 0] - group_scores[:, 1]).abs(), best[:, 2] - best[:, 3])


def test_without_replay_a_flip_is_seen_in_the_logprobs(generated):
    """The gap above is small because routing is replayed, not because nothing depends on it."""
    widest = 0.0
    for start, ids, completion in sequences(generated):
        expected = trained_logprobs(generated.model, ids, start, completion, None)
        widest = max(widest, (torch.tensor(completion.logprobs) - expected).abs().max().item())
    assert widest > 1e-4
