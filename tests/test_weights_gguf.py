"""GGUF files: the same weights as in safetensors, every type as the gguf library reads it, and nothing past the end."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families import FAMILIES
from gguf_files import CHANGES, IDS, TOKENIZER, copy_fields, finish, in_bf16, model_of, rewritten
from refusals import refused
from tiny_model import tiny_model

from finback.engine import Engine, Sampling
from finback.errors import UserError
from finback.model import Config, Llama3Scaling, RopeScaling
from finback.weights import load, load_tokenizer
from finback.weights.gguf_file import write
from finback.weights.gguf_keys import config_of


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write(model_of("V3, R1"), TOKENIZER, path, "bf16")
    return path


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_we_write_in_bf16_is_the_model(name, tmp_path):
    """Configuration, logits, greedy tokens and tokenizer, through the names and the layout llama.cpp uses."""
    model = in_bf16(model_of(name))
    write(model, TOKENIZER, tmp_path / "m.gguf", "bf16")
    again = load(tmp_path / "m.gguf", dtype="float32")
    expected = replace(model.config, bos_token_id=TOKENIZER.bos_id, eos_token_id=TOKENIZER.eos_id)
    assert replace(again.config, initializer_range=expected.initializer_range) == expected
    assert (again(IDS) - model(IDS)).abs().max() <= 1e-5
    sampling = Sampling(max_tokens=64, temperature=0, ignore_eos=True)
    prompt = [IDS[0, :10].tolist()]
    one, other = (next(Engine(m, max_batch=1).generate(prompt, sampling)) for m in (model, again))
    assert one.token_ids == other.token_ids
    assert load_tokenizer(tmp_path / "m.gguf").encode("two fünf <｜User｜>") == TOKENIZER.encode("two fünf <｜User｜>")
    assert load(tmp_path / "m.gguf").decoder.embed_tokens.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_q8_0_is_what_the_library_makes_of_it(tmp_path):
    """Every matrix of 32 columns or more as the library quantises and dequantises it, and the model runs as that."""
    model = model_of("V3, R1")
    write(model, TOKENIZER, tmp_path / "m.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_q_a.weight"] == kinds["blk.2.ffn_up_exps.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.attn_norm.weight"] == "F32"
    assert kinds["blk.1.attn_q_b.weight"] == "BF16"  # 10 columns
    again = load(tmp_path / "m.gguf", dtype="float32")
    for part in ("gate_up", "down"):
        ours = getattr(again.decoder.layers["2"].mlp.experts, part).dense().numpy()
        values = getattr(model.decoder.layers["2"].mlp.experts, part).dense().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if values.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.BF16
        assert np.array_equal(ours, gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind))
    # A step is 1/127 of the largest of 32 numbers, about 1 % of a typical one; logits have a deviation near 2.
    assert 0 < (again(IDS) - model(IDS)).abs().median() < 0.1


READABLE = [
    kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits or kind.name in ("F32", "F16")
]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}


def wide_file(path: Path, kind: gguf.GGMLQuantizationType, seed: int = 0) -> dict[str, np.ndarray]:
    """A Qwen2 whose matrices are random bytes of one type; returns what the library reads of them."""
    model = model_of("R1-Distill-Qwen", hidden_size=256, intermediate_size=512, head_dim=None, num_hidden_layers=1)
    write(model, TOKENIZER, path.with_suffix(".plain"), "bf16")
    reader = gguf.GGUFReader(path.with_suffix(".plain"))
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
    rng, expected = np.random.default_rng(seed), {}
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        if len(shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        # Bytes below 0x3c: whatever half of a float16 scale they are, it is finite.
        data = rng.integers(0, 0x3C, gguf.quants.quant_shape_to_byte_shape(shape, kind), dtype=np.uint8)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
        expected[tensor.name] = gguf.quants.dequantize(data, kind).reshape(shape)
    finish(writer)
    return expected


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_library_reads_it(kind, tmp_path):
    expected = wide_file(tmp_path / "m.gguf", kind)
    layer = load(tmp_path / "m.gguf", dtype="float32").decoder.layers["0"]
    for name, module in (("attn_q", layer.self_attn.q_proj), ("ffn_down", layer.mlp.down_proj)):
        assert np.array_equal(module.weight.dense().detach().numpy(), expected[f"blk.0.{name}.weight"])


@torch.no_grad()
def test_files_from_before_absorbed_attention_are_read(tmp_path):
    """attn_kv_b whole, head sizes without _mla, no keys for groups: those of 2024 and early 2025."""
    model = in_bf16(model_of("Moonlight"))
    write(model, TOKENIZER, tmp_path / "new.gguf", "bf16")
    reader = gguf.GGUFReader(tmp_path / "new.gguf")
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "deepseek2")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or "_mla" in name or "group" in name:
            continue
        value = {"deepseek2.attention.key_length": 14, "deepseek2.attention.value_length": 5}.get(
            name, field.contents()
        )
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, value, field.types[0], field.types[-1] if array else None)
    for tensor in reader.tensors:
        if "attn_v_b" not in tensor.name and "attn_k_b" not in tensor.name:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for i, layer in model.decoder.layers.items():
        writer.add_tensor(f"blk.{i}.attn_kv_b.weight", layer.self_attn.kv_b_proj.weight.dense().numpy())
    finish(writer)
    assert (load(tmp_path / "old.gguf", dtype="float32")(IDS) - model(IDS)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["R1-Distill-Llama", "deepseek-moe-16b", "R1-Distill-Qwen", "V3, R1"])
def test_halves_are_dealt_out_as_llama_cpp_wants_them(name, tmp_path):
    """Its converter's permutation of queries and keys, row by row; Qwen2's and the latent ones stay as they are."""
    model = in_bf16(model_of(name))
    write(model, TOKENIZER, tmp_path / "m.gguf", "f32")
    stored = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    attention, head = model.decoder.layers["1"].self_attn, model.config.query_dim
    ours = attention.q_b_proj if name == "V3, R1" else attention.k_proj
    theirs = stored["blk.1.attn_q_b.weight" if name == "V3, R1" else "blk.1.attn_k.weight"]
    for row, values in enumerate(ours.weight.dense().detach().numpy()):
        place = row % head
        if name in ("R1-Distill-Llama", "deepseek-moe-16b"):
            half, pair = divmod(place, head // 2)
            place = 2 * pair + half
        assert np.array_equal(theirs[row // head * head + place], values)


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_have_the_types_that_readers_want(name, tmp_path):
    """Whole numbers of a config.json where llama.cpp reads floats: "rope_theta": 10000, a factor of 16."""
    values = FAMILIES[name] | {"vocab_size": 310, "rope_theta": 10000, "bos_token_id": 0, "eos_token_id": 1}
    if "routed_scaling_factor" in values:
        values["routed_scaling_factor"] = 16
    write(
        tiny_model(replace(Config.from_dict(values), **CHANGES.get(name, {}))), TOKENIZER, tmp_path / "m.gguf", "bf16"
    )
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    floats = ("freq_base", "rms_epsilon", "weights_scale", "scaling.factor", "log_multiplier")
    for key, field in fields.items():
        if key.split(".")[0] in ("deepseek2", "deepseek", "qwen2", "llama"):
            kind = "FLOAT32" if key.endswith(floats) else "BOOL" if key.endswith("weights_norm") else "UINT32"
            if not key.endswith("scaling.type"):
                assert field.types[0].name == kind, key


@torch.no_grad()
def test_kv_b_may_be_there_whole_and_split(good, tmp_path):
    """As some programs write it; and a split one of another form is missing, not a crash."""
    expected = load(good, dtype="float32")
    reader = gguf.GGUFReader(good)
    for shape in ("both", "flat"):
        writer = gguf.GGUFWriter(tmp_path / f"{shape}.gguf", "deepseek2")
        copy_fields(reader, writer)
        for tensor in reader.tensors:
            data = np.array(tensor.data)
            if shape == "flat" and "_k_b" in tensor.name:
                data = data.reshape(-1, data.shape[-1])
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
        if shape == "both":
            for i, layer in expected.decoder.layers.items():
                writer.add_tensor(f"blk.{i}.attn_kv_b.weight", layer.self_attn.kv_b_proj.weight.dense().numpy())
        finish(writer)
    assert torch.equal(load(tmp_path / "both.gguf", dtype="float32")(IDS), expected(IDS))
    refused(tmp_path / "flat.gguf", "lacks", "kv_b_proj")


@pytest.mark.parametrize("scaling", [RopeScaling(40, 16, mscale=1.0, mscale_all_dim=0.8), RopeScaling(40, 16, 16)])
def test_a_yarn_that_no_file_can_hold_is_refused(scaling, tmp_path):
    with pytest.raises(UserError, match="rope_scaling"):
        write(model_of("V3, R1", rope_scaling=scaling), TOKENIZER, tmp_path / "m.gguf", "bf16")


@pytest.mark.parametrize("path", ["/proc/nope/m.gguf", "file/m.gguf"])
def test_a_file_that_cannot_be_written_is_one_clear_line(path, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        write(model_of("R1-Distill-Qwen"), TOKENIZER, tmp_path / path, "bf16")


@pytest.mark.parametrize(("experts", "groups"), [(256, (8, 4)), (160, (8, 3)), (64, (1, 1))])
def test_the_groups_of_old_files(experts, groups):
    """Facts 1.1, 1.2: V3 has 256 experts in 8 groups and keeps 4, V2 160 in 8 and keeps 3; the small ones have none."""
    keys = {"block_count": 2, "embedding_length": 64, "feed_forward_length": 64, "context_length": 64}
    keys |= {"attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": 10}
    keys |= {"expert_count": experts, "expert_used_count": 6, "rope.dimension_count": 8, "expert_gating_func": 2}
    keys |= {"attention.key_length": 16, "attention.value_length": 8, "attention.kv_lora_rank": 32}
    metadata = {f"deepseek2.{key}": value for key, value in keys.items()} | {"general.architecture": "deepseek2"}
    config = config_of(metadata, 10, False, None)
    assert (config.n_group, config.topk_group, config.model_type) == (*groups, "deepseek_v3")


@torch.no_grad()
def test_a_split_file_is_read_by_its_first_part(tmp_path):
    model = in_bf16(model_of("R1-Distill-Qwen"))
    write(model, TOKENIZER, tmp_path / "m.gguf", "bf16")
    names = [t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors]
    (tmp_path / "s").mkdir()
    first, second = (tmp_path / "s" / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    rewritten(tmp_path / "m.gguf", first, drop=set(names[5:]))
    rewritten(tmp_path / "m.gguf", second, drop=set(names[:5]))
    for place in (first, tmp_path / "s"):
        assert (load(place, dtype="float32")(IDS) - model(IDS)).abs().max() <= 1e-5
    second.unlink()
    with pytest.raises(UserError, match=r"m-00002-of-00002\.gguf"):
        load(first)


@torch.no_grad()
def test_a_gguf_file_can_be_packed_and_the_pack_is_kept(tmp_path):
    model = model_of("V2-Lite")
    write(model, TOKENIZER, tmp_path / "m.gguf", "bf16")
    one, other = load(tmp_path / "m.gguf", quantize="int8"), load(tmp_path / "m.gguf", quantize="int8")
    assert (tmp_path / "packs" / "m-int8-bfloat16" / "pack.json").is_file()
    assert torch.equal(one(IDS), other(IDS)) and (one(IDS) - model(IDS)).abs().mean() < 0.5


def test_a_llama_rule_that_no_file_can_hold_is_refused(tmp_path):
    model = model_of("R1-Distill-Llama", rope_scaling=Llama3Scaling(8.0, 64))
    with pytest.raises(UserError, match="rope_scaling"):
        write(model, TOKENIZER, tmp_path / "m.gguf", "bf16")
    assert not list(tmp_path.iterdir())


def test_a_gguf_file_is_sampled_as_deepseek_advises(good):
    from finback.about import describe, sampling_defaults

    assert sampling_defaults(str(good)) == {"temperature": 0.6, "top_p": 0.95}
    facts = describe(str(good))
    assert facts["precision"] == "GGUF" and facts["weights_bytes"] >= good.stat().st_size
