// Multiply a step's rows by a matrix that is read as it is kept, in bfloat16 or int8, and widened in registers.
//
// Where a processor's float32 units outrun its bfloat16 ones, this does more than a product in bfloat16.
// A sum has one order whatever else is in the batch: over the inputs, one after another, in float32. So a row's
// answer does not depend on its company, nor on how its prompt was cut. It is rounded once.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "lora/ops/native/lanes.h"

namespace {

constexpr int COLUMNS = 2 * LANES;  // outputs of a panel, whose weights lie together
constexpr int MOST_ROWS = 12;  // of a tile: 24 of 32 registers are sums
constexpr int FEW_ROWS = 3;  // where there are 16 registers, or of half the size
constexpr int64_t FEW_NUMBERS = 1 << 15;  // of rows: less is not worth a meeting of all threads
constexpr int64_t CHUNK_BYTES = 1 << 20;  // of rows, which stay in a core's cache while panels pass

// The weights of 16 outputs lie in words of 4 bytes, each of as many inputs as fit; what follows takes out one of them.
INLINE void widen(Words words, int input, const bfloat16*, Lanes& to) {
    Words bits = input ? words & 0xffff0000u : words << 16;
    memcpy(&to, &bits, sizeof to);
}

INLINE void widen(Words words, int input, const int8_t*, Lanes& to) {
    typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
    to = __builtin_convertvector((Integers)(words << (24 - 8 * input)) >> 24, Lanes);
}

struct Outputs {  // of one panel: rows of y are `width` numbers apart, of which the first `columns` are written
    bfloat16* y;
    int64_t width;
    int columns;
    const float *scale, *bias;  // of each output; null for none
};

INLINE void write(const Outputs& to, int row, int block, Lanes value) {
    const int some = std::min(LANES, to.columns - block * LANES), at = block * LANES;
    if (some <= 0) return;
    Lanes term;
    if (to.scale) load_some(to.scale + at, some, term), value *= term;
    if (to.bias) load_some(to.bias + at, some, term), value += term;
    bfloat16* y = to.y + row * to.width + at;
    some == LANES ? store(y, value) : store_some(y, some, value);
}

// ROWS rows by one panel. x: [inputs, ROWS].
template <int ROWS, typename W>
FOR_EACH_PROCESSOR void multiply_tile(const float* x, const W* panel, int64_t inputs, const Outputs& to) {
    constexpr int STEP = sizeof(uint32_t) / sizeof(W);
    Lanes sums[ROWS][2] = {};
    for (int64_t at = 0; at < inputs; at += STEP, panel += STEP * COLUMNS) {
        Words words[2];
        for (int block = 0; block < 2; block++) memcpy(&words[block], panel + STEP * LANES * block, sizeof words[0]);
        for (int input = 0; input < STEP; input++, x += ROWS) {
            Lanes weights[2];
            for (int block = 0; block < 2; block++) widen(words[block], input, panel, weights[block]);
            for (int row = 0; row < ROWS; row++)
                for (int block = 0; block < 2; block++) sums[row][block] += x[row] * weights[block];
        }
    }
    Lanes written[ROWS][2];  // apart from the sums, which stay in registers so
    for (int row = 0; row < ROWS; row++)
        for (int block = 0; block < 2; block++) written[row][block] = sums[row][block];
    for (int row = 0; row < ROWS; row++)
        for (int block = 0; block < 2; block++) write(to, row, block, written[row][block]);
}

template <typename W>
using Tile = void (*)(const float*, const W*, int64_t, const Outputs&);

template <typename W, int... ROWS>
Tile<W> tile_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static const Tile<W> tiles[] = {multiply_tile<ROWS + 1, W>...};
    return tiles[rows - 1];
}

int rows_of_a_tile() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") ? MOST_ROWS : FEW_ROWS;
#else
    return FEW_ROWS;
#endif
}

void widen_rows(const bfloat16* x, int64_t rows, int64_t inputs, float* to) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t at = 0; at < inputs; at++) {
            const uint32_t word = uint32_t(x[row * inputs + at].bits) << 16;
            memcpy(to + at * rows + row, &word, sizeof word);
        }
}

template <typename W>
void multiply(const bfloat16* x, int64_t rows, int64_t inputs, const W* weights, const Outputs& all, int threads) {
    const int most = rows_of_a_tile();
    const int64_t tiles = (rows + most - 1) / most, panels = (all.width + COLUMNS - 1) / COLUMNS;
    const int64_t chunk = std::max<int64_t>(1, CHUNK_BYTES / (inputs * int64_t(sizeof(float)) * most));
    auto start_of = [=](int64_t tile) { return rows * tile / tiles; };  // tiles of equal height, but for one row
    std::unique_ptr<float[]> room(new float[rows * inputs]);
    float* wide = room.get();
    auto multiply_panel = [&](int64_t panel, int64_t first, int64_t stop) {
        Outputs to = all;
        to.columns = int(std::min<int64_t>(COLUMNS, all.width - panel * COLUMNS));
        if (all.scale) to.scale += panel * COLUMNS;
        if (all.bias) to.bias += panel * COLUMNS;
        for (int64_t tile = first; tile < stop; tile++) {
            const int64_t start = start_of(tile), count = start_of(tile + 1) - start;
            to.y = all.y + start * all.width + panel * COLUMNS;
            tile_of<W>(count, std::make_integer_sequence<int, MOST_ROWS>())(
                wide + start * inputs, weights + panel * COLUMNS * inputs, inputs, to);
        }
    };
    auto widen_tile = [&](int64_t tile) {
        const int64_t start = start_of(tile);
        widen_rows(x + start * inputs, start_of(tile + 1) - start, inputs, wide + start * inputs);
    };
    const bool few = rows * inputs <= FEW_NUMBERS;
    for (int64_t tile = 0; few && tile < tiles; tile++) widen_tile(tile);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (!few) {
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < tiles; tile++) widen_tile(tile);
        }
        for (int64_t first = 0; first < tiles; first += chunk) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t panel = 0; panel < panels; panel++)
                multiply_panel(panel, first, std::min(tiles, first + chunk));
        }
    }
}

}  // namespace

extern "C" int loraserve_size_of(int) { return 0; }

// y[rows, outputs] = (x[rows, inputs] * weights) * scale + bias, x and y in bfloat16. The weights are of ceil(outputs /
// 32) panels of [inputs / 4, 32, 4] int8 if so told, else of [inputs / 2, 32, 2] bfloat16, with whole numbers of both.
extern "C" void loraserve_multiply(const void* x, int64_t rows, int64_t inputs, const void* weights, int64_t outputs,
                                   const float* scale, const float* bias, void* y, int is_int8, int threads) {
    const Outputs to = {static_cast<bfloat16*>(y), outputs, 0, scale, bias};
    const bfloat16* from = static_cast<const bfloat16*>(x);
    if (is_int8)
        multiply(from, rows, inputs, static_cast<const int8_t*>(weights), to, threads);
    else
        multiply(from, rows, inputs, static_cast<const bfloat16*>(weights), to, threads);
}
