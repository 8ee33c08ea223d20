"""From a file into panels: each tensor goes there as it is read, and the numbers are those of the plain way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_paths import laid, native_paths, stored
from safetensors.torch import load_file, save_file
from tiny_model import tiny, tiny_model

from finback import machine
from finback.errors import UserError
from finback.kernels import native, panels
from finback.kernels.quantise import FORMATS
from finback.model import fused
from finback.model.weight import DenseWeight, PackedWeight, PanelWeight, Weight
from finback.weights import load, save, store

PATHS = pytest.mark.parametrize("path", native_paths())
CASES = {
    "mixture": {"num_nextn_predict_layers": 1, "hidden_size": 160, "moe_intermediate_size": 140},
    "tied": {"tie_word_embeddings": True, "first_k_dense_replace": 9},
}


@pytest.fixture(autouse=True)
def _best_path_again():
    with torch.no_grad():
        yield
    native.use(None)


@pytest.fixture
def small_blocks(monkeypatch):
    """Every matrix of more than 128 rows comes in several pieces."""
    monkeypatch.setattr(store, "_PANEL", 1)


def weights(model) -> dict[str, Weight]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Weight)}


@PATHS
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", [None, "fp8", "int8", "int4", "fp8 file"])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_panels_hold_what_plain_tensors_do(path, case, form, kept, tmp_path, small_blocks):
    """Every matrix bit for bit, quantised while it is read and read from the pack; all else is the same."""
    native.use(path)
    save(tiny_model(tiny(**CASES[case])).to(kept), None, tmp_path, quantize="fp8" if form == "fp8 file" else None)
    how = {"dtype": "auto" if form == "fp8 file" and kept == torch.bfloat16 else "bfloat16"}
    if form in FORMATS:
        how["quantize"] = form
    plain = load(tmp_path, native=False, **how)
    for turn in ("first", "from the pack"):
        laid = load(tmp_path, **how)
        ours, theirs = weights(laid), weights(plain)
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            assert isinstance(weight, PanelWeight) and weight.form is theirs[name].form, (turn, name)
            assert torch.equal(weight.dense(), theirs[name].dense()), (turn, name)
        rest = {name: value for name, value in laid.state_dict().items() if name.rpartition(".")[0] not in ours}
        expected = plain.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in rest.items())
        assert not any(parameter.requires_grad for parameter in laid.parameters())
        assert form == "fp8 file" or all(block.fused is not None for block in laid.decoder.layers.values())


def test_no_plain_matrix_is_made_on_the_way(tmp_path, monkeypatch):
    """Neither dense nor packed: the panels are there before the first number is read."""
    if native.kernels() is None:
        pytest.skip("without native kernels nothing is put into panels; plain tensors have tests of their own")
    save(tiny_model(tiny()).bfloat16(), None, tmp_path)
    for form in (None, "int8", "int8"):
        seen = []
        fill = fused.lay_out

        def look(model, seen=seen, fill=fill):
            seen.append({type(weight) for weight in weights(model).values()})
            return fill(model)

        monkeypatch.setattr("finback.weights.reader.lay_out", look)
        load(tmp_path, quantize=form)
        assert seen == [{PanelWeight}]
        monkeypatch.undo()


@PATHS
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_a_second_start_quantises_nothing(path, form, case, tmp_path, monkeypatch):
    """Its codes come from the files that the first one left, whatever path wrote them."""
    save(tiny_model(tiny(**CASES[case])).bfloat16(), None, tmp_path)
    native.use(path)
    first = {name: weight.dense() for name, weight in weights(load(tmp_path, quantize=form)).items()}
    packs = {file: file.stat().st_mtime_ns for file in (tmp_path / "packs").rglob("*")}
    for each in FORMATS.values():
        monkeypatch.setattr(type(each), "quantise", None)
    for other in (path, "torch"):
        native.use(other)
        again = weights(load(tmp_path, quantize=form))
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name].dense(), numbers) for name, numbers in first.items())
    assert packs == {file: file.stat().st_mtime_ns for file in (tmp_path / "packs").rglob("*")}


@PATHS
@pytest.mark.parametrize("form", panels.FORMS)
def test_large_pieces_are_laid_out_by_all_threads(path, form, monkeypatch):
    native.use(path)
    codes, scale, _ = stored(form, 900, 70)
    monkeypatch.setattr(native, "_ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    out = torch.full((57, panels.panel_bytes(form, 70)), 5, dtype=torch.uint8)
    native.lay(form, codes, scale, 70, out)
    assert torch.equal(out, laid(form, codes, scale, 70))


PEAK = """
import sys
from finback import machine
from finback.weights import load
load(sys.argv[1])  # imports, threads, kernels
def peak():
    lines = machine.read("/proc/self/status").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
model = load(sys.argv[2])
print(peak() - before)
"""


def test_loading_takes_the_weights_and_little_more(tmp_path):
    """Half of this model is one stack of experts: a second copy of the largest tensor alone would be 48 MiB."""
    if native.kernels() is None:
        pytest.skip("without native kernels nothing is put into panels; plain tensors have tests of their own")
    config = tiny(hidden_size=1024, moe_intermediate_size=1024, n_routed_experts=12, num_hidden_layers=2)
    save(tiny_model(config).bfloat16(), None, tmp_path / "large")
    save(tiny_model(tiny()).bfloat16(), None, tmp_path / "small")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert 0.8 * size < int(done.stdout) < size + (32 << 20)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_on_the_way_into_panels(bad, tmp_path):
    save(tiny_model(tiny()).bfloat16(), None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name][-1, -1] = bad
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name}.*NaN or infinity"):
        load(tmp_path)


def test_a_file_cut_off_while_it_is_read_is_refused(tmp_path, monkeypatch):
    save(tiny_model(tiny()).bfloat16(), None, tmp_path)
    file = tmp_path / "model.safetensors"
    check = store.Checkpoint.rows

    def cut(self, *which):
        os.truncate(file, file.stat().st_size // 2)
        return check(self, *which)

    monkeypatch.setattr(store.Checkpoint, "rows", cut)
    with pytest.raises(UserError, match="ends within tensor"):
        load(tmp_path)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="this system has no huge pages to ask for: `native.memory` goes on in small ones, and no flag would tell",
)
def test_panels_may_lie_in_huge_pages():
    """Private and advised: shared memory is never put into them unless the system says so for itself."""
    place = native.memory(8, 1 << 20)
    place[3, 5] = 7
    flags, here = "", False
    for line in machine.read("/proc/self/smaps").splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            first, last = (int(part, 16) for part in line.split(" ")[0].split("-"))
            here = first <= place.data_ptr() < last
        elif here and line.startswith("VmFlags:"):
            flags = line
    assert "hg" in flags.split() and "sh" not in flags.split(), flags
    assert place.sum() == 7 and not native.memory(3, 4).any()


def test_stored_is_what_a_piece_is():
    """Types and shapes that are told without the numbers, of every kind of weight."""
    dense = DenseWeight(3, 2 * 40, 70, parts=2).to(torch.bfloat16)
    kinds: list[Weight] = [dense, *(PackedWeight(form, dense, torch.bfloat16) for form in FORMATS.values())]
    if native.kernels() is not None:
        for weight in kinds[1:]:
            weight.codes.view(torch.uint8).zero_()
            weight.scale.zero_()
        kinds += [PanelWeight(weight) for weight in kinds]
    for weight in kinds:
        pieces = dict(weight.pieces())
        assert list(pieces) == [(e, p) for e in range(3) for p in range(2)]
        for piece in pieces.values():
            told = {suffix: (t.shape, t.dtype, t.is_meta) for suffix, t in weight.stored().items()}
            assert told == {suffix: (t.shape, t.dtype, True) for suffix, t in piece.items()}
