"""Files made to harm: every one is read as what it says, or refused in one line that names it."""

import json
import os
import random
import struct
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused
from safetensors.torch import load_file
from tiny_model import tiny, tiny_model

from finback.errors import UserError
from finback.text import Tokenizer
from finback.weights import load, load_tokenizer, reader, save
from finback.weights.convert import verify


@pytest.fixture
def folder(tmp_path) -> Path:
    save(tiny_model(tiny()), None, tmp_path / "m")
    return tmp_path / "m"


def parts(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def put(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def overlap(header, names):
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def gap(header, names):
    for name in names[3:]:
        header[name]["data_offsets"] = [offset + 64 for offset in header[name]["data_offsets"]]


def backwards(header, names):
    header[names[2]]["data_offsets"].reverse()


def beyond(header, names):
    header[names[-1]]["data_offsets"][1] = 2**62


def negative(header, names):
    header[names[0]]["data_offsets"] = [-8, 0]


def huge_shape(header, names):
    header[names[0]]["shape"] = [2**40, 2**40]


def overflowing_shape(header, names):
    header[names[0]]["shape"] = [2**32, 2**32, 4]


def negative_shape(header, names):
    header[names[0]]["shape"][0] = -1


def no_dtype(header, names):
    header[names[0]]["dtype"] = "F128"


def smaller_dtype(header, names):
    header[names[0]]["dtype"] = "F16"


def not_an_object(header, names):
    header[names[0]] = [1, 2]


def deep(header, names):
    header["__metadata__"] = {"a": "b" * 10}
    header[names[0]]["shape"] = [[[[1]]]]


@pytest.mark.parametrize(
    "change",
    [
        *(overlap, gap, backwards, beyond, negative, huge_shape, overflowing_shape, negative_shape),
        *(no_dtype, smaller_dtype, not_an_object, deep),
    ],
    ids=lambda change: change.__name__,
)
def test_a_header_that_lies_is_one_clear_line(folder, change):
    path = folder / "model.safetensors"
    header, data = parts(path)
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    change(header, names)
    put(path, header, data)
    refused(folder, "model.safetensors")
    assert verify(str(folder))["problems"]


@pytest.mark.parametrize("size", [0, 7, 2**20, 2**62, 2**64 - 1])
def test_a_header_length_that_lies_is_one_clear_line(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"null", b"{" * 50_000, b"[" * 200_000, b"\xff\xfe", b"{}"])
def test_a_header_that_is_no_json_is_one_clear_line(folder, header):
    put(folder / "model.safetensors", header, b"")
    refused(folder)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_file_is_read_or_refused_and_never_more(folder, seed):
    """Bytes changed, cut and put in at random, mostly in the header: one line, or a model of finite numbers."""
    rng, path = random.Random(seed), folder / "model.safetensors"
    good = path.read_bytes()
    content = bytearray(good)
    end = 8 + struct.unpack("<Q", good[:8])[0] if rng.random() < 0.8 else len(good)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place, kind = rng.randrange(end), rng.random()
        if kind < 0.7:
            content[place] = rng.choice([0, 34, 44, 48, 57, 91, 255, rng.randrange(256)])
        elif kind < 0.85:
            del content[place : place + rng.randrange(1, 40)]
        else:
            content[place:place] = rng.randbytes(rng.randrange(1, 20))
    path.write_bytes(content)
    try:
        model = load(folder)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(good)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_config_that_lies_is_refused_or_fits(folder, data):
    """Any value in any field: one line, or the model that is there."""
    path = folder / "config.json"
    good = json.loads(path.read_text())
    odd = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 300),
        st.sampled_from(
            [2**31, 2**63, 10**30, -1, 0.5, float("nan"), float("inf"), "", "yarn", [], {}, [1], {"a": {}}]
        ),
        st.text(max_size=5),
    )
    changed = good | {
        data.draw(st.sampled_from(sorted(good))): data.draw(odd) for _ in range(data.draw(st.integers(1, 3)))
    }
    path.write_text(json.dumps(changed))
    try:
        load(folder)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        path.write_text(json.dumps(good))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("where", ["outside", "above", "dangling"])
def test_a_link_out_of_the_folder_is_named(folder, tmp_path, file, where):
    targets = {"outside": tmp_path / "elsewhere", "above": Path("../elsewhere"), "dangling": Path("/nowhere/at/all")}
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(targets[where])
    if where == "dangling" and file == "config.json":
        refused(folder)  # no config.json at all
    else:
        refused(folder, file, "outside")


def test_links_into_a_hub_cache_are_followed(folder, tmp_path):
    """models--a--b/snapshots/SHA/file -> ../../blobs/HASH, as other programs' caches have them."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(n))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(n))
    assert load(snapshot)


def test_a_giant_json_is_not_read(folder, monkeypatch):
    path = folder / "config.json"
    with open(path, "r+b") as file:
        file.truncate(3 * 2**30)  # sparse: it takes no disk
    refused(folder, "config.json", "bytes")


def test_deeply_nested_json_is_one_clear_line(folder):
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "config.json")


def test_what_is_no_file_is_not_waited_for(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder)
    os.unlink(folder / "config.json")


@pytest.mark.parametrize("token_id", [-1, 10**12, 1.5, "3", None])
def test_a_token_id_that_cannot_be_is_one_clear_line(folder, token_id):
    Tokenizer.train(["one two three " * 20], vocab_size=300).save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"][3]["id"] = token_id
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert verify(str(folder))["problems"]


def test_a_tokenizer_of_another_model_is_named(folder):
    Tokenizer.train(["one two three " * 20], vocab_size=300).save(folder)
    assert "do not belong together" in verify(str(folder))["problems"][0]


def test_links_in_a_loop_are_one_clear_line(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("zz")
    (folder / "zz").symlink_to("model.safetensors")
    refused(folder, "model.safetensors")


def test_a_home_of_nobody_is_one_clear_line(monkeypatch):
    with pytest.raises(UserError, match="nobody-here"):
        load("~nobody-here/model")
    monkeypatch.setenv("FINBACK_HOME", "~nobody-here")
    with pytest.raises(UserError, match="nobody-here"):
        load("some-model")
    with pytest.raises(UserError, match="empty"):
        load(" ")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": 3}', '{"model": {"type": "BPE"}}', '{"model": null}'])
def test_a_tokenizer_that_is_none_is_one_clear_line(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_has_no_room_is_refused_with_the_arithmetic(folder, monkeypatch):
    """By the sizes of its config, before anything is read; what would fit is said; --force loads it."""
    monkeypatch.setattr(reader.machine, "memory_free", lambda: 500 * 2**20)
    assert load(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    large = {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 3, "intermediate_size": 2048}
    path.write_text(json.dumps(config | large))
    refused(folder, "weights 0.3 GiB", "cache 0.0 GiB", "margin", "0.5 GiB are free", "--force", "--dtype bfloat16 (0.")
    refused(folder, "asks for", force=True)
    monkeypatch.setattr(reader.machine, "memory_free", lambda: 100 * 2**20)
    refused(folder, "only a smaller model")


@pytest.mark.parametrize("tied", [False, True])
def test_the_estimate_counts_what_the_model_takes(folder, tied):
    """Weights of every form to 2 % for a model whose matrices are large; the cache to the byte."""
    from finback.kernels.native import kernels
    from finback.model.sizes import cache_numbers, memory

    large = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512, "kv_lora_rank": 128}
    config = tiny(**large, vocab_size=2048, tie_word_embeddings=tied)
    save(tiny_model(config), None, folder)
    for form, size in product((None, "fp8", "int8", "int4"), (4, 2)):
        model = load(folder, "float32" if size == 4 else "bfloat16", quantize=form)
        kept = {t.data_ptr(): t.nbytes for n, t in model.state_dict().items()}  # by turns: from one half the other
        laid_out = size == 2 and kernels() is not None
        assert memory(config, size, form, 100, None, laid_out).weights == pytest.approx(sum(kept.values()), rel=0.02)
    assert memory(config, 4, None, 100).cache == 100 * 4 * cache_numbers(config)
    assert memory(config, 4, None, 10**6).cache == config.max_position_embeddings * 4 * cache_numbers(config)


def test_nothing_but_whole_files_was_needed(folder):
    """The fixture itself loads: every refusal above is the change's doing."""
    assert load_file(folder / "model.safetensors") and load(folder)
    assert verify(str(folder))["problems"] == []
    assert torch.isfinite(load(folder)(torch.tensor([[1, 2]]))).all()
