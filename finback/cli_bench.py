"""`finback bench`: how fast a model runs here, beside what this machine allows."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finback import terminal
from finback.cli_models import Json
from finback.cli_options import (
    CacheFormat,
    Dtype,
    ExpertMemory,
    Force,
    Model,
    Quantize,
    Seed,
    Speculate,
    expert_bytes,
)
from finback.errors import UserError
from finback.paths import DEFAULT_MODEL

if TYPE_CHECKING:
    from finback.evaluate.calls import Call, Overheads
    from finback.evaluate.limits import Limits, Rate
    from finback.evaluate.roofline import Needs, Shares
    from finback.evaluate.speed import Load, Percentiles, Result

_OPEN_REQUESTS = 32
_LIMITS_S = 2.0  # for measuring the machine
_QUIET = 1.25  # best over median: above, somebody else uses the machine

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,...", help="Closed loops: so many requests in flight at a time.")
    ] = "1,4,16",
    rate: Annotated[
        float | None, typer.Option(help="An open loop as well: requests a second, arriving by a Poisson process.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Requests of each loop. [default: twice the concurrency, at least 8; open: 32]")
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(metavar="N or N-M", help="Length of the prompts.")] = "512",
    max_tokens: Annotated[int, typer.Option(help="New tokens of each request.")] = 64,
    shared_tokens: Annotated[int, typer.Option(help="The same beginning of every prompt, found in the cache.")] = 0,
    speculate: Speculate = "off",
    quantize: Quantize = None,
    dtype: Dtype = None,
    force: Force = False,
    expert_memory: ExpertMemory = None,
    cache_format: CacheFormat = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Throughput, time to first token and between tokens, beside the limits of this machine.

    Random prompts, greedy, past EOS, after a warm-up. Of fewer than 100 requests p99 is the slowest. share: least time
    of the decoding steps, by memory or arithmetic, over the time they took; prefill: the same of prompts that come
    alone. The open loop runs as many together as the largest --concurrency, and counts from when a request was due.

    Example: finback bench --concurrency 1,8 --rate 2
    """
    if context.invoked_subcommand is not None:
        return _check_alone(context)
    from finback.about import default_dtype
    from finback.engine import Options
    from finback.weights.reader import read_config

    lengths = _lengths(prompt_tokens)
    shape = {"prompt_tokens": lengths, "max_tokens": max_tokens, "shared_tokens": shared_tokens, "seed": seed}
    counts = _counts(concurrency)
    loads = _loads(counts, rate, requests, shape)
    positions = read_config(model)[1].max_position_embeddings
    for load in loads:
        load.check_context(positions)
    how = {"dtype": dtype or default_dtype(model), "quantize": quantize, "expert_memory": expert_bytes(expert_memory)}
    room = max(counts) * (lengths[1] + max_tokens)
    options = Options(speculate=speculate, cache_format=cache_format)
    limits, needs, results = _measure(model, loads, max(counts), how | {"force": force, "context": room}, options)
    if json:
        settings = {"model": model, **how, "speculate": speculate, "cache_format": cache_format}
        terminal.print_json(settings | _report(limits, needs, results))
        return
    _show(limits, needs, results)


@app.command()
def machine(
    seconds: Annotated[float, typer.Option(min=0, max=3600, help="About how long to measure.")] = 10.0,
    json: Json = False,
) -> None:
    """The limits of this machine, and what real calls reach of them.

    Limits: memory larger than the caches, read by all threads; what the instructions of the compiled kernels multiply
    in registers; torch's own square products. Calls: a matrix larger than the caches times one row, as for every token
    that is generated, and a smaller one times 512, as for a prompt; share is the best rate beside the limit.

    Example: finback bench machine --seconds 5
    """
    from finback.evaluate import calls
    from finback.progress import bar

    # A bar that is drawn more often would take time from what is measured.
    with bar(calls.count(), "measurements", per_second=1) as progress:
        found = calls.report(seconds, done=progress.advance)
    if json:
        from dataclasses import asdict

        reached = [asdict(call) | {"share": call.share} for call in found.calls]
        terminal.print_json(asdict(found) | {"calls": reached})
        return
    _show_limits(found.limits)
    print()
    terminal.table(*_reached(found.calls))
    print()
    terminal.table(("before a call does anything", "best, us", "median, us"), _overheads(found.overheads))
    _note_noise([*_rates(found.limits), *(call.rate for call in found.calls)])


def _check_alone(context: typer.Context) -> None:
    """Raises UserError where options of the loads stand before the name of another command."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        option, command = given[0].replace("_", "-"), context.invoked_subcommand
        raise UserError(f"--{option} before {command}: options of `finback bench {command}` come after its name")


def _measure(
    model: str, loads: "list[Load]", max_batch: int, how: dict[str, Any], options: Any
) -> "tuple[Limits, Needs, list[tuple[Result, Shares]]]":
    """Every load on an engine of its own, so that none finds another's prompts in the cache."""
    from finback.engine import Engine
    from finback.evaluate.limits import machine_limits
    from finback.evaluate.roofline import Needs, shares
    from finback.evaluate.speed import measure
    from finback.progress import bar
    from finback.weights import load as load_model

    limits = machine_limits(_LIMITS_S)  # before the model takes its memory
    loaded = load_model(model, **how)
    needs, results = Needs.of(loaded, limits), []
    # A bar that is drawn more often would take time from what is measured.
    with bar(sum(load.requests for load in loads), "requests", per_second=1) as progress:
        for load in loads:
            engine = Engine(loaded, max_batch=load.concurrency or max_batch, options=options)
            result = measure(engine, load, progress=progress)
            results.append((result, shares(result, needs)))
    return limits, needs, results


def _lengths(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
    if found is None:
        raise UserError(f"--prompt-tokens {text}: a number, or two with a - between them; write it as 512 or 128-1024")
    return int(found[1]), int(found[2] or found[1])


def _counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text.replace(" ", "")):
        raise UserError(f"--concurrency {text}: numbers from 1 on with commas between them; write it as 1,4,16")
    return [int(count) for count in text.split(",")]


def _loads(counts: list[int], rate: float | None, requests: int | None, shape: dict[str, Any]) -> "list[Load]":
    from finback.evaluate.speed import Load

    closed = [Load(max(8, 2 * c) if requests is None else requests, concurrency=c, **shape) for c in counts]
    if rate is None:
        return closed
    return [*closed, Load(_OPEN_REQUESTS if requests is None else requests, rate=rate, **shape)]


def _report(limits: "Limits", needs: "Needs", results: "list[tuple[Result, Shares]]") -> dict[str, Any]:
    from dataclasses import asdict

    loads = [result.to_dict() | {"shares": asdict(shares)} for result, shares in results]
    return {"limits": asdict(limits), "weights_read_per_token": needs.bytes_of(1), "loads": loads}


def _show(limits: "Limits", needs: "Needs", results: "list[tuple[Result, Shares]]") -> None:
    columns = ("load", "new\ntokens/s", "prompt\ntokens/s", "first token, ms\np50/p95/p99", "between, ms\np50/p95/p99")
    rows = []
    for result, _ in results:
        speeds = result.rates["new_tokens_per_s"], result.rates["prompt_tokens_per_s"]
        rows.append((_name(result.load), *map(_number, speeds), _ms(result.ttft_s), _ms(result.between_s)))
    terminal.table(columns, rows)
    print()
    terminal.table(*_beside(needs, results))
    print()
    _show_limits(limits)
    _note_noise(_rates(limits))


def _show_limits(limits: "Limits") -> None:
    rates = {
        "memory, read": (limits.read, "GB/s"),
        "memory, one row times bfloat16": (limits.gemv_bf16, "GB/s"),
        "product, float32": (limits.matmul_fp32, "GFLOP/s"),
        "product, bfloat16": (limits.matmul_bf16, "GFLOP/s"),
    } | {f"registers, {kind}": (found, "GFLOP/s") for kind, found in limits.peaks.items()}
    rows = [(name, _number(r.best / 1e9), _number(r.median / 1e9), unit) for name, (r, unit) in rates.items()]
    terminal.table((f"this machine, {limits.path}, threads: {limits.threads}", "best", "median", "unit"), rows)


def _rates(limits: "Limits") -> "list[Rate]":
    return [limits.read, limits.gemv_bf16, limits.matmul_fp32, limits.matmul_bf16, *limits.peaks.values()]


def _note_noise(rates: "list[Rate]") -> None:
    if max(rate.best / rate.median for rate in rates) > _QUIET:
        terminal.note("(best and median are far apart: somebody else uses this machine)")


def _reached(calls: "list[Call]") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The calls beside their limits."""
    rows = []
    for call in calls:
        name = f"{call.by}, {call.form}, {call.rows} row{'s' if call.rows > 1 else ''}"
        rates = (_number(rate / 1e9) for rate in (call.rate.best, call.rate.median, call.limit))
        rows.append((name, *rates, "GB/s" if call.rows == 1 else "GFLOP/s", _percent(call.share)))
    return ("call", "best", "median", "limit", "unit", "share"), rows


def _overheads(overheads: "Overheads") -> Iterator[tuple[str, ...]]:
    names = {
        "torch": "torch, add of 8 numbers",
        "native": "native, nothing to do",
        "team": "native, a team of threads",
        "barrier": "a barrier of the team",
    }
    for key, name in names.items():
        if (rate := getattr(overheads, key)) is not None:
            yield name, *(f"{1e6 / calls:.2f}" for calls in (rate.best, rate.median))


def _beside(needs: "Needs", results: "list[tuple[Result, Shares]]") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The loads beside their limits, and what the engine counted, where there was any of it."""
    columns = ["load", "weights\na step", "decoding\ntokens/s", "limit\ntokens/s", "share", "prefill"]
    counted = {
        "prompt\nhits": [result.hit_tokens / result.prompt_tokens or None for result, _ in results],
        "drafts\ntaken": [result.acceptance for result, _ in results],
        "expert\nhits": [result.expert_hit_rate for result, _ in results],
    }
    counted = {name: values for name, values in counted.items() if any(value is not None for value in values)}
    preempted = any(result.preemptions for result, _ in results)
    rows = []
    for index, (result, shares) in enumerate(results):
        together = result.load.concurrency
        weights = "–" if together is None else terminal.size(int(needs.bytes_of(together)))
        speeds = map(_number, (shares.decode_tokens_per_s, shares.limit_tokens_per_s))
        row = [_name(result.load), weights, *speeds, _percent(shares.decode), _percent(shares.prefill)]
        row += [_percent(values[index]) for values in counted.values()]
        rows.append((*row, *([str(result.preemptions)] if preempted else [])))
    return (*columns, *counted, *(["preempted"] if preempted else [])), rows


def _name(load: "Load") -> str:
    return f"{load.concurrency} at once" if load.concurrency is not None else f"{load.rate:g}/s"


def _ms(found: "Percentiles | None") -> str:
    """Percentiles in milliseconds."""
    if found is None:
        return "–"
    values = [1e3 * value for value in (found.p50, found.p95, found.p99)]
    return "/".join(f"{value:.0f}" if values[0] >= 100 else f"{value:.1f}" for value in values)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"
