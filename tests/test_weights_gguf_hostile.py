"""GGUF files that lie, end early, or hold what nobody reads: each is refused in one line, before anything is read."""

import os
import random
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import TOKENIZER, copy_fields, finish, model_of, rewritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused

from finback.errors import UserError
from finback.weights import load, load_tokenizer
from finback.weights.gguf_file import GGUF, write


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write(model_of("V3, R1"), TOKENIZER, path, "bf16")
    return path


@pytest.mark.parametrize("kind", ["I32", "Q8_K", "F64"])
def test_a_type_that_cannot_be_read_is_named_before_anything_is(kind, tmp_path, monkeypatch):
    one = gguf.GGMLQuantizationType[kind]
    write(model_of("R1-Distill-Qwen"), TOKENIZER, tmp_path / "good.gguf", "bf16")
    reader, writer = gguf.GGUFReader(tmp_path / "good.gguf"), gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    copy_fields(reader, writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    size = gguf.GGML_QUANT_SIZES[one][1]
    writer.add_tensor("blk.1.odd.weight", np.zeros((2, size), np.uint8), raw_dtype=one)
    finish(writer)
    monkeypatch.setattr(GGUF, "_rows", None)
    refused(tmp_path / "m.gguf", "'blk.1.odd.weight'", kind, "another type")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"deepseek2.block_count": 4}, "lacks"),
        ({"deepseek2.block_count": 2}, "unknown"),
        ({"deepseek2.block_count": 2**31}, ""),
        ({"deepseek2.embedding_length": 64}, "[310, 64]"),
        ({"deepseek2.expert_count": 7}, "n_routed_experts"),
        ({"deepseek2.expert_used_count": "many"}, "num_experts_per_tok"),
        ({"deepseek2.attention.key_length_mla": 3}, "qk_nope_head_dim"),
        ({"deepseek2.rope.freq_base": float("nan")}, "rope_theta"),
        ({"deepseek2.rope.scaling.factor": "forty"}, "factor"),
        ({"deepseek2.rope.scaling.type": "linear"}, "linear"),
        ({"deepseek2.rope.scaling.type": "longrope"}, "longrope"),
    ],
)
def test_metadata_that_lies_is_one_clear_line(good, tmp_path, fields, named):
    rewritten(good, tmp_path / "m.gguf", **fields)
    refused(tmp_path / "m.gguf", named)


@pytest.mark.parametrize("key", ["embedding_length", "block_count", "expert_count", "rope.dimension_count"])
def test_a_missing_key_is_named(good, tmp_path, key):
    rewritten(good, tmp_path / "m.gguf", drop={f"deepseek2.{key}"})
    refused(tmp_path / "m.gguf", f"deepseek2.{key}")


@pytest.mark.parametrize("tensor", ["blk.1.attn_k_b.weight", "blk.2.ffn_up_exps.weight", "blk.1.exp_probs_b.bias"])
def test_a_missing_tensor_is_named(good, tmp_path, tensor):
    rewritten(good, tmp_path / "m.gguf", drop={tensor})
    refused(tmp_path / "m.gguf", "lacks", f"model.layers.{tensor.split('.')[1]}.")


def test_nan_is_named(tmp_path):
    model = model_of("R1-Distill-Qwen")
    model.decoder.layers["1"].mlp.up_proj.weight.value.data[3, 4] = float("nan")
    write(model, TOKENIZER, tmp_path / "m.gguf", "bf16")
    refused(tmp_path / "m.gguf", "'blk.1.ffn_up.weight'", "NaN")


@pytest.mark.parametrize("keep", [0, 3, 4, 24, 100, 5000, -1, -5000])
def test_a_truncated_file_is_one_clear_line(good, tmp_path, keep):
    (tmp_path / "m.gguf").write_bytes(good.read_bytes()[:keep])
    refused(tmp_path / "m.gguf", "m.gguf")


def test_counts_beyond_all_bounds_end_at_once(good, tmp_path):
    """Numbers of keys, tensors and elements that a reader would count to for years."""
    content = good.read_bytes()
    tokens = content.index(b"tokenizer.ggml.merges") + len(b"tokenizer.ggml.merges") + 8
    types = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    for place in (8, 16, tokens, types):
        changed = bytearray(content)
        changed[place : place + 8] = (2**62).to_bytes(8, "little")
        (tmp_path / "m.gguf").write_bytes(changed)
        refused(tmp_path / "m.gguf", "m.gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_header_is_read_or_refused_and_never_more(good, tmp_path, seed):
    """Bytes of the header changed at random: a model that is whole, or one line; no crash, no other error."""
    rng = random.Random(seed)
    content = bytearray(good.read_bytes())
    end = content.rindex(b"output.weight") + 60
    for _ in range(rng.choice([1, 1, 2, 8])):
        content[rng.randrange(end)] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    try:
        load(path, force=True)
        load_tokenizer(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_of_several_models_in_a_folder_one_must_be_named(good, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(good, tmp_path / name)
    refused(tmp_path, "2 GGUF models", "a.gguf")
    os.remove(tmp_path / "b.gguf")
    assert load(tmp_path)


def test_without_the_library_it_says_what_to_install(good, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"finback\[gguf\]"):
        GGUF(good)
