"""What this machine has: memory, its limits, processors. From the system's own files, None where they do not tell."""

import os
import re
from pathlib import Path

from finback.errors import UserError

_LIMITS = {
    "/sys/fs/cgroup/memory.max": "/sys/fs/cgroup/memory.current",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "/sys/fs/cgroup/memory/memory.usage_in_bytes",
}


def read(path: str | Path) -> str:
    """A file of the system, empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parse_bytes(text: str, option: str) -> int:
    """A size as one writes it: 4GiB, 4G (the same), 4GB (a thousand for each step), 512MiB, 1.5e9. Else UserError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?) ?(?:([kmgt])(i?b)?|b)?", text.strip().lower())
    if found is None:
        raise UserError(f"{option} {text}: not a size; write it as 4GiB, 512MiB, 4GB or a number of bytes")
    step = 1000 if found[3] == "b" else 1024
    return int(float(found[1]) * step ** (" kmgt".index(found[2] or " ")))


def cpu_flags() -> set[str]:
    """What the processor says it can do, in the system's words: "avx2", "amx_bf16". Empty where it does not tell."""
    lines = (line.partition(":") for line in read("/proc/cpuinfo").splitlines())
    return next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), set())


def cpus() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(key: str = "MemTotal") -> int | None:
    """A line of /proc/meminfo, in bytes: MemTotal, MemAvailable."""
    lines = read("/proc/meminfo").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def memory_limit() -> int | None:
    """The cgroup's limit (a container's) in bytes."""
    return next((limit for limit, _ in _limits()), None)


def memory_free() -> int | None:
    """Bytes this process can still take: what is available, and what its cgroup leaves."""
    rooms = [limit - used for limit, used in _limits()]
    available = memory("MemAvailable")
    return min(rooms if available is None else [available, *rooms], default=None)


def cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the first processor's largest cache, 0 where the system does not tell."""
    sizes = [read(path).strip() for path in folder.glob("index*/size")]
    return max((parse_bytes(size, str(folder)) for size in sizes if size), default=0)


def _limits() -> list[tuple[int, int]]:
    """(limit, used) of every cgroup limit that is below the machine's memory."""
    total, found = memory(), []
    for limit, used in _LIMITS.items():
        if (text := read(limit).strip()).isdigit() and (total is None or int(text) < total):
            # Pages of files can be dropped; they do not count as used.
            stat = dict(line.split() for line in read(Path(used).with_name("memory.stat")).splitlines())
            current = int(read(used).strip() or 0) - int(stat.get("file", stat.get("total_cache", 0)))
            found.append((int(text), max(current, 0)))
    return found
