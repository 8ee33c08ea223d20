"""Models larger than memory: experts on disk compute what experts in memory do, within their bytes."""

import json
import os
import shutil
import threading
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from text_samples import trained
from tiny_model import tiny, tiny_model, tokens
from typer.testing import CliRunner

from finback import machine
from finback.cli import app
from finback.engine import Engine, Sampling
from finback.errors import UserError
from finback.kernels import dispatch, reference
from finback.model.sizes import memory
from finback.weights import gguf_file, load, packs, save

CONFIG = tiny(num_nextn_predict_layers=1, hidden_size=160, moe_intermediate_size=144, q_lora_rank=130)
LAYERS = ["decoder.layers.1.mlp.experts", "decoder.layers.2.mlp.experts", "mtp.3.block.mlp.experts"]
EXPERTS, NUMBERS = 8, 3 * 160 * 144
# Bytes of one expert as it is held, by hand: scales of 128 x 128 blocks, of rows, of 32 columns (144 fill up to 160).
HELD = {
    "float32": 4 * NUMBERS,
    "bfloat16": 2 * NUMBERS,
    "fp8 file": NUMBERS + 4 * 3 * (2 * 2),
    "fp8": NUMBERS + 4 * 3 * (2 * 2),
    "int8": NUMBERS + 4 * (144 + 144 + 160),
    "int4": (2 * 144 * 160 + 160 * 160) // 2 + 2 * (2 * 144 * 5 + 160 * 5),
}
ALL = len(LAYERS) * EXPERTS
FORMS = pytest.mark.parametrize("form", HELD)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in float32, and the same in FP8 blocks."""
    root = tmp_path_factory.mktemp("disk")
    model = tiny_model(CONFIG)
    save(model, None, root / "plain")
    save(model, None, root / "fp8", quantize="fp8")
    return root


def opened(folders, form: str, expert_memory: int | None = None):
    if form == "fp8 file":
        return load(folders / "fp8", expert_memory=expert_memory, native=False)
    how = {"dtype": form} if form in ("float32", "bfloat16") else {"quantize": form}
    return load(folders / "plain", expert_memory=expert_memory, native=False, **how)


@torch.no_grad()
def logits(model, ids):
    """Of the decoder and of the MTP module behind it."""
    hidden = model.decoder(ids)
    following = model.mtp["3"](hidden[:, :-1], model.decoder.embed_tokens(ids[:, 1:]))
    return model.decoder.logits(torch.cat((hidden, following), dim=1))


@FORMS
def test_every_budget_gives_the_resident_models_logits(form, folders):
    """Bit for bit: less than a layer's step needs, less than a layer, more than all; one token and whole groups."""
    resident = opened(folders, form)
    prompts = [tokens(1, 2), tokens(2, 7), tokens(3, 150)]
    expected = [logits(resident, ids) for ids in prompts]
    for count in (1, 2, 5, 13, ALL, ALL + 1):
        model = opened(folders, form, count * HELD[form] + 7)
        for ids, wanted in zip(prompts, expected, strict=True):
            assert torch.equal(logits(model, ids), wanted)
        hot = model.expert_cache
        assert hot.resident_bytes == min(count, ALL) * HELD[form]
        assert hot.misses >= ALL and (hot.hits > 0 or count < EXPERTS)


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_generation_gives_the_resident_models_tokens(form, folders):
    """In the engine's inference mode, through the cache, several rows at once."""
    prompts = [[3, 14, 15], [9], [2, 6, 5, 3, 5, 8, 9]]
    told = []
    for budget in (None, HELD[form], 11 * HELD[form]):
        engine = Engine(opened(folders, form, budget), max_batch=3)
        sampling = Sampling(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True, logprobs=1)
        told.append({c.index: (c.token_ids, c.logprobs) for c in engine.generate(prompts, sampling)})
    assert told[0] == told[1] == told[2]


@torch.no_grad()
def test_streamed_experts_are_the_kernels(folders):
    """Against the specification, and bit for bit what a resident stack gives without gradients, filled groups too."""
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(6, *shape, generator=generator) / 5 for shape in ((32, 48), (48, 16)))
    stacks = [lambda x, e, stack=stack: torch.nn.functional.linear(x, stack[e]) for stack in (gate_up, down)]
    for rows in (1, 3, 40, 700):
        x, weights = torch.randn(rows, 48, generator=generator), torch.rand(rows, 2, generator=generator)
        chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(rows)])  # 5 is never chosen
        got = dispatch.expert_stream(x, *stacks, 6, chosen, weights)
        assert torch.equal(got, dispatch.expert_ffn(x, gate_up, down, chosen, weights))
        torch.testing.assert_close(got, reference.expert_ffn(x, gate_up, down, chosen, weights), atol=1e-5, rtol=1e-5)


class Lru:
    """A plain model of the cache: which keys are in, in the order of their last use."""

    def __init__(self, room: int) -> None:
        self.room, self.hits, self.misses = room, 0, 0
        self.keys: OrderedDict[tuple[str, int], None] = OrderedDict()

    def use(self, key: tuple[str, int]) -> None:
        if key in self.keys:
            self.hits += 1
            del self.keys[key]
        else:
            self.misses += 1
            if len(self.keys) == self.room:
                self.keys.popitem(last=False)
        self.keys[key] = None


USES = st.lists(st.tuples(st.sampled_from(LAYERS), st.integers(0, EXPERTS - 1)), max_size=80)


@given(form=st.sampled_from(["float32", "int4", "fp8 file"]), uses=USES, count=st.integers(1, ALL + 1), odd=st.data())
@settings(max_examples=40)
def test_the_budget_holds_and_the_least_recently_used_leaves(folders, form, uses, count, odd):
    budget = count * HELD[form] + odd.draw(st.integers(0, HELD[form] - 1))
    hot, plain = opened(folders, form, budget).expert_cache, Lru(count)
    for key in uses:
        plain.use(key)
        with hot.entry(*key) as entry:
            tensors = [t for e in hot._entries.values() for w in e.values() for t in w.state_dict().values()]
            held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
            assert sum(held.values()) == hot.resident_bytes == len(plain.keys) * HELD[form] <= budget
            for stack, weight in entry.items():
                got, wanted = weight.state_dict(), hot.read(*key, stack).state_dict()
                assert all(torch.equal(got[n].view(torch.uint8), t.view(torch.uint8)) for n, t in wanted.items())
    assert (hot.hits, hot.misses, hot.uses) == (plain.hits, plain.misses, len(uses))
    assert list(hot._entries) == list(plain.keys)
    assert hot.bytes_read == plain.misses * HELD[form]
    assert hot.hit_rate == (plain.hits / len(uses) if uses else 0)


@FORMS
def test_uses_are_counted_once_a_layer_and_pass(form, folders):
    """From the routing: each expert that any token chose, in the order of layers and numbers."""
    model, plain = opened(folders, form, 9 * HELD[form]), Lru(9)
    with torch.no_grad():
        for seed in range(6):
            routing: dict[int, torch.Tensor] = {}
            model(tokens(2, 3, seed=seed), routing=routing)
            for layer in (1, 2):
                for expert in sorted(set(routing[layer].flatten().tolist())):
                    plain.use((LAYERS[layer - 1], expert))
    hot = model.expert_cache
    assert (hot.hits, hot.misses) == (plain.hits, plain.misses) and plain.hits > 0
    assert hot.stats() == {
        "budget": 9 * HELD[form],
        "resident_bytes": 9 * HELD[form],
        "hits": plain.hits,
        "misses": plain.misses,
        "hit_rate": plain.hits / (plain.hits + plain.misses),
        "bytes_read": plain.misses * HELD[form],
        "seconds_reading": hot.seconds_reading,
    }
    assert hot.seconds_reading > 0


def test_buffers_are_reused(folders):
    """Fresh pages would cost more than the reading."""
    hot = opened(folders, "bfloat16", 3 * HELD["bfloat16"]).expert_cache
    seen: list[object] = []  # kept, so that no other can take their place in memory
    for number in range(ALL):
        with hot.entry(LAYERS[number % 3], number // 3) as entry:
            seen += [weight.value for weight in entry.values()]
    assert len({id(value) for value in seen}) == 3 * 2


def test_nobody_reads_into_an_expert_in_use(folders):
    hot = opened(folders, "float32", HELD["float32"]).expert_cache
    free: list[bool] = []

    def look():
        free.append(hot._lock.acquire(blocking=False))

    with hot.entry(LAYERS[0], 0):
        (other := threading.Thread(target=look)).start()
        other.join()
    (other := threading.Thread(target=look)).start()
    other.join()
    assert free == [False, True]


def test_loading_reads_no_expert(folders, tmp_path):
    """Nor holds one: what is damaged shows when it is needed."""
    shutil.copytree(folders / "plain", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    bad = [name for name in tensors if ".experts." in name]
    for name in bad:
        tensors[name].fill_(float("nan"))
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path / "m", expert_memory=HELD["float32"])
    dense = {name: t for name, t in tensors.items() if name not in bad and not name.startswith("model.layers.3.embed")}
    del dense["model.layers.3.shared_head.head.weight"]
    assert sum(t.nbytes for t in model.state_dict().values()) == sum(t.nbytes for t in dense.values())
    with pytest.raises(UserError, match=r"model\.safetensors.*\.experts\..*NaN"):
        logits(model, tokens(1, 4))
    assert model.expert_cache.resident_bytes == 0


@pytest.mark.parametrize("form", ["float32", "fp8 file", "int8"])
def test_saving_writes_what_the_resident_model_writes(form, folders, tmp_path):
    for name, budget in (("resident", None), ("disk", HELD[form])):
        save(opened(folders, form, budget), None, tmp_path / name)
    for file in sorted(path.name for path in (tmp_path / "resident").iterdir()):
        assert (tmp_path / "disk" / file).read_bytes() == (tmp_path / "resident" / file).read_bytes(), file
    model = opened(folders, form, HELD[form]).decoder.layers["1"].mlp.experts
    wanted = opened(folders, form).decoder.layers["1"].mlp.experts
    assert torch.equal(model.gate_up.dense(), wanted.gate_up.dense())
    assert torch.equal(model.down.dense(), wanted.down.dense())


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_a_missing_pack_is_written_an_expert_at_a_time(form, folders, tmp_path, monkeypatch):
    """The files that packing in memory writes; then they are what is read."""
    shutil.copytree(folders / "plain", tmp_path / "a", ignore=shutil.ignore_patterns("packs"))
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy2)
    resident, model = load(tmp_path / "a", quantize=form), load(tmp_path / "b", quantize=form, expert_memory=HELD[form])
    for file in sorted((tmp_path / "a" / "packs" / f"{form}-float32").glob("model*")):
        assert (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes() == file.read_bytes()
    from finback.kernels import quantise

    monkeypatch.setattr(type(quantise.FORMATS[form]), "quantise", None)  # nothing is quantised again
    ids = tokens(2, 9)
    assert torch.equal(logits(model, ids), logits(resident, ids))
    again = load(tmp_path / "b", quantize=form, expert_memory=HELD[form])
    assert torch.equal(logits(again, ids), logits(resident, ids))


def test_where_no_pack_can_be_kept_matrices_are_packed_as_they_are_read(folders, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(packs, "atomic_folder", refuse)
    shutil.copytree(folders / "plain", tmp_path / "m", ignore=shutil.ignore_patterns("packs"))
    with pytest.warns(UserWarning, match="read-only"):
        model = load(tmp_path / "m", quantize="int8", expert_memory=3 * HELD["int8"])
    assert torch.equal(logits(model, tokens(2, 9)), logits(opened(folders, "int8"), tokens(2, 9)))


def test_a_gguf_file_is_read_an_expert_at_a_time(folders, tmp_path):
    tokenizer = trained()
    model = tiny_model(tiny(vocab_size=tokenizer.vocab_size, hidden_size=64, moe_intermediate_size=32))
    ids = tokens(2, 9)
    for kind in ("bf16", "q8_0"):
        gguf_file.write(model, tokenizer, path := tmp_path / f"{kind}.gguf", kind)
        disk = load(path, expert_memory=2 * 3 * 64 * 32 * 2)
        with torch.no_grad():
            assert torch.equal(disk(ids), load(path, native=False)(ids))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 8])
        with pytest.raises(UserError, match=path.name), torch.no_grad():
            disk(ids)


@pytest.mark.parametrize("how", ["cut", "changed", "replaced", "gone"])
def test_a_file_that_changes_meanwhile_is_named(how, folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "m")
    model, file = load(tmp_path / "m", expert_memory=HELD["float32"]), tmp_path / "m" / "model.safetensors"
    logits(model, tokens(1, 4))
    if how == "cut":
        os.truncate(file, file.stat().st_size // 3)
    elif how == "changed":
        with open(file, "r+b") as handle:
            handle.seek(-8, os.SEEK_END)
            handle.write(b"\0" * 8)
        os.utime(file, (1, 1))
    elif how == "replaced":
        shutil.copy2(file, tmp_path / "new")  # the same size and time
        os.replace(tmp_path / "new", file)
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors.*again") as caught:
        logits(model, tokens(1, 4, seed=1))
    assert "\n" not in str(caught.value)


def test_such_a_model_is_not_trained(folders):
    model = opened(folders, "float32", HELD["float32"])
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    assert not model(tokens(1, 4)).requires_grad
    for form in ("float32", "int8"):
        model = opened(folders, form, HELD[form]).train().requires_grad_(True)
        with pytest.raises(UserError, match=r"cannot be trained.*expert_memory"):
            model(tokens(1, 4))
    with pytest.raises(UserError, match="cannot be written"):
        model.decoder.layers["1"].mlp.experts.down.fill((0, 0), 0, torch.zeros(1, 144))


def test_what_cannot_be_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match=r"expert_memory=276479: .*276,480 bytes.*--expert-memory 1MiB"):
        opened(folders, "float32", HELD["float32"] - 1)
    save(tiny_model(tiny(first_k_dense_replace=3)), None, tmp_path / "dense")
    with pytest.raises(UserError, match="no routed experts"):
        load(tmp_path / "dense", expert_memory=2**30)


def test_room_is_asked_for_what_is_in_memory(folders, monkeypatch):
    whole, none = (memory(CONFIG, 4, None, 256, limit).weights for limit in (None, 0))
    assert whole - none == ALL * HELD["float32"]
    assert memory(CONFIG, 4, None, 256, 10**6).weights == none + 10**6
    assert memory(CONFIG, 4, None, 256, 10**9).weights == whole
    assert whole - memory(CONFIG, 4, "int8", 256, 0).weights > whole - none
    free = memory(CONFIG, 4, None, 4096, 3 * 2**20).total + 2**19
    monkeypatch.setattr(machine, "memory_free", lambda: free)
    with pytest.raises(UserError, match=r"--expert-memory 3MiB \("):
        load(folders / "plain", dtype="float32")
    assert load(folders / "plain", dtype="float32", expert_memory=3 * 2**20)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("4G", 4 * 2**30),
        ("4GB", 4 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5 gib", 3 * 2**29),
        ("2T", 2 * 2**40),
        ("10kB", 10_000),
        ("1e9", 10**9),
        ("123456B", 123456),
        ("0", 0),
    ],
)
def test_sizes_are_read_as_one_writes_them(text, size):
    assert machine.parse_bytes(text, "--x") == size


@pytest.mark.parametrize(
    "text", ["", "much", "-4GiB", "4 GiB free", "GiB", "4XB", "0x10", "1e999", "4iB", "nan", "٤GiB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match=r"--x .*: not a size.*4GiB"):
        machine.parse_bytes(text, "--x")


@pytest.fixture
def finback(tmp_path, monkeypatch):
    """Run a command on the model "m"; its result has .stdout, .stderr and .exit_code."""
    monkeypatch.setenv("FINBACK_HOME", str(tmp_path))
    tokenizer = trained()
    save(tiny_model(tiny(vocab_size=tokenizer.vocab_size)), tokenizer, tmp_path / "models" / "m", greedy=True)

    def run(*arguments: object, stdin: str = ""):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def test_commands_take_the_option_and_report(finback):
    ask = ["ask", "What is 2 + 2?", "--model", "m", "--max-tokens", 12]
    plain, disk = (json.loads(finback(*ask, "--json", *more).stdout) for more in ([], ["--expert-memory", "20KiB"]))
    told = disk.pop("experts")
    assert plain == disk and told["budget"] == 20480 and 0 < told["resident_bytes"] <= 20480
    spoken = finback(*ask, "--expert-memory", "20KiB")
    assert "experts in memory" in spoken.stderr and "% of" in spoken.stderr
    assert "experts in memory" in finback("chat", *ask[2:], "--expert-memory", "1M", stdin="hi\n").stderr
    rated = ["eval", "--model", "m", "--task", "letters", "--n", 2, "--max-tokens", 4, "--json"]
    plain, disk = (json.loads(finback(*rated, *more).stdout) for more in ([], ["--expert-memory", "9kB"]))
    assert disk.pop("experts")["misses"] > 0 and plain == disk
    for command in (ask, rated, ["chat", "--model", "m"]):
        for text, why in (("lots", "not a size"), ("1kB", "one expert takes 4,608 bytes")):
            result = finback(*command, "--expert-memory", text)
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and why in result.stderr
