"""The loss by its definition: which token predicts which, over what it is divided, and what the biases do."""

import dataclasses

import pytest
import torch
from tiny_model import tiny, tiny_model
from tiny_recipe import stage
from torch.nn import functional as F

from finback.kernels.reference import IGNORED
from finback.train.data import Batch
from finback.train.losses import compute, denominators, update_biases
from finback.train.pretrain import PretrainStream
from finback.train.sft import SftStream

VOCABULARY = 53


class Small:
    """Random examples over the tiny model's vocabulary."""

    def __init__(self, seed=0):
        self.seed = seed

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(1000 * self.seed + i)
        lengths = torch.randint(2, 9, (2,), generator=generator).tolist()
        return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths)


def model(depth=1, **changes):
    return tiny_model(tiny(num_nextn_predict_layers=depth, **changes)).train()


def pretraining(rows=4, depth=1) -> Batch:
    return PretrainStream(Small(), rows, 20, 1 + depth, {}).batch()


def sft(rows=4, depth=1) -> Batch:
    return SftStream(Small(), rows, 30, 1 + depth, 2, {}).batch()


def terms(net, batch, parts=1, **changes):
    """The loss of the whole batch, summed over its parts, gradients added up."""
    wanted = stage(**changes)
    counts = denominators(batch, net.config.num_nextn_predict_layers)
    got = []
    for part in batch.parts(parts):
        got.append(compute(net, part, counts, parts, wanted))
        got[-1].total.backward()
    return [
        float(sum(getattr(term, name).detach() for term in got)) for name in ("total", "next_token", "mtp", "balance")
    ]


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_next_token_loss_of_pretraining_is_the_mean_over_all_tokens():
    net, batch = model(), pretraining()
    _, got, _, _ = terms(net, batch)
    logits = net(batch.ids_BW[:, :20])
    expected = F.cross_entropy(logits.flatten(0, 1), batch.ids_BW[:, 1:21].flatten())
    assert got == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_predicts_the_tokens_after_the_next_and_takes_the_mean_over_depths(depth):
    """V3 TR eq. 21–25, written out: hidden_i joins Emb(t_{i+k}) and predicts t_{i+k+1}."""
    net, batch = model(depth), pretraining(depth=depth)
    total, next_token, got, balance = terms(net, batch, mtp_lambda=0.3, balance_alpha=0.01)
    ids = batch.ids_BW
    hidden = net.decoder(ids[:, :20])
    expected = 0.0
    for k, module in enumerate(net.mtp.values(), start=1):
        hidden = module(hidden, net.decoder.embed_tokens(ids[:, k : k + 20]))
        logits = net.decoder.logits(hidden)
        expected += float(F.cross_entropy(logits.flatten(0, 1), ids[:, k + 1 : k + 21].flatten()).detach()) / depth
    assert got == pytest.approx(expected, rel=1e-5)
    assert total == pytest.approx(next_token + 0.3 * got + 0.01 * balance, rel=1e-5)


def test_mtp_learns_a_counting_sequence_only_if_it_is_wired_to_the_right_tokens():
    """With an embedding and head that copy, the module sees t_{i+1}; the loss must ask it for t_{i+2}."""
    net, batch = model(), pretraining()
    counting = (torch.arange(4)[:, None] + torch.arange(22)[None]) % VOCABULARY
    batch = dataclasses.replace(batch, ids_BW=counting)
    seen = {}
    module = net.mtp["3"]
    module.register_forward_pre_hook(lambda _, args: seen.update(embeds=args[1]))
    terms(net, batch, mtp_lambda=1.0)
    assert torch.equal(seen["embeds"], net.decoder.embed_tokens(counting[:, 1:21]))
    assert torch.equal(batch.targets(2), counting[:, 2:22])


def test_sft_is_each_example_alone_learned_on_its_reply():
    """Packing, masking and positions change nothing: the loss is that of every example run by itself."""
    net, batch = model(), sft()
    _, got, got_mtp, _ = terms(net, batch, mtp_lambda=1.0)
    net.eval()
    sums, counts = [0.0, 0.0], [0, 0]
    for i in batch.examples():
        prompt, reply = Small()[i]
        ids = torch.tensor([prompt + reply])
        hidden = net.decoder(ids)
        ahead = net.mtp["3"](hidden[:, :-1], net.decoder.embed_tokens(ids[:, 1:]))
        for n, states in enumerate((hidden[:, :-1], ahead[:, :-1])):
            targets = ids[0, n + 1 :].clone()
            targets[: max(0, len(prompt) - n - 1)] = IGNORED
            sums[n] += float(F.cross_entropy(net.decoder.logits(states)[0], targets, reduction="sum").detach())
            counts[n] += int((targets != IGNORED).sum())
    assert got == pytest.approx(sums[0] / counts[0], rel=1e-4)
    assert got_mtp == pytest.approx(sums[1] / counts[1], rel=1e-4)


@pytest.mark.parametrize("make", [pretraining, sft])
def test_loss_and_gradient_do_not_depend_on_how_the_step_is_cut(make):
    batch = make(rows=4)
    whole, parted = model(), model()
    wanted = {"mtp_lambda": 0.3, "balance_alpha": 0.1}
    expected = terms(whole, batch, 1, **wanted)
    for parts in (2, 4):
        parted.zero_grad()
        assert terms(parted, batch, parts, **wanted) == pytest.approx(expected, rel=1e-5)
        for name, gradient in gradients(whole).items():
            torch.testing.assert_close(gradients(parted)[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_the_parts_of_an_sft_step_have_different_numbers_of_targets():
    """Otherwise the test above could not see a denominator taken from the part."""
    counts = [denominators(part, 1)[0] for part in sft(rows=4).parts(4)]
    assert len(set(counts)) > 1
    assert sum(counts) == denominators(sft(rows=4), 1)[0]


def test_without_mtp_its_modules_get_no_gradient():
    net = model()
    terms(net, pretraining(), mtp_lambda=0.0)
    assert not any(name.startswith("mtp.") for name in gradients(net))
    terms(net, pretraining(), mtp_lambda=0.1)
    assert any(name.startswith("mtp.") for name in gradients(net))


def test_the_balance_loss_sums_over_the_layers_that_ran():
    net, batch = model(), pretraining()
    *_, balance = terms(net, batch, mtp_lambda=0.3)
    assert balance == pytest.approx(sum(float(router.balance_loss.detach()) for _, router in net.routers()), rel=1e-5)
    *_, without = terms(net, batch, mtp_lambda=0.0)
    main = sum(float(r.balance_loss.detach()) for name, r in net.routers() if name.startswith("decoder."))
    assert without == pytest.approx(main, rel=1e-5)
    assert without < balance


def test_biases_move_against_the_load_by_gamma_and_the_load_is_forgotten():
    net = model()
    routers = [router for _, router in net.routers()]
    for router in routers:
        router.e_score_correction_bias.zero_()
        router.load.copy_(torch.tensor([9.0, 0, 4, 3, 4, 4, 4, 4]))  # the mean is 4
    routers[-1].load.zero_()
    worst = update_biases(net, 0.25)
    expected = torch.tensor([-0.25, 0.25, 0, 0.25, 0, 0, 0, 0])
    for router in routers[:-1]:
        assert torch.equal(router.e_score_correction_bias, expected)
    assert torch.equal(routers[-1].e_score_correction_bias, torch.zeros(8))
    assert not any(router.load.any() for router in routers)
    assert worst == pytest.approx(9 / 4)


def test_the_load_of_a_step_is_that_of_all_its_parts():
    net, batch = model(), pretraining()
    terms(net, batch, 2, mtp_lambda=0.1)
    chosen = net.config.num_experts_per_tok
    assert all(float(router.load.sum()) == 4 * 20 * chosen for _, router in net.routers())


def test_balancing_evens_out_the_load():
    """A bias that starts far off is brought back by the rule alone."""
    net = model(depth=0)
    router = dict(net.routers())["decoder.layers.1.mlp.gate"]
    router.e_score_correction_bias[0] = 0.8
    batch = pretraining(depth=0)
    ratios = []
    for _ in range(60):
        with torch.no_grad():
            net.decoder(batch.ids_BW[:, :20])
        ratios.append(float(router.load[0] / router.load.mean()))
        update_biases(net, 0.02)
    assert ratios[0] > 2 and ratios[-1] < 1.5
