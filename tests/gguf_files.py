"""GGUF files for the tests: written by us, and written again with other contents."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from families import FAMILIES
from tiny_model import tiny_model

from finback.model import Config, Llama3Scaling, Model
from finback.text import Tokenizer

TOKENIZER = Tokenizer.train(["one two three " * 20, "vier fünf"], vocab_size=300)
IDS = torch.randint(300, (2, 50), generator=torch.Generator().manual_seed(3))
LLAMA3 = Llama3Scaling(8.0, 8192)
CHANGES = {"R1-Distill-Llama": {"rope_scaling": LLAMA3, "max_position_embeddings": 131072, "rope_theta": 5e5}}


def model_of(name: str, **changes) -> Model:
    config = Config.from_dict(FAMILIES[name] | {"vocab_size": 310})
    return tiny_model(replace(config, **{"bos_token_id": 0, "eos_token_id": 1, **CHANGES.get(name, {}), **changes}))


def in_bf16(model: Model) -> Model:
    """The numbers a BF16 file can hold: matrices rounded, the rest as it is."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("mlp.gate.weight"):
            parameter.data.copy_(parameter.data.bfloat16().float())
    return model


def copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)


def finish(writer: gguf.GGUFWriter) -> None:
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def rewritten(source: Path, target: Path, drop: set[str] = frozenset(), **fields) -> None:
    """A GGUF file with other metadata, tensors of `drop` left out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, fields.pop("architecture", reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in drop:
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        value, kind = fields.pop(name, field.contents()), field.types[0]
        kind = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32}.get(type(value), kind)
        writer.add_key_value(name, value, kind, field.types[-1] if array else None)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    finish(writer)
