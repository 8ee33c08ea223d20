"""Checkpoints: folders `checkpoints/step-N` that exist whole or not at all, and hold everything needed to go on.

`model.safetensors` has the float32 weights as they are in training (bit-exact), `optimizer.safetensors` the optimisers'
tensors and torch's generator, `state.json` the rest. A folder is written under another name and renamed when complete.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finback.errors import UserError
from finback.model import Model
from finback.paths import atomic_folder

_RANDOM = "torch.generator"
KEPT = 2
"""How many of the latest checkpoints stay, besides the ends of stages."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `state` is its state.json."""

    folder: Path
    step: int
    state: dict[str, Any]

    def restore_model(self, model: Model) -> None:
        """Copy the weights and correction biases into `model`, and torch's generator into place."""
        tensors = self._read("model.safetensors")
        own = _unique(model)
        if own.keys() != tensors.keys():
            raise UserError(f"{self.folder}: holds other tensors than the recipe's model; start again in a new folder")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])
        torch.set_rng_state(self._read("optimizer.safetensors")[_RANDOM])

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """What was given to `save` as `optimizer`."""
        tensors = self._read("optimizer.safetensors")
        del tensors[_RANDOM]
        return tensors

    def _read(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.folder / name}: damaged ({error}); remove {self.folder} to resume earlier"
            ) from None


def save(root: Path, step: int, model: Model, optimizer: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write checkpoint `step` under `root`; raises UserError when the disk does not take it, earlier ones intact."""
    folder = root / f"step-{step}"
    try:
        with atomic_folder(folder) as temporary:
            _write_tensors(temporary / "model.safetensors", _unique(model))
            _write_tensors(temporary / "optimizer.safetensors", optimizer | {_RANDOM: torch.get_rng_state()})
            (temporary / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
            for file in temporary.iterdir():
                _flush(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the checkpoint cannot be written ({error}); earlier checkpoints are intact: "
            "free some space, then go on with --resume"
        ) from None
    return folder


def latest(root: Path) -> Checkpoint | None:
    """The complete checkpoint of the highest step."""
    steps = _steps(root)
    if not steps:
        return None
    folder = root / f"step-{steps[-1]}"
    return Checkpoint(folder, steps[-1], json.loads((folder / "state.json").read_text(encoding="utf-8")))


def prune(root: Path, stage_ends: Iterable[int]) -> None:
    """Remove all checkpoints but the latest KEPT and those at the end of a stage."""
    ends = set(stage_ends)
    for step in _steps(root)[:-KEPT]:
        if step not in ends:
            shutil.rmtree(root / f"step-{step}")


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written in `folder`."""
    for pattern in (".*.tmp", ".*.old"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _steps(root: Path) -> list[int]:
    names = [path.parent.name.removeprefix("step-") for path in root.glob("step-*/state.json")]
    return sorted(int(name) for name in names if name.isdecimal())


def _unique(model: Model) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, one that is shared (a tied head) once."""
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: value.detach() for name, value in state.items() if seen.setdefault(id(value), name) == name}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)


def _flush(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
