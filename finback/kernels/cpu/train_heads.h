// Heads as training lays them out, forward and backward, each in one pass over memory: turned parts, shared keys.
#pragma once

#include "lanes.h"

namespace finback {

// Numbers [tokens, heads, ·] whose tokens and heads lie as far apart as it says.
template <class T>
struct PerHead {
    T* data;
    i64 token, head;

    T* at(i64 t, i64 h) const { return data + t * token + h * head; }
};

// A few numbers, as they are; shorter than what a call of memcpy is worth.
template <class T>
inline void take_over(T* out, const T* x, i64 n) {
    constexpr i64 step = 32 / i64(sizeof(T));
    i64 i = 0;
    for (; i + step <= n; i += step) _mm256_storeu_si256((__m256i*)(out + i), _mm256_loadu_si256((const __m256i*)(x + i)));
    for (; i < n; i++) out[i] = x[i];
}

// out [tokens, heads, before + turning]: the first `before` numbers of x, and the others turned, pair by pair, by their
// token's (cos, sin) pairs; or turned back, which is the gradient.
template <class T>
struct Turn {
    i64 tokens, heads, before, turning;
    PerHead<const T> x;
    const float* turn;  // [tokens, turning]
    bool back;
    T* out;

    void run(int threads) const {
        Pieces(tokens * heads).share(threads, [&](i64, i64 first, i64 end) {
            for (i64 index = first; index < end; index++) {
                i64 token = index / heads;
                const T* from = x.at(token, index - token * heads);
                const float* by = turn + token * turning;
                T* to = out + index * (before + turning);
                take_over(to, from, before);
                by_lanes(turning, [&](i64 i, auto lanes) {
                    Floats pairs = lanes.load(from + before + i), angle = lanes.load(by + i);
                    lanes.store(to + before + i, back ? turned_back(pairs, angle) : turned(pairs, angle));
                });
            }
        });
    }
};

// Expanded latents [own | value] and one key for all heads: key [tokens, heads, own | shared].
template <class T>
struct Keys {
    i64 tokens, heads, own, shared;
    PerHead<const T> expanded, shared_key;
    T* out;

    void run(int threads) const {
        Pieces(tokens).share(threads, [&](i64, i64 first, i64 end) {
            for (i64 t = first; t < end; t++)
                for (i64 h = 0; h < heads; h++) {
                    T* key = out + (t * heads + h) * (own + shared);
                    take_over(key, expanded.at(t, h), own);
                    take_over(key + own, shared_key.at(t, 0), shared);
                }
        });
    }
};

// From the gradients of keys and values those of both: that of the shared key is the sum over all heads.
template <class T>
struct KeysBackward {
    i64 tokens, heads, own, shared, value;
    PerHead<const T> d_key, d_value;
    T *d_expanded, *d_shared;

    void run(int threads) const {
        Pieces(tokens).share(threads, [&](i64, i64 first, i64 end) {
            for (i64 t = first; t < end; t++) {
                for (i64 h = 0; h < heads; h++) {
                    T* to = d_expanded + (t * heads + h) * (own + value);
                    take_over(to, d_key.at(t, h), own);
                    take_over(to + own, d_value.at(t, h), value);
                }
                by_lanes(shared, [&](i64 i, auto lanes) {
                    Floats total = zero();
                    for (i64 h = 0; h < heads; h++) total = add(total, lanes.load(d_key.at(t, h) + own + i));
                    lanes.store(d_shared + t * shared + i, total);
                });
            }
        });
    }
};

}  // namespace finback
