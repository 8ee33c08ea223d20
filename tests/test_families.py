"""Every family, through the folder it is published as: the same logits and tokens as transformers, both ways."""

import json
import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, VOCAB, theirs, unfused, write_theirs
from paged import Sequence, advance, paged
from published import PUBLISHED
from safetensors.torch import load_file
from tiny_model import tiny_model

from finback.engine import Engine, Sampling
from finback.errors import UserError
from finback.model import Config, Model
from finback.model.rope import inverse_frequencies, softmax_scale
from finback.model.sizes import cache_numbers, sizes
from finback.train.losses import update_biases
from finback.weights import load, save

EACH = pytest.mark.parametrize("name", FAMILIES)
IDS = torch.randint(VOCAB, (2, 96), generator=torch.Generator().manual_seed(3))


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """By whole forward passes: no cache that could be wrong."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, len(prompt) :].tolist()


@EACH
@torch.no_grad()
def test_what_is_published_gives_the_logits_and_tokens_of_transformers(name, tmp_path):
    """96 positions: beyond the 16 and 64 of the scaled families' original lengths."""
    other = theirs(name)
    write_theirs(other, name, tmp_path)
    model = load(tmp_path)
    expected = other(IDS).logits
    assert expected.std() > 0.3, "the comparison needs logits that say something"
    assert (model(IDS) - expected).abs().max() <= 1e-4
    prompts = [IDS[0, :20].tolist(), IDS[1, :7].tolist()]
    sampling = Sampling(max_tokens=64, temperature=0, ignore_eos=True)
    wanted = {i: greedy(other, p, 64) for i, p in enumerate(prompts)}
    assert {c.index: c.token_ids for c in Engine(model, max_batch=2).generate(prompts, sampling)} == wanted
    # Alone a token at the end of its block needs no mask.
    assert {c.index: c.token_ids for c in Engine(model, max_batch=1).generate(prompts, sampling)} == wanted


@EACH
@torch.no_grad()
def test_what_we_write_is_the_familys_own_layout(name, tmp_path):
    """Names, shapes and config.json as published; transformers reads it and gives the same logits."""
    import transformers

    other = theirs(name)
    write_theirs(other, name, tmp_path / "a")
    model = load(tmp_path / "a")
    save(model, None, tmp_path / "b")
    ours, published = load_file(tmp_path / "b" / "model.safetensors"), unfused(other)
    if FAMILIES[name].get("tie_word_embeddings"):
        published.pop("lm_head.weight"), ours.pop("lm_head.weight", None)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in published.items()}
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {key: written[key] for key in FAMILIES[name] if FAMILIES[name][key] is not None} == {
        key: value for key, value in FAMILIES[name].items() if value is not None
    }
    if FAMILIES[name]["model_type"] != "deepseek":
        again, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "b", dtype="auto", output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (again.eval()(IDS).logits - model(IDS)).abs().max() <= 1e-4
    else:
        assert torch.equal(load(tmp_path / "b")(IDS), model(IDS))


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_count_what_is_there(name):
    config = Config.from_dict(FAMILIES[name])
    with torch.device("meta"):
        model = Model(config)
    count = sizes(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    used = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 1
    idle = sum(p.numel() * (1 - used) for n, p in model.named_parameters() if ".experts." in n)
    assert count.active == pytest.approx(count.total - idle)


@pytest.mark.parametrize(
    ("name", "per_layer"),
    [("V2", 14 + 8), ("deepseek-moe-16b", 2 * 4 * 8), ("R1-Distill-Qwen", 2 * 2 * 8), ("R1-Distill-Llama", 2 * 2 * 8)],
)
def test_cache_numbers_per_token(name, per_layer):
    """Facts 3.3: latent and shared key, or a key and a value for each KV head."""
    config = Config.from_dict(FAMILIES[name])
    assert cache_numbers(config) == 3 * per_layer
    engine = Engine(tiny_model(config), max_batch=1)
    next(engine.generate([[2, 3]], Sampling(max_tokens=2, temperature=0, ignore_eos=True)))
    assert engine.stats().bytes_per_token == 4 * 3 * per_layer


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_v2_weights_are_normalised_or_scaled_and_never_both(normalise, grouped):
    """V2 TR 2.2 and its modelling file, by hand: softmax, groups by their best score, x 16 unless normalised."""
    config = Config.from_dict(FAMILIES["V2" if grouped else "V2-Lite"] | {"norm_topk_prob": normalise})
    config = replace(config, routed_scaling_factor=16.0)
    router = tiny_model(config).decoder.layers["1"].mlp.gate
    x = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(5))
    experts, weights = router(x, None)
    for token in range(40):
        scores = (router.weight @ x[0, token]).softmax(-1)
        groups = sorted(range(4), key=lambda g: -scores[2 * g : 2 * g + 2].max().item())[:2]
        allowed = [e for e in range(8) if not grouped or e // 2 in groups]
        best = sorted(allowed, key=lambda e: -scores[e].item())[:3]
        assert set(experts[token].tolist()) == set(best)
        total = sum(scores[e].item() for e in best)
        for expert, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            wanted = scores[expert].item() / total if normalise else 16.0 * scores[expert].item()
            assert weight == pytest.approx(wanted, rel=1e-5)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    config = Config.from_dict(FAMILIES["R1-Distill-Llama"] | {"head_dim": 64})
    plain = inverse_frequencies(replace(config, rope_scaling=None))
    scaled = inverse_frequencies(config)
    waves = 2 * math.pi / plain
    assert torch.equal(scaled[waves < 64 / 4], plain[waves < 64 / 4])
    torch.testing.assert_close(scaled[waves > 64], plain[waves > 64] / 8)
    between = (waves >= 64 / 4) & (waves <= 64)
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("V2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("V2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("R1-Distill-Qwen", {"use_sliding_window": True}, "use_sliding_window"),
        ("R1-Distill-Llama", {"attention_bias": True}, "attention_bias"),
        ("R1-Distill-Llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("R1-Distill-Llama", {"num_key_value_heads": 0}, "num_key_value_heads"),
        ("R1-Distill-Llama", {"head_dim": 7}, "head_dim"),
        ("R1-Distill-Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max"),
        ("R1-Distill-Llama", {"rope_theta": float("nan")}, "rope_theta"),
        ("deepseek-moe-16b", {"n_routed_experts": 2}, "num_experts_per_tok"),
        ("V2", {"num_hidden_layers": 2**31}, "num_hidden_layers"),
        ("V2", {"num_hidden_layers": 1000, "n_routed_experts": 4096}, "n_routed_experts"),
        ("V2", {"rope_theta": 1}, "rope_theta"),
        ("V2", {"rope_scaling": {"type": ["yarn"]}}, "rope_scaling"),
        ("V2", {"rope_scaling": {"type": "yarn", "factor": 0, "original_max_position_embeddings": 16}}, "factor"),
        ("V2", {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}}, "original"),
        ("R1-Distill-Qwen", {"num_attention_heads": 64, "num_key_value_heads": 64}, "head_dim"),
        ("V2", {"n_routed_experts": 10**9}, "n_routed_experts"),
        ("V2", {"hidden_size": 10**18}, "hidden_size"),
    ],
)
def test_what_the_family_does_not_do_is_one_clear_line(name, change, named):
    with pytest.raises(UserError, match=named) as caught:
        Config.from_dict(FAMILIES[name] | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["V2", "deepseek-moe-16b", "R1-Distill-Qwen"])
def test_every_family_learns(name):
    """One step of training: a finite loss, a gradient for every parameter that the tokens reached."""
    model = tiny_model(Config.from_dict(FAMILIES[name])).train()
    torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert update_biases(model, 0.1) >= 0


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_cached_chunk_equals_the_whole(name):
    """Several new tokens at once behind a cached prefix, rows of different length."""
    model = tiny_model(Config.from_dict(FAMILIES[name]))
    ids, starts, width = IDS[:, :40], [13, 29], 11
    cache, pool = paged(model.config)
    rows = [Sequence(ids[row].tolist()) for row in range(2)]
    advance(model, cache, pool, dict(zip(rows, starts, strict=True)))
    hidden = advance(model, cache, pool, dict.fromkeys(rows, width))
    for row, start in enumerate(starts):
        whole = model(ids[row : row + 1, : start + width])[0, start:]
        assert (model.decoder.logits(hidden[rows[row]]) - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_read_as_what_it_is(name):
    """Sizes from the facts (the exact ones from the models' own pages), on the meta device too; written as it was."""
    file, parameters = PUBLISHED[name]
    config = Config.from_dict(file)
    assert sizes(config).total == pytest.approx(parameters, rel=5e-4 if parameters % 10**6 == 0 else 0)
    with torch.device("meta"):
        model = Model(replace(config, num_nextn_predict_layers=0))
    assert sum(p.numel() for p in model.parameters()) == sizes(config).total
    written = config.to_dict()
    for key in written.keys() & file.keys() - {"eos_token_id"}:
        assert written[key] == file[key], key


def test_the_scales_of_the_families():
    """Facts 1.6 and 9: 0.135234 for V3, 0.114721 for V2 and V2-Lite, one over the root of 128 for Llama-8B."""
    expected = {"DeepSeek-R1": 0.135234, "DeepSeek-V2": 0.114721, "DeepSeek-V2-Lite": 0.114721}
    for name, scale in (expected | {"R1-Distill-Llama-8B": 128**-0.5, "Moonlight-16B-A3B": 192**-0.5}).items():
        assert softmax_scale(Config.from_dict(PUBLISHED[name][0])) == pytest.approx(scale, abs=5e-7), name


def test_odd_and_legal_ways_to_say_the_same():
    """Nulls for what the family fixes, whole numbers for floats, larger bases than any limit of sizes."""
    plain = Config.from_dict(FAMILIES["R1-Distill-Qwen"])
    nulls = {"use_sliding_window": None, "attention_bias": None, "rope_scaling": None, "head_dim": None}
    assert Config.from_dict(FAMILIES["R1-Distill-Qwen"] | nulls) == plain
    assert Config.from_dict(FAMILIES["R1-Distill-Qwen"] | {"rope_theta": 10_000_000}).rope_theta == 1e7
    assert Config.from_dict(FAMILIES["V2"] | {"n_shared_experts": None}).n_shared_experts == 0
    assert Config.from_dict(FAMILIES["V2"] | {"topk_method": None}).topk_method == "greedy"


@torch.no_grad()
def test_qwens_yarn_is_on_wherever_it_is_named():
    """Qwen2.5's recipe for long texts: original 32768 in a model of 32768 positions; transformers applies it."""
    import transformers

    values = FAMILIES["R1-Distill-Qwen"] | {
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    }
    config = Config.from_dict(values)
    model = tiny_model(config)
    other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config.to_dict(), attn_implementation="eager"))
    names = {k.replace("decoder.", "model.", 1).removesuffix(".value"): v for k, v in model.state_dict().items()}
    other.load_state_dict({k.replace("model.lm_head", "lm_head"): v for k, v in names.items()})
    assert (other.eval()(IDS[:, :60]).logits - model(IDS[:, :60])).abs().max() <= 1e-4
