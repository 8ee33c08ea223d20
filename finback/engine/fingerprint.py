"""A model's fingerprint: what was computed with one model must never be read with another."""

import hashlib
import json

import torch
from torch import Tensor, nn

from finback.model.weight import Weight

_COLUMNS = 256
_CHUNK = 512 * _COLUMNS  # words of 8 bytes: 1 MiB, which the second sum still finds in cache


def fingerprint(model: nn.Module, extra: str = "") -> str:
    """SHA-256 in hex over a model's `config`, every parameter and buffer in it, and `extra`.

    A tensor counts with its name, shape, dtype and all its bytes. Those go in as wrap-around sums of 8-byte words by
    row and by column of tables 256 words wide: a word that differs changes two sums, words that move change those of
    their rows or columns. That runs at half the speed of reading memory (SHA-256 itself at a tenth of it) and is no
    defence against weights made to collide. `extra` names what else decides what a cache holds: format, block size.
    """
    config = getattr(model, "config", None)
    described = json.dumps(config.to_dict() if config is not None else None, sort_keys=True)
    digest = hashlib.sha256(json.dumps([described, extra]).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        _add_bytes(digest, tensor.detach())
    for name, module in model.named_modules():
        if isinstance(module, Weight) and not [*module.parameters(), *module.buffers()]:  # it stays on disk
            for index, tensors in module.pieces():
                for part, tensor in tensors.items():
                    digest.update(json.dumps([name, index, part, list(tensor.shape), str(tensor.dtype)]).encode())
                    _add_bytes(digest, tensor.detach())
    return digest.hexdigest()


def _add_bytes(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Add the sums over a tensor's bytes, and what is left of them after whole rows as it is."""
    raw = tensor.contiguous().view(-1)
    if raw.numel() == 0:
        return
    raw = raw.view(torch.uint8)
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:  # a view into something else
        raw = raw.clone()
    whole = raw.numel() // (8 * _COLUMNS) * 8 * _COLUMNS
    parts = [raw[whole:]]
    for words in raw[:whole].view(torch.int64).split(_CHUNK):
        table = words.view(-1, _COLUMNS)
        parts += [table.sum(1).view(torch.uint8), table.sum(0).view(torch.uint8)]
    digest.update(torch.cat(parts).cpu().numpy().tobytes())
