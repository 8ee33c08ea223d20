// AMX in plain C++, as Intel's Software Developer's Manual (volume 2, instructions TILELOADD, TDPBF16PS, TDPBSUD and
// their neighbours) defines it: the same faults, the same order of sums, bit for bit. For tests alone.
#pragma once

namespace finback {

struct TileState {
    TileConfig config;
    bool configured = false;
    alignas(64) uint8_t tile[8][16][64];
};
inline thread_local TileState tile_state;

inline void tile_check(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "AMX would fault: %s\n", what);
    std::abort();
}

inline int tile_rows(int tile) {
    tile_check(tile_state.configured, "tiles are not configured");
    tile_check(tile_state.config.rows[tile] > 0, "a tile without rows");
    return tile_state.config.rows[tile];
}
inline int tile_bytes(int tile) { return tile_state.config.bytes[tile]; }

inline void allow_tiles() {}

inline void tile_configure(const TileConfig& config) {
    tile_check(config.palette == 1 && config.start_row == 0, "palette or first row");
    for (uint8_t reserved : config.reserved) tile_check(reserved == 0, "a reserved byte of the configuration");
    for (int tile = 0; tile < 16; tile++) {
        int rows = config.rows[tile], bytes = config.bytes[tile];
        tile_check(tile < 8 ? rows <= 16 && bytes <= 64 : !rows && !bytes, "more rows, bytes or tiles than there are");
        tile_check(!rows == !bytes, "rows without bytes, or bytes without rows");
    }
    tile_state.config = config;
    tile_state.configured = true;
    std::memset(tile_state.tile, 0, sizeof(tile_state.tile));
}
inline void tile_release() { tile_state.configured = false; }

template <int tile>
inline void tile_zero() {
    tile_rows(tile);
    std::memset(tile_state.tile[tile], 0, sizeof(tile_state.tile[tile]));
}
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
    int rows = tile_rows(tile), bytes = tile_bytes(tile);
    std::memset(tile_state.tile[tile], 0, sizeof(tile_state.tile[tile]));
    for (int row = 0; row < rows; row++)
        std::memcpy(tile_state.tile[tile][row], static_cast<const char*>(from) + row * stride, bytes);
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
    int rows = tile_rows(tile), bytes = tile_bytes(tile);
    for (int row = 0; row < rows; row++)
        std::memcpy(static_cast<char*>(to) + row * stride, tile_state.tile[tile][row], bytes);
}

// The shapes of a product: rows of both, and the bytes of a row of `sum`.
struct TileProduct {
    int rows, steps, lanes;

    TileProduct(int sum, int a, int b) : rows(tile_rows(a)), steps(tile_rows(b)), lanes(tile_bytes(b) / 4) {
        tile_check(sum != a && a != b && sum != b, "a tile twice in one product");
        tile_check(tile_rows(sum) == rows && tile_bytes(sum) == tile_bytes(b), "shape of the sums");
        tile_check(tile_bytes(a) == 4 * steps && tile_bytes(b) % 4 == 0, "columns of the first, rows of the second");
    }
};

inline float without_denormals(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// The two numbers of every pair have sums of their own, which meet at the end. Denormal numbers are zeros throughout.
template <int sum, int a, int b>
inline void tile_dot_bf16() {
    const TileProduct shape(sum, a, b);
    auto number = [](uint32_t bits) {
        float value;
        std::memcpy(&value, &bits, 4);
        return without_denormals(value);
    };
    float first[16][16], second[16][16];
    for (int step = 0; step < shape.steps; step++)
        for (int lane = 0; lane < 16; lane++) {
            uint32_t pair;
            std::memcpy(&pair, tile_state.tile[b][step] + lane * 4, 4);
            first[step][lane] = number(pair << 16), second[step][lane] = number(pair & 0xffff0000u);
        }
    for (int row = 0; row < shape.rows; row++) {
        float even[16] = {}, odd[16] = {}, total[16];
        for (int step = 0; step < shape.steps; step++) {
            uint32_t pair;
            std::memcpy(&pair, tile_state.tile[a][row] + step * 4, 4);
            float x = number(pair << 16), y = number(pair & 0xffff0000u);
            for (int lane = 0; lane < 16; lane++) {
                even[lane] = without_denormals(std::fma(x, first[step][lane], even[lane]));
                odd[lane] = without_denormals(std::fma(y, second[step][lane], odd[lane]));
            }
        }
        std::memcpy(total, tile_state.tile[sum][row], 64);
        for (int lane = 0; lane < shape.lanes; lane++) {
            float both = without_denormals(even[lane] + odd[lane]);
            total[lane] = without_denormals(without_denormals(total[lane]) + both);
        }
        std::memcpy(tile_state.tile[sum][row], total, 64);
    }
}

template <int sum, int a, int b>
inline void tile_dot_int8() {
    const TileProduct shape(sum, a, b);
    for (int row = 0; row < shape.rows; row++) {
        uint32_t total[16];  // sums wrap around
        std::memcpy(total, tile_state.tile[sum][row], 64);
        for (int step = 0; step < shape.steps; step++) {
            int8_t x[4];
            std::memcpy(x, tile_state.tile[a][row] + step * 4, 4);
            const uint8_t* w = tile_state.tile[b][step];
            for (int lane = 0; lane < shape.lanes; lane++)
                for (int i = 0; i < 4; i++) total[lane] += uint32_t(int32_t(x[i]) * int32_t(w[lane * 4 + i]));
        }
        std::memcpy(tile_state.tile[sum][row], total, 64);
    }
}

}  // namespace finback
