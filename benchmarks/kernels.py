"""The hot loops of a training step beside their alternatives, forward and backward, in one process.

    python benchmarks/kernels.py [--repeats 9]

Shapes are those of configuration (S): 32 x 256 tokens, 8 experts of 192 on a width of 256, top-2, 8 heads of 48 and 32.
bf16. Every figure is the median of the repeats in milliseconds with its range.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.kernels import attention as ours_attention
from finback.kernels import cross_entropy as ours_loss
from finback.kernels import experts as ours_experts
from finback.kernels import reference
from finback.kernels.norm import rms_norm

BATCH, TOKENS, HIDDEN, WIDTH, EXPERTS, CHOSEN, HEADS, VOCABULARY = 32, 256, 256, 192, 8, 2, 8, 4096
QUERY, VALUE = 48, 32


def timed(run: Callable[[], Tensor], repeats: int) -> str:
    forward, both = [], []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        out = run()
        middle = time.perf_counter()
        out.backward(torch.ones_like(out))
        forward.append((middle - start) * 1e3)
        both.append((time.perf_counter() - start) * 1e3)
    forward, both = forward[3:], both[3:]
    return f"{statistics.median(forward):7.1f} | {statistics.median(both):7.1f} ({min(both):.1f} – {max(both):.1f})"


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def split_loop(x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Sorted tokens, one ordinary product per expert, torch's own backward."""
    order = experts.flatten().argsort(stable=True)
    sizes = torch.bincount(experts.flatten(), minlength=EXPERTS).tolist()
    results = []
    for expert, rows in enumerate(x.index_select(0, order // CHOSEN).split(sizes)):
        gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
        results.append(F.linear(F.silu(gate) * up, down[expert]))
    result = torch.cat(results) * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, result)


def padded_bmm(x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Every expert padded to the fullest one, one batched product."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat, minlength=EXPERTS)
    starts = sizes.cumsum(0) - sizes
    slot = torch.arange(len(flat)) - starts[flat[order]] + flat[order] * int(sizes.max())
    padded = x.new_zeros(EXPERTS * int(sizes.max()), HIDDEN).index_copy(0, slot, x.index_select(0, order // CHOSEN))
    gate, up = torch.bmm(padded.view(EXPERTS, -1, HIDDEN), gate_up.mT).chunk(2, dim=-1)
    result = torch.bmm(F.silu(gate) * up, down.mT).flatten(0, 1).index_select(0, slot)
    result = result * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, result)


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: None) -> Tensor:
    """torch's own, with values padded to the keys' width so that it takes its fast path."""
    padded = F.pad(value, (0, QUERY - VALUE))
    heads = (x.transpose(1, 2) for x in (query, key, padded))
    return F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale)[..., :VALUE].transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    x, gate_up, down = leaf(BATCH * TOKENS, HIDDEN), leaf(EXPERTS, 2 * WIDTH, HIDDEN), leaf(EXPERTS, HIDDEN, WIDTH)
    experts, weights = torch.rand(len(x), EXPERTS).topk(CHOSEN).indices, leaf(len(x), CHOSEN)
    query, key, value = (leaf(BATCH, TOKENS, HEADS, width) for width in (QUERY, QUERY, VALUE))
    wide, scale = leaf(BATCH * TOKENS, HIDDEN, dtype=torch.float32), leaf(HIDDEN, dtype=torch.float32)
    head, targets = leaf(VOCABULARY, HIDDEN), torch.randint(VOCABULARY, (len(x),))
    print("| what | forward ms | forward + backward ms |\n|---|---|---|")
    mixture = {
        "experts: ours, torch._grouped_mm": ours_experts.expert_ffn,
        "experts: sorted, a product each": split_loop,
        "experts: padded to the fullest, bmm": padded_bmm,
        "experts: reference": reference.expert_ffn,
    }
    for name, run in mixture.items():
        print(f"| {name} | {timed(lambda run=run: run(x, gate_up, down, experts, weights), repeats)} |", flush=True)
    attentions = {
        "attention: ours": ours_attention.attention,
        "attention: torch SDPA, values padded": sdpa,
        "attention: reference": reference.attention,
    }
    for name, run in attentions.items():
        print(f"| {name} | {timed(lambda run=run: run(query, key, value, 0.14, None), repeats)} |", flush=True)
    norms = {
        "RMSNorm: ours": rms_norm,
        "RMSNorm: torch": lambda a, w, eps: F.rms_norm(a, (HIDDEN,), w, eps),
        "RMSNorm: reference": reference.rms_norm,
    }
    for name, run in norms.items():
        print(f"| {name} | {timed(lambda run=run: run(wide, scale, 1e-6), repeats)} |", flush=True)
    losses = {
        "head + loss: ours, by chunks": ours_loss.cross_entropy,
        "head + loss: reference": reference.cross_entropy,
    }
    for name, run in losses.items():
        print(f"| {name} | {timed(lambda run=run: run(x, head, targets), repeats)} |", flush=True)


if __name__ == "__main__":
    main()
