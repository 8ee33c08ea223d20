"""A measured speed beside what the machine allows: bytes that must be read, operations that must be done."""

from dataclasses import dataclass

import torch

from finback.evaluate.limits import Limits
from finback.evaluate.speed import Result
from finback.model import Config, Model
from finback.model.sizes import bytes_read, flops_per_token
from finback.model.weight import Weight


@dataclass(frozen=True)
class Needs:
    """What a pass of a model needs of this machine. form: of its packed matrices, None where all are dense.

    read: bytes/s from memory; product: FLOP/s of the numbers that its matrices meet: the best that was measured.
    """

    config: Config
    dtype_bytes: int
    form: str | None
    read: float
    product: float

    @classmethod
    def of(cls, model: Model, limits: Limits) -> "Needs":
        """Of a loaded model."""
        dtype = model.decoder.embed_tokens.weight.dtype
        blocks = model.decoder.layers.modules()  # not the head, which int4 packs as int8
        forms = {module.form.name for module in blocks if isinstance(module, Weight) and module.form is not None}
        form = min(forms, default=None)
        # Integer weights meet rows rounded to 8 bits, where kernels are compiled and the model is in bfloat16.
        kind = form if form is not None and form in limits.peaks else "bf16"
        kind = kind if dtype == torch.bfloat16 else "fp32"
        return cls(model.config, dtype.itemsize, form, limits.bandwidth(), limits.product(kind))

    def bytes_of(self, rows: int) -> float:
        """Weights that a pass over `rows` tokens reads, by `sizes.bytes_read`."""
        return bytes_read(self.config, rows, self.dtype_bytes, self.form)

    def decode_s(self, rows: int, cached_bytes: float, cached: int) -> float:
        """Least seconds of a pass that gives `rows` requests a token each, with `cached` tokens in all behind them.

        Weights and cache are read once, or the arithmetic takes longer than that.
        """
        flops = rows * flops_per_token(self.config, cached // rows)
        return max((self.bytes_of(rows) + cached_bytes) / self.read, flops / self.product)

    def prefill_s(self, tokens: int, depth: int) -> float:
        """Least seconds to compute `tokens` of a prompt after `depth` that are cached; the head sees the last alone."""
        head = 2 * self.config.vocab_size * self.config.hidden_size
        flops = tokens * (flops_per_token(self.config, depth + tokens // 2) - head) + head
        return max(flops / self.product, self.bytes_of(tokens) / self.read)


@dataclass(frozen=True)
class Shares:
    """Speeds beside their limits; None where nothing was measured.

    decode: least time of the decoding steps over the time they took. The limit is that of one token a request and
    step: speculation may pass it. decode_tokens_per_s, limit_tokens_per_s: the same in new tokens. prefill: least time
    of the prompts over their times to first token, where requests come one after the other.
    """

    decode: float | None
    decode_tokens_per_s: float | None
    limit_tokens_per_s: float | None
    prefill: float | None


def shares(result: Result, needs: Needs) -> Shares:
    """How near `result` comes to the machine's limits."""
    steps = result.decoding
    took, tokens = sum(step.seconds for step in steps), sum(step.tokens for step in steps)
    least = sum(
        step.tokens / step.rows * needs.decode_s(step.rows, step.cached * result.cache_bytes, step.cached)
        for step in steps
    )
    prefill = None
    if result.load.concurrency == 1:
        computed = [(record.prompt_tokens - record.cached_tokens, record.cached_tokens) for record in result.records]
        waited = sum(record.first_s for record in result.records)
        prefill = sum(needs.prefill_s(*each) for each in computed) / waited
    if not steps:
        return Shares(None, None, None, prefill)
    return Shares(least / took, tokens / took, tokens / least, prefill)
