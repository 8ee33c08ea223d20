"""What the engine's benchmarks share: a larger context over the same weights, prompts, and where results go."""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEEP = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}


def keep_memory() -> None:
    """Start again with a malloc that keeps freed memory: no page faults in the steady state."""
    if any(os.environ.get(name) != value for name, value in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)


def with_context(checkpoint: Path, context: int, folder: Path) -> Path:
    """A copy of the checkpoint's config.json with a larger context, its other files linked; packs are not."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in checkpoint.iterdir():
        target = folder / file.name
        if file.name == "config.json":
            text = json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": context})
            if not target.exists() or target.read_text() != text:  # packs are known by its time
                target.write_text(text)
        elif file.is_file() and not (target.exists() and target.samefile(file)):
            target.unlink(missing_ok=True)
            os.link(file, target)
    return folder


def random_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    import torch

    return torch.randint(5, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median (least – most)."""
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} – {high})"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def write(out: Path | None, text: str, log: Any) -> None:
    """Print the report; keep it and the raw figures beside each other as .md and .json."""
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(log, indent=1, default=str) + "\n")
        out.with_suffix(".md").write_text(text + "\n")
