"""The run beside other engines: what it measures in which order, what it repeats, and what its report makes of it."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import make_dense
import peers
import peers_llama
import peers_report
import peers_worker

from finback import UserError
from finback.model import Config, Model
from finback.model.sizes import bytes_read, flops_per_token
from finback.weights import gguf_file, load_tokenizer, save

CONFIG = Config(
    vocab_size=512, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
SETUP = {"model": "M", "processor": "Some CPU", "cpu_flags": ["avx2"], "threads": 2, "kernels": None}
PRODUCTS = {"bfloat16": 1e12, "int8": 2e12, "int4": 2e12}
LIMITS = {"round": 1, "peer": "machine", "form": "", "what": "limits", "read": 1e9, "product": PRODUCTS}


def line(number: int, peer: str, *values: float, what: str = "decode-1", form: str = "bfloat16") -> dict:
    key = {"round": number, "peer": peer, "form": form, "what": what}
    return key | {"tokens_per_s": list(values), "seconds": 1.0, "weight_bytes": 1e7, "version": "1"}


def running(process: int) -> bool:
    """Whether it is there, and not only its end's status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_every_round_gives_every_peer_its_turn_and_another_the_first():
    jobs = list(peers.planned(["finback", "llama.cpp", "vllm"], ["bfloat16", "int4"], ["decode-1", "prefill-512"], 3))
    for number in (1, 2, 3):
        own = [job for job in jobs if job.round == number]
        assert own[0].peer == "machine"
        assert [job.what for job in own if job.peer == "vllm"] == [("decode-1", "prefill-512")]
        for peer in ("finback", "llama.cpp"):
            done = {(job.form, job.what) for job in own if job.peer == peer}
            assert done == {(form, (what,)) for form in ("bfloat16", "int4") for what in ("decode-1", "prefill-512")}
    assert [next(job.peer for job in jobs if job.round == n and job.peer != "machine") for n in (1, 2)] == [
        "finback",
        "llama.cpp",
    ]


def test_torch_peers_have_no_packed_forms_and_only_decoding_is_compiled():
    jobs = list(
        peers.planned(["transformers", "transformers-compiled"], ["bfloat16", "int8"], ["decode-1", "prefill-9"], 1)
    )
    done = {(job.peer, job.form, *job.what) for job in jobs if job.peer != "machine"}
    assert done == {
        ("transformers", "bfloat16", "decode-1"),
        ("transformers", "bfloat16", "prefill-9"),
        ("transformers-compiled", "bfloat16", "decode-1"),
    }


def test_what_is_measured_is_not_measured_again_and_what_failed_is():
    log = [LIMITS, line(1, "vllm", 5.0), line(1, "finback", 6.0)]
    log.append({"round": 1, "peer": "transformers", "form": "bfloat16", "what": "decode-1", "error": "ended with 1"})
    every = peers.planned(["finback", "transformers", "vllm"], ["bfloat16"], ["decode-1", "prefill-512"], 1)
    rest = [(job.peer, job.what) for job in peers.left(every, log)]
    assert rest == [
        ("transformers", ("decode-1",)),
        ("finback", ("prefill-512",)),
        ("transformers", ("prefill-512",)),
        ("vllm", ("prefill-512",)),
    ]


def test_ratios_are_taken_within_rounds():
    log = [LIMITS, line(1, "finback", 10.0), line(1, "vllm", 5.0), line(2, "finback", 100.0), line(2, "vllm", 25.0)]
    log.append(line(3, "finback", 1000.0))
    found = peers_report.figures(log, CONFIG)
    own, other = (found["decode-1", "bfloat16", peer] for peer in ("finback", "vllm"))
    assert peers_report.ratios(own, [other]) == [2.0, 4.0]


def test_the_best_peer_is_the_best_of_each_round():
    log = [line(1, "finback", 10.0), line(1, "vllm", 5.0), line(1, "llama.cpp", 2.0)]
    log += [line(2, "finback", 10.0), line(2, "vllm", 5.0), line(2, "llama.cpp", 10.0)]
    own, *others = (
        peers_report.figures(log, CONFIG)["decode-1", "bfloat16", p] for p in ("finback", "vllm", "llama.cpp")
    )
    assert peers_report.ratios(own, others) == [2.0, 1.0]


@pytest.mark.parametrize(("speed", "marked"), [(22.8, True), (22.9, False)])
def test_a_peer_below_its_known_figure_is_marked(speed, marked):
    text = peers_report.report(SETUP, CONFIG, [LIMITS, line(1, "llama.cpp", speed)], {})
    assert ("†" in text) == marked and "Some CPU" in text  # 0.9 of 25.4 is 22.86


def test_the_share_is_that_of_reading_weights_and_cache():
    found = peers_report.figures([LIMITS, line(1, "finback", 20.0, what="decode-4")], CONFIG)
    cache = 4 * (512 + 64 // 2) * 3 * (32 + 8) * 2  # rows, depth in the middle, layers, latent and rope, bytes
    assert found["decode-4", "bfloat16", "finback"].limit == pytest.approx(4 * 1e9 / (1e7 + cache))


def test_the_share_of_a_long_prompt_is_that_of_its_arithmetic():
    log = [LIMITS | {"read": 1e15}]
    log += [line(1, "finback", 20.0, what="prefill-500", form=form) for form in ("bfloat16", "int8")]
    found = peers_report.figures(log, CONFIG)
    head = 2 * 512 * 64
    flops = 500 * (flops_per_token(CONFIG, 250) - head) + head  # the last token alone meets the head
    for form in ("bfloat16", "int8"):
        assert found["prefill-500", form, "finback"].limit == pytest.approx(500 / (flops / PRODUCTS[form]))


def test_goals_say_what_is_reached():
    log = [LIMITS, line(1, "finback", 10.0), line(1, "llama.cpp", 5.0), line(1, "vllm", 8.0)]
    log += [line(1, "finback", 13.0, what="prefill-512", form="int8"), line(1, "finback", 10.0, what="prefill-512")]
    lines = list(peers_report.goals(SETUP, peers_report.figures(log, CONFIG)))
    assert "| decode-1 | bfloat16 | 1.7x the best peer | 1.25 (1.25 – 1.25)x | **no** |" in lines
    assert "| prefill-512 | int8 | 1.3x ours in bfloat16 | 1.30 (1.30 – 1.30)x | yes |" in lines
    assert not any("transformers" in each for each in lines)


def test_a_failure_is_reported_until_it_succeeds():
    failed = {"round": 1, "peer": "vllm", "form": "bfloat16", "what": "decode-1", "error": "ended with 1"}
    assert "failed: vllm" in peers_report.report(SETUP, CONFIG, [LIMITS, failed, line(2, "vllm", 5.0)], {})
    assert "failed" not in peers_report.report(SETUP, CONFIG, [LIMITS, failed, line(1, "vllm", 5.0)], {})


def test_what_llama_prints_is_read():
    bench = '{"build_commit": "abc", "n_prompt": 512, "avg_ts": 2.5, "samples_ts": [ 2.000000, 3.000000 ]}'
    assert [each["tokens_per_s"] for each in peers_llama.parse("prefill-512", f"noise\n{bench}\n")] == [[2.0, 3.0]]
    assert list(peers_llama.parse("prefill-512", "error: no such model")) == []
    batched = '{"n_kv_max": 16384, "pp": 512, "tg": 64, "pl": 16, "speed_pp": 180.0, "speed_tg": 53.4, "speed": 150.0}'
    assert [each["tokens_per_s"] for each in peers_llama.parse("decode-16", f"{batched}\n{batched}")] == [[53.4, 53.4]]


def test_a_run_is_not_continued_on_another_set_up(tmp_path):
    run = SimpleNamespace(options=SimpleNamespace(out=tmp_path, again=False), path=tmp_path / "log.jsonl", setup=SETUP)
    assert peers.Run.read(run) == []
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps(LIMITS) + "\n")
    assert peers.Run.read(run) == [LIMITS]
    run.setup = SETUP | {"threads": 1}
    with pytest.raises(UserError, match="threads 2, now it is 1"):
        peers.Run.read(run)
    run.options.again = True
    assert peers.Run.read(run) == []


def test_a_process_that_hangs_is_stopped_with_its_children(tmp_path):
    with (tmp_path / "raw").open("w") as file:
        status = peers.run(["sh", "-c", "sleep 60 & echo $!; wait"], {"PATH": "/usr/bin:/bin"}, file, 0.5)
    child = int((tmp_path / "raw").read_text())
    assert status == "was stopped after 0 s"
    for _ in range(300):  # it dies when the system comes to it
        if not running(child):
            break
        time.sleep(0.1)
    assert not running(child)


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    save(Model(CONFIG).to(torch.bfloat16), None, tmp_path / "tiny")
    ran = []

    def command(run, job):
        ran.append((job.peer, job.what))
        lines = [{"what": what, "tokens_per_s": [2.0, 4.0], "version": "1"} for what in job.what]
        if job.peer == "machine":
            lines = [LIMITS | {"version": "1"}]
        if job.peer == "transformers" and len(ran) < 9:
            return ["sh", "-c", "echo out of memory; exit 3"]
        return ["printf", "%s\\n", "loading", *map(json.dumps, ({"what": each.pop("what")} | each for each in lines))]

    monkeypatch.setattr(peers.Run, "_command", command)
    monkeypatch.setattr(peers, "absent", lambda options: {"vllm": "no --vllm-python"})
    out = tmp_path / "out"
    words = ["--model", "tiny", "--checkpoints", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(out)]
    words += ["--peers", "finback", "transformers", "vllm", "--forms", "bfloat16", "--what", "decode-1", "prefill-9"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words, "--rounds", "1"])
    peers.main()
    first = (out / "report.md").read_text()
    assert "failed: transformers bfloat16 decode-1: ended with 3" in first and "Left out: vllm" in first
    assert "out of memory" in (out / "raw" / "round-1-transformers-bfloat16-decode-1.log").read_text()
    done = len(ran)
    ran += [("", ())] * 9
    peers.main()
    assert [peer for peer, _ in ran[done + 9 :]] == ["transformers", "transformers"]
    second = (out / "report.md").read_text()
    assert "failed" not in second and "| 1.00 (1.00 – 1.00)x |" in second and "| 3.0 (2.0 – 4.0) |" in second
    peers.main()
    assert len(ran) == done + 11 and capsys.readouterr().out.endswith(second + "\n")


def test_bytes_of_a_gguf_file_are_those_of_its_tensors(tmp_path):
    tokenizer = load_tokenizer("calf")
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size)
    gguf_file.write(Model(config), tokenizer, tmp_path / "a.gguf", "bf16")
    for rows in (1, 16):  # norms are float32 there
        exact = bytes_read(config, rows, 2)
        assert peers_llama.bytes_read(tmp_path / "a.gguf", config, rows) == pytest.approx(exact, rel=0.02)


def test_our_worker_measures_what_it_says(tmp_path):
    model = Model(CONFIG)
    model.init_weights(0)
    save(model.to(torch.bfloat16), None, tmp_path / "tiny")
    options = SimpleNamespace(checkpoint=tmp_path / "tiny", form="bfloat16", repeats=2)
    loaded: dict = {}
    for what, count in (("decode-2", 2), ("prefill-40", 6)):
        found = peers_worker.finback(options, what, loaded)
        assert len(found["tokens_per_s"]) == count and min(found["tokens_per_s"]) > 0


def test_the_dense_model_is_the_same_every_time():
    shape = make_dense.SHAPE | {"vocab_size": 300, "hidden_size": 28, "intermediate_size": 40, "num_hidden_layers": 2}
    first, again, deeper = (make_dense.dense(shape | {"num_hidden_layers": n}).state_dict() for n in (2, 2, 3))
    assert all(torch.equal(value, again[name]) and torch.equal(value, deeper[name]) for name, value in first.items())
    assert any(name.endswith("q_proj.bias") for name in first)
    wide = next(value for name, value in first.items() if name.endswith("down_proj.weight.value"))
    assert float(wide.float().std()) == pytest.approx(40**-0.5, rel=0.1)
