"""Planted bugs of the native kernels; those in C++ are compiled for AVX2 in the copy."""

from mutations import Mutation

NATIVE = "test_kernels_native.py"
LINEAR, BITS = f"{NATIVE}::test_linear_of_few_and_many_rows", f"{NATIVE}::test_a_rows_bits_do_not_depend_on_the_others"
FEED, ATTENTION = f"{NATIVE}::test_the_feed_forward_of_a_block", f"{NATIVE}::test_attention_of_a_block"
FILL, LAY = f"{NATIVE}::test_panels_are_filled_in_parts", f"{NATIVE}::test_the_native_way_into_panels"
SEEN = "test_kernels_train_attention.py"
CAUSAL, PACKED = f"{SEEN}::test_causal", f"{SEEN}::test_documents_packed_in_a_row"
TRAIN = "test_kernels_train_rows.py"
EXPERTS = "test_kernels_train_experts.py::test_result_and_gradients"
NORM, SWIGLU = f"{TRAIN}::test_norm_of_a_sum", f"{TRAIN}::test_swiglu"
SCORES = f"{TRAIN}::test_scores"
ROWS, TURN, HEADS = (
    f"{SWIGLU}_backward_with_a_weight_for_every_row",
    f"{TRAIN}::test_rotation",
    f"{TRAIN}::test_keys_and_values",
)
LOGITS, HOPELESS = (
    f"{TRAIN}::test_logits_become_their_gradient",
    f"{TRAIN}::test_cross_entropy_of_hopeless_targets_and_of_nan",
)


def cpu(file: str, old: str, new: str, test: str, why: str) -> Mutation:
    return Mutation(f"kernels/cpu/{file}", old, new, [test], why)


MUTATIONS = [
    cpu(
        "panel.h", "row = Pair::row(x + m * stride + k)", "row = Pair::row(x + k)", LINEAR, "all rows are the first one"
    ),
    cpu(
        "panel.h",
        "\n    rows_left<P, M - 1>(pack, first, x, row, out);\n}",
        "\n}",
        LINEAR,
        "rows past the last full block are forgotten",
    ),
    cpu(
        "panel.h",
        "if (first < end) all_rows<1, MOST>(pack, first, x, out);",
        "",
        LINEAR,
        "an odd last panel is forgotten",
    ),
    cpu(
        "panel.h",
        "w[p] + x.width * PANEL + block * 4",
        "w[p] + x.width * PANEL",
        LINEAR,
        "FP8 has one scale for all columns",
    ),
    cpu("rows.h", "-zero_point * total", "zero_point * total", LINEAR, "what weights have too much is added again"),
    cpu("rows.h", "form == Form::int8 ? 128 : 8", "128", LINEAR, "int4's codes are taken for int8's"),
    cpu(
        "rows.h",
        "scale[group] = limit / 127.0f;",
        "scale[group] = limit / 128.0f;",
        LINEAR,
        "a row is rounded by another scale",
    ),
    cpu("rows.h", "for (; i < width; i++) out[i] = 0;", "", FEED, "what fills a row up is left over from before"),
    cpu("lay.h", "std::memset(copy + held, from.zero ^ from.flip, bytes - held);", "", LAY, "panels are not filled up"),
    cpu(
        "feed_forward.h",
        "score_[e] + (spec_.bias ? spec_.bias[e] : 0.0f)",
        "score_[e]",
        FEED,
        "the correction bias does not select",
    ),
    cpu(
        "feed_forward.h",
        "total += weights[k] = score_[experts[k]]",
        "total += weights[k] = score_[experts[k]] + (spec_.bias ? spec_.bias[experts[k]] : 0.0f)",
        FEED,
        "the correction bias weighs",
    ),
    cpu("feed_forward.h", "if (spec_.groups > 1) keep_groups();", "", FEED, "groups of experts do not matter"),
    cpu("feed_forward.h", "if (!replay) select(experts);", "select(experts);", FEED, "a replayed choice is made again"),
    cpu("feed_forward.h", "if (panel % 2 == 0) {", "if (panel % 2 == 1) {", FEED, "gate and up are exchanged"),
    cpu(
        "feed_forward.h",
        "total + choice / spec_.chosen * size",
        "total + choice % call_.rows * size",
        FEED,
        "tokens get each other's experts",
    ),
    cpu(
        "attend.h",
        "end = std::min(first + CHUNK, entries.length)",
        "end = first + CHUNK",
        ATTENTION,
        "a token sees what is behind it",
    ),
    cpu(
        "attend.h",
        "value = fma(load(mixed + c * next_mixed + v), all(share[c]), value)",
        "value = add(load(mixed + c * next_mixed + v), value)",
        ATTENTION,
        "chunks are joined without their weights",
    ),
    cpu(
        "attend.h",
        "    if (count % 2) store(score + count * PANEL, zero());\n",
        "",
        ATTENTION,
        "a slot behind an odd end has the weight that lay there",
    ),
    cpu(
        "attention.h",
        "chunk = turn_[piece / streams_]",
        "chunk = turn_[piece / streams_ / 2 * 2]",
        ATTENTION,
        "every other stretch of slots is forgotten",
    ),
    cpu(
        "span.h",
        "std::clamp(position_ + q + 1 - first, i64(0), count)",
        "count",
        ATTENTION,
        "a span's tokens see those after them",
    ),
    cpu(
        "span.h",
        "for (i64 slot = slots; slot < slots_; slot++) clear(slot);",
        "",
        ATTENTION,
        "what nobody wrote is looked at",
    ),
    cpu(
        "span.h",
        "total_[q] = total_[q] * kept + sum(total);",
        "total_[q] = total_[q] + sum(total);",
        ATTENTION,
        "an earlier chunk counts by its old largest score",
    ),
    cpu(
        "latent.h",
        "rotate(kv + spec_.rank, call_.turn + row * spec_.rope",
        "rotate(kv + spec_.rank, call_.turn",
        ATTENTION,
        "every key is turned to the first position",
    ),
    cpu(
        "grouped.h",
        "out[i] = narrow(widen(out[i]) + widen(narrow(bias[i])));",
        ";",
        ATTENTION,
        "Qwen2's biases are forgotten",
    ),
    cpu(
        "grouped.h",
        "head / group_ * each + in_group / PANEL",
        "head % spec_.kv_heads * each",
        ATTENTION,
        "heads ask another group's keys",
    ),
    cpu(
        "train_seen.h",
        "uint16_t(0xffff << before)",
        "uint16_t(0xfffe << before)",
        CAUSAL,
        "in training a token does not see itself",
    ),
    cpu(
        "train_seen.h",
        "round_up(last + 1, BAND)",
        "(last + 1) / BAND * BAND",
        PACKED,
        "in training a document's last tokens are not seen",
    ),
    cpu(
        "train_forward.h",
        "fma(load((const float*)at), all(strip.kept[q + m]), sums)",
        "add(load((const float*)at), sums)",
        f"{SEEN}::test_more_keys_than_a_chunk_and_wide_heads",
        "what earlier chunks mixed keeps the weight of an old largest score",
    ),
    cpu(
        "train_backward.h",
        "mul(weight[i], sub(load((const float*)head.tile[1] + at), delta))",
        "mul(weight[i], load((const float*)head.tile[1] + at))",
        CAUSAL,
        "the compiled softmax's gradient forgets its normaliser",
    ),
    cpu(
        "train_backward.h",
        "for (i64 s = start; s < stop; s += BAND) to_keys(",
        "for (i64 s = start; s < stop - BAND; s += BAND) to_keys(",
        CAUSAL,
        "the last eight keys of a block get no gradient",
    ),
    cpu(
        "train_backward.h",
        "if (call_.mask) clear(part, stop, head);",
        "",
        f"{SEEN}::test_any_mask_and_other_numbers_of_keys",
        "queries that see nothing of a key pass it what an earlier block left there",
    ),
    cpu(
        "train_block.h",
        "std::memset(spare + (count - first) * width, 0, (first + 32 - count) * width * 2);",
        "",
        CAUSAL,
        "queries past the last one hold what was there before",
    ),
    Mutation(
        "kernels/panels.py",
        "tail[:, : scale.shape[1]] = scale.float().repeat_interleave(128 // PANEL, dim=0)[:panels]",
        "tail[:, : scale.shape[1]] = scale.float()[:1]",
        [LINEAR],
        "FP8's first row of blocks scales all",
    ),
    Mutation(
        "kernels/native.py",
        "if level is not None and level not in possible and not named:",
        "if False:",
        [f"{NATIVE}::test_paths_are_named"],
        "a path that cannot be taken is tried",
    ),
    Mutation("model/fused.py", "1 if bias is None else 2", "2", [FEED], "V2's groups are judged by two experts"),
    Mutation(
        "model/fused.py",
        "for module in model.modules()):\n        model.requires_grad_(False)",
        "for module in model.modules()) or True:\n        model.requires_grad_(False)",
        ["test_weights_folder.py::test_a_loaded_model_is_ready"],
        "a float32 model cannot be trained",
    ),
    Mutation(
        "model/weight.py",
        "self.panels[index[0]][index[1] :: self.parts]",
        "self.panels[index[0]].unflatten(0, (self.parts, -1))[index[1]]",
        [FEED],
        "gate and up lie one below the other where kernels take them by turns",
    ),
    cpu(
        "train_rows.h",
        "if (beside) d = add(d, lanes.load(beside.row(m) + i));",
        "",
        NORM,
        "no gradient goes past the norm",
    ),
    cpu("train_rows.h", "mul(y, mean)", "mul(here, mean)", NORM, "what is taken off the gradient points along itself"),
    cpu(
        "train_rows.h",
        "float* here = part + piece * n;",
        "float* here = part;",
        NORM,
        "all pieces of rows write one sum of the weight's gradient",
    ),
    cpu(
        "train_rows.h",
        "sub(all(1.0f), s), s);",
        "sub(all(1.0f), s), zero());",
        SWIGLU,
        "the slope of silu lacks a part",
    ),
    cpu("train_rows.h", "mul(product, scale)", "product", ROWS, "active is not scaled by a token's weight"),
    cpu(
        "train_rows.h",
        "dot = fma(here, product, dot);",
        "dot = fma(here, mul(product, scale), dot);",
        ROWS,
        "a weight's gradient is scaled by the weight",
    ),
    cpu(
        "train_rows.h",
        "exponential(sub(lanes.load(logits + i, lowest)",
        "exponential(sub(lanes.load(logits + i)",
        LOGITS,
        "what is past a row's end counts as a logit of 0",
    ),
    cpu(
        "rows.h",
        "larger(all(-87.0f), smaller(all(88.0f), x))",
        "larger(smaller(x, all(88.0f)), all(-87.0f))",
        HOPELESS,
        "a NaN becomes a large number",
    ),
    cpu(
        "train_heads.h",
        "back ? turned_back(pairs, angle) : turned(pairs, angle)",
        "turned(pairs, angle)",
        TURN,
        "gradients are turned forward",
    ),
    cpu("train_heads.h", "turn + token * turning", "turn", TURN, "all tokens are turned as the first one"),
    cpu(
        "train_heads.h",
        "for (i64 h = 0; h < heads; h++) total",
        "for (i64 h = 0; h < 1; h++) total",
        HEADS,
        "the shared key learns from the first head alone",
    ),
    cpu("train_heads.h", "for (; i < n; i++) out[i] = x[i];", "", HEADS, "the end of an odd row is not copied"),
    Mutation(
        "kernels/heads.py",
        "shared.type_as(expanded), own)",
        "shared.type_as(expanded).detach(), own)",
        [HEADS],
        "the shared key has no gradient",
    ),
    cpu(
        "train_rows.h",
        "for (; e < count; e++) some<1>(x.row(m), e, out + m * count + e);",
        "",
        SCORES,
        "experts past the last eight have no score",
    ),
    cpu(
        "train_rows.h",
        "Floats by = all(grad[m * count + e]);",
        "Floats by = all(grad[first * count + e]);",
        SCORES,
        "a piece of rows learns from its first one's scores",
    ),
    cpu(
        "layers.h",
        "experts += attention.rows * next.chosen",
        "experts += next.chosen",
        f"{NATIVE}::test_all_layers_in_one_call_are_the_blocks_one_by_one",
        "a layer's choices are written over the last one's",
    ),
    cpu(
        "layers.h",
        "call.caches[i]",
        "call.caches[0]",
        f"{NATIVE}::test_all_layers_in_one_call_are_the_blocks_one_by_one",
        "all layers write into the first one's cache",
    ),
    cpu(
        "train_product.h",
        "return store(to + panel * PANEL, add(load((const float*)to + panel * PANEL), sums));",
        "return store(to + panel * PANEL, sums);",
        EXPERTS,
        "a sum over tokens is its last stretch",
    ),
    cpu(
        "train_experts.h",
        "weight_of_ + p.first, {active",
        "weight_of_, {active",
        EXPERTS,
        "every piece of rows has the first one's weights",
    ),
    cpu(
        "train_experts.h",
        "row_weight_ + p.first}",
        "row_weight_}",
        EXPERTS,
        "gradients of weights are written over those of the first piece",
    ),
    cpu(
        "train_experts.h",
        "source.assign(start.back(), -1);",
        "source.assign(start.back(), 0);",
        EXPERTS,
        "rows that fill up are token 0's",
    ),
    cpu(
        "train_experts.h",
        "to.d_up + expert * 2 * size",
        "to.d_up + expert * size",
        EXPERTS,
        "gradients of the up projections lie where others do",
    ),
]
