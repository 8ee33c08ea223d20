"""The head of a tied model in fewer bits: a packed copy of the embedding, which stays as it is."""

import pytest
import torch
from gguf_files import TOKENIZER, model_of
from native_paths import native_paths
from safetensors.torch import load_file, save_file
from tiny_model import tiny, tiny_model, tokens

from finback.kernels import native
from finback.kernels.quantise import FORMATS
from finback.model.weight import DenseWeight, PackedWeight, PanelWeight
from finback.weights import load, packs, save
from finback.weights.gguf_file import write as write_gguf

CONFIG = tiny(tie_word_embeddings=True, num_nextn_predict_layers=1, hidden_size=64, vocab_size=300)
FORMS = pytest.mark.parametrize("form", ["int8", "int4"])


@pytest.fixture(autouse=True)
def _best_path_again():
    with torch.no_grad():
        yield
    native.use(None)


@pytest.fixture
def folder(tmp_path):
    save(tiny_model(CONFIG), None, tmp_path / "m")
    return tmp_path / "m"


def head_of(model):
    return model.decoder.lm_head.weight


def by_row(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return FORMATS["int8"].quantise(table)


@FORMS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_int8_and_the_embedding_what_it_was(form, dtype, folder):
    """In float32 and bfloat16; a first time and from the pack."""
    plain = load(folder, dtype, native=False)
    table = plain.decoder.embed_tokens.weight
    for turn in ("packed", "read"):
        model = load(folder, dtype, quantize=form, native=False)
        assert torch.equal(model.decoder.embed_tokens.weight, table), turn
        head = head_of(model)
        assert isinstance(head, PackedWeight) and head.form is FORMATS["int8"]
        stored = load(folder, "float32").decoder.embed_tokens.weight
        codes, scale = by_row(stored)
        assert torch.equal(head.codes, codes) and torch.equal(head.scale, scale), turn
        hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(table.dtype)
        found, exact = model.decoder.logits(hidden), hidden.float() @ (codes.float() * scale[:, None]).T
        assert (found - exact).norm() <= (1e-5 if dtype == "float32" else 2**-7) * exact.norm()
        assert not torch.equal(found, plain.decoder.logits(hidden))


def test_in_fp8_it_stays_the_embedding(folder):
    model = load(folder, quantize="fp8")
    assert isinstance(head_of(model), DenseWeight) and head_of(model).value is model.decoder.embed_tokens.weight


@FORMS
def test_it_is_quantised_once_and_kept(form, folder, monkeypatch):
    first = load(folder, quantize=form).state_dict()
    kept = load_file(packs._place(folder, form, torch.float32) / "model.safetensors")
    assert torch.equal(kept["lm_head.weight"], first["decoder.lm_head.weight.codes"])
    assert torch.equal(kept["lm_head.weight_scale"], first["decoder.lm_head.weight.scale"])
    for each in ("int8", "int4"):
        monkeypatch.setattr(type(FORMATS[each]), "quantise", None)
    again = load(folder, quantize=form).state_dict()
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_a_pack_without_the_head_is_made_anew(folder):
    """As packs were before the head had a place in them."""
    wanted = load(folder, quantize="int8").state_dict()
    file = packs._place(folder, "int8", torch.float32) / "model.safetensors"
    rest = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("lm_head")}
    save_file(rest, file, metadata={"format": "pt"})
    again = load(folder, quantize="int8").state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert "lm_head.weight" in load_file(file)


def test_a_head_in_the_file_is_not_looked_at(folder):
    """Tied says that the embedding is meant, whatever lies beside it."""
    expected = head_of(load(folder, quantize="int8")).codes
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(head_of(load(folder, quantize="int8")).codes, expected)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(head_of(load(folder, quantize="int8")).codes, expected)


def test_saving_gives_the_embedding_back(folder, tmp_path):
    """A tied file has one table: the head's rounding must not reach it."""
    save(load(folder, quantize="int8"), None, tmp_path / "again")
    one, other = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert one.keys() == other.keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.3.shared_head.head.weight"):
        assert torch.equal(one[name], other[name]), name


def test_experts_on_disk_have_the_same_head(folder):
    resident, disk = load(folder, quantize="int8", native=False), load(folder, quantize="int8", expert_memory=10**4)
    ids = tokens(2, 9)
    assert torch.equal(resident(ids), disk(ids))


def test_a_gguf_file_without_a_head(tmp_path):
    model = model_of("Qwen2, tied")
    write_gguf(model, TOKENIZER, tmp_path / "m.gguf", "f32")
    codes, _ = by_row(model.decoder.embed_tokens.weight)
    loaded = load(tmp_path / "m.gguf", "float32", quantize="int4")
    assert loaded.config.tie_word_embeddings and torch.equal(head_of(loaded).codes, codes)


@pytest.mark.parametrize("path", native_paths())
@FORMS
def test_native_kernels_multiply_by_the_same_numbers(path, form, folder):
    native.use(path)
    packed = load(folder, "bfloat16", quantize=form, native=False)
    panels = load(folder, "bfloat16", quantize=form)
    head = head_of(panels)
    assert isinstance(head, PanelWeight) and head.form is FORMATS["int8"]
    assert torch.equal(head.dense(), head_of(packed).dense())
    for rows in (1, 3, 20):
        hidden = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16()
        found, exact = panels.decoder.logits(hidden), packed.decoder.logits(hidden)
        assert (found - exact).norm() <= 0.015 * exact.norm()
