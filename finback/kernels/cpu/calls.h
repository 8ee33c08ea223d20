// What Python tells an operation: the fixed part of a layer once, the rest with every call.
#pragma once

#include "common.h"

namespace finback {

struct LinearCall {
    Pack weight;
    const bf16* x;      // [rows, weight.cols]
    i64 rows;
    const float* bias;  // [weight.rows], or null
    void* out;          // [rows, weight.rows]
    bool wide;          // out is float, else bfloat16
};

// A gated feed-forward, dense or with routed experts; adds its result to x.
struct FeedForward {
    i64 hidden, experts, chosen, width, shared_width;  // width: of one routed expert; shared_width: 0 where there is none
    const float* norm;                                 // [hidden]
    float eps;
    // Gate and up by turns, panel by panel, then down; of expert 0, the others `..._bytes` further each.
    Pack gate_up, down, shared_gate_up, shared_down;
    i64 gate_up_bytes, down_bytes;
    const float* router;  // [experts, hidden]
    const float* bias;    // [experts] or null: added for the choice alone
    bool softmax, normalise;
    i64 groups, kept_groups, group_best;  // groups are judged by the sum of their `group_best` best
    float factor;
};

struct FeedForwardCall {
    bf16* x;  // [rows, hidden]
    i64 rows;
    int64_t* experts;  // [rows, chosen] or null: where the choice is written, or read from if `replay`
    bool replay;
};

// What every kind of attention begins and ends with; adds its result to x.
struct Attention {
    i64 hidden, heads;
    const float* norm;  // [hidden]
    float eps, scale;
    Pack output;
};

// Latent attention: entries are [latent | turned key].
struct Latent : Attention {
    i64 nope, rope, value, rank;
    const float *q_norm, *kv_norm;  // q_norm: null where queries are not compressed
    float latent_eps;
    Pack q_a, q_b, kv_a;  // q_a: no rows where queries are not compressed
    // Of head 0, the others `..._bytes` further each: [rank, nope], [value, rank], and [nope, rank] of long spans.
    Pack key_up, value_up, key_rows;
    i64 key_up_bytes, value_up_bytes, key_rows_bytes;
};

// Attention whose heads share keys and values in groups: entries are [keys | values].
struct Grouped : Attention {
    i64 kv_heads, head_dim;
    Pack query, key, value;
    const float *query_bias, *key_bias, *value_bias;  // or null, all three
};

struct AttentionCall {
    bf16* x;                // [rows, hidden]
    i64 rows;
    const float* turn;      // [rows, numbers turned]: cosine and sine of every pair
    bf16* cache;            // [slots, numbers of an entry]
    const int64_t* slot;    // [rows]: where a token's own entry goes
    const int64_t* tables;  // blocks of 16 slots
    const int64_t* table;   // [rows]: where a token's table begins
    const int64_t* length;  // [rows]: how many slots it sees
    const int64_t* single;  // [singles]: the tokens that attend by themselves, in the absorbed form
    i64 singles;
    const int64_t* spans;   // [n_spans, 4]: the others, a `Span` for each stretch
    i64 n_spans;
};

}  // namespace finback
