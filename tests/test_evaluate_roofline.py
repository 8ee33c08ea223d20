"""What a pass must read and do, counted on what is built and by enumeration, and the shares that follow."""

from dataclasses import replace
from fractions import Fraction
from itertools import combinations, product

import pytest
import torch
from scripted_model import ScriptedModel
from tiny_model import tiny, tiny_model
from torch import nn

from finback.engine import Engine
from finback.evaluate.limits import Limits, Rate
from finback.evaluate.roofline import Needs, shares
from finback.evaluate.speed import Clock, Load, Step, measure
from finback.model import Config, Model
from finback.model.linear import Experts
from finback.model.moe import Router
from finback.model.sizes import bytes_read, flops_per_token
from finback.model.weight import PackedWeight, PanelWeight
from finback.weights.reader import pack

LIMITS = Limits(2, Rate(20e9, 18e9), Rate(25e9, 21e9), Rate(1e11, 9e10), Rate(4e11, 3e11))


def built(config: Config) -> Model:
    with torch.device("meta"):
        return Model(config)


def distinct(experts: int, chosen: int, rows: int) -> Fraction:
    """Experts that `rows` tokens choose between them, on average over every way to choose."""
    ways = list(product(combinations(range(experts), chosen), repeat=rows))
    return Fraction(sum(len(set().union(*way)) for way in ways), len(ways))


def read(module: nn.Module, rows: int, config: Config) -> float:
    """Bytes of a built module that a pass reads, tensor by tensor."""
    if isinstance(module, Experts):
        part = distinct(config.n_routed_experts, config.num_experts_per_tok, rows) / config.n_routed_experts
        return float(part) * sum(tensor.nbytes for tensor in module.state_dict().values())
    if isinstance(module, nn.Embedding):
        return rows * module.embedding_dim * module.weight.element_size()
    if isinstance(module, Router):
        return 4 * module.weight.numel()
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.nbytes for tensor in own) + sum(read(child, rows, config) for child in module.children())


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_read_are_those_of_the_tensors_that_rows_need(rows, tied):
    config = tiny(n_routed_experts=4, num_experts_per_tok=2, tie_word_embeddings=tied, num_nextn_predict_layers=1)
    for dtype in (torch.bfloat16, torch.float32):
        expected = read(built(config).to(dtype).decoder, rows, config)
        assert bytes_read(config, rows, dtype.itemsize) == pytest.approx(expected, rel=1e-12)


def test_bytes_read_of_a_dense_model_grow_by_embeddings_alone():
    config = tiny(first_k_dense_replace=9)
    assert bytes_read(config, 9, 2) - bytes_read(config, 1, 2) == 8 * config.hidden_size * 2


@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_read_of_packed_weights(form, tied):
    """Within 1 %: what a scale adds depends a little on a matrix's width."""
    layers = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "hidden_size": 1024, "intermediate_size": 2048}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = Config(vocab_size=8192, tie_word_embeddings=tied, **layers, **experts)
    model = built(config).bfloat16()
    with torch.device("meta"):
        pack(model, form, torch.bfloat16)
    assert bytes_read(config, 2, 2, form) == pytest.approx(read(model.decoder, 2, config), rel=0.01)


def test_needs_are_the_models():
    model = built(tiny())
    assert Needs.of(model, LIMITS) == Needs(model.config, 4, None, 25e9, 1e11)
    model = built(tiny()).bfloat16()
    assert Needs.of(model, LIMITS) == Needs(model.config, 2, None, 25e9, 4e11)
    pack(model, "int4", torch.bfloat16)  # the head is int8 then
    assert Needs.of(model, LIMITS).form == "int4"


def test_needs_of_weights_in_panels_are_those_of_their_numbers():
    """Native kernels lay packed matrices out anew: what a pass reads stays; integers have products of their own."""
    peaks = {"fp32": Rate(2e11, 1.0), "bf16": Rate(3e11, 1.0), "int8": Rate(6e11, 1.0), "int4": Rate(9e11, 1.0)}
    limits = replace(LIMITS, peaks=peaks)
    for form, flops in (("fp8", 4e11), ("int8", 6e11), ("int4", 9e11)):
        packed = tiny_model(tiny()).bfloat16()
        pack(packed, form, torch.bfloat16)
        before = Needs.of(packed, limits)
        assert before == Needs(packed.config, 2, form, 25e9, flops)
        assert Needs.of(packed, LIMITS).product == 4e11  # plain torch multiplies bfloat16
        for owner in list(packed.modules()):
            for name, weight in list(owner.named_children()):
                if isinstance(weight, PackedWeight):
                    setattr(owner, name, PanelWeight(weight))
        assert Needs.of(packed, limits) == before
    wide = built(tiny())
    pack(wide, "int8", torch.float32)
    assert Needs.of(wide, limits).product == 2e11


@pytest.mark.parametrize("bound", ["memory", "arithmetic"])
def test_a_pass_takes_as_long_as_the_slower_of_memory_and_arithmetic(bound):
    config = tiny()
    needs = Needs(config, 4, None, *((1.0, 1e18) if bound == "memory" else (1e18, 1.0)))
    by_hand = {
        "memory": bytes_read(config, 3, 4) + 900,
        "arithmetic": 3 * flops_per_token(config, 20),
    }
    assert needs.decode_s(3, 900, 60) == pytest.approx(by_hand[bound])
    head = 2 * config.vocab_size * config.hidden_size
    by_hand = {"memory": bytes_read(config, 10, 4), "arithmetic": 10 * flops_per_token(config, 21) - 9 * head}
    assert needs.prefill_s(10, 16) == pytest.approx(by_hand[bound])


def test_shares_of_a_loop_with_steps_of_a_second():
    """Prompts of 20 and 5 tokens each: a prompt takes one step, and each of the 4 other tokens one."""
    now = [0.0]

    class Timed(Engine):
        def step(self):
            now[0] += 1.0
            return super().step()

    def result(concurrency: int):
        load = Load(4, concurrency, prompt_tokens=(20, 20), max_tokens=5)
        return measure(Timed(ScriptedModel([3] * 9), max_batch=2), load, Clock(lambda: now[0]))

    needs = Needs(tiny(vocab_size=600, max_position_embeddings=512), 4, None, 1e6, 1e9)
    one, two = result(1), result(2)
    found = shares(one, needs)
    cached = one.cache_bytes
    expected = [needs.decode_s(1, n * cached, n) for n in (21, 22, 23, 24)]
    assert found.decode == pytest.approx(sum(expected) / 4)
    assert found.decode_tokens_per_s == 1.0
    assert found.limit_tokens_per_s == pytest.approx(4 / sum(expected))
    assert found.prefill == pytest.approx(needs.prefill_s(20, 0))
    found = shares(two, needs)
    expected = [needs.decode_s(2, 2 * n * cached, 2 * n) for n in (21, 22, 23, 24)]
    assert found.decode == pytest.approx(sum(expected) / 4)
    assert (found.decode_tokens_per_s, found.prefill) == (2.0, None)
    assert found.limit_tokens_per_s == pytest.approx(8 / sum(expected))


def test_no_decoding_no_share():
    now = [0.0]
    clock = Clock(lambda: now.__setitem__(0, now[0] + 1) or now[0])
    result = measure(Engine(ScriptedModel([3])), Load(2, 2, prompt_tokens=(4, 4), max_tokens=1), clock)
    found = shares(result, Needs(tiny(vocab_size=600), 4, None, 1e6, 1e9))
    assert (found.decode, found.decode_tokens_per_s, found.limit_tokens_per_s, found.prefill) == (None,) * 4


def test_speculation_is_held_to_the_limit_without_it():
    """A step that gave a request three tokens counts as three steps of one."""
    now = [0.0]
    clock = Clock(lambda: now.__setitem__(0, now[0] + 1) or now[0])
    result = measure(Engine(ScriptedModel([3])), Load(1, 1, prompt_tokens=(4, 4), max_tokens=2), clock)
    needs = Needs(tiny(vocab_size=600), 4, None, 1e6, 1e9)
    plain = shares(replace(result, decoding=[Step(1.0, 2, 2, 40)]), needs)
    guessed = shares(replace(result, decoding=[Step(1.0, 2, 6, 40)]), needs)
    assert guessed.decode == pytest.approx(3 * plain.decode)
    assert guessed.limit_tokens_per_s == pytest.approx(plain.limit_tokens_per_s)
