// Add low-rank updates to a step's projections, each segment at its own rank (Hu et al., LoRA, arXiv 2106.09685).
//
// A sum has one order whatever else is in the batch: 16 lanes run over the columns of A in pairs, are added as a tree,
// and the ranks follow one another. So a row's answer does not depend on its company, nor on how its prompt was cut.
// All sums are in float32 and are rounded once, with y.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "lora/ops/native/lanes.h"

namespace {

// h[row, rank] = scale[rank] * dot(x[row], A[rank]) for ROWS rows and RANKS ranks.
template <int ROWS, int RANKS, typename X, typename W>
INLINE void shrink_tile(const X* x, int64_t width, const W* A, const float* scale, float* h, int64_t h_width) {
    Lanes sums[ROWS][RANKS] = {};
    auto take = [&](int64_t at, auto fetch) {
        Pair rows[ROWS];
        for (int row = 0; row < ROWS; row++) fetch(x + row * width + at, rows[row]);
        for (int rank = 0; rank < RANKS; rank++) {
            Pair weights;
            fetch(A + rank * width + at, weights);
            for (int row = 0; row < ROWS; row++) sums[row][rank] += rows[row].even * weights.even;
            for (int row = 0; row < ROWS; row++) sums[row][rank] += rows[row].odd * weights.odd;
        }
    };
    int64_t at = 0;
    for (; at + PAIR <= width; at += PAIR) take(at, [](const auto* from, Pair& to) { load(from, to); });
    const int rest = int(width - at);
    if (rest) take(at, [rest](const auto* from, Pair& to) { load_some(from, rest, to); });
    for (int row = 0; row < ROWS; row++)
        for (int rank = 0; rank < RANKS; rank++) h[row * h_width + rank] = scale[rank] * sum(sums[row][rank]);
}

template <int ROWS, typename X, typename W>
INLINE void shrink_rows(const X* x, int64_t width, const W* A, const float* scale, int ranks, float* h,
                        int64_t h_width) {
    constexpr int RANKS = ROWS == 1 ? 8 : 4;
    int rank = 0;
    for (; rank + RANKS <= ranks; rank += RANKS)
        shrink_tile<ROWS, RANKS>(x, width, A + rank * width, scale + rank, h + rank, h_width);
    for (; rank < ranks; rank++)
        shrink_tile<ROWS, 1>(x, width, A + rank * width, scale + rank, h + rank, h_width);
}

template <typename X, typename W>
FOR_EACH_PROCESSOR void shrink(const X* x, int rows, int64_t width, const W* A, const float* scale, int ranks,
                               float* h, int64_t h_width) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        shrink_rows<4>(x + row * width, width, A, scale, ranks, h + row * h_width, h_width);
    for (; row < rows; row++)
        shrink_rows<1>(x + row * width, width, A, scale, ranks, h + row * h_width, h_width);
}

INLINE void add_product(Pair& sum, float factor, const Pair& value) {
    sum.even += factor * value.even;
    sum.odd += factor * value.odd;
}

// y[row, column] += sum of h[row, rank] * Bt[rank, column] for ROWS rows and BLOCKS * 32 columns.
template <int ROWS, int BLOCKS, typename X, typename W>
INLINE void expand_tile(X* y, int64_t y_width, const W* Bt, int64_t b_width, const float* h, int64_t h_width,
                        int ranks) {
    Pair sums[ROWS][BLOCKS] = {};
    for (int rank = 0; rank < ranks; rank++) {
        Pair weights[BLOCKS];
        for (int block = 0; block < BLOCKS; block++) load(Bt + rank * b_width + block * PAIR, weights[block]);
        for (int row = 0; row < ROWS; row++)
            for (int block = 0; block < BLOCKS; block++)
                add_product(sums[row][block], h[row * h_width + rank], weights[block]);
    }
    for (int row = 0; row < ROWS; row++)
        for (int block = 0; block < BLOCKS; block++) {
            Pair before;
            load(y + row * y_width + block * PAIR, before);
            add_product(before, 1.0f, sums[row][block]);
            store(y + row * y_width + block * PAIR, before);
        }
}

template <int ROWS, typename X, typename W>
INLINE void expand_rows(X* y, int64_t y_width, int columns, const W* Bt, int64_t b_width, const float* h,
                        int64_t h_width, int ranks) {
    constexpr int BLOCKS = ROWS == 1 ? 4 : 2;
    int column = 0;
    for (; column + BLOCKS * PAIR <= columns; column += BLOCKS * PAIR)
        expand_tile<ROWS, BLOCKS>(y + column, y_width, Bt + column, b_width, h, h_width, ranks);
    for (; column + PAIR <= columns; column += PAIR)
        expand_tile<ROWS, 1>(y + column, y_width, Bt + column, b_width, h, h_width, ranks);
    int rest = columns - column;
    if (rest == 0) return;
    for (int row = 0; row < ROWS; row++) {
        Pair sums = {}, weights, before;
        for (int rank = 0; rank < ranks; rank++) {
            load_some(Bt + rank * b_width + column, rest, weights);
            add_product(sums, h[row * h_width + rank], weights);
        }
        load_some(y + row * y_width + column, rest, before);
        add_product(before, 1.0f, sums);
        store_some(y + row * y_width + column, rest, before);
    }
}

template <typename X, typename W>
FOR_EACH_PROCESSOR void expand(X* y, int rows, int64_t y_width, int columns, const W* Bt, int64_t b_width,
                               const float* h, int64_t h_width, int ranks) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        expand_rows<4>(y + row * y_width, y_width, columns, Bt, b_width, h + row * h_width, h_width, ranks);
    for (; row < rows; row++)
        expand_rows<1>(y + row * y_width, y_width, columns, Bt, b_width, h + row * h_width, h_width, ranks);
}

}  // namespace

// What follows is laid out as lora/ops/native/library.py says.
struct Part {  // one projection of a fused group
    const void* Bt;  // [rank_stop - rank_start, out_stop - out_start]
    int32_t rank_start, rank_stop, out_start, out_stop;
};

struct Site {  // an adapter's weights at one layer and group; no A where it has none
    const void* A;  // [ranks, width]
    const float* scale;  // [ranks]
    int64_t width;
    int32_t ranks, num_parts;
    Part parts[3];
};

struct Segment {  // the rows start:stop, and all sites of their adapter
    int64_t start, stop;
    const Site* sites;
    int64_t num_sites;
};

namespace {

struct Item {  // a share of the work: rows of a segment by ranks of A, or by columns of one part
    const Site* site;
    const Part* part;
    int64_t start, h_at;
    int rows, first, count;
};

constexpr int ROWS_AN_ITEM = 64, RANKS_AN_ITEM = 16, COLUMNS_AN_ITEM = 512;
constexpr int64_t FEW_BYTES = 1 << 16;  // of weights: less is not worth waking another thread

// h[row, rank] = scale[rank] * A[rank, tokens[row]]
template <typename W>
void shrink(const int64_t* tokens, int rows, int64_t width, const W* A, const float* scale, int ranks, float* h,
            int64_t h_width) {
    for (int row = 0; row < rows; row++)
        for (int rank = 0; rank < ranks; rank++) {
            Lanes number;
            load_some(A + rank * width + tokens[row], 1, number);
            h[row * h_width + rank] = scale[rank] * number[0];
        }
}

// A row of x has x_width numbers, or one token's id.
template <typename X, typename W, typename In>
void add_lora(X* y, int64_t y_width, const In* x, int64_t x_width, const Segment* segments, int64_t count,
              int64_t number, int threads) {
    std::vector<Item> shrinks, expands;
    int64_t h_size = 0, weights = 0;
    for (int64_t at = 0; at < count; at++) {
        if (number >= segments[at].num_sites) continue;
        const Site& site = segments[at].sites[number];
        if (!site.A) continue;
        weights += site.ranks * x_width;
        for (int64_t start = segments[at].start; start < segments[at].stop; start += ROWS_AN_ITEM) {
            int rows = int(std::min<int64_t>(segments[at].stop - start, ROWS_AN_ITEM));
            for (int first = 0; first < site.ranks; first += RANKS_AN_ITEM) {
                int some = std::min(site.ranks - first, RANKS_AN_ITEM);
                shrinks.push_back({&site, nullptr, start, h_size, rows, first, some});
            }
            for (int one = 0; one < site.num_parts; one++) {
                const Part& part = site.parts[one];
                int columns = part.out_stop - part.out_start;
                for (int first = 0; first < columns; first += COLUMNS_AN_ITEM) {
                    int some = std::min(columns - first, COLUMNS_AN_ITEM);
                    expands.push_back({&site, &part, start, h_size, rows, first, some});
                }
            }
            h_size += int64_t(rows) * site.ranks;
        }
    }
    if (shrinks.empty()) return;
    std::unique_ptr<float[]> room(new float[h_size]);
    float* h = room.get();
    const int num_shrinks = int(shrinks.size()), num_expands = int(expands.size());
    if (weights * int64_t(sizeof(W)) < FEW_BYTES) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int at = 0; at < num_shrinks; at++) {
            const Item& item = shrinks[at];
            const int64_t width = item.site->width;
            const W* A = static_cast<const W*>(item.site->A) + item.first * width;
            shrink(x + item.start * x_width, item.rows, width, A, item.site->scale + item.first, item.count,
                   h + item.h_at + item.first, item.site->ranks);
        }
#pragma omp for schedule(dynamic, 1)
        for (int at = 0; at < num_expands; at++) {
            const Item& item = expands[at];
            const Part& part = *item.part;
            const W* Bt = static_cast<const W*>(part.Bt) + item.first;
            expand(y + item.start * y_width + part.out_start + item.first, item.rows, y_width, item.count, Bt,
                   int64_t(part.out_stop) - part.out_start, h + item.h_at + part.rank_start, item.site->ranks,
                   part.rank_stop - part.rank_start);
        }
    }
}

}  // namespace

extern "C" int loraserve_size_of(int kind) {
    return int(kind == 0 ? sizeof(Segment) : kind == 1 ? sizeof(Site) : sizeof(Part));
}

// x: [rows, x_width], y: [rows, y_width], both of one dtype, and all weights of one, bfloat16 where narrow, else float32.
// Or x: [rows, 1], ids of tokens. `site` numbers the layer's group of projections among an adapter's sites.
extern "C" void loraserve_add_lora(void* y, int64_t y_width, const void* x, int64_t x_width, const Segment* segments,
                                   int64_t count, int64_t site, int x_is_tokens, int rows_are_narrow,
                                   int weights_are_narrow, int threads) {
    auto add = [&](auto row, auto weight) {
        using X = decltype(row);
        using W = decltype(weight);
        auto of = [&](auto* rows) {
            add_lora<X, W>(static_cast<X*>(y), y_width, rows, x_width, segments, count, site, threads);
        };
        x_is_tokens ? of(static_cast<const int64_t*>(x)) : of(static_cast<const X*>(x));
    };
    if (rows_are_narrow)
        weights_are_narrow ? add(bfloat16(), bfloat16()) : add(bfloat16(), float());
    else
        weights_are_narrow ? add(float(), bfloat16()) : add(float(), float());
}
