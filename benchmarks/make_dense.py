"""A dense model of Qwen2-0.5B's shape with random weights, for benchmarks: the same numbers every time.

    python benchmarks/make_dense.py FOLDER

Every tensor is drawn from its own name, so none depends on the order or on what else there is. The tokenizer is calf's:
benchmarks give token ids, but other programs want one. 1.3 GB: the file has the tied head twice.
"""

import argparse
import sys
import zlib
from pathlib import Path

import torch

from finback import UserError, load_tokenizer, save
from finback.model import Config, Model

SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def dense(shape: dict) -> Model:
    """A bfloat16 model: norms about 1, biases about 0, matrices so that each product keeps the size of its input."""
    model = Model(Config.from_dict(shape)).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if parameter.dim() == 1:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.1 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        save(dense(SHAPE), load_tokenizer("calf"), options.folder, greedy=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(options.folder)


if __name__ == "__main__":
    main()
