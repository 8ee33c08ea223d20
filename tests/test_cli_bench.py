"""`finback bench` as a user runs it, on a tiny random model and a machine whose limits are given."""

import json
from contextlib import nullcontext

import pytest
from text_samples import trained
from tiny_model import tiny, tiny_model
from typer.testing import CliRunner

from finback.cli import app
from finback.evaluate.calls import Call, Overheads, Report
from finback.evaluate.limits import Limits, Rate, machine_limits
from finback.progress import Bar
from finback.weights import save

LIMITS = Limits(2, Rate(20e9, 18e9), Rate(25e9, 21e9), Rate(123.4e9, 1e11), Rate(4e11, 3.9e11))
FAST = Limits(2, *(Rate(1e10, 1e10),) * 4, "avx2", {"fp32": Rate(2e11, 1.9e11), "int8": Rate(8e11, 7e11)})
CALLS = [Call("native", "fp8", 1, Rate(15e9, 14e9), 20e9), Call("torch", "bf16", 512, Rate(1e11, 9e10), 4e11)]
SMALL = ["--model", "rand", "--requests", 4, "--prompt-tokens", "20-30", "--max-tokens", 4]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    config = tiny(vocab_size=trained().vocab_size, max_position_embeddings=128)
    save(tiny_model(config), trained(), home / "models" / "rand")
    return home


@pytest.fixture
def bench(home, monkeypatch):
    monkeypatch.setenv("FINBACK_HOME", str(home))
    monkeypatch.setattr("finback.evaluate.limits.machine_limits", lambda seconds: LIMITS)

    def run(*arguments: object):
        result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def test_the_tables_have_a_line_for_each_loop_and_the_machine_below(bench):
    result = bench(*SMALL, "--concurrency", "1, 3", "--rate", 200)
    assert result.exit_code == 0, result.stderr
    speeds, beside, machine = ([line.split("\t") for line in t.splitlines()] for t in result.stdout.split("\n\n"))
    for table in (speeds, beside):
        assert [row[0] for row in table] == ["load", "1 at once", "3 at once", "200/s"]
        assert len({len(row) for row in table}) == 1
    for row in speeds[1:]:
        for cell in row[3:]:
            p50, p95, p99 = map(float, cell.split("/"))
            assert 0 < p50 <= p95 <= p99
    assert beside[0] == ["load", "weights a step", "decoding tokens/s", "limit tokens/s", "share", "prefill"]
    assert beside[1][5].endswith("%") and beside[2][5] == "–"
    assert machine[1] == ["memory, read", "20.0", "18.0", "GB/s"]
    assert machine[3] == ["product, float32", "123", "100", "GFLOP/s"]
    assert result.stderr == ""


@pytest.fixture
def measured(monkeypatch):
    """What `bench machine` measures, and what it was asked: the seconds."""
    asked = []

    def report(seconds, done):
        asked.append(seconds)
        done()
        return Report(FAST, CALLS, Overheads(Rate(1e6, 5e5), Rate(1e7, 1e7), None, Rate(4e6, 4e6)))

    monkeypatch.setattr("finback.evaluate.calls.report", report)
    return asked


def test_the_machine_alone_is_three_tables(bench, measured):
    result = bench("machine", "--seconds", 3)
    assert result.exit_code == 0 and measured == [3.0]
    limits, calls, overheads = ([line.split("\t") for line in t.splitlines()] for t in result.stdout.split("\n\n"))
    assert limits[0][0] == "this machine, avx2, threads: 2"
    assert limits[-2:] == [
        ["registers, fp32", "200", "190", "GFLOP/s"],
        ["registers, int8", "800", "700", "GFLOP/s"],
    ]
    assert calls == [
        ["call", "best", "median", "limit", "unit", "share"],
        ["native, fp8, 1 row", "15.0", "14.0", "20.0", "GB/s", "75%"],
        ["torch, bf16, 512 rows", "100", "90.0", "400", "GFLOP/s", "25%"],
    ]
    assert overheads[1:] == [
        ["torch, add of 8 numbers", "1.00", "2.00"],
        ["native, nothing to do", "0.10", "0.10"],
        ["a barrier of the team", "0.25", "0.25"],
    ]
    assert result.stderr == ""


def test_the_machine_as_json(bench, measured):
    found = json.loads(bench("machine", "--json").stdout)
    assert measured == [10.0]
    assert found["limits"]["path"] == "avx2" and found["limits"]["peaks"]["int8"] == {"best": 8e11, "median": 7e11}
    assert [(call["by"], call["form"], call["rows"], call["share"]) for call in found["calls"]] == [
        ("native", "fp8", 1, 0.75),
        ("torch", "bf16", 512, 0.25),
    ]
    assert found["overheads"]["team"] is None and found["overheads"]["native"]["best"] == 1e7


def test_the_bar_of_the_machine_ends_where_its_measurements_do(bench, monkeypatch):
    """The real measurements, of a moment each."""
    from finback.evaluate import calls

    real, asked, moved = calls.report, [], []
    monkeypatch.setattr("finback.evaluate.limits.machine_limits", machine_limits)
    monkeypatch.setattr(calls, "report", lambda seconds, done: real(0, 1 << 20, 16, done))

    class Counted(Bar):
        def advance(self, n=1, **fields):
            moved.append(n)

    def bar(total, description, **how):
        asked.append((total, how))
        return nullcontext(Counted())

    monkeypatch.setattr("finback.progress.bar", bar)
    assert bench("machine").exit_code == 0
    assert asked == [(sum(moved), {"per_second": 1})]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--concurrency", "2", "machine"], "--concurrency before machine"),
        (["--max-tokens", "9", "machine"], "--max-tokens before machine"),
        (["--json", "machine"], "--json before machine"),
        (["machine", "--seconds", "-1"], "--seconds"),
        (["engine"], "engine"),
    ],
)
def test_a_mistake_about_the_machine_is_refused(bench, measured, arguments, named):
    result = bench(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and measured == []
    assert named in result.stderr


def test_columns_of_what_the_engine_counted_come_where_there_is_any(bench):
    result = bench(*SMALL, "--concurrency", 2, "--shared-tokens", 16, "--speculate", "ngram", "--max-tokens", 40)
    header, row = (line.split("\t") for line in result.stdout.split("\n\n")[1].splitlines())
    assert header[6] == "prompt hits" and "preempted" not in header
    found = json.loads(bench(*SMALL, "--concurrency", 2, "--shared-tokens", 16, "--json").stdout)["loads"][0]
    assert found["hit_tokens"] == 4 * 16
    assert row[6] == f"{64 / found['prompt_tokens']:.0%}"


def test_json_has_all_of_it(bench):
    options = ["--rate", 100, "--dtype", "bfloat16", "--cache-format", "int8", "--seed", 5]
    found = json.loads(bench(*SMALL, "--concurrency", "2", *options, "--json").stdout)
    settings = {"model": "rand", "dtype": "bfloat16", "cache_format": "int8", "quantize": None}
    assert found.items() >= settings.items()
    assert found["limits"]["read"] == {"best": 20e9, "median": 18e9}
    assert found["weights_read_per_token"] > 0
    closed, opened = found["loads"]
    assert (closed["load"]["concurrency"], closed["load"]["rate"]) == (2, None)
    assert (opened["load"]["concurrency"], opened["load"]["rate"]) == (None, 100.0)
    for load in (closed, opened):
        assert load["new_tokens"] == 16 and load["load"]["seed"] == 5
        assert len(load["records"]) == 4
        assert all(20 <= record["prompt_tokens"] <= 30 for record in load["records"])
        assert all(len(record["token_times"]) == 4 for record in load["records"])
        assert load["new_tokens_per_s"] == pytest.approx(16 / load["seconds"])
        assert set(load["ttft_s"]) == set(load["between_s"]) == set(load["total_s"]) == {"p50", "p95", "p99"}
        assert load["shares"]["decode"] is None or load["shares"]["decode"] > 0


def test_options_reach_the_engine(bench):
    plain, packed = (
        json.loads(bench(*SMALL, "--concurrency", 1, *more, "--json").stdout)["loads"][0]["cache_bytes"]
        for more in ([], ["--cache-format", "bfloat16"])
    )
    assert plain == 2 * packed  # float32, the small model's precision
    options = ["--speculate", "ngram", "--max-tokens", 60]
    assert json.loads(bench(*SMALL, "--concurrency", 1, *options, "--json").stdout)["loads"][0]["drafted"] > 0


def test_a_bar_that_takes_no_time_from_the_measured(bench, monkeypatch):
    asked = []

    def bar(total, description, **how):
        asked.append((total, description, how))
        return nullcontext(Bar())

    monkeypatch.setattr("finback.progress.bar", bar)
    assert bench(*SMALL, "--concurrency", "1,2").exit_code == 0
    assert asked[-1] == (8, "requests", {"per_second": 1})


def test_requests_are_twice_the_concurrency_at_least_eight(bench):
    short = ["--model", "rand", "--prompt-tokens", 5, "--max-tokens", 2, "--json", "--concurrency"]
    loads = json.loads(bench(*short, "1,5,6").stdout)["loads"]
    assert [len(load["records"]) for load in loads] == [8, 10, 12]
    assert [load["most_in_flight"] for load in loads] == [1, 5, 6]


def test_packed_weights_and_a_busy_machine(bench, monkeypatch):
    busy = Limits(2, Rate(20e9, 9e9), *(Rate(1e9, 1e9),) * 3)
    monkeypatch.setattr("finback.evaluate.limits.machine_limits", lambda seconds: busy)
    plain, packed = (
        json.loads(bench(*SMALL, "--concurrency", 1, *more, "--json").stdout) for more in ([], ["--quantize", "int8"])
    )
    assert packed["weights_read_per_token"] < 0.5 * plain["weights_read_per_token"]
    assert "somebody else uses this machine" in bench(*SMALL, "--concurrency", 1).stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--concurrency", "0"], "--concurrency 0"),
        (["--concurrency", "1,,2"], "--concurrency 1,,2"),
        (["--concurrency", "5", "--requests", 4], "concurrency is 5"),
        (["--prompt-tokens", "many"], "--prompt-tokens many"),
        (["--prompt-tokens", "30-20"], "prompt_tokens is 30-20"),
        (["--prompt-tokens", 126, "--max-tokens", 3], "context of 128"),
        (["--rate", 0], "rate is 0.0"),
        (["--shared-tokens", 20, "--prompt-tokens", 20], "shared_tokens is 20"),
        (["--max-tokens", 0], "max_tokens is 0"),
        (["--expert-memory", "much"], "--expert-memory much"),
        (["--speculate", "mtp"], "no multi-token prediction"),
        (["--model", "absent"], "absent"),
    ],
)
def test_a_mistake_is_one_line(bench, arguments, named):
    result = bench(*["--model", "rand", "--concurrency", "1", "--prompt-tokens", 20, "--max-tokens", 4, *arguments])
    assert result.exit_code == 2 and result.stdout == ""
    assert named in result.stderr and result.stderr.count("\n") == 1
