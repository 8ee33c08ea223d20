// Tiles of up to 16 rows of 64 bytes, and their products: AMX, or a plain model of it that runs anywhere, for tests.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__AMX_TILE__) || defined(FINBACK_AMX_MODEL)
#define FINBACK_TILES 1
#else
#define FINBACK_TILES 0
#endif

#if FINBACK_TILES

#include <cmath>
#include <stdexcept>
#include <string>

namespace finback {

// What `tile_configure` reads: palette 1 has 8 tiles. A tile that is not used has neither rows nor bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace finback

#if defined(FINBACK_AMX_MODEL)
#include "amx_model.h"
#else

#include <cerrno>
#include <sys/syscall.h>
#include <unistd.h>

namespace finback {

// Once a process, before its first tile: Linux keeps room for tiles only for who asks (since 5.16).
inline void allow_tiles() {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request, tile_data) != 0)
        throw std::runtime_error(std::string("the system does not allow AMX tiles: ") + std::strerror(errno));
}

// Written out, since GCC's own (amxtileintrin.h) do not tell the compiler that a load reads memory.
inline void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void tile_release() { asm volatile("tilerelease"); }

template <int tile>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sum, int a, int b>
inline void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}
template <int sum, int a, int b>
inline void tile_dot_int8() {  // a with a sign, b without
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

}  // namespace finback

#endif

namespace finback {

// The shape that this thread's tiles have, 0 where they are released.
inline thread_local int64_t tile_shape = 0;

// Numbers of tiles: sums of row tile m and panel p are 2 m + p, row tiles 4 and 5, panels 6 and 7. `depth`: the bytes
// of a row that one step takes. Everything in tiles is lost where the shape changes.
inline void shape_tiles(int64_t rows, int64_t more_rows, int64_t depth) {
    int64_t shape = rows | more_rows << 8 | depth << 16;
    if (shape == tile_shape) return;
    TileConfig config;
    auto set = [&](int tile, int64_t tile_rows, int64_t bytes) {
        config.rows[tile] = uint8_t(tile_rows), config.bytes[tile] = uint16_t(tile_rows ? bytes : 0);
    };
    set(0, rows, 64), set(1, rows, 64), set(2, more_rows, 64), set(3, more_rows, 64);
    set(4, rows, depth), set(5, more_rows, depth), set(6, depth / 4, 64), set(7, depth / 4, 64);
    tile_configure(config);
    tile_shape = shape;
}

// What is not released is saved with every switch of threads, and keeps a core from sleeping deeply.
inline void release_tiles() {
    if (tile_shape) tile_release();
    tile_shape = 0;
}

}  // namespace finback

#else

namespace finback {
inline void release_tiles() {}
}  // namespace finback

#endif
