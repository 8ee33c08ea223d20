"""From one form on disk to another, through the one door for pickles, and the proof that a model is whole."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from gguf_files import in_bf16
from safetensors.torch import load_file, save_file
from tiny_model import tiny_model

from finback.errors import UserError
from finback.model import Config
from finback.paths import atomic_file, check_writable
from finback.text import Tokenizer
from finback.weights import load, load_tokenizer, save
from finback.weights.convert import convert, verify

TOKENIZER = Tokenizer.train(["one two three " * 20], vocab_size=300)
IDS = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folder(tmp_path) -> Path:
    model = tiny_model(Config.from_dict(FAMILIES["V3, R1"] | {"vocab_size": 300, "num_nextn_predict_layers": 1}))
    save(model, TOKENIZER, tmp_path / "m")
    (tmp_path / "m" / "LICENSE").write_text("MIT License")
    return tmp_path / "m"


def pickled(folder: Path, shards: int = 2) -> Path:
    """The same folder as older checkpoints are published: its weights in .bin files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for i in range(shards):
        torch.save({n: tensors[n] for n in names[i::shards]}, folder / f"pytorch_model-0000{i + 1}.bin")
    return folder


@torch.no_grad()
def test_to_gguf_and_back(folder, tmp_path):
    """BF16 rounds the matrices once; from there on nothing changes. The MTP module is left out, and said to be."""
    remarks = convert(str(folder), tmp_path / "m.gguf")
    assert any("MTP" in remark for remark in remarks)
    convert(str(tmp_path / "m.gguf"), tmp_path / "back", dtype="float32")
    convert(str(tmp_path / "back"), tmp_path / "again.gguf")
    one, other = load(tmp_path / "m.gguf", dtype="float32"), load(tmp_path / "again.gguf", dtype="float32")
    assert torch.equal(one(IDS), other(IDS))
    assert (one(IDS) - in_bf16(load(folder))(IDS)).abs().max() <= 1e-5
    assert load_tokenizer(tmp_path / "back").encode("one two") == TOKENIZER.encode("one two")


@torch.no_grad()
def test_dtype_and_fp8(folder, tmp_path):
    convert(str(folder), tmp_path / "half", dtype="bfloat16")
    assert {t.dtype for n, t in load_file(tmp_path / "half" / "model.safetensors").items() if "gate." not in n} == {
        torch.bfloat16
    }
    assert (tmp_path / "half" / "LICENSE").read_text() == "MIT License"
    convert(str(folder), tmp_path / "fp8", quantize="fp8")
    convert(str(tmp_path / "fp8"), tmp_path / "dense", dtype="float32")
    assert (load(tmp_path / "fp8")(IDS) - load(tmp_path / "dense")(IDS)).abs().max() <= 1e-4
    assert verify(str(tmp_path / "fp8"))["problems"] == []


@torch.no_grad()
def test_pickles_of_tensors_are_read(folder, tmp_path):
    model = load(folder)
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    convert(str(pickled(folder)), tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(IDS), model(IDS))
    assert not list((tmp_path / "out").glob("*.bin"))


class Harmful:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code_does_not(folder, tmp_path, protocol):
    """As torch.save writes it and as plain pickle: refused, nothing ran, nothing was written."""
    pickled(folder, shards=1)
    path, marker = folder / "pytorch_model-00001.bin", tmp_path / "ran"
    torch.save({"model.norm.weight": Harmful(marker)}, path, pickle_protocol=protocol)
    for _ in range(2):
        with pytest.raises(UserError, match="weights alone") as caught:
            convert(str(folder), tmp_path / "out")
        assert "\n" not in str(caught.value)
        path.write_bytes(pickle.dumps({"a": Harmful(marker)}, protocol=protocol))
    assert not marker.exists() and not (tmp_path / "out").exists()
    pickle.loads(path.read_bytes())  # the test's own file does run where it is let
    assert marker.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"PK\x03\x04nonsense", b"\x00" * 1000])
def test_a_damaged_pickle_is_one_clear_line(folder, tmp_path, content):
    pickled(folder, shards=1)
    (folder / "pytorch_model-00001.bin").write_bytes(content)
    with pytest.raises(UserError) as caught:
        convert(str(folder), tmp_path / "out")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_limits_are_set_before_anything_is_read(tmp_path, monkeypatch):
    from finback.weights import unpickle

    order: list[str] = []
    monkeypatch.setattr(unpickle, "limit", lambda files: order.append("limit"))
    monkeypatch.setattr(unpickle.torch, "load", lambda *_, **__: order.append("load") or {"a": torch.ones(1)})
    unpickle.main(tmp_path, [tmp_path / "x.bin"])
    assert order == ["limit", "load"]


def test_the_door_is_limited(tmp_path):
    """The process that unpickles has its limits set before it reads anything."""
    code = (
        "import resource, sys, pathlib; from finback.weights.unpickle import limit; f = pathlib.Path(sys.argv[1]);"
        "limit([f]); print([resource.getrlimit(getattr(resource, 'RLIMIT_' + n))[0] for n in ('AS', 'FSIZE', 'CPU')])"
    )
    (tmp_path / "x").write_bytes(b"1" * 1000)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    space, size, time = json.loads(done.stdout)
    assert 0 < space <= 17 * 2**30 and 0 < size <= 2**31 and 0 < time <= 700


@pytest.mark.parametrize(
    ("out", "options", "named"),
    [
        ("out", {"quantize": "q8_0"}, "fp8"),
        ("out.gguf", {"quantize": "fp8"}, "bf16, q8_0, f32"),
        ("out", {"dtype": "int3"}, "int3"),
        ("m/full", {"dtype": "int3"}, "int3"),
    ],
)
def test_what_cannot_be_is_one_clear_line(folder, tmp_path, out, options, named):
    with pytest.raises(UserError, match=named):
        convert(str(folder), tmp_path / out, **options)
    assert not (tmp_path / out).exists()


def test_gguf_needs_a_tokenizer_and_a_folder_says_it_has_none(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        convert(str(folder), tmp_path / "m.gguf")
    assert any("tokenizer" in remark for remark in convert(str(folder), tmp_path / "out"))


def test_a_whole_model_has_no_problems(folder, tmp_path):
    convert(str(folder), tmp_path / "m.gguf")
    for place in (folder, tmp_path / "m.gguf"):
        found = verify(str(place))
        assert found["problems"] == [] and found["tensors"] > 50


def test_every_tensor_that_is_wrong_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.2.mlp.experts.1.up_proj.weight"):
        tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    problems = verify(str(folder))["problems"]
    assert len(problems) == 2 and "model.norm.weight" in problems[1] and "experts.1" in problems[0]


def test_missing_and_extra_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.extra": torch.ones(1)}, folder / "model.safetensors")
    assert "model.extra" in verify(str(folder))["problems"][0]
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    assert "model.norm.weight" in verify(str(folder))["problems"][0]


def test_files_that_are_not_as_they_were_pulled_are_named(folder):
    import hashlib

    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in folder.iterdir()
    }
    manifest = {"repo": "a/b", "revision": "main", "commit": "0" * 40, "endpoint": "http://x", "files": files}
    (folder / "finback.json").write_text(json.dumps(manifest))
    assert verify(str(folder))["problems"] == []
    (folder / "LICENSE").write_text("MIT Licence")
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer_config.json").unlink()
    problems = verify(str(folder))["problems"]
    assert [any(name in p for p in problems) for name in ("SHA-256", "generation_config", "missing")] == [True] * 3
    assert len(problems) == 3
    (folder / "finback.json").write_text("{}")
    assert "finback.json" in verify(str(folder))["problems"][0]


def test_a_folder_can_be_converted_into_itself(folder):
    (folder / "README.md").write_text("kept")
    convert(str(folder), folder, quantize="fp8")
    assert verify(str(folder))["problems"] == [] and (folder / "README.md").read_text() == "kept"


def test_the_hashes_of_a_file_in_a_subfolder_are_checked(folder, tmp_path):
    (folder / "Q4").mkdir()
    convert(str(folder), folder / "Q4" / "m.gguf")
    entry = {"size": 5, "sha256": "0" * 64}
    manifest = {
        "repo": "a/b",
        "revision": "main",
        "commit": "0" * 40,
        "endpoint": "http://x",
        "files": {"Q4/m.gguf": entry},
    }
    (folder / "finback.json").write_text(json.dumps(manifest))
    assert "was 5 when pulled" in verify(str(folder / "Q4" / "m.gguf"))["problems"][0]


def test_the_copies_of_embedding_and_head_are_verified_too(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    assert "model.layers.3.embed_tokens.weight" in verify(str(folder))["problems"][0]


def test_what_a_trainer_left_and_old_pickles_are_no_obstacle(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for name in ("rng_state_0.pth", "scheduler.pt", "optimizer.bin"):
        (folder / name).write_bytes(b"anything")
    convert(str(folder), tmp_path / "out")
    assert verify(str(tmp_path / "out"))["problems"] == []


def test_the_users_home_and_folders_among_the_texts(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").mkdir()
    convert(str(folder), Path("~/there"))
    assert verify(str(tmp_path / "there"))["problems"] == []
    assert not (tmp_path / "there" / "LICENSE").exists() and not Path("~").exists()


def test_a_device_is_not_replaced(folder):
    for path in (Path("/dev/null"), folder):
        with pytest.raises(UserError, match="no file"):
            check_writable(path)
    with pytest.raises(UserError, match="no file"), atomic_file(Path("/dev/null")):
        raise AssertionError


@pytest.mark.parametrize("file", ["pytorch_model-00001.bin", "tokenizer.json"])
def test_no_link_leads_out_of_a_folder_of_pickles(folder, tmp_path, file):
    pickled(folder, shards=1)
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside"):
        convert(str(folder), tmp_path / "out")
