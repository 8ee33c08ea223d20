// The kernels of training as Python sees them.
#pragma once

#include "bindings.h"

#include "train_backward.h"
#include "train_experts.h"
#include "train_forward.h"
#include "train_heads.h"
#include "train_rows.h"

namespace finback {

void bind_train_attention(nb::module_& m) {
    nb::class_<Heads>(m, "Heads").def("__init__", [](Heads* self, uintptr_t data, i64 row, i64 token, i64 head) {
        new (self) Heads{at<bf16>(data), row, token, head};
    });
    nb::class_<TrainAttention> bound(m, "TrainAttention");
    bound.def("__init__", [](TrainAttention* self, i64 rows, i64 queries, i64 keys, i64 heads, i64 key, i64 value, float scale,
                             uintptr_t mask, i64 mask_row, i64 mask_query, uintptr_t log_sum, Heads query_at, Heads key_at,
                             Heads value_at, Heads out_at) {
        new (self) TrainAttention{rows, queries, keys, heads, key, value, scale, at<uint8_t>(mask), mask_row, mask_query,
                                  at<float>(log_sum), query_at, key_at, value_at, out_at};
    });
    nb::call_guard<nb::gil_scoped_release> released;
    bound.def("forward", [](const TrainAttention& self, int threads) { AttentionForward(self, threads).run(); }, released);
    bound.def(
        "backward",
        [](const TrainAttention& self, Heads grad, Heads d_query, Heads d_key, Heads d_value, int threads) {
            AttentionBackward(self, grad, d_query, d_key, d_value, threads).run();
        },
        released);
}

void bind_train_experts(nb::module_& m) {
    nb::call_guard<nb::gil_scoped_release> released;
    nb::class_<Stored>(m, "Stored")
        .def("__init__", [](Stored* self, uintptr_t data, i64 rows, i64 cols, i64 stride, bool wide) {
            new (self) Stored{at<void>(data), rows, cols, stride, wide};
        });
    nb::class_<TrainExperts> experts(m, "TrainExperts");
    experts.def("__init__", [](TrainExperts* self, i64 tokens, i64 hidden, i64 width, i64 experts, i64 chosen, uintptr_t x,
                               uintptr_t choice, uintptr_t weight, const Stored& gate, const Stored& up, const Stored& down,
                               i64 gate_next, i64 down_next) {
        new (self) TrainExperts{tokens, hidden, width, experts, chosen, at<bf16>(x), at<int64_t>(choice), at<float>(weight),
                                gate, up, down, gate_next, down_next};
    });
    experts.def(
        "forward",
        [](const TrainExperts& self, uintptr_t hidden, uintptr_t out, int threads) {
            TrainExpertsRun(self, threads).forward(at<bf16>(hidden), at<bf16>(out));
        },
        released);
    experts.def(
        "backward",
        [](const TrainExperts& self, uintptr_t hidden, uintptr_t grad, uintptr_t dx, uintptr_t d_gate, uintptr_t d_up,
           uintptr_t d_down, uintptr_t d_weight, int threads) {
            TrainExpertsGradients to{at<bf16>(grad), at<bf16>(dx), at<float>(d_gate), at<float>(d_up), at<float>(d_down),
                                     at<float>(d_weight)};
            TrainExpertsRun(self, threads).backward(at<bf16>(hidden), to);
        },
        released);
}

// run(x) with an x of the type that a tensor's numbers have.
template <class Run>
void of_type(bool wide, Run run) {
    wide ? run(float{}) : run(bf16{});
}

// Addresses of rows come with the numbers from one row to the next; without them rows lie one behind the other.
void bind_train_rows(nb::module_& m) {
    nb::call_guard<nb::gil_scoped_release> released;
    m.def(
        "norm",
        [](i64 rows, i64 n, bool x_wide, bool out_wide, uintptr_t x, i64 x_stride, uintptr_t added, i64 added_stride,
           uintptr_t sum, uintptr_t weight, float eps, uintptr_t inverse, uintptr_t out, int threads) {
            of_type(x_wide, [&]<class In>(In) {
                of_type(out_wide, [&]<class Out>(Out) {
                    Norm<In, Out>{rows, n, {at<const In>(x), x_stride}, {at<const Out>(added), added_stride}, at<In>(sum),
                                  at<float>(weight), eps, at<float>(inverse), at<Out>(out)}
                        .run(threads);
                });
            });
        },
        released);
    m.def(
        "norm_backward",
        [](i64 rows, i64 n, bool x_wide, bool out_wide, uintptr_t x, i64 x_stride, uintptr_t weight, uintptr_t inverse,
           uintptr_t grad, i64 grad_stride, uintptr_t beside, i64 beside_stride, uintptr_t dx, uintptr_t d_added,
           uintptr_t d_weight, int threads) {
            of_type(x_wide, [&]<class In>(In) {
                of_type(out_wide, [&]<class Out>(Out) {
                    NormBackward<In, Out>{rows, n, {at<const In>(x), x_stride}, at<float>(weight), at<float>(inverse),
                                          {at<const Out>(grad), grad_stride}, {at<const In>(beside), beside_stride},
                                          at<In>(dx), at<Out>(d_added), at<float>(d_weight)}
                        .run(threads);
                });
            });
        },
        released);
    m.def(
        "swiglu",
        [](i64 rows, i64 n, bool wide, uintptr_t gate, i64 gate_stride, uintptr_t up, i64 up_stride, uintptr_t active,
           int threads) {
            of_type(wide, [&]<class T>(T) {
                swiglu<T>(rows, n, {at<const T>(gate), gate_stride}, {at<const T>(up), up_stride}, at<T>(active), threads);
            });
        },
        released);
    // weight 0: no weights, and `active` and `d_weight` are not written.
    m.def(
        "swiglu_backward",
        [](i64 rows, i64 n, bool wide, uintptr_t gate, i64 gate_stride, uintptr_t up, i64 up_stride, uintptr_t grad,
           i64 grad_stride, uintptr_t d_gate, i64 d_gate_stride, uintptr_t d_up, i64 d_up_stride, uintptr_t weight,
           uintptr_t active, uintptr_t d_weight, int threads) {
            of_type(wide, [&]<class T>(T) {
                SwigluBackward<T>{rows, n, {at<const T>(gate), gate_stride}, {at<const T>(up), up_stride},
                                  {at<const T>(grad), grad_stride}, {at<T>(d_gate), d_gate_stride},
                                  {at<T>(d_up), d_up_stride}, at<float>(weight), {at<T>(active), n}, at<float>(d_weight)}
                    .run(threads);
            });
        },
        released);
    m.def(
        "scores",
        [](i64 rows, i64 n, i64 count, bool wide, uintptr_t x, i64 x_stride, uintptr_t weight, uintptr_t out, int threads) {
            of_type(wide, [&]<class T>(T) {
                Scores<T>{rows, n, count, {at<const T>(x), x_stride}, at<float>(weight)}.run(at<float>(out), threads);
            });
        },
        released);
    m.def(
        "scores_backward",
        [](i64 rows, i64 n, i64 count, bool wide, uintptr_t x, i64 x_stride, uintptr_t weight, uintptr_t grad, uintptr_t dx,
           uintptr_t d_weight, int threads) {
            of_type(wide, [&]<class T>(T) {
                Scores<T>{rows, n, count, {at<const T>(x), x_stride}, at<float>(weight)}
                    .back(at<float>(grad), at<T>(dx), at<float>(d_weight), threads);
            });
        },
        released);
    m.def(
        "loss_to_gradient",
        [](i64 rows, i64 n, bool wide, uintptr_t logits, uintptr_t targets, int threads) {
            double loss = 0;
            of_type(wide, [&]<class T>(T) {
                loss = loss_to_gradient(rows, n, at<T>(logits), at<int64_t>(targets), threads);
            });
            return loss;
        },
        released);
}

void bind_train_heads(nb::module_& m) {
    nb::call_guard<nb::gil_scoped_release> released;
    m.def(
        "turn",
        [](i64 tokens, i64 heads, i64 before, i64 turning, bool wide, uintptr_t x, i64 token, i64 head, uintptr_t turn,
           bool back, uintptr_t out, int threads) {
            of_type(wide, [&]<class T>(T) {
                Turn<T>{tokens, heads, before, turning, {at<const T>(x), token, head}, at<float>(turn), back, at<T>(out)}
                    .run(threads);
            });
        },
        released);
    m.def(
        "keys",
        [](i64 tokens, i64 heads, i64 own, i64 shared, bool wide, uintptr_t expanded, i64 token, i64 head,
           uintptr_t shared_key, i64 shared_token, uintptr_t out, int threads) {
            of_type(wide, [&]<class T>(T) {
                Keys<T>{tokens, heads, own, shared, {at<const T>(expanded), token, head},
                        {at<const T>(shared_key), shared_token, 0}, at<T>(out)}
                    .run(threads);
            });
        },
        released);
    m.def(
        "keys_backward",
        [](i64 tokens, i64 heads, i64 own, i64 shared, i64 value, bool wide, uintptr_t d_key, i64 key_token, i64 key_head,
           uintptr_t d_value, i64 value_token, i64 value_head, uintptr_t d_expanded, uintptr_t d_shared, int threads) {
            of_type(wide, [&]<class T>(T) {
                KeysBackward<T>{tokens, heads, own, shared, value, {at<const T>(d_key), key_token, key_head},
                                {at<const T>(d_value), value_token, value_head}, at<T>(d_expanded), at<T>(d_shared)}
                    .run(threads);
            });
        },
        released);
}

}  // namespace finback
