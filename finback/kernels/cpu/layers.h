// All layers of a decoder in one call: nothing of theirs is seen by Python in between.
#pragma once

#include <variant>
#include <vector>

#include "feed_forward.h"
#include "grouped.h"
#include "latent.h"

namespace finback {

struct Layer {
    std::variant<Latent, Grouped> attention;
    FeedForward feed_forward;
};

struct Layers {
    std::vector<Layer> each;
};

// caches: each layer's entries; experts: [layers, rows, chosen] or null, where choices are written.
struct LayersCall {
    AttentionCall attention;
    const uintptr_t* caches;
    int64_t* experts;
};

inline void run_layers(const Layers& layers, const LayersCall& call, int threads) {
    AttentionCall attention = call.attention;
    int64_t* experts = call.experts;
    for (size_t i = 0; i < layers.each.size(); i++) {
        attention.cache = reinterpret_cast<bf16*>(call.caches[i]);
        if (auto* kind = std::get_if<Latent>(&layers.each[i].attention)) latent(*kind, attention, threads);
        else grouped(std::get<Grouped>(layers.each[i].attention), attention, threads);
        const FeedForward& next = layers.each[i].feed_forward;
        feed_forward(next, {attention.x, attention.rows, experts, false}, threads);
        if (experts) experts += attention.rows * next.chosen;
    }
}

}  // namespace finback
