"""How an engine is set up, and what its cache may take."""

from dataclasses import dataclass
from pathlib import Path

import torch

from finback import machine
from finback.engine.blocks import BLOCK
from finback.engine.cache import PagedCache
from finback.engine.params import check, whole
from finback.engine.scheduler import Cost
from finback.engine.speculate import Speculation
from finback.errors import UserError
from finback.kernels.cache_format import CACHE_FORMATS
from finback.model import Config
from finback.model.sizes import flops_per_token

_SHARED, _ALONE = 192, 2048
_SHARE = 0.5  # of free memory, for the cache where nobody says how much


@dataclass(frozen=True)
class Options:
    """Settings of an engine. Raises UserError for a value that is not allowed.

    cache_memory: bytes for the cache; None is what `max_batch` full contexts take, half of the free memory at most.
    cache_format: None keeps entries as computed; "int8", "fp8": about half of bfloat16 (kernels/cache_format.py).
    step_tokens: what a step may cost, in tokens: more computes long prompts faster, less makes others wait less. None
        is 192, and 2,048 where max_batch is 1: then nobody waits.
    prefix_cache: whether prompts that begin alike share what was computed; prefix_folder: also on disk, and across
        restarts, in at most prefix_limit bytes.
    speculate: "mtp" (the model's own module), "ngram" (repeated text), "auto" (mtp where the model has it, else ngram)
        or "off". draft_tokens: guesses a step; None is 1 for mtp, 4 for ngram. adaptive: stop guessing for a request
        when it does not pay.
    max_queue, max_queue_tokens: requests and prompt tokens that may wait; `submit` refuses what is more.
    batch_invariant: results equal bit for bit whatever else runs, and slower.
    """

    cache_memory: int | None = None
    cache_format: str | None = None
    step_tokens: int | None = None
    prefix_cache: bool = True
    prefix_folder: Path | None = None
    prefix_limit: int = 4 * 2**30
    speculate: Speculation = "off"
    draft_tokens: int | None = None
    adaptive: bool = True
    max_queue: int | None = None
    max_queue_tokens: int | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        least = {"prefix_limit": 1, "step_tokens": BLOCK, "cache_memory": 1, "draft_tokens": 1}
        for name, low in (least | {"max_queue": 1, "max_queue_tokens": 1}).items():
            value = getattr(self, name)
            fits = whole(value, low) or (value is None and name != "prefix_limit")
            check(name, value, f"a whole number, at least {low}", fits)
        if self.speculate not in ("auto", "mtp", "ngram", "off"):
            raise UserError(f"speculate is {self.speculate!r}; it must be auto, mtp, ngram or off")
        if self.cache_format is not None and self.cache_format not in CACHE_FORMATS:
            raise UserError(f"cache_format is {self.cache_format!r}; it must be one of {', '.join(CACHE_FORMATS)}")


def step_budget(options: Options, max_batch: int) -> int:
    """What a step may cost, in tokens."""
    return options.step_tokens or (_ALONE if max_batch == 1 else _SHARED)


def blocks_for(options: Options, cache: PagedCache, max_batch: int, context: int) -> int:
    """How many blocks a cache like this one gets. Raises UserError where the memory given holds none."""
    block_bytes, device = cache.block_bytes, cache.storage.device
    wanted = max_batch * (-(-context // BLOCK) + 1)  # one more: a shared block is copied before the other is let go
    budget = options.cache_memory
    if budget is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.memory_free()
        budget = wanted * block_bytes if free is None else int(_SHARE * free)
    if budget < 2 * block_bytes:
        raise UserError(
            f"cache_memory is {budget:,} bytes; a block of {BLOCK} tokens takes {block_bytes:,}, and 2 are needed"
        )
    return min(wanted, budget // block_bytes)


def cost_of(config: Config) -> Cost:
    """What attention costs beside the rest of the model, by its arithmetic."""
    rest, heads = flops_per_token(config, 0), config.num_attention_heads * config.num_hidden_layers
    if config.kv_lora_rank is None:
        return Cost(near=2 * heads * 2 * config.query_dim / rest)
    rank, expanded = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    return Cost(
        near=2 * heads * (config.cache_width + rank) / rest,
        expand=2 * heads * rank * expanded / rest,
        far=2 * heads * (config.query_dim + config.v_head_dim) / rest,
    )
