/* The loops of the host path: which logits pass, the best of each level, and greedy suppression.

   core/native.py loads this file's library and says what goes in and out. What decides a result is computed as NumPy
   computes it, operation by operation: float32 in decoding, float64 in overlaps, no fused multiply-add
   (-ffp-contract=off). Exponentials stay in NumPy, whose last bit differs from the C library's. Nothing here keeps
   state, so that threads may call at the same time. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
/* Compiled twice; the loader takes what the processor has. Wider registers round no operation differently. */
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif
#define INLINE static inline __attribute__((always_inline)) /* into both */

enum { INTERFACE = 2 }; /* raised with every change of what goes in or out; core/native.py has the same number */
enum { NO_MEMORY = -1 };
enum { BLOCK = 64 };  /* logits that are compared before a branch: almost all blocks have none that passes */
enum { LANES = 16 };  /* logits of a block in which one passes, or boxes, that are compared before a branch */
enum { DIGIT = 11 };  /* bits that a pass of the sort looks at: three passes for the 31 of a score */
enum { BUCKETS = 1 << DIGIT };
enum { P, PQ, SQRT_PQ }; /* forms of a score, in the order of ScoreForm */

int64_t host_interface(void) { return INTERFACE; }

/* ---- which pairs of location and class pass ---- */

typedef struct {
    int32_t *flat;
    int64_t count, capacity; /* flat has BLOCK more places than the capacity */
} Hits;

/* Halves compare as integers once the bits of negative ones are flipped. */
INLINE int16_t half_order(uint16_t bits) { return (int16_t)(bits & 0x8000 ? bits ^ 0x7FFF : bits); }

/* The same loops for both types. NAME_any: whether one of `size` values is above the bound, which compilers turn into
   vector instructions. NAME: append begin <= i < end with x[i] above the bound; beyond the capacity only count. */
#define DEFINE_SCAN(NAME, TYPE, BOUND, ORDER)                                                                          \
    INLINE int NAME##_any(const TYPE *x, int size, BOUND bound) {                                              \
        int32_t any = 0;                                                                                              \
        for (int i = 0; i < size; i++) any |= ORDER(x[i]) > bound;                                                    \
        return any;                                                                                                   \
    }                                                                                                                 \
    INLINE void NAME(const TYPE *x, int64_t begin, int64_t end, BOUND bound, Hits *hits) {                            \
        for (int64_t block = begin; block < end; block += BLOCK) {                                                    \
            int64_t stop = end - block < BLOCK ? end : block + BLOCK;                                                 \
            if (stop - block == BLOCK && !NAME##_any(x + block, BLOCK, bound)) continue;                              \
            for (int64_t at = block; at < stop; at += LANES) {                                                        \
                int64_t size = stop - at < LANES ? stop - at : LANES, passed = 0;                                     \
                if (size == LANES && !NAME##_any(x + at, LANES, bound)) continue;                                     \
                int writes = hits->count <= hits->capacity;                                                           \
                int32_t *next = hits->flat + (writes ? hits->count : 0);                                              \
                for (int64_t i = 0; i < size; i++) {                                                                  \
                    if (writes) next[passed] = (int32_t)(at + i);                                                     \
                    passed += ORDER(x[at + i]) > bound;                                                               \
                }                                                                                                     \
                hits->count += passed;                                                                                \
            }                                                                                                         \
        }                                                                                                             \
    }

#define SAME(value) (value)
DEFINE_SCAN(scan_floats, float, float, SAME)
DEFINE_SCAN(scan_halves, uint16_t, int16_t, half_order)

INLINE float half_value(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023, word;
    if (exponent == 0) { /* zero or subnormal: a multiple of 2^-24, exact in float32 */
        float value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    word = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE float value_at(const void *array, int half, int64_t index) {
    return half ? half_value(((const uint16_t *)array)[index]) : ((const float *)array)[index];
}

/* Flat indices (location * classes + channel), ascending, of logits above a bound; how many, and how many by level.

   bounds: one for all, or one for each location (per_location); float32, or int16 in half_order for halves.
   ends: where levels end, as locations. flat: capacity + 64 places. values: if all fit, the n logits, and the n
   centernesses of their locations; 2 * capacity places. */
WIDE int64_t host_scan(const void *logits, int half, const void *centerness, int half_centerness, int32_t classes,
                  const void *bounds, int per_location, const int64_t *ends, int64_t levels, int64_t capacity,
                  int32_t *flat, float *values, int64_t *counts) {
    Hits hits = {flat, 0, capacity};
    int64_t location = 0;
    for (int64_t level = 0; level < levels; level++) {
        int64_t before = hits.count;
        for (int64_t end; location < ends[level]; location = end) {
            int64_t at = per_location ? location : 0;
            end = per_location ? location + 1 : ends[level];
            if (half)
                scan_halves(logits, location * classes, end * classes, ((const int16_t *)bounds)[at], &hits);
            else if (((const float *)bounds)[at] < INFINITY)
                scan_floats(logits, location * classes, end * classes, ((const float *)bounds)[at], &hits);
        }
        counts[level] = hits.count - before;
    }
    int64_t count = hits.count;
    if (count <= capacity) {
        for (int64_t i = 0; i < count; i++) values[i] = value_at(logits, half, flat[i]);
        for (int64_t i = 0; i < count; i++)
            values[count + i] = value_at(centerness, half_centerness, flat[i] / classes);
    }
    return count;
}

/* Whether all of n floats, or halves, are finite: infinity and NaN have all exponent bits set. */
WIDE int64_t host_finite(const void *values, int half, int64_t count) {
    const uint32_t *words = values;
    const uint16_t *halves = values;
    uint32_t any = 0;
    if (half)
        for (int64_t i = 0; i < count; i++) any |= (halves[i] & 0x7C00) == 0x7C00;
    else
        for (int64_t i = 0; i < count; i++) any |= (words[i] & 0x7F800000u) == 0x7F800000u;
    return !any;
}

/* Floats compare as integers in the same way. */
INLINE int32_t float_order(uint32_t bits) { return (int32_t)(bits & 0x80000000u ? bits ^ 0x7FFFFFFFu : bits); }

/* The largest of a row, in its order: an integer, whose maximum compilers turn into vector instructions. NaN is beyond
   either infinity. */
#define DEFINE_LARGEST(NAME, TYPE, ORDER_TYPE, ORDER, INFINITE)                                                       \
    INLINE ORDER_TYPE NAME(const TYPE *x, int32_t size, int *nan) {                                                   \
        ORDER_TYPE most = ~(INFINITE), least = INFINITE;                                                              \
        for (int32_t i = 0; i < size; i++) {                                                                          \
            ORDER_TYPE value = ORDER(x[i]);                                                                           \
            most = value > most ? value : most;                                                                       \
            least = value < least ? value : least;                                                                    \
        }                                                                                                             \
        *nan = most > INFINITE || least < ~(INFINITE);                                                                \
        return most;                                                                                                  \
    }

DEFINE_LARGEST(largest_float, uint32_t, int32_t, float_order, 0x7F800000)
DEFINE_LARGEST(largest_half, uint16_t, int16_t, half_order, 0x7C00)

/* The largest logit of each location, NaN where one is: (locations,) float32. */
WIDE void host_largest(const void *logits, int half, int64_t locations, int32_t classes, float *largest) {
    for (int64_t row = 0; row < locations; row++) {
        int nan;
        if (half) {
            int16_t order = largest_half((const uint16_t *)logits + row * classes, classes, &nan);
            largest[row] = half_value((uint16_t)(order < 0 ? order ^ 0x7FFF : order));
        } else {
            int32_t order = largest_float((const uint32_t *)logits + row * classes, classes, &nan);
            order = order < 0 ? order ^ 0x7FFFFFFF : order;
            memcpy(largest + row, &order, 4);
        }
        if (nan) largest[row] = NAN;
    }
}

/* ---- the best of each level ---- */

/* A score >= 0 as a key: the best has the smallest. NaN comes before all numbers, as in core/decode.py. */
static uint32_t best_first_key(float score) {
    uint32_t bits;
    memcpy(&bits, &score, 4);
    return ~bits & 0x7FFFFFFFu;
}

typedef struct {
    uint32_t key, index;
} Ranked;

/* Sort by key; equal ones keep their order. spare: as many places. */
static void sort_ranked(Ranked *items, Ranked *spare, int64_t count) {
    uint32_t starts[3][BUCKETS];
    if (count < BLOCK) { /* insertion: the histograms would take longer */
        for (int64_t i = 1; i < count; i++) {
            Ranked item = items[i];
            int64_t at = i;
            for (; at > 0 && items[at - 1].key > item.key; at--) items[at] = items[at - 1];
            items[at] = item;
        }
        return;
    }
    memset(starts, 0, sizeof starts);
    for (int64_t i = 0; i < count; i++)
        for (int digit = 0; digit < 3; digit++) starts[digit][items[i].key >> digit * DIGIT & (BUCKETS - 1)]++;
    Ranked *from = items, *to = spare;
    for (int digit = 0; digit < 3; digit++) {
        uint32_t sum = 0, *start = starts[digit];
        if (start[from[0].key >> digit * DIGIT & (BUCKETS - 1)] == count) continue; /* all the same */
        for (int bucket = 0; bucket < BUCKETS; bucket++) {
            uint32_t size = start[bucket];
            start[bucket] = sum;
            sum += size;
        }
        for (int64_t i = 0; i < count; i++) to[start[from[i].key >> digit * DIGIT & (BUCKETS - 1)]++] = from[i];
        Ranked *swap = from;
        from = to;
        to = swap;
    }
    if (from != items) memcpy(items, from, (size_t)count * sizeof *items);
}

static void form_values(int form, const float *p, const float *q, float *values, int64_t count) {
    if (form == P) memcpy(values, p, (size_t)count * sizeof *values);
    if (form == PQ)
        for (int64_t i = 0; i < count; i++) values[i] = p[i] * q[i];
    if (form == SQRT_PQ)
        for (int64_t i = 0; i < count; i++) values[i] = sqrtf(p[i] * q[i]);
}

/* Drop items that cannot be among the limit best by the first digit of their keys; how many are left. */
static int64_t near_best(Ranked *items, int64_t count, int64_t limit) {
    enum { SHIFT = 31 - DIGIT };
    uint32_t sizes[BUCKETS] = {0}, last = 0;
    int64_t sum = 0, left = 0;
    for (int64_t i = 0; i < count; i++) sizes[items[i].key >> SHIFT]++;
    while ((sum += sizes[last]) < limit) last++;
    for (int64_t i = 0; i < count; i++) {
        Ranked item = items[i];
        items[left] = item;
        left += item.key >> SHIFT <= last;
    }
    return left;
}

/* Indices of the limit best of n scores >= 0, best first, the earlier one first among equals; how many, or NO_MEMORY. */
int64_t host_best(const float *scores, int64_t count, int64_t limit, int64_t *best) {
    Ranked *items = malloc(((size_t)count + 1) * 2 * sizeof *items);
    if (!items) return NO_MEMORY;
    for (int64_t i = 0; i < count; i++) items[i] = (Ranked){best_first_key(scores[i]), (uint32_t)i};
    int64_t left = limit < count ? near_best(items, count, limit) : count;
    sort_ranked(items, items + count, left);
    if (left > limit) left = limit;
    for (int64_t i = 0; i < left; i++) best[i] = items[i].index;
    free(items);
    return left;
}

/* Candidates of all levels; how many, or NO_MEMORY. What decode() in core/decode.py does after the probabilities.

   p, q: (n,) of each flat index, levels one after the other, counts[level] of each. limit: of a level; sorted: best
   first in a level, otherwise by position. centers: (2, locations) x and y. Out: up to n rows. */
int64_t host_select(const int32_t *flat, const float *p, const float *q, const int64_t *counts, int64_t levels,
                    int32_t classes, int gate, float threshold, int rank, int score, int64_t limit, int sorted,
                    const float *centers, int64_t locations, const void *distances, int half, float *boxes,
                    float *scores, int64_t *channels) {
    int64_t largest = 1, begin = 0, rows = 0;
    for (int64_t level = 0; level < levels; level++)
        if (counts[level] > largest) largest = counts[level];
    Ranked *items = malloc((size_t)largest * 2 * sizeof *items);
    float *gates = malloc((size_t)largest * 2 * sizeof *gates), *ranks = gate == rank ? gates : gates + largest;
    if (!items || !gates) {
        free(items);
        free(gates);
        return NO_MEMORY;
    }
    for (int64_t level = 0; level < levels; begin += counts[level++]) {
        int64_t passed = 0;
        form_values(gate, p + begin, q + begin, gates, counts[level]);
        if (rank != gate) form_values(rank, p + begin, q + begin, ranks, counts[level]);
        for (int64_t i = 0; i < counts[level]; i++) {
            items[passed] = (Ranked){best_first_key(ranks[i]), (uint32_t)i};
            passed += gates[i] > threshold;
        }
        int64_t kept = passed < limit ? passed : limit;
        if (kept < passed) passed = near_best(items, passed, limit);
        if (sorted || kept < passed) sort_ranked(items, items + largest, passed);
        if (!sorted && kept < passed) { /* back to the order of positions */
            for (int64_t i = 0; i < kept; i++) items[i].key = items[i].index;
            sort_ranked(items, items + largest, kept);
        }
        for (int64_t i = 0; i < kept; i++, rows++) {
            int64_t pair = begin + items[i].index;
            int32_t location = flat[pair] / classes;
            float x = centers[location], y = centers[locations + location];
            boxes[4 * rows] = x - value_at(distances, half, 4 * (int64_t)location);
            boxes[4 * rows + 1] = y - value_at(distances, half, 4 * (int64_t)location + 1);
            boxes[4 * rows + 2] = x + value_at(distances, half, 4 * (int64_t)location + 2);
            boxes[4 * rows + 3] = y + value_at(distances, half, 4 * (int64_t)location + 3);
            form_values(score, p + pair, q + pair, scores + rows, 1);
            channels[rows] = flat[pair] - location * classes;
        }
    }
    free(items);
    free(gates);
    return rows;
}

/* ---- suppression ---- */

/* Of LANES boxes: corners, share of the area (see may_overlap), label. */
typedef struct {
    float x1[LANES], y1[LANES], x2[LANES], y2[LANES], share[LANES];
    int32_t label[LANES];
} Group;

/* False only if no box of the group has the label and IoU > threshold with this one; in float32.

   inter / (a + b - inter) > t  <=>  inter > (a + b) * t / (1 + t). A share is an area times t / (1 + t), less a margin
   of 1e-5 for rounding and 1e-37 for underflow; -inf for areas that might overflow, which are always compared. */
INLINE int may_overlap(const Group *group, const float box[4], float share, int32_t label, float offset) {
    int any = 0;
    for (int i = 0; i < LANES; i++) {
        float right = box[2] < group->x2[i] ? box[2] : group->x2[i], left = box[0] > group->x1[i] ? box[0] : group->x1[i];
        float low = box[3] < group->y2[i] ? box[3] : group->y2[i], high = box[1] > group->y1[i] ? box[1] : group->y1[i];
        float width = right - left + offset, height = low - high + offset;
        float inter = (width > 0 ? width : 0) * height;
        any |= (inter >= share + group->share[i]) & (label == group->label[i]);
    }
    return any;
}

/* As NumPy's minimum and maximum: NaN if either is. */
static double lesser(double a, double b) { return a <= b || a != a ? a : b; }
static double greater(double a, double b) { return a >= b || a != a ? a : b; }

/* box_iou() of core/detections.py. */
static double box_iou(const float a[4], const float b[4], double offset) {
    double width = greater(lesser(a[2], b[2]) - greater(a[0], b[0]) + offset, 0.0);
    double height = greater(lesser(a[3], b[3]) - greater(a[1], b[1]) + offset, 0.0);
    double inter = width * height;
    double area_a = ((double)a[2] - a[0] + offset) * ((double)a[3] - a[1] + offset);
    double area_b = ((double)b[2] - b[0] + offset) * ((double)b[3] - b[1] + offset);
    return inter / greater(area_a + area_b - inter, 1e-300);
}

/* Indices of the boxes that stay, best score first; how many, or NO_MEMORY. What suppress() in core/detections.py says.

   boxes: (n, 4) xyxy. kept: n places. keep_ties: those that tie with the last one allowed stay. */
WIDE int64_t host_suppress(const float *boxes, const float *scores, const int64_t *labels, int64_t count,
                      double iou_threshold, double iou_offset, int64_t limit, int keep_ties, int64_t *kept) {
    int64_t places = keep_ties || limit > count ? count : limit, stay = 0;
    size_t groups = (size_t)places / LANES + 1;
    Ranked *order = malloc(((size_t)count + 1) * 2 * sizeof *order);
    Group *group = malloc(groups * sizeof *group);
    if (!order || !group) {
        free(order);
        free(group);
        return NO_MEMORY;
    }
    for (int64_t i = 0; i < count; i++) order[i] = (Ranked){best_first_key(scores[i]), (uint32_t)i};
    sort_ranked(order, order + count, count);
    float part = (float)(iou_threshold / (1 + iou_threshold) * (1 - 1e-5)), offset = (float)iou_offset;
    for (int64_t i = 0; i < count; i++) {
        int64_t index = order[i].index;
        if (stay >= limit && (!keep_ties || scores[index] < scores[kept[limit - 1]])) break;
        const float *box = boxes + 4 * index;
        int32_t label = (int32_t)labels[index];
        float share = (box[2] - box[0] + offset) * (box[3] - box[1] + offset) * part - 1e-37f;
        if (share > 1e36f) share = -INFINITY;
        int stays = 1;
        for (int64_t first = 0; first < stay && stays; first += LANES) {
            if (!may_overlap(group + first / LANES, box, share, label, offset)) continue;
            for (int64_t other = first; other < stay && other < first + LANES && stays; other++)
                stays = (int32_t)labels[kept[other]] != label
                        || !(box_iou(boxes + 4 * kept[other], box, iou_offset) > iou_threshold);
        }
        if (!stays) continue;
        Group *last = group + stay / LANES;
        int lane = (int)(stay % LANES);
        if (lane == 0) /* no box is there yet: what is compared with it has to be defined */
            memset(last, 0, sizeof *last);
        last->x1[lane] = box[0], last->y1[lane] = box[1], last->x2[lane] = box[2], last->y2[lane] = box[3];
        last->share[lane] = share, last->label[lane] = label;
        kept[stay++] = index;
    }
    free(order);
    free(group);
    return stay;
}
