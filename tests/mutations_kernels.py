"""Planted bugs of the kernels: wrong gradients above all, which no loss curve shows at once."""

from mutations import Mutation

ATTENTION, EXPERTS = "kernels/attention.py", "kernels/experts.py"
NORM, LOSS, ROTARY = "kernels/norm.py", "kernels/cross_entropy.py", "kernels/rotary.py"
LATENT, LINEAR, ORDER = "kernels/latent.py", "kernels/linear.py", "kernels/order.py"
TEST_SERVING = "test_kernels_serving.py"
TEST_LATENT = f"{TEST_SERVING}::test_latent_attention"
TEST_FORMS = f"{TEST_SERVING}::test_experts_in_every_form"
ALL_ROWS = [f"{TEST_SERVING}::test_in_fixed_order_every_product_has_all_rows"]
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
        ATTENTION,
        "seen = (0, 0, 0) if mask is None else",
        "seen = (0, 0, 0) if True else",
        ["test_kernels_train_attention.py::test_documents_packed_in_a_row"],
        "the compiled form does not hear of documents",
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
        "part = x_N[rows].to(wide_dtype(x), memory_format=torch.contiguous_format, copy=True)",
        "part = x_N[rows].to(wide_dtype(x), copy=True)",
        ["test_kernels.py::test_rotation_of_a_tensor_in_another_order_of_memory"],
        "numbers that do not lie side by side cannot be seen as complex ones",
    ),
    Mutation(
        ROTARY,
        "part = x_N[rows].to(wide_dtype(x), memory_format=torch.contiguous_format, copy=True)",
        "part = x_N[rows].to(wide_dtype(x), memory_format=torch.contiguous_format)",
        [TEST_ROTARY],
        "a float32 input is turned in place",
    ),
    Mutation(
        ROTARY,
        "whole = x.to(wide_dtype(x), memory_format=torch.contiguous_format, copy=True)",
        "whole = x.to(wide_dtype(x), memory_format=torch.contiguous_format)",
        [TEST_ROTARY, f"{TEST_SERVING}::test_without_gradients_norm_and_rotation_are_those_with_them"],
        "a small input is turned in place",
    ),
    Mutation(
        ROTARY,
        "        return whole.to(x.dtype)\n",
        "        return whole\n",
        [f"{TEST_SERVING}::test_without_gradients_norm_and_rotation_are_those_with_them"],
        "a few tokens are float32 from here on",
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
    Mutation(
        NORM,
        "return _normed(x, weight, eps)[0].to(dtype)",
        "return _normed(x, weight, eps)[0]",
        [f"{TEST_SERVING}::test_without_gradients_norm_and_rotation_are_those_with_them"],
        "without gradients all is float32 after the first norm",
    ),
    Mutation(
        NORM,
        "        return _normed(x, weight, eps)[0].to(dtype)",
        "        return _normed(x, weight, eps)[0].to(x.dtype)",
        [f"{TEST_SERVING}::test_under_autocast_the_norm_is_in_the_dtype_of_the_next_product"],
        "under autocast every product converts its input once more",
    ),
    Mutation(
        LATENT,
        "torch.where(mask.unsqueeze(1), by_head",
        "torch.where(mask[:, :1].unsqueeze(1), by_head",
        [TEST_LATENT],
        "all new tokens of a row see what its first one sees",
    ),
    Mutation(
        LATENT,
        "query_BRC = query.transpose(1, 2).flatten(1, 2)",
        "query_BRC = query.flatten(1, 2)",
        [TEST_LATENT],
        "heads and tokens change places under the mask",
    ),
    Mutation(
        LATENT,
        ".to(wide_dtype(query)).mul_(scale)",
        ".to(wide_dtype(query))",
        [TEST_LATENT],
        "scores are not scaled",
    ),
    Mutation(
        LATENT,
        ".to(wide_dtype(query)).mul_(scale)",
        ".mul_(scale)",
        [f"{TEST_SERVING}::test_latent_attention_scales_its_scores_in_float32"],
        "scores and weights are rounded to bfloat16",
    ),
    Mutation(
        LATENT,
        "    entry = entry if entry.dtype == dtype else entry.to(dtype)\n",
        "",
        [f"{TEST_SERVING}::test_latent_attention_of_a_cache_in_another_dtype"],
        "a cache of another dtype cannot be read",
    ),
    Mutation(
        LINEAR,
        "x.numel() <= FEW * x.shape[-1]",
        "x.numel() < x.shape[-1]",
        [f"{TEST_SERVING}::test_only_a_few_rows_go_without_onednn"],
        "a single row takes the way for many: half the speed of decoding",
    ),
    Mutation(
        LINEAR,
        "x.numel() <= FEW * x.shape[-1]",
        "x.shape[0] <= FEW",
        [f"{TEST_SERVING}::test_only_a_few_rows_go_without_onednn"],
        "a long row of tokens takes the way for few",
    ),
    Mutation(
        LINEAR,
        "        finally:\n            torch._C._set_mkldnn_enabled(before)",
        "        finally:\n            pass",
        [f"{TEST_SERVING}::test_only_a_few_rows_go_without_onednn"],
        "after one decoded token all products go without oneDNN",
    ),
    Mutation(
        LINEAR,
        "        try:\n            return F.linear(x, weight)\n        finally:\n"
        "            torch._C._set_mkldnn_enabled(before)",
        "        out = F.linear(x, weight)\n        torch._C._set_mkldnn_enabled(before)\n        return out",
        [f"{TEST_SERVING}::test_onednn_is_on_again_after_a_product_that_raised"],
        "after one product that raised all go without oneDNN",
    ),
    Mutation(
        LINEAR,
        "plain and not torch.is_grad_enabled() and",
        "plain and",
        [f"{TEST_SERVING}::test_what_may_need_onednn_keeps_it"],
        "training takes the way of decoding",
    ),
    Mutation(
        EXPERTS,
        "        result[rows] = down(part, expert)",
        "        result[rows] = down(active[: end - start], expert)",
        [TEST_FORMS],
        "all experts but the first get the first one's activations",
    ),
    Mutation(
        EXPERTS,
        "        if start == end:\n            continue\n",
        "",
        [f"{TEST_SERVING}::test_a_stream_asks_for_chosen_experts_only"],
        "every expert is read from disk, chosen or not",
    ),
    Mutation(
        EXPERTS,
        'result, per_sample_weights=weights_NK, mode="sum")\n\n\ndef _grouped',
        'result, mode="sum")\n\n\ndef _grouped',
        [TEST_FORMS],
        "without gradients all chosen experts weigh the same",
    ),
    Mutation(
        ORDER,
        "gate, up = gate_up(x_ND, expert).chunk(2, dim=-1)\n        result = down(F.silu(gate) * up, expert)[token]",
        "gate, up = gate_up(x_ND[token], expert).chunk(2, dim=-1)\n        result = down(F.silu(gate) * up, expert)",
        ALL_ROWS,
        "the order of an expert's sums depends on how many rows chose it",
    ),
    Mutation(
        ORDER,
        "weights_NK[token, choice, None]",
        "weights_NK[token, 0, None]",
        [TEST_FORMS],
        "in fixed order every expert weighs as much as the first",
    ),
    Mutation(
        ORDER,
        "        _fix(before)\n",
        "        _fix(False)\n",
        [f"{TEST_SERVING}::test_fixed_order_ends_with_its_block"],
        "a block inside another ends the fixed order of both",
    ),
    Mutation(
        ORDER,
        "loop = _all_rows if _fixed else reference.expert_loop",
        "loop = reference.expert_loop",
        ALL_ROWS,
        "expert by expert, sums depend on the company even in fixed order",
    ),
]
