"""What went wrong when a loss or gradient is not a number: the first tensor that is not finite."""

import torch
from torch import Tensor, nn

from finback.model import Model
from finback.train.data import Batch


@torch.no_grad()
def first_bad_tensor(model: Model, batch: Batch) -> str:
    """The name of the first weight, else activation in a fresh forward pass, else gradient that is not finite."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"weight {name}"
    found: list[str] = []

    def look(name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(tensor, Tensor) and not _finite(tensor) for tensor in tensors):
                found.append(f"output of {name}")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model.decoder(batch.ids_BW[:, : batch.sequence], positions=batch.positions_BT)
    finally:
        for hook in hooks:
            hook.remove()
    bad = [f"gradient of {n}" for n, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    return (found + bad + ["the loss"])[0]


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
