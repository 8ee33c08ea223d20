"""Finback beside transformers, llama.cpp and vLLM on one machine, in one run: decoding and prefill, in every form.

    python benchmarks/peers.py --model M --checkpoints FOLDER --llama-bin FOLDER --vllm-python PATH \
        --rounds 3 --out results/kernels/peers-M

Every measurement is a process of its own (vLLM, which takes minutes to start, measures all it is asked for in one), all
with the same threads and malloc settings; in every round all peers have their turn, so that a noisy minute falls on all
of them. The machine's limits are measured in every round too. What each process printed is kept beside the report. A
run that was stopped goes on where it was; --again starts anew. Nothing else should use the machine.

--model S, M or dense (benchmarks/make_dense.py) is a folder under --checkpoints, which may also be FINBACK_PEERS. With
--kernels avx2 our kernels and all of torch stay below AVX-512; give llama.cpp as it is built without AVX-512 and AMX.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import peers_llama
import peers_report
from engine_common import with_context
from train_step import MALLOC

from finback import UserError, machine
from finback.model.sizes import bytes_read
from finback.progress import bar
from finback.weights.reader import read_config

PEERS = ("finback", "transformers", "transformers-compiled", "llama.cpp", "vllm")
FORMS = ("bfloat16", "int8", "int4")
WHAT = ("decode-1", "decode-16", "prefill-512", "prefill-4096")
CONTEXT = 8192
GUESS = {"machine": 6, "finback": 24, "transformers": 60, "transformers-compiled": 200, "llama.cpp": 50, "vllm": 70}
"""Seconds of a measurement, until one like it was taken."""
BELOW_AVX512 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@dataclass(frozen=True)
class Job:
    """One process: what a peer measures in a round."""

    round: int
    peer: str
    form: str
    what: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"round-{self.round}-{self.peer}-{self.form}-{'-and-'.join(self.what)}"


def planned(peers: list[str], forms: list[str], whats: list[str], rounds: int) -> Iterator[Job]:
    """All jobs in their order; whose turn is first moves on by one from round to round."""
    for number in range(1, rounds + 1):
        yield Job(number, "machine", "", ("limits",))
        first = (number - 1) % len(peers)
        turns = peers[first:] + peers[:first]
        for what in whats:
            for form in forms:
                for peer in turns:
                    if peer != "vllm" and fits(peer, form, what):
                        yield Job(number, peer, form, (what,))
        if "vllm" in peers and "bfloat16" in forms:
            yield Job(number, "vllm", "bfloat16", tuple(whats))


def fits(peer: str, form: str, what: str) -> bool:
    """Whether the peer can do that: the torch peers have no packed weights here, and only steps are compiled."""
    compiled = peer != "transformers-compiled" or what.startswith("decode-")
    return compiled and (form == "bfloat16" or peer in ("finback", "llama.cpp"))


def left(jobs: Iterator[Job], log: list[dict[str, Any]]) -> list[Job]:
    """What the log has no measurement of."""
    done = {(line["round"], line["peer"], line["form"], line["what"]) for line in log if "error" not in line}
    rest = []
    for job in jobs:
        what = tuple(each for each in job.what if (job.round, job.peer, job.form, each) not in done)
        if what:
            rest.append(Job(job.round, job.peer, job.form, what))
    return rest


class Run:
    """The jobs' processes, and the log that they go into."""

    def __init__(self, options: argparse.Namespace, checkpoint: Path) -> None:
        self.options, self.original = options, checkpoint
        self.checkpoint = with_context(checkpoint, CONTEXT, options.work / "checkpoints" / checkpoint.name)
        self.config = read_config(self.checkpoint)[1]
        self.path = options.out / "log.jsonl"
        self.setup = {
            "model": checkpoint.name,
            "processor": processor(),
            "cpu_flags": sorted(flag for flag in machine.cpu_flags() if flag.startswith(("avx", "amx"))),
            "threads": options.threads,
            "kernels": options.kernels,
            "malloc": MALLOC,
        }

    def read(self) -> list[dict[str, Any]]:
        """The measurements so far. Raises UserError where they were taken in another way than these would be."""
        if self.options.again and self.options.out.is_dir():
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.options.out / "raw", ignore_errors=True)
        (self.options.out / "raw").mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            self.path.write_text(json.dumps({"setup": self.setup}) + "\n")
        first, *log = (json.loads(line) for line in self.path.read_text().splitlines())
        if wrong := [name for name, value in self.setup.items() if first["setup"].get(name) != value]:
            name, was = wrong[0], first["setup"].get(wrong[0])
            what = f"its measurements were taken with {name} {was}, now it is {self.setup[name]}"
            raise UserError(f"{self.path}: {what}; give another --out, or --again to start anew")
        return log

    def do(self, job: Job) -> list[dict[str, Any]]:
        """Run a job's process to its end; what it measured, or one line with the error, goes into the log."""
        start, load = time.perf_counter(), os.getloadavg()[0]
        raw = self.options.out / "raw" / f"{job.name}.log"
        command = self._command(job)
        with raw.open("w") as file:
            print("$ " + " ".join(Path(part).name if "/" in part else part for part in command), file=file, flush=True)
            status = run(command, self._environment(), file, self.options.timeout)
        text = raw.read_text(errors="replace").replace(f"{self.options.work.absolute()}/", "")
        raw.write_text(text)  # where this machine keeps its files is nobody's business
        found = list(self._parse(job, text))
        common = {"round": job.round, "peer": job.peer, "form": job.form}
        spent = {"seconds": round(time.perf_counter() - start, 1) / max(1, len(found)), "load_before": round(load, 2)}
        lines = [common | line | spent | self._weights(job, line["what"]) for line in found]
        if missing := [each for each in job.what if each not in {line["what"] for line in found}]:
            lines += [common | {"what": each, "error": f"{status}; see raw/{raw.name}"} for each in missing]
        with self.path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return lines

    def _command(self, job: Job) -> list[str]:
        options = self.options
        if job.peer == "llama.cpp":
            file, tools = self.gguf(job.form), options.llama_bin
            return peers_llama.command(job.what[0], file, tools, options.threads, options.repeats)
        python = options.vllm_python if job.peer == "vllm" else sys.executable
        peer = job.peer.removesuffix("-compiled")
        worker = [str(python), str(Path(__file__).with_name("peers_worker.py")), peer, str(self.checkpoint)]
        numbers = ["--threads", str(options.threads), "--repeats", str(options.repeats)]
        more = ["--compiled"] if peer != job.peer else []
        return [*worker, "--form", job.form, *numbers, *more, "--what", *job.what]

    def gguf(self, form: str) -> Path:
        """The file that llama.cpp reads."""
        return peers_llama.file_of(self.original, form, self.options.work / "gguf", self.options.llama_bin)

    def _environment(self) -> dict[str, str]:
        threads = self.options.threads
        cores = sorted(os.sched_getaffinity(0))[:threads]
        own = {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_MLA_DISABLE": "1",  # its latent attention has a list of head sizes, of real checkpoints alone
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONSAFEPATH": "1",  # transformers would take kernels.py beside the worker for a package it knows
        }
        if self.options.kernels is not None:
            own["FINBACK_KERNELS"] = self.options.kernels
        if self.options.kernels == "avx2":
            own |= BELOW_AVX512
        return os.environ | MALLOC | own

    def _parse(self, job: Job, text: str) -> Iterator[dict[str, Any]]:
        if job.peer == "llama.cpp":
            yield from peers_llama.parse(job.what[0], text)
            return
        for line in text.splitlines():
            if line.startswith('{"what": '):
                yield json.loads(line)

    def _weights(self, job: Job, what: str) -> dict[str, float]:
        """The bytes of weights that a pass reads, as this peer stores them."""
        if job.peer == "machine":
            return {}
        count = int(what.split("-")[1])
        if job.peer == "llama.cpp":
            return {"weight_bytes": peers_llama.bytes_read(self.gguf(job.form), self.config, count)}
        return {"weight_bytes": bytes_read(self.config, count, 2, None if job.form == "bfloat16" else job.form)}


def run(command: list[str], environment: dict[str, str], file: Any, timeout: float) -> str:
    """A process and whatever it starts; how it ended."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    try:
        return f"ended with {process.wait(timeout)}"
    except subprocess.TimeoutExpired:
        return f"was stopped after {timeout:.0f} s"
    finally:
        with suppress(ProcessLookupError):  # vLLM's own processes, where they outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def processor() -> str:
    """What the system calls it."""
    lines = (line.partition(":") for line in machine.read("/proc/cpuinfo").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "unknown processor")


def guess(job: Job, log: list[dict[str, Any]]) -> float:
    """Seconds, by those of the same job in other rounds."""
    spent: dict[str, list[float]] = {}
    for line in log:
        if "seconds" in line and (line["peer"], line["form"]) == (job.peer, job.form):
            spent.setdefault(line["what"], []).append(line["seconds"])
    return sum(median(spent[what]) if what in spent else GUESS[job.peer] for what in job.what)


def absent(options: argparse.Namespace) -> dict[str, str]:
    """The peers that are asked for and cannot run, and why."""
    reasons = {}
    if importlib.util.find_spec("transformers") is None:
        reasons |= {name: "not installed beside Finback" for name in PEERS if name.startswith("transformers")}
    if (why := peers_llama.absent(options.llama_bin)) is not None:
        reasons["llama.cpp"] = why
    if options.vllm_python is None or not options.vllm_python.is_file():
        reasons["vllm"] = "no --vllm-python" if options.vllm_python is None else f"{options.vllm_python} is no file"
    return {name: reasons[name] for name in options.peers if name in reasons}


def measure(options: argparse.Namespace) -> None:
    checkpoint = options.checkpoints / options.model
    if not (checkpoint / "config.json").is_file():
        how = "benchmarks/make_dense.py makes it" if options.model == "dense" else "give --checkpoints"
        raise UserError(f"--model {options.model}: {checkpoint} is no model folder; {how}")
    missing = absent(options)
    for name, why in missing.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    this = Run(options, checkpoint)
    log = this.read()
    peers = [name for name in options.peers if name not in missing]
    if not peers:
        raise UserError(f"--peers {' '.join(options.peers)}: none of them can run here")
    for form in options.forms if "llama.cpp" in peers else ():
        this.gguf(form)  # made before anything is measured
    jobs = left(planned(peers, options.forms, options.what, options.rounds), log)
    total = sum(guess(job, log) for job in jobs)
    print(f"{len(jobs)} measurements to take, about {ceil(total / 60)} minutes", file=sys.stderr)
    with bar(total, options.model) as progress:
        for job in jobs:
            expected = guess(job, log)
            lines = this.do(job)
            log += lines
            for line in lines:
                print(peers_report.line(line), file=sys.stderr, flush=True)
            progress.advance(expected, round=job.round, peer=job.peer)
            (options.out / "report.md").write_text(peers_report.report(this.setup, this.config, log, missing))
    text = peers_report.report(this.setup, this.config, log, missing)
    (options.out / "report.md").write_text(text)
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = os.environ.get("FINBACK_PEERS", "peers")
    parser.add_argument("--model", required=True, help="S, M, dense, or another folder under --checkpoints")
    parser.add_argument("--checkpoints", type=Path, default=Path(home), help="the folder of model folders")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["finback", "transformers", "llama.cpp", "vllm"])
    parser.add_argument("--what", nargs="+", default=list(WHAT), help="decode-BATCH and prefill-TOKENS")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="of each process, times 3 (1 of what takes long)")
    parser.add_argument("--threads", type=int, default=machine.cpus())
    parser.add_argument("--kernels", choices=["avx512", "avx2", "torch"], help="our path; the best where not given")
    parser.add_argument("--llama-bin", type=Path, help="a folder with llama-bench, llama-batched-bench, llama-quantize")
    parser.add_argument("--vllm-python", type=Path, help="a Python that has vllm-cpu")
    parser.add_argument("--work", type=Path, default=Path(home) / "work", help="for GGUF files and links to weights")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds that a process may take")
    parser.add_argument("--out", type=Path, required=True, help="the results folder; a run that stopped goes on")
    parser.add_argument("--again", action="store_true", help="forget the measurements that are there")
    options = parser.parse_args()
    for what in options.what:
        kind, _, count = what.partition("-")
        if kind not in ("decode", "prefill") or not count.isdigit() or not 1 <= int(count) < CONTEXT:
            parser.error(f"--what {what}: allowed are decode-BATCH and prefill-TOKENS, such as {', '.join(WHAT)}")
    return options


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what runs is ended too
    try:
        measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
