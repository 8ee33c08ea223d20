"""Planted bugs of the kernels: wrong gradients above all, which no loss curve shows at once."""

from mutations import Mutation

ATTENTION, EXPERTS = "kernels/attention.py", "kernels/experts.py"
NORM, LOSS, ROTARY = "kernels/norm.py", "kernels/cross_entropy.py", "kernels/rotary.py"
TEST_ATTENTION = "test_kernels.py::test_attention_value_and_gradient"
TEST_EXPERTS = "test_kernels.py::test_experts_value_and_gradient"
TEST_NORM = "test_kernels.py::test_rms_norm_value_and_gradient"
TEST_ROTARY = "test_kernels.py::test_rotation_value_and_gradient"
TEST_LOSS = "test_kernels.py::test_cross_entropy_value_and_gradient"

MUTATIONS = [
    Mutation(
        ATTENTION,
        "bias.triu_(queries.start + 1)",
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
        "_part(q, share, queries), alpha=ctx.scale)",
        "_part(q, share, queries), beta=0, alpha=ctx.scale)",
        [TEST_ATTENTION],
        "a key's gradient keeps the last block of queries only",
    ),
    Mutation(
        ATTENTION,
        "unflatten(0, (-1, heads))",
        "unflatten(0, (heads, -1)).transpose(0, 1)",
        [TEST_ATTENTION],
        "rows of the batch that go together swap heads",
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
        "torch.add(centred, mean_N1.mul_(inverse_N1[rows]), out=dx_ND[rows])",
        "dx_ND[rows] = centred",
        [TEST_NORM],
        "the norm's gradient is LayerNorm's",
    ),
    Mutation(
        NORM,
        "d_weight += d_scale",
        "d_weight = d_scale",
        [TEST_NORM],
        "the scale's gradient keeps the last tile only",
    ),
    Mutation(
        ROTARY,
        "_turned(grad, turn.conj())",
        "_turned(grad, turn)",
        [TEST_ROTARY],
        "the gradient is turned onwards and not back",
    ),
    Mutation(
        ROTARY,
        "part.unflatten(-1, (-1, 2))",
        "part.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous()",
        [TEST_ROTARY, "test_model_rope.py::test_rotation_turns_neighbouring_pairs"],
        "the two halves are turned, as in Llama",
    ),
    Mutation(
        ROTARY,
        "memory_format=torch.contiguous_format, copy=True)",
        "copy=True)",
        ["test_kernels.py::test_rotation_of_a_tensor_in_another_order_of_memory"],
        "numbers that do not lie side by side cannot be seen as complex ones",
    ),
    Mutation(
        ROTARY,
        "contiguous_format, copy=True)",
        "contiguous_format)",
        [TEST_ROTARY],
        "a float32 input is turned in place",
    ),
    Mutation(
        LOSS,
        "scores.new_full((), -1.0)",
        "scores.new_full((), 0.0)",
        [TEST_LOSS],
        "the target gets no credit in the gradient",
    ),
    Mutation(
        LOSS,
        "scores.amax(1, keepdim=True).log_()).sum()",
        "scores.amax(1, keepdim=True).log_()).mean()",
        [TEST_LOSS],
        "a mean where a sum is due: the loss depends on the chunks",
    ),
]
