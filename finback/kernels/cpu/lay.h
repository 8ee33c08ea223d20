// Matrices into panels, as kernels/panels.py specifies: a word of every one of 16 rows in turn.
#pragma once

#include <algorithm>

#include "common.h"

namespace finback {

// The words of one row fill `chunk` places at a time; then a gap follows, for scales, up to `chunk_bytes`.
struct Words {
    const uint8_t* codes;  // [rows, row_bytes]
    i64 rows, row_bytes;
    i64 count, chunk, chunk_bytes;  // words of a row, filled up
    uint8_t zero, flip;             // what fills up; what every byte is exclusive-ored with
    uint8_t* out;
    i64 stride;  // bytes from panel to panel
};

template <class Word>
inline void lay_panel(const Words& from, i64 panel, uint8_t* filled) {
    const uint8_t* row[PANEL];
    i64 bytes = from.count * i64(sizeof(Word));
    for (i64 r = 0; r < PANEL; r++) {
        i64 index = panel * PANEL + r;
        row[r] = from.codes + index * from.row_bytes;
        if (index < from.rows && from.row_bytes == bytes) continue;
        uint8_t* copy = filled + r * bytes;
        i64 held = index < from.rows ? from.row_bytes : 0;
        std::memcpy(copy, row[r], held);
        std::memset(copy + held, from.zero ^ from.flip, bytes - held);
        row[r] = copy;
    }
    Word flip;
    std::memset(&flip, from.flip, sizeof flip);
    uint8_t* out = from.out + panel * from.stride;
    for (i64 first = 0; first < from.count; first += from.chunk, out += from.chunk_bytes)
        for (i64 word = first; word < first + from.chunk; word++) {
            Word together[PANEL];
            for (i64 r = 0; r < PANEL; r++) {
                std::memcpy(&together[r], row[r] + word * sizeof(Word), sizeof(Word));
                together[r] ^= flip;
            }
            std::memcpy(out + (word - first) * sizeof together, together, sizeof together);
        }
}

template <class Word>
inline void lay(const Words& from, int threads) {
    i64 panels = (from.rows + PANEL - 1) / PANEL, bytes = from.count * i64(sizeof(Word)) * PANEL;
    uint8_t* filled = Arena::fresh().take<uint8_t>(bytes * threads);
    Team team;
#pragma omp parallel num_threads(threads)
    team.share(0, panels, [&](i64 panel) { lay_panel<Word>(from, panel, filled + omp_get_thread_num() * bytes); });
}

}  // namespace finback
