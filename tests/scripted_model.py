"""A stand-in for a model that continues every prompt by a script, so that tests can say which tokens come."""

from types import SimpleNamespace

import torch
from tiny_model import tiny
from torch import Tensor, nn


class ScriptedDecoder(nn.Module):
    def __init__(self, script: list[int], vocabulary: int) -> None:
        super().__init__()
        self.script, self.vocabulary = script, vocabulary
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1))
        self.passes: list[tuple[int, int]] = []  # rows and width of every forward pass

    def forward(self, ids: Tensor, *, positions: Tensor, cache: object, routing: object) -> Tensor:
        self.passes.append(tuple(ids.shape))
        return positions[..., None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        places = hidden[..., 0].long() + 1
        tokens = torch.tensor(self.script)[places % len(self.script)]
        return nn.functional.one_hot(tokens, self.vocabulary).float() * 30


class ScriptedModel(nn.Module):
    """At position p comes `script[p]`, again from the start where the script ends."""

    def __init__(self, script: list[int], vocabulary: int = 600, context: int = 512) -> None:
        super().__init__()
        self.config = tiny(vocab_size=vocabulary, max_position_embeddings=context)
        self.decoder = ScriptedDecoder(script, vocabulary)
