"""What this machine has, what is missing, and what to do about it."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import finback
from finback import machine
from finback.errors import UserError
from finback.paths import home, installed

_FEATURES = {"avx2": "avx2", "avx512": "avx512f", "amx": "amx_tile", "neon": "asimd"}
_GIB = 2**30
_BUILD = (
    "install a C++ compiler with OpenMP (g++, clang) and build: FINBACK_REQUIRE_NATIVE=1 pip install --force-reinstall "
    "--no-deps --no-binary finback finback (in a checkout: --no-deps -e .); the variable shows why a build fails"
)


def examine() -> dict[str, Any]:
    """Facts about this machine, sizes in bytes, None where unknown; under "advice" what to do, one line each."""
    facts: dict[str, Any] = {
        "finback": finback.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **_torch(),
        "processor": _processor(),
        "cpus": machine.cpus(),
        "cpu_features": _features(),
        "memory": machine.memory(),
        "memory_available": machine.memory("MemAvailable"),
        "memory_limit": machine.memory_limit(),
        "home": str(home()),
        "disk_free": _disk_free(home()),
        "models": [name for name, _folder in installed()],
        **_kernels(),
    }
    return {**facts, "advice": list(_advice(facts))}


def _torch() -> dict[str, Any]:
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        return {"torch": None, "threads": None, "gpus": []}
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"torch": torch_version, "threads": torch.get_num_threads(), "gpus": gpus}


def _kernels() -> dict[str, Any]:
    """The path that runs, those that this processor could take, the best first, and those that do not load."""
    facts: dict[str, Any] = {"kernels": None, "kernels_possible": [], "kernels_missing": [], "kernels_forced": None}
    if importlib.util.find_spec("torch") is None:
        return facts
    from finback.kernels import native

    missing = [f"{path}: {why}" for path, why in native.missing().items()]
    forced = os.environ.get(native.VARIABLE) or None
    facts |= {"kernels_possible": native.supported(), "kernels_missing": missing, "kernels_forced": forced}
    with suppress(UserError):  # where the forced path cannot be taken nothing runs
        facts["kernels"] = native.find(forced)[0]
    return facts


def _kernel_advice(facts: dict[str, Any]) -> Iterator[str]:
    runs, possible, missing, forced = (facts[f"kernels{name}"] for name in ("", "_possible", "_missing", "_forced"))
    if not possible:
        return
    there = [path for path in possible if path not in {line.partition(":")[0] for line in missing}]
    if runs is None:
        yield f"FINBACK_KERNELS={forced} cannot be taken here: unset it, or set one of {', '.join(there)}"
    elif runs != there[0]:
        yield f"FINBACK_KERNELS={forced} forces a slower path than {there[0]}: unset it"
    if possible == ["torch"]:
        yield "This processor has neither AVX-512 BF16 nor AVX2: plain PyTorch computes everything, correct and slower"
    better = missing[: possible.index(there[0])]
    if better:
        lost = f"{there[0]} takes their place, correct and slower"
        yield f"Native kernels are absent ({'; '.join(better)}), {lost}: {_BUILD}"


def _advice(facts: dict[str, Any]) -> list[str]:
    found = []
    if facts["torch"] is None:
        found.append("PyTorch is missing: pip install 'torch>=2.11,<2.14'")
    elif "+cu" in facts["torch"] and not facts["gpus"]:
        found.append(
            "This PyTorch is built for CUDA and no GPU is here: its CPU build is 2 GB smaller (see the README)"
        )
    if facts["threads"] is not None and facts["threads"] > facts["cpus"]:
        found.append(f"{facts['threads']} threads on {facts['cpus']} CPUs: set OMP_NUM_THREADS={facts['cpus']}")
    found += _kernel_advice(facts)
    if facts["cpu_features"] == []:
        found.append("The CPU has no AVX2, AVX-512, AMX or NEON: expect slow answers")
    usable = min((m for m in (facts["memory_available"], facts["memory_limit"]) if m is not None), default=None)
    if usable is not None and usable < 2 * _GIB:
        found.append(f"Only {usable / _GIB:.1f} GiB of memory can be used: calf fits, training needs 2 GiB")
    if facts["disk_free"] is not None and facts["disk_free"] < 2 * _GIB:
        found.append(
            f"Only {facts['disk_free'] / _GIB:.1f} GiB are free under {facts['home']}: set FINBACK_HOME elsewhere"
        )
    if not facts["models"]:
        found.append("No model is installed: finback train recipes/calf.toml makes one")
    if importlib.util.find_spec("transformers") is None:
        found.append("The test extra is not installed (only needed for make test): pip install 'finback[test]'")
    return found


def _cpuinfo(key: str) -> str | None:
    lines = machine.read("/proc/cpuinfo").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)


def _processor() -> str | None:
    return _cpuinfo("model name") or platform.processor() or None


def _features() -> list[str] | None:
    """What native kernels can use, or None where the system does not tell."""
    flags = _cpuinfo("flags") or _cpuinfo("Features")
    return None if flags is None else [name for name, flag in _FEATURES.items() if flag in flags.split()]


def _disk_free(folder: Path) -> int | None:
    existing = next((p for p in (folder, *folder.parents) if p.exists()), None)
    return None if existing is None else shutil.disk_usage(existing).free
