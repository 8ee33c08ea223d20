"""What a folder may lack or hold wrongly: one clear line that names it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_model import tiny, tiny_model

from finback.errors import UserError
from finback.weights import load, save

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    save(tiny_model(tiny(num_nextn_predict_layers=1)), None, tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path) -> Path:
    save(tiny_model(tiny()), None, tmp_path / "s", shard_limit=20_000)
    return tmp_path / "s"


def change(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewrite(folder: Path, drop: str = "", **add: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != drop} | add, folder / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.mlp.experts.7.up_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.3.eh_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(folder, name):
    rewrite(folder, drop=name)
    refused(folder, "lacks", f"tensor {name!r}")


def test_many_missing_tensors_are_counted(folder):
    change(folder, num_hidden_layers=4, num_nextn_predict_layers=0)
    refused(folder, "model.layers.3")


def test_an_unexpected_tensor_is_named(folder):
    rewrite(folder, **{"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})
    refused(folder, "'model.layers.0.self_attn.q_proj.weight'", "unknown")


def test_an_mtp_layer_the_config_denies_is_unexpected(folder):
    change(folder, num_nextn_predict_layers=0)
    refused(folder, "model.layers.3.", "…")


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    rewrite(folder, **{"model.layers.1.mlp.experts.0.down_proj.weight": torch.zeros(12, 32)})
    refused(folder, "'model.layers.1.mlp.experts.0.down_proj.weight'", "[12, 32]", "[32, 12]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_a_dtype_that_is_not_read_is_named(folder, dtype):
    rewrite(folder, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32).to(dtype)})
    refused(folder, "'model.layers.0.mlp.up_proj.weight'", "BF16, F16, F32")


@pytest.mark.parametrize(
    "how", [{"quant_method": "awq"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}, "fp8"]
)
def test_another_quantisation_says_what_is_read(folder, how):
    change(folder, quantization_config=how)
    refused(folder, "quantization_config", "FP8 in blocks of 128 x 128", "GGUF")


def test_an_unknown_quantisation_lists_the_known(folder):
    refused(folder, "int3", "fp8, int8, int4", quantize="int3")


def test_fp8_and_scales_come_together(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    codes = torch.zeros(48, 32).to(torch.float8_e4m3fn)
    rewrite(folder, **{name: codes})
    refused(folder, repr(name), "FP8 without", "_scale_inv")
    rewrite(folder, **{name: codes, f"{name}_scale_inv": torch.ones(2, 1)})
    refused(folder, "_scale_inv", "[2, 1]", "[1, 1]")
    rewrite(folder, **{name: torch.zeros(48, 32), f"{name}_scale_inv": torch.ones(1, 1)})
    refused(folder, repr(name), "not FP8")


def test_a_norm_in_fp8_is_not_read(folder):
    rewrite(folder, **{"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})
    refused(folder, "'model.norm.weight'", "float8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_number_that_is_none_is_named(folder, name, bad, dtype):
    values = load_file(folder / "model.safetensors")[name]
    values.view(-1)[-1] = bad
    rewrite(folder, **{name: values})
    refused(folder, "model.safetensors", repr(name), "NaN", dtype=dtype)


def test_a_nan_code_in_fp8_is_named(folder):
    save(load(folder), None, folder, quantize="fp8")
    name = "model.layers.1.self_attn.o_proj.weight"
    codes = load_file(folder / "model.safetensors")[name]
    codes.view(torch.uint8)[2, 3] = 0xFF
    rewrite(folder, **{name: codes})
    for dtype in ("auto", "float32"):
        refused(folder, repr(name), "NaN", dtype=dtype)


def test_large_numbers_are_not_mistaken_for_infinity(folder):
    """Their sum overflows; they are fine."""
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, **{name: torch.full((48, 32), 3e38)})
    assert load(folder).decoder.layers["0"].mlp.up_proj.weight.dense().max() == torch.tensor(3e38)


@pytest.mark.parametrize("dtype", ["fp8", "int8", torch.int64])
def test_an_unknown_dtype_lists_the_known(folder, dtype):
    refused(folder, "auto, float32, bfloat16, float16", dtype=dtype)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(folder, device):
    refused(folder, repr(device), device=device)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(folder, "model.safetensors", "again")


def test_a_damaged_header_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    refused(folder, "model.safetensors")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors", INDEX)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    refused(sharded, shard.name, "missing")


def test_an_index_that_misplaces_a_tensor(sharded):
    index = json.loads((sharded / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    index["weight_map"][name] = next(f for f in index["weight_map"].values() if f != file)
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX, name)


@pytest.mark.parametrize("file", ["../m/model.safetensors", "/etc/passwd", "sub/x.safetensors", 3])
def test_an_index_may_name_files_of_its_folder_only(sharded, file):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX, "same folder")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "\udcff"])
def test_an_index_that_is_no_index(sharded, text):
    (sharded / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(sharded, INDEX)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_no_such_model(tmp_path):
    refused(tmp_path / "nothing", "nothing")


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    model = tiny_model(tiny())
    for target in ("thesis", "file"):
        with pytest.raises(UserError, match=target):
            save(model, None, tmp_path / target)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"
    shutil.rmtree(tmp_path / "thesis")
    (tmp_path / "thesis").mkdir()
    save(model, None, tmp_path / "thesis")
    assert load(tmp_path / "thesis")


def test_a_folder_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    save(tiny_model(tiny()), None, tmp_path / "m")
    (tmp_path / "m" / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "m" / "inside")
    for target in (".", ".."):
        with pytest.raises(UserError, match="a folder of its own"):
            save(tiny_model(tiny()), None, target)
