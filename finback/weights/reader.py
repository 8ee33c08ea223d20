"""From a model folder to a `Model`."""

import dataclasses
from collections.abc import Set
from pathlib import Path

import torch
from torch import nn

from finback.errors import UserError
from finback.model.config import Config
from finback.model.decoder import Model
from finback.model.moe import Router
from finback.paths import model_folder
from finback.text.tokenizer import Tokenizer
from finback.weights import layout, store

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantize: str | None = None,
) -> Model:
    """Load a model by path, or by name from the models on this machine, in eval mode.

    `dtype`: "auto" keeps the checkpoint's (that of its embedding), or one of float32, bfloat16, float16. Router weights
    and correction biases are float32 always. Tensors are read one at a time into place: there is no second copy.
    Raises UserError for a folder that does not hold what its config.json describes, naming the tensor.
    """
    if quantize is not None:
        raise UserError(f"quantize={quantize!r}: quantised loading is not available in this version; leave it at None")
    folder = model_folder(str(name_or_path))
    settings = store.read_json(folder / "config.json")
    if settings.get("quantization_config"):
        raise UserError(
            f"{folder}: a quantised checkpoint (quantization_config in config.json); this version reads BF16, F16 and "
            "F32 tensors: convert it to BF16 and remove that entry"
        )
    checkpoint = store.Checkpoint(folder)
    config = _without_absent_mtp(Config.from_dict(settings), checkpoint)
    with torch.device("meta"):
        model = Model(config)
    _check(checkpoint, model)
    _materialise(model, _dtype(dtype, checkpoint), _device(device))
    with torch.no_grad():
        for disk, place in layout.tensors(model):
            place.copy_(checkpoint.tensor(disk))
    return model.eval()


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder; names resolve as in `load`."""
    return Tokenizer.load(model_folder(str(name_or_path)))


def _without_absent_mtp(config: Config, checkpoint: store.Checkpoint) -> Config:
    """The config of what the file holds: many files announce an MTP layer that was never written."""
    if layout.has_layer(checkpoint.names(), config.num_hidden_layers):
        return config
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def _check(checkpoint: store.Checkpoint, model: Model) -> None:
    """Raise UserError unless the file holds exactly the model's tensors, each in its shape and a readable dtype."""
    where, names = checkpoint.folder, checkpoint.names()
    expected = {disk: tuple(place.shape) for disk, place in layout.tensors(model)}
    if missing := expected.keys() - names:
        raise UserError(f"{where}: the checkpoint lacks {_list(missing)}, which its config.json asks for")
    unexpected = names - expected.keys() - {disk for disk, _ in layout.copies(model)}
    if unexpected := {name for name in unexpected if not layout.IGNORED.search(name)}:
        raise UserError(f"{where}: the checkpoint holds {_list(unexpected)}, unknown to its config.json")
    for disk, wanted in expected.items():
        checkpoint.dtype(disk)
        if (shape := checkpoint.shape(disk)) != wanted:
            raise UserError(f"{where}: tensor {disk!r} is {list(shape)}, its config.json asks for {list(wanted)}")


def _list(names: Set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors ({shown}{', …' if len(names) > 3 else ''})"


def _materialise(model: Model, dtype: torch.dtype, device: torch.device) -> None:
    """Give every meta parameter of the model memory, uninitialised; buffers start at zero. What is shared stays so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                kept = torch.float32 if isinstance(module, Router) else dtype
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=kept, device=device))
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))


def _dtype(dtype: str | torch.dtype, checkpoint: store.Checkpoint) -> torch.dtype:
    if dtype == "auto":
        return checkpoint.dtype(layout.EMBEDDING)
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r} is not known; allowed: auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return chosen
