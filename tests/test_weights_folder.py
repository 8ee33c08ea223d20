"""Model folders: the original layout, both ways with transformers, and nothing lost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from text_families import FAMILIES
from tiny_model import tiny, tiny_model, tokens, twin

import finback
from finback.errors import UserError
from finback.model import RopeScaling
from finback.text.tokenizer import Tokenizer
from finback.weights import load, load_tokenizer, save

CONFIG = tiny(num_nextn_predict_layers=1, n_group=4, topk_group=2)
YARN = {"rope_scaling": RopeScaling(40, 8, mscale=1.0, mscale_all_dim=1.0), "max_position_embeddings": 320}
CASES = {
    "with MTP, groups": {"num_nextn_predict_layers": 1, "n_group": 4, "topk_group": 2},
    "no q_lora, two shared": {"q_lora_rank": None, "n_shared_experts": 2},
    "YaRN": YARN,
    "YaRN named but off": YARN | {"max_position_embeddings": 8},
    "tied head": {"tie_word_embeddings": True, "num_nextn_predict_layers": 1},
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(one, other) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def from_transformers(folder: Path):
    from transformers import DeepseekV3ForCausalLM

    model, report = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_what_we_write_transformers_reads(tmp_path, name):
    model, ids = tiny_model(tiny(**CASES[name])), tokens(2, 8)
    save(model, None, tmp_path / "m")
    with torch.no_grad():
        theirs = from_transformers(tmp_path / "m")(ids).logits
        assert (model(ids) - theirs).abs().max() <= 1e-4
        same(model, load(tmp_path / "m"))


@pytest.mark.parametrize("name", set(CASES) - {"YaRN named but off"})
def test_what_transformers_writes_we_read(tmp_path, name):
    """It announces an MTP layer that the file does not hold, and writes `rope_parameters`."""
    original, ids = twin(tiny_model(tiny(**CASES[name]))), tokens(2, 12)
    original.config.num_mtp_layers = 1
    original.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    assert written["num_nextn_predict_layers"] == 1
    model = load(tmp_path)
    assert not model.mtp
    assert model.config.num_nextn_predict_layers == 0
    with torch.no_grad():
        assert (model(ids) - original(ids).logits).abs().max() <= 1e-4


def expected_names() -> dict[str, list[int]]:
    """README_WEIGHTS.md and the facts, 1.4, for CONFIG: one dense layer, two mixtures, one MTP layer."""
    D, V = 32, 53
    heads, q_rank, kv_rank, nope, rope, value = 3, 10, 14, 6, 8, 5
    attention = {
        "q_a_proj": [q_rank, D],
        "q_a_layernorm": [q_rank],
        "q_b_proj": [heads * (nope + rope), q_rank],
        "kv_a_proj_with_mqa": [kv_rank + rope, D],
        "kv_a_layernorm": [kv_rank],
        "kv_b_proj": [heads * (nope + value), kv_rank],
        "o_proj": [D, heads * value],
    }

    def mlp(prefix: str, width: int) -> dict[str, list[int]]:
        shapes = {"gate_proj": [width, D], "up_proj": [width, D], "down_proj": [D, width]}
        return {f"{prefix}.{part}.weight": shape for part, shape in shapes.items()}

    names = {"model.embed_tokens.weight": [V, D], "model.norm.weight": [D], "lm_head.weight": [V, D]}
    for i in range(4):
        layer = f"model.layers.{i}"
        names |= {f"{layer}.{norm}.weight": [D] for norm in ("input_layernorm", "post_attention_layernorm")}
        names |= {f"{layer}.self_attn.{part}.weight": shape for part, shape in attention.items()}
        if i == 0:
            names |= mlp(f"{layer}.mlp", 48)
            continue
        names |= {f"{layer}.mlp.gate.weight": [8, D], f"{layer}.mlp.gate.e_score_correction_bias": [8]}
        names |= mlp(f"{layer}.mlp.shared_experts", 12)
        for e in range(8):
            names |= mlp(f"{layer}.mlp.experts.{e}", 12)
    mtp = {"enorm": [D], "hnorm": [D], "eh_proj": [D, 2 * D], "shared_head.norm": [D]}
    mtp |= {"embed_tokens": [V, D], "shared_head.head": [V, D]}
    return names | {f"model.layers.3.{part}.weight": shape for part, shape in mtp.items()}


def test_names_and_shapes_on_disk_are_the_originals(tmp_path):
    save(tiny_model(CONFIG), None, tmp_path)
    assert {name: list(value.shape) for name, value in stored(tmp_path).items()} == expected_names()


def test_the_mtp_layer_repeats_embedding_and_head(tmp_path):
    save(tiny_model(CONFIG), None, tmp_path)
    tensors = stored(tmp_path)
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])


def test_gate_and_up_are_not_exchanged(tmp_path):
    model = tiny_model(CONFIG)
    save(model, None, tmp_path)
    tensors, stack = stored(tmp_path), model.decoder.layers["2"].mlp.experts.gate_up.dense()
    assert torch.equal(tensors["model.layers.2.mlp.experts.5.gate_proj.weight"], stack[5, :12])
    assert torch.equal(tensors["model.layers.2.mlp.experts.5.up_proj.weight"], stack[5, 12:])


def test_every_end_of_turn_is_in_generation_config(tmp_path):
    """Other programs stop by it; a family without BOS has none there."""
    for name in ("Qwen2.5", "Llama 3"):
        tokenizer = FAMILIES[name].tokenizer()
        save(tiny_model(tiny()), tokenizer, tmp_path / name)
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert generation["bos_token_id"] == tokenizer.marks.get("<|begin_of_text|>")
        assert generation["eos_token_id"] == sorted(tokenizer.eos_ids) and len(tokenizer.eos_ids) == 2


def test_the_folder_is_complete(tmp_path):
    tokenizer = Tokenizer.train(["one two three " * 20], vocab_size=300)
    save(tiny_model(tiny()), tokenizer, tmp_path / "deep" / "m")
    files = {file.name for file in (tmp_path / "deep" / "m").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files == expected
    config = json.loads((tmp_path / "deep" / "m" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["torch_dtype"] == "float32"
    assert "rope_parameters" not in config
    generation = json.loads((tmp_path / "deep" / "m" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert load_tokenizer(tmp_path / "deep" / "m").encode("one two") == tokenizer.encode("one two")
    with safe_open(tmp_path / "deep" / "m" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_shards_stay_below_the_limit_and_are_indexed(tmp_path):
    model, ids, limit = tiny_model(CONFIG), tokens(1, 8), 20_000
    save(model, None, tmp_path, shard_limit=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    sizes = [sum(value.nbytes for value in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= limit
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    same(model, load(tmp_path))
    with torch.no_grad():
        assert (from_transformers(tmp_path)(ids).logits - model(ids)).abs().max() <= 1e-4


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own(tmp_path):
    model = tiny_model(CONFIG)
    save(model, None, tmp_path, shard_limit=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(expected_names())
    same(model, load(tmp_path))


def test_saving_again_replaces_what_was_and_keeps_the_rest(tmp_path):
    first, second = tiny_model(CONFIG, seed=1), tiny_model(tiny(), seed=2)
    save(first, None, tmp_path / "m", shard_limit=20_000)
    (tmp_path / "m" / "MODEL_CARD.md").write_text("made by hand")
    (tmp_path / "m" / "notes").mkdir()
    (tmp_path / "m" / "notes" / "config.json").write_text("kept")
    save(second, None, tmp_path / "m")
    assert [file.name for file in (tmp_path / "m").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "m" / "MODEL_CARD.md").read_text() == "made by hand"
    assert (tmp_path / "m" / "notes" / "config.json").read_text() == "kept"
    same(second, load(tmp_path / "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = tiny_model(tiny())
    save(model, None, tmp_path / "m")
    monkeypatch.setattr(finback.weights.store, "save_file", full)
    with pytest.raises(UserError, match="No space"):
        save(tiny_model(tiny(), seed=5), None, tmp_path / "m")
    same(model, load(tmp_path / "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_keeps_the_checkpoints_dtype(tmp_path, dtype):
    """As DeepSeek stores it: everything in one dtype, the router's weight too, correction biases in float32."""
    save(tiny_model(CONFIG), None, tmp_path)
    tensors = stored(tmp_path)
    save_file({n: t if "bias" in n else t.to(dtype) for n, t in tensors.items()}, tmp_path / "model.safetensors")
    for asked, expected in (("auto", dtype), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = load(tmp_path, dtype=asked, native=False)
        for name, value in model.state_dict().items():
            assert value.dtype == (torch.float32 if "mlp.gate." in name else expected), name
        assert torch.isfinite(model(tokens(1, 5))).all()
    router = load(tmp_path).decoder.layers["1"].mlp.gate
    assert torch.equal(router.weight, tensors["model.layers.1.mlp.gate.weight"].to(dtype).float())
    assert torch.equal(router.e_score_correction_bias, tensors["model.layers.1.mlp.gate.e_score_correction_bias"])


def test_bfloat16_survives_a_round_trip(tmp_path):
    """From plain tensors as from panels, in which native kernels read them."""
    save(tiny_model(CONFIG), None, tmp_path / "a")
    model = load(tmp_path / "a", dtype="bfloat16", native=False)
    for number, written in enumerate((model, load(tmp_path / "a", dtype="bfloat16"))):
        save(written, None, tmp_path / f"b{number}")
        same(model, load(tmp_path / f"b{number}", native=False))
    assert json.loads((tmp_path / "b1" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_loaded_model_is_ready(tmp_path):
    """Eval mode, trainable, its own memory, a clean load count; a tied head is still one parameter."""
    save(tiny_model(tiny(tie_word_embeddings=True)), None, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = finback.load(str(tmp_path))
    assert not model.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
    assert model.decoder.lm_head.weight.value is model.decoder.embed_tokens.weight
    assert all(not router.load.any() and not router.load.is_meta for _, router in model.routers())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_tied_head_may_be_in_the_file_or_not(tmp_path):
    model = tiny_model(tiny(tie_word_embeddings=True, num_nextn_predict_layers=1))
    save(model, None, tmp_path)
    tensors = stored(tmp_path)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    same(model, load(tmp_path))
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, tmp_path / "model.safetensors")
    same(model, load(tmp_path))


def test_the_copies_in_the_mtp_layer_need_not_be_there(tmp_path):
    save(tiny_model(CONFIG), None, tmp_path)
    copies = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    save_file({n: t for n, t in stored(tmp_path).items() if n not in copies}, tmp_path / "model.safetensors")
    same(tiny_model(CONFIG), load(tmp_path))


def test_rotary_tables_of_old_converters_are_ignored(tmp_path):
    save(tiny_model(tiny()), None, tmp_path)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(stored(tmp_path) | table, tmp_path / "model.safetensors")
    same(tiny_model(tiny()), load(tmp_path))
