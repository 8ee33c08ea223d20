"""What this machine has, what is missing, and what to do about it."""

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import finback
from finback import machine
from finback.paths import PACKAGE, home, installed

_FEATURES = {"avx2": "avx2", "avx512": "avx512f", "amx": "amx_tile", "neon": "asimd"}
_GIB = 2**30


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
        "native_kernels": any(p.suffix in (".so", ".pyd") for p in (PACKAGE / "kernels").rglob("*")),
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
    """The best path of the native kernels, and better ones that this processor has and the system does not allow."""
    if importlib.util.find_spec("torch") is None:
        return {"kernels": None, "kernels_refused": []}
    from finback.kernels import native

    best = native.find()[0]
    return {"kernels": best, "kernels_refused": [f"{path}: {reason}" for path, reason in native.refused.items()]}


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
    if not facts["native_kernels"]:
        found.append("Native kernels are absent: plain PyTorch computes everything, correct and slower")
    found += [f"The native kernels take {facts['kernels']}, not {refused}" for refused in facts["kernels_refused"]]
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
