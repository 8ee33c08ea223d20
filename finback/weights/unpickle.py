"""The one door for pickles: a process of its own that reads tensors alone, within limits, and writes safetensors.

`python -I unpickle.py OUT FILE...`; only `finback convert` starts it.
"""

import resource
import sys
import zipfile
from pathlib import Path

import torch

from finback.weights import store


def limit(files: list[Path]) -> None:
    """No more memory, time, files and processes than the work takes."""
    size = sum(file.stat().st_size for file in files)
    limits = {
        resource.RLIMIT_AS: 3 * size + 16 * 2**30,
        resource.RLIMIT_FSIZE: 2 * size + 2**30,
        resource.RLIMIT_CPU: 600 + size // 10**7,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main(out: Path, files: list[Path]) -> None:
    limit(files)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise SystemExit(f"{file}: holds other things than named tensors")
        tensors |= content
    store.write(out, tensors.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
