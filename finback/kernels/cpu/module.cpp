// One Python module per instruction set: the same sources, built again with other flags, so that no code of one
// set can be linked into another. Addresses are integers: nothing here knows of PyTorch.
#if defined(__AVX512BF16__)
#include "avx512.h"
#else
#include "avx2.h"
#endif

#include "panel.h"
#include "rows.h"

#include "attend.h"
#include "linear.h"

#include "feed_forward.h"
#include "span.h"

#include "grouped.h"
#include "latent.h"
#include "lay.h"
#include "layers.h"

#include "limits.h"

#include "train_bindings.h"

using namespace finback;

namespace {

void bind_feed_forward(nb::module_& m) {
    nb::class_<FeedForward> bound(m, "FeedForward");
    bound.def(nb::init<>())
        .def_rw("hidden", &FeedForward::hidden)
        .def_rw("experts", &FeedForward::experts)
        .def_rw("chosen", &FeedForward::chosen)
        .def_rw("width", &FeedForward::width)
        .def_rw("shared_width", &FeedForward::shared_width)
        .def_rw("eps", &FeedForward::eps)
        .def_rw("gate_up", &FeedForward::gate_up)
        .def_rw("down", &FeedForward::down)
        .def_rw("shared_gate_up", &FeedForward::shared_gate_up)
        .def_rw("shared_down", &FeedForward::shared_down)
        .def_rw("gate_up_bytes", &FeedForward::gate_up_bytes)
        .def_rw("down_bytes", &FeedForward::down_bytes)
        .def_rw("softmax", &FeedForward::softmax)
        .def_rw("normalise", &FeedForward::normalise)
        .def_rw("groups", &FeedForward::groups)
        .def_rw("kept_groups", &FeedForward::kept_groups)
        .def_rw("group_best", &FeedForward::group_best)
        .def_rw("factor", &FeedForward::factor)
        .def(
            "__call__",
            [](const FeedForward& self, uintptr_t x, i64 rows, uintptr_t experts, bool replay, int threads) {
                feed_forward(self, {at<bf16>(x), rows, at<int64_t>(experts), replay}, threads);
            },
            nb::call_guard<nb::gil_scoped_release>());
    address(bound, "norm", &FeedForward::norm);
    address(bound, "router", &FeedForward::router);
    address(bound, "bias", &FeedForward::bias);
}

// The fields and the call that every kind of attention has.
template <class Kind, void (*run)(const Kind&, const AttentionCall&, int)>
nb::class_<Kind> bind_attention(nb::module_& m, const char* name) {
    nb::class_<Kind> bound(m, name);
    bound.def(nb::init<>())
        .def_rw("hidden", &Kind::hidden)
        .def_rw("heads", &Kind::heads)
        .def_rw("eps", &Kind::eps)
        .def_rw("scale", &Kind::scale)
        .def_rw("output", &Kind::output)
        .def(
            "__call__",
            [](const Kind& self, uintptr_t x, i64 rows, uintptr_t turn, uintptr_t cache, uintptr_t slot, uintptr_t tables,
               uintptr_t table, uintptr_t length, uintptr_t single, i64 singles, uintptr_t spans, i64 n_spans, int threads) {
                run(self,
                    {at<bf16>(x), rows, at<float>(turn), at<bf16>(cache), at<int64_t>(slot), at<int64_t>(tables),
                     at<int64_t>(table), at<int64_t>(length), at<int64_t>(single), singles, at<int64_t>(spans), n_spans},
                    threads);
            },
            nb::call_guard<nb::gil_scoped_release>());
    address<Kind, const float>(bound, "norm", &Kind::norm);
    return bound;
}

void bind_latent(nb::module_& m) {
    auto bound = bind_attention<Latent, latent>(m, "Latent");
    bound.def_rw("nope", &Latent::nope)
        .def_rw("rope", &Latent::rope)
        .def_rw("value", &Latent::value)
        .def_rw("rank", &Latent::rank)
        .def_rw("latent_eps", &Latent::latent_eps)
        .def_rw("q_a", &Latent::q_a)
        .def_rw("q_b", &Latent::q_b)
        .def_rw("kv_a", &Latent::kv_a)
        .def_rw("key_up", &Latent::key_up)
        .def_rw("value_up", &Latent::value_up)
        .def_rw("key_rows", &Latent::key_rows)
        .def_rw("key_up_bytes", &Latent::key_up_bytes)
        .def_rw("value_up_bytes", &Latent::value_up_bytes)
        .def_rw("key_rows_bytes", &Latent::key_rows_bytes);
    address(bound, "q_norm", &Latent::q_norm);
    address(bound, "kv_norm", &Latent::kv_norm);
}

void bind_grouped(nb::module_& m) {
    auto bound = bind_attention<Grouped, grouped>(m, "Grouped");
    bound.def_rw("kv_heads", &Grouped::kv_heads)
        .def_rw("head_dim", &Grouped::head_dim)
        .def_rw("query", &Grouped::query)
        .def_rw("key", &Grouped::key)
        .def_rw("value", &Grouped::value);
    address(bound, "query_bias", &Grouped::query_bias);
    address(bound, "key_bias", &Grouped::key_bias);
    address(bound, "value_bias", &Grouped::value_bias);
}

void bind_layers(nb::module_& m) {
    nb::class_<Layers>(m, "Layers")
        .def(nb::init<>())
        .def("add", [](Layers& self, const Latent& kind, const FeedForward& next) { self.each.push_back({kind, next}); })
        .def("add", [](Layers& self, const Grouped& kind, const FeedForward& next) { self.each.push_back({kind, next}); })
        .def(
            "__call__",
            [](const Layers& self, uintptr_t x, i64 rows, uintptr_t turn, const std::vector<uintptr_t>& caches, uintptr_t slot,
               uintptr_t tables, uintptr_t table, uintptr_t length, uintptr_t single, i64 singles, uintptr_t spans, i64 n_spans,
               uintptr_t experts, int threads) {
                run_layers(self,
                           {{at<bf16>(x), rows, at<float>(turn), nullptr, at<int64_t>(slot), at<int64_t>(tables),
                             at<int64_t>(table), at<int64_t>(length), at<int64_t>(single), singles, at<int64_t>(spans), n_spans},
                            caches.data(), at<int64_t>(experts)},
                           threads);
            },
            nb::call_guard<nb::gil_scoped_release>());
}

void bind_limits(nb::module_& m) {
    nb::call_guard<nb::gil_scoped_release> released;
    m.def("empty", [](uintptr_t, i64, int) {}, released);
    m.def("meet", [](i64 barriers, int threads) { meet(barriers, threads); }, released);
    m.def(
        "read", [](uintptr_t memory, i64 floats, int threads) { return read(at<float>(memory), floats, threads); },
        released);
    m.def(
        "peak",
        [](int form, i64 steps, int threads) { return by_all(threads, [&] { return peak(Form(form), steps); }); },
        released);
    m.def(
        "float_peak", [](i64 steps, int threads) { return by_all(threads, [&] { return float_rounds(steps); }); },
        released);
}

#if FINBACK_TILES
// sums [rows, 16] += a [rows, depth] x b [depth / 4, 64], in bytes, by one product of tiles.
void bind_tiles(nb::module_& m) {
    m.def("tile_product", [](bool whole, i64 rows, i64 depth, uintptr_t a, uintptr_t b, uintptr_t sums) {
        shape_tiles(rows, 0, depth);
        tile_load<0>(at<void>(sums), 64);
        tile_load<4>(at<void>(a), depth);
        tile_load<6>(at<void>(b), 64);
        whole ? tile_dot_int8<0, 4, 6>() : tile_dot_bf16<0, 4, 6>();
        tile_store<0>(at<void>(sums), 64);
        release_tiles();
    });
}
#endif

}  // namespace

NB_MODULE(FINBACK_MODULE, m) {
#if FINBACK_TILES
    allow_tiles();
    bind_tiles(m);
#endif
    m.def("fixed_order", [](bool on) { fixed_order = on; });
    nb::class_<Pack>(m, "Pack").def("__init__", [](Pack* self, int form, i64 rows, i64 cols, uintptr_t data, i64 stride) {
        new (self) Pack{Form(form), rows, cols, at<uint8_t>(data), stride};
    });
    m.def("panel_bytes", [](int form, i64 cols) { return panel_bytes(Form(form), cols); });
    m.def(
        "lay",
        [](uintptr_t codes, i64 rows, i64 row_bytes, i64 word, i64 count, i64 chunk, i64 chunk_bytes, int zero, int flip,
           uintptr_t out, i64 stride, int threads) {
            Words from{at<uint8_t>(codes), rows, row_bytes, count, chunk, chunk_bytes, uint8_t(zero), uint8_t(flip),
                       at<uint8_t>(out), stride};
            word == 2 ? lay<uint16_t>(from, threads) : lay<uint32_t>(from, threads);
        },
        nb::call_guard<nb::gil_scoped_release>());
    m.def(
        "linear",
        [](const Pack& weight, uintptr_t x, i64 rows, uintptr_t bias, uintptr_t out, bool wide, int threads) {
            linear({weight, at<bf16>(x), rows, at<float>(bias), at<void>(out), wide}, threads);
        },
        nb::call_guard<nb::gil_scoped_release>());
    bind_feed_forward(m);
    bind_latent(m);
    bind_grouped(m);
    bind_layers(m);
    bind_limits(m);
    bind_train_attention(m);
    bind_train_experts(m);
    bind_train_rows(m);
    bind_train_heads(m);
}
