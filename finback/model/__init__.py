"""The architecture as plain modules: what a DeepSeek-V3 is, and nothing about files, text or training."""

from finback.model.attention import Cache
from finback.model.config import Config, Llama3Scaling, RopeScaling
from finback.model.decoder import Decoder, Model
from finback.model.moe import Routing

__all__ = ["Cache", "Config", "Decoder", "Llama3Scaling", "Model", "RopeScaling", "Routing"]
