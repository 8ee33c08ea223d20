"""Weights in fewer bits: the codes, the products, the folders, and what is kept beside a model."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_model import tiny, tiny_model, tokens

from finback.errors import UserError
from finback.kernels.quantise import E4M3_MAX, FORMATS, Fp8
from finback.model.linear import Experts, Linear
from finback.model.weight import DenseWeight, PackedWeight
from finback.weights import load, save

FORMS = pytest.mark.parametrize("form", FORMATS)
# Of the largest number: half a step of E4M3's last place, of 127 levels; the eighth that a level +8 is missing.
WORST = {"fp8": 2**-4, "int8": 0.5 / 127, "int4": 1 / 8}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def round_trip(form: str, w: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    return FORMATS[form].dequantise(*FORMATS[form].quantise(w), w.shape[-1], dtype)


def test_fp8_is_code_times_scale_of_its_block():
    """Facts 9: 300 x 200 has a grid of 3 x 2; relative error at most 2^-4 for normal codes. Every block by hand."""
    w = random(300, 200) * torch.logspace(-3, 3, 300)[:, None]
    codes, scale = FORMATS["fp8"].quantise(w)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (3, 2)
    got = FORMATS["fp8"].dequantise(codes, scale, 200, torch.float32)
    for i in range(3):
        for j in range(2):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            assert scale[i, j] == w[block].abs().max() / E4M3_MAX
            assert torch.equal(got[block], codes[block].float() * scale[i, j])
            normal = w[block].abs() >= scale[i, j] * 2**-6
            assert ((got[block] - w[block]).abs() <= w[block].abs() * 2**-4)[normal].all()


def test_every_fp8_code_is_read_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    real = codes.float()
    scale = torch.tensor([[0.37, 3.1e-9]])
    got = FORMATS["fp8"].dequantise(codes, scale, 256, torch.float32)
    expected = real * scale.repeat_interleave(128, 1)
    finite = ~real.isnan()
    assert torch.equal(got[finite], expected[finite]) and finite.sum() == 254


def test_the_576_rows_of_the_key_projection_have_five_blocks():
    codes, scale = FORMATS["fp8"].quantise(random(576, 256))
    assert scale.shape == (5, 2)
    codes[512:] = torch.tensor(1.0).to(torch.float8_e4m3fn)
    got = FORMATS["fp8"].dequantise(codes, scale, 256, torch.float32)
    assert torch.equal(got[512:, :128], scale[4, 0].expand(64, 128))


def test_power_of_two_scales_are_rounded_up():
    w = random(200, 130) * 7
    _, exact = Fp8().quantise(w)
    codes, scale = Fp8(power_of_two=True).quantise(w)
    assert (scale.frexp().mantissa == 0.5).all() and (scale >= exact).all() and (scale < 2 * exact).all()
    assert codes.float().isfinite().all()


@FORMS
@given(
    rows=st.integers(1, 150),
    cols=st.integers(1, 150),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_no_number_is_further_off_than_half_a_step(form, rows, cols, exponent, seed):
    w = random(rows, cols, seed=seed) * 2.0**exponent
    w[seed % rows] = 0
    got = round_trip(form, w)
    assert got.shape == w.shape and (got[seed % rows] == 0).all()
    assert (got - w).abs().max() <= WORST[form] * w.abs().max()


def test_int4_searches_its_scale():
    """Less squared error than rounding to the nearest of the plain scale, largest / 7."""
    w = random(64, 256)
    grouped = w.unflatten(-1, (-1, 32))
    scale = grouped.abs().amax(-1, keepdim=True) / 7
    plain = ((grouped / scale).round().clamp(-8, 7) * scale).flatten(-2)
    assert (round_trip("int4", w) - w).square().mean() < 0.85 * (plain - w).square().mean()


@FORMS
@pytest.mark.parametrize("rows", [1, 40])
def test_products_equal_those_of_the_dense_matrix(form, rows):
    """More rows than a panel holds; ragged on both sides."""
    dense = Linear(150, 1300)
    with torch.no_grad():
        dense.weight.value.copy_(random(1300, 150))
    packed = PackedWeight(FORMATS[form], dense.weight, torch.float32)
    for start, stop in ((0, 640), (640, 1300)):
        packed.fill((), start, dense.weight.value.data[start:stop])
    assert torch.equal(packed.dense(), round_trip(form, dense.weight.value.data))
    x = random(rows, 150)
    torch.testing.assert_close(packed.linear(x), x @ packed.dense().T, atol=1e-4, rtol=1e-4)


@FORMS
def test_packed_experts_equal_dense_ones(form):
    """An expert without tokens, gate and up not exchanged, gradients to the input."""
    experts = Experts(5, 70, 40)
    for weight in (experts.gate_up, experts.down):
        assert isinstance(weight, DenseWeight)
        weight.value.data.copy_(random(*weight.shape))
    packed = Experts(5, 70, 40)
    packed.gate_up = PackedWeight(FORMATS[form], experts.gate_up, torch.float32)
    packed.down = PackedWeight(FORMATS[form], experts.down, torch.float32)
    for name in ("gate_up", "down"):
        pieces = list(getattr(experts, name).pieces())
        for index, tensors in pieces:
            getattr(packed, name).fill(index, 0, tensors[""])
        getattr(experts, name).value.data.copy_(getattr(packed, name).dense())
    chosen = torch.tensor([[0, 3], [3, 1], [1, 0]])
    x, weights = random(3, 70).requires_grad_(), random(3, 2)
    outs = [made(x, chosen, weights) for made in (experts, packed)]
    torch.testing.assert_close(*outs, atol=2e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(*gradients, atol=1e-2, rtol=1e-3)


CONFIG = tiny(num_nextn_predict_layers=1, hidden_size=160, moe_intermediate_size=140, q_lora_rank=130)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in float32, the same in FP8 blocks, and what the second stands for in float32."""
    root = tmp_path_factory.mktemp("fp8")
    model = tiny_model(CONFIG)
    save(model, None, root / "plain")
    save(model, None, root / "fp8", quantize="fp8")
    save(load(root / "fp8", dtype="float32"), None, root / "dense")
    return root


def test_an_fp8_folder_is_what_deepseek_publishes(folders):
    """Facts 1.4: matrices E4M3 with an fp32 scale for 128 x 128; embedding, head, norms, router, eh_proj are not."""
    stored, plain = load_file(folders / "fp8" / "model.safetensors"), load_file(folders / "plain" / "model.safetensors")
    settings = json.loads((folders / "fp8" / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    for name, value in plain.items():
        high = ("embed_tokens", "lm_head", "shared_head", "norm", "mlp.gate.", "eh_proj")
        if any(part in name for part in high):
            assert torch.equal(stored[name], value), name
        else:
            assert stored[name].dtype == torch.float8_e4m3fn, name
            rows, cols = value.shape
            assert stored[f"{name}_scale_inv"].shape == (-(-rows // 128), -(-cols // 128))
            assert stored[f"{name}_scale_inv"].dtype == torch.float32
    gate = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert torch.equal(stored[f"{gate}_scale_inv"], FORMATS["fp8"].quantise(plain[gate])[1])


@torch.no_grad()
def test_an_fp8_checkpoint_runs_as_what_it_stands_for(folders):
    packed, dense = load(folders / "fp8"), load(folders / "dense")
    forms = {type(module).__name__ for module in packed.modules() if hasattr(module, "pieces")}
    assert forms == {"PackedWeight", "DenseWeight"}
    ids = tokens(2, 20)
    assert (packed(ids) - dense(ids)).abs().max() <= 1e-4
    assert (packed(ids) - load(folders / "plain")(ids)).abs().mean() > 1e-3, "FP8 changed nothing: nothing was tested"
    for place in (load(folders / "fp8", dtype="bfloat16", native=False), load(folders / "fp8", dtype="float32")):
        assert all(isinstance(m, DenseWeight) for m in place.modules() if hasattr(m, "pieces"))


def test_an_fp8_checkpoint_saves_as_it_was(folders, tmp_path):
    save(load(folders / "fp8"), None, tmp_path / "again")
    one, other = (load_file(place / "model.safetensors") for place in (folders / "fp8", tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
    assert (folders / "fp8" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


def test_power_of_two_scales_are_announced_and_kept(folders, tmp_path):
    """V3.1's "ue8m0", whether the file has the scales as float32 or as exponents."""
    from safetensors.torch import save_file

    stored = load_file(folders / "fp8" / "model.safetensors")
    scales = {n: torch.exp2(t.log2().round()) for n, t in stored.items() if n.endswith("_scale_inv")}
    save(load(folders / "fp8"), None, tmp_path / "m")
    results = []
    for kind in (torch.float32, torch.float8_e8m0fnu):
        changed = stored | {name: scale.to(kind) for name, scale in scales.items()}
        save_file(changed, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
        model = load(tmp_path / "m")
        with torch.no_grad():
            results.append(model(tokens(1, 9)))
        save(model, None, tmp_path / "n")
        written = json.loads((tmp_path / "n" / "config.json").read_text())["quantization_config"]
        assert written["scale_fmt"] == "ue8m0"
    assert torch.equal(*results)


@FORMS
@torch.no_grad()
def test_quantised_loading_is_kept_beside_the_model_and_reused(form, folders, tmp_path, monkeypatch):
    from finback.kernels import quantise

    shutil.copytree(folders / "plain", tmp_path / "m")
    model, ids = load(tmp_path / "m", quantize=form), tokens(2, 12)
    places = {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}
    head = places.pop("decoder.lm_head.weight", None)
    assert (head is None) if form == "fp8" else head.form.name == "int8"
    assert {module.form.name for module in places.values()} == {form}
    assert ("mtp.3.eh_proj.weight" in places) == (form != "fp8")
    plain = load(tmp_path / "m")
    expected = load(tmp_path / "m")
    for (_, packed), (_, dense) in zip(model.named_modules(), expected.named_modules(), strict=True):
        if isinstance(packed, PackedWeight):
            dense.value.data.copy_(packed.dense())
    assert (model(ids) - expected(ids)).abs().max() <= 2e-4
    assert (model(ids) - plain(ids)).abs().mean() > 1e-4
    monkeypatch.setattr(type(quantise.FORMATS[form]), "quantise", None)  # nothing is quantised again
    again = load(tmp_path / "m", quantize=form)
    assert torch.equal(again(ids), model(ids))
    os.utime(tmp_path / "m" / "model.safetensors", (1, 1))  # another file: the pack is stale
    with pytest.raises(TypeError):
        load(tmp_path / "m", quantize=form)


def test_a_quantised_model_saves_what_it_stands_for(folders, tmp_path):
    model = load(folders / "plain", quantize="int8")
    save(model, None, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], model.decoder.lm_head.weight.dense())
    assert not [name for name in stored if "scale" in name]
    experts = model.decoder.layers["1"].mlp.experts
    assert torch.equal(stored["model.layers.1.mlp.experts.2.up_proj.weight"], experts.gate_up.dense()[2, 140:])


def test_a_folder_that_cannot_be_written_still_loads(folders, monkeypatch):
    from finback.weights import packs

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(packs, "atomic_folder", refuse)
    with pytest.warns(UserWarning, match="read-only"):
        assert load(folders / "dense", quantize="int4")


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu, torch.bfloat16])
def test_fp8_codes_are_never_rounded_again(scales, folders, tmp_path):
    """Scales that are not largest / 448, of any type: the codes in memory are those of the file."""
    from safetensors.torch import save_file

    save(load(folders / "plain"), None, tmp_path / "m", quantize="fp8-ue8m0")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    powers = {n: t.to(scales) for n, t in stored.items() if n.endswith("_scale_inv")}
    save_file(stored | powers, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    weight = load(tmp_path / "m").decoder.layers["1"].self_attn.o_proj.weight
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(weight.codes.view(torch.uint8), stored[name].view(torch.uint8))
    assert torch.equal(weight.scale, stored[f"{name}_scale_inv"])


@FORMS
def test_another_device_holds_the_same(form, folders, tmp_path, monkeypatch):
    """Places that bytes cannot be read into directly, as on a GPU, get what the CPU gets, from a pack too."""
    from finback.weights.store import Checkpoint

    shutil.copytree(folders / "plain", tmp_path / "m")
    wanted = load(tmp_path / "m", quantize=form).state_dict()
    into = Checkpoint.into

    def aside(self, name, out):
        spread = torch.zeros(*out.shape[::-1], dtype=out.dtype).permute(*reversed(range(out.dim())))  # other strides
        into(self, name, spread)
        out.copy_(spread)

    monkeypatch.setattr(Checkpoint, "into", aside)
    got = load(tmp_path / "m", quantize=form).state_dict()
    assert all(torch.equal(got[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)


def test_a_damaged_pack_is_made_anew(folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "m")
    wanted = load(tmp_path / "m", quantize="int8").state_dict()
    pack = tmp_path / "m" / "packs" / "int8-float32" / "model.safetensors"
    pack.write_bytes(pack.read_bytes()[:-100])
    got = load(tmp_path / "m", quantize="int8").state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_power_of_two_scales_can_be_asked_for(folders, tmp_path):
    save(load(folders / "plain"), None, tmp_path, quantize="fp8-ue8m0")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    scales = [t for n, t in load_file(tmp_path / "model.safetensors").items() if n.endswith("_scale_inv")]
    assert scales and all((t.frexp().mantissa == 0.5).all() for t in scales)
    with pytest.raises(UserError, match="fp8, fp8-ue8m0"):
        save(load(folders / "plain"), None, tmp_path, quantize="int8")
