// What is done to single rows between products: norms, SiLU, softmax, rotation, rounding to 8 bits.
#pragma once

#include <cmath>

#include "common.h"

namespace finback {

inline Floats exponential(Floats x) {  // relative error below 2e-7; x at most 88; NaN stays NaN: it comes second
    x = larger(all(-87.0f), smaller(all(88.0f), x));
    Floats n = rounded(mul(x, all(1.44269504f)));
    Floats r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Floats y = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = fma(y, r, all(c));
    y = add(fma(y, mul(r, r), r), all(1.0f));
    return mul(y, power_of_two(n));
}

inline Floats silu(Floats x) { return div(x, add(all(1.0f), exponential(sub(zero(), x)))); }

// n numbers; those past a multiple of 16 one by one through the same lanes.
template <class In>
inline float sum_of_squares(const In* x, i64 n) {
    Floats total = zero();
    i64 i = 0;
    for (; i + 16 <= n; i += 16) {
        Floats v = load(x + i);
        total = fma(v, v, total);
    }
    float rest = sum(total);
    for (; i < n; i++) {
        float v;
        if constexpr (sizeof(In) == 2) v = widen(x[i]); else v = x[i];
        rest += v * v;
    }
    return rest;
}

// x / rms(x) · weight, as bfloat16, filled up with zeros to `width`.
template <class In>
inline void rms_norm(const In* x, const float* weight, float eps, i64 n, bf16* out, i64 width) {
    float inverse = 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + eps);
    i64 i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, mul(mul(load(x + i), all(inverse)), load(weight + i)));
    for (; i < n; i++) {
        float v;
        if constexpr (sizeof(In) == 2) v = widen(x[i]); else v = x[i];
        out[i] = narrow(v * inverse * weight[i]);
    }
    for (; i < width; i++) out[i] = 0;
}

// Codes, scales and offsets of a row of bfloat16, for products with integer weights of `form`.
inline void round_row(Form form, const bf16* x, i64 width, int8_t* code, float* scale, int32_t* offset) {
    i64 size = row_group(form);
    int32_t zero_point = form == Form::int8 ? 128 : 8;
    for (i64 group = 0; group * size < width; group++) {
        i64 start = group * size, end = start + size < width ? start + size : width;
        Floats most = zero();
        for (i64 i = start; i < end; i += 16) most = larger(most, absolute(load(x + i)));
        float limit = largest(most);
        float inverse = limit > 0 ? 127.0f / limit : 0.0f;
        int32_t total = 0;
        for (i64 i = start; i < end; i += 16) store(code + i, mul(load(x + i), all(inverse)));
        for (i64 i = start; i < end; i++) total += code[i];
        scale[group] = limit / 127.0f;
        offset[group] = -zero_point * total;
    }
}

// Interleaved pairs turned by (cos, sin) pairs.
template <class In, class OutNumber>
inline void rotate(const In* x, const float* turn, i64 n, OutNumber* out) {
    for (i64 i = 0; i < n; i += 2) {
        float a, b, c = turn[i], s = turn[i + 1];
        if constexpr (sizeof(In) == 2) a = widen(x[i]), b = widen(x[i + 1]); else a = x[i], b = x[i + 1];
        if constexpr (sizeof(OutNumber) == 2) out[i] = narrow(a * c - b * s), out[i + 1] = narrow(a * s + b * c);
        else out[i] = a * c - b * s, out[i + 1] = a * s + b * c;
    }
}

}  // namespace finback
