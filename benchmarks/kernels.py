"""The hot loops of a training step beside their alternatives, forward and backward, in one process.

    python benchmarks/kernels.py [--repeats 9]

Shapes are those of configuration (S): 32 x 256 tokens, 8 experts of 192 on a width of 256, top-2, 8 heads of 48 and 32,
and attention of 8 x 1024 tokens too. bf16. The alternatives of a loop take turns. Every figure is the median of the
repeats in milliseconds with its range.
"""

import argparse
import os
import statistics
import time
from functools import partial

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


def show(runs: dict[str, partial[Tensor]], repeats: int) -> None:
    """A row for each, all measured in turn."""
    forward: dict[str, list[float]] = {name: [] for name in runs}
    both: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 3):
        for name, run in runs.items():
            for x in run.args:
                if isinstance(x, Tensor):
                    x.grad = None
            start = time.perf_counter()
            out = run()
            middle = time.perf_counter()
            out.backward(torch.ones_like(out))
            forward[name].append((middle - start) * 1e3)
            both[name].append((time.perf_counter() - start) * 1e3)
    for name in runs:
        first, whole = forward[name][3:], both[name][3:]
        spread = f"{statistics.median(whole):7.1f} ({min(whole):.1f} – {max(whole):.1f})"
        print(f"| {name} | {statistics.median(first):7.1f} | {spread} |", flush=True)


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
    wide, scale = leaf(BATCH * TOKENS, HIDDEN, dtype=torch.float32), leaf(HIDDEN, dtype=torch.float32)
    head, targets = leaf(VOCABULARY, HIDDEN), torch.randint(VOCABULARY, (len(x),))
    print("| what | forward ms | forward + backward ms |\n|---|---|---|")
    mixture = {
        "experts: ours, torch._grouped_mm": ours_experts.expert_ffn,
        "experts: sorted, a product each": split_loop,
        "experts: padded to the fullest, bmm": padded_bmm,
        "experts: reference": reference.expert_ffn,
    }
    show({name: partial(run, x, gate_up, down, experts, weights) for name, run in mixture.items()}, repeats)
    attentions = {
        "ours, compiled where it can be": ours_attention.attention,
        "ours, plain torch": ours_attention._Attention.apply,
        "torch SDPA, values padded": sdpa,
        "reference": reference.attention,
    }
    for tokens in (TOKENS, 4 * TOKENS):
        rows = BATCH * TOKENS // tokens
        given = [leaf(rows, tokens, HEADS, width) for width in (QUERY, QUERY, VALUE)]
        runs = {
            f"attention, {rows} x {tokens}: {name}": partial(run, *given, 0.14, None)
            for name, run in attentions.items()
        }
        show(runs, repeats)
    norms = {
        "RMSNorm: ours": rms_norm,
        "RMSNorm: torch": lambda a, w, eps: F.rms_norm(a, (HIDDEN,), w, eps),
        "RMSNorm: reference": reference.rms_norm,
    }
    show({name: partial(run, wide, scale, 1e-6) for name, run in norms.items()}, repeats)
    losses = {
        "head + loss: ours, by chunks": ours_loss.cross_entropy,
        "head + loss: reference": reference.cross_entropy,
    }
    show({name: partial(run, x, head, targets) for name, run in losses.items()}, repeats)


if __name__ == "__main__":
    main()
