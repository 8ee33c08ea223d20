"""Planted bugs of the kernels: wrong gradients above all, which no loss curve shows at once."""

from mutations import Mutation

ATTENTION, EXPERTS = "kernels/attention.py", "kernels/experts.py"
NORM, LOSS = "kernels/norm.py", "kernels/cross_entropy.py"
TEST_ATTENTION = "test_kernels.py::test_attention_value_and_gradient"
TEST_EXPERTS = "test_kernels.py::test_experts_value_and_gradient"
TEST_NORM = "test_kernels.py::test_rms_norm_value_and_gradient"
TEST_LOSS = "test_kernels.py::test_cross_entropy_value_and_gradient"

MUTATIONS = [
    Mutation(
        ATTENTION,
        "bias.triu_(rows.start + 1)",
        "bias.triu_(1)",
        [TEST_ATTENTION],
        "later blocks of queries lose keys they may see",
    ),
    Mutation(
        ATTENTION,
        "transpose(1, 2), beta=-1).mul_(chosen)",
        "transpose(1, 2), beta=0).mul_(chosen)",
        [TEST_ATTENTION],
        "the softmax's gradient forgets its normaliser",
    ),
    Mutation(
        ATTENTION,
        "dk[b, :, columns].baddbmm_(ds.transpose(1, 2), q[b, :, rows], alpha=ctx.scale)",
        "dk[b, :, columns].baddbmm_(ds.transpose(1, 2), q[b, :, rows], beta=0, alpha=ctx.scale)",
        [TEST_ATTENTION],
        "a key's gradient keeps the last block of queries only",
    ),
    Mutation(
        ATTENTION,
        "-(-(keys - unseen) // _STEP) * _STEP, keys)",
        "(keys - unseen) // _STEP * _STEP, keys)",
        [TEST_ATTENTION],
        "a block of queries loses the last key it may see",
    ),
    Mutation(
        EXPERTS,
        "d_active.mul_(weight)\n",
        "d_active.mul_(1)\n",
        [TEST_EXPERTS],
        "the experts' gradient ignores how much each token weighed them",
    ),
    Mutation(
        EXPERTS,
        "weights_NK.new_zeros(len(source))",
        "weights_NK.new_ones(len(source))",
        [TEST_EXPERTS],
        "rows that only fill up a group add to the gradient",
    ),
    Mutation(
        EXPERTS,
        "torch.mul(d_active, silu, out=d_up)",
        "torch.mul(d_active, gate, out=d_up)",
        [TEST_EXPERTS],
        "the up projection's gradient skips the activation",
    ),
    Mutation(
        NORM,
        ".addcmul_(normed, share, value=-1)",
        "",
        [TEST_NORM],
        "the norm's gradient forgets that the scale depends on x",
    ),
    Mutation(
        LOSS,
        "scored.new_full((), -1.0)",
        "scored.new_full((), 0.0)",
        [TEST_LOSS],
        "the target gets no credit in the gradient",
    ),
    Mutation(
        LOSS,
        "scored.gather(1, targets).sum()",
        "scored.gather(1, targets).mean()",
        [TEST_LOSS],
        "a mean where a sum is due: the loss depends on the chunks",
    ),
]
