/* The loops of the host path: which logits pass, the best of each level, and greedy suppression.

   core/native.py loads this file's library and says what goes in and out. What decides a result is computed as NumPy
   computes it, operation by operation: float32 in decoding, float64 in overlaps, no fused multiply-add
   (-ffp-contract=off). Exponentials are those of NumPy's own loop, whose address is passed in: the C library's differ in
   the last bit. Nothing here keeps state, so that threads may call at the same time. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
/* Compiled twice; the loader takes what the processor has. Wider registers round no operation differently. */
#define WIDE __attribute__((target_clones("avx2", "default")))
#define VECTORS __attribute__((target("avx2")))
#include <immintrin.h>
#else
#define WIDE
#endif
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "collect() looks at bytes");
#define INLINE static inline __attribute__((always_inline)) /* into both */

enum { INTERFACE = 4 }; /* raised with every change of what goes in or out; core/native.py has the same number */
enum { NO_MEMORY = -1, NOT_FINITE = -2, TOO_MANY = -3 };
enum { CHUNK = 4096 }; /* logits that are looked through twice while they are in the cache */
enum { BLOCK = 64 };  /* logits that are compared before a branch: almost all blocks have none that passes */
enum { LANES = 16 };  /* logits of a block in which one passes, or boxes, that are compared before a branch */
enum { DIGIT = 11 };  /* bits that a pass of the sort looks at, at most: three passes for the 31 of a score */
enum { BUCKETS = 1 << DIGIT };
#define NONE (-1.0f) /* in place of a score */
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

/* Whether all of n floats, or halves, are finite: infinity and NaN have all exponent bits set. */
INLINE int all_finite(const void *values, int half, int64_t begin, int64_t end) {
    const uint32_t *words = values;
    const uint16_t *halves = values;
    uint32_t any = 0;
    if (half)
        for (int64_t i = begin; i < end; i++) any |= (halves[i] & 0x7C00) == 0x7C00;
    else
        for (int64_t i = begin; i < end; i++) any |= (words[i] & 0x7F800000u) == 0x7F800000u;
    return !any;
}

WIDE int64_t host_finite(const void *values, int half, int64_t count) { return all_finite(values, half, 0, count); }

/* Whether a bound is infinity. */
INLINE int nothing_above(const void *bounds, int half, int64_t at) {
    return half ? ((const int16_t *)bounds)[at] == 0x7C00 : ((const float *)bounds)[at] == INFINITY;
}

/* The location of a pair. (flat + 0.5) / classes is farther than 2^-33 of itself from every integer, and the product
   differs from it by less than 2^-51 of it. */
INLINE int32_t location_of(int32_t flat, double per_class) { return (int32_t)((flat + 0.5) * per_class); }

/* Flat indices (location * classes + channel), ascending, of logits above a bound; how many, and how many by level.

   bounds: one for all, or one for each location (per_location); float32, or int16 in half_order for halves.
   ends: where levels end, as locations. flat: capacity + 64 places. values: if all fit, the n logits, and the n
   centernesses of their locations; 2 * capacity places. finite: set to 0 if a logit is not; NULL: do not look. */
INLINE int64_t scan(const void *logits, int half, const void *centerness, int half_centerness, int32_t classes,
                    const void *bounds, int per_location, const int64_t *ends, int64_t levels, int64_t capacity,
                    int32_t *flat, float *values, int64_t *counts, int32_t *finite) {
    Hits hits = {flat, 0, capacity};
    int64_t location = 0, step = per_location ? 1 : CHUNK / classes + 1;
    for (int64_t level = 0; level < levels; level++) {
        int64_t before = hits.count;
        for (int64_t end; location < ends[level]; location = end) {
            int64_t at = per_location ? location : 0;
            if (per_location && nothing_above(bounds, half, at)) {
                end = location + 1;
                continue;
            }
            end = ends[level] - location < step ? ends[level] : location + step;
            if (finite) *finite &= all_finite(logits, half, location * classes, end * classes);
            if (half)
                scan_halves(logits, location * classes, end * classes, ((const int16_t *)bounds)[at], &hits);
            else
                scan_floats(logits, location * classes, end * classes, ((const float *)bounds)[at], &hits);
        }
        counts[level] = hits.count - before;
    }
    int64_t count = hits.count;
    double per_class = 1.0 / classes;
    if (count <= capacity) {
        for (int64_t i = 0; i < count; i++) values[i] = value_at(logits, half, flat[i]);
        for (int64_t i = 0; i < count; i++)
            values[count + i] = value_at(centerness, half_centerness, location_of(flat[i], per_class));
    }
    return count;
}

WIDE int64_t host_scan(const void *logits, int half, const void *centerness, int half_centerness, int32_t classes,
                       const void *bounds, int per_location, const int64_t *ends, int64_t levels, int64_t capacity,
                       int32_t *flat, float *values, int64_t *counts, int32_t *finite) {
    return scan(logits, half, centerness, half_centerness, classes, bounds, per_location, ends, levels, capacity, flat,
                values, counts, finite);
}

/* Floats compare as integers in the same way. */
INLINE int32_t float_order(uint32_t bits) { return (int32_t)(bits & 0x80000000u ? bits ^ 0x7FFFFFFFu : bits); }

/* The largest of a row, in its order: an integer, whose maximum compilers turn into vector instructions. NaN is beyond
   either infinity. */
#define DEFINE_LARGEST(NAME, TYPE, ORDER_TYPE, ORDER, INFINITE)                                                       \
    INLINE ORDER_TYPE NAME(const TYPE *x, int32_t size, int *nan, int *finite) {                                      \
        ORDER_TYPE most = ~(INFINITE), least = INFINITE;                                                              \
        for (int32_t i = 0; i < size; i++) {                                                                          \
            ORDER_TYPE value = ORDER(x[i]);                                                                           \
            most = value > most ? value : most;                                                                       \
            least = value < least ? value : least;                                                                    \
        }                                                                                                             \
        *nan = most > INFINITE || least < ~(INFINITE);                                                                \
        *finite &= most < INFINITE && least > ~(INFINITE);                                                            \
        return most;                                                                                                  \
    }

DEFINE_LARGEST(largest_float, uint32_t, int32_t, float_order, 0x7F800000)
DEFINE_LARGEST(largest_half, uint16_t, int16_t, half_order, 0x7C00)

/* The largest logit of each location, NaN where one is: (locations,) float32. Whether all logits are finite. */
WIDE int64_t host_largest(const void *logits, int half, int64_t locations, int32_t classes, float *largest) {
    int finite = 1;
    for (int64_t row = 0; row < locations; row++) {
        int nan;
        if (half) {
            int16_t order = largest_half((const uint16_t *)logits + row * classes, classes, &nan, &finite);
            largest[row] = half_value((uint16_t)(order < 0 ? order ^ 0x7FFF : order));
        } else {
            int32_t order = largest_float((const uint32_t *)logits + row * classes, classes, &nan, &finite);
            order = order < 0 ? order ^ 0x7FFFFFFF : order;
            memcpy(largest + row, &order, 4);
        }
        if (nan) largest[row] = NAN;
    }
    return finite;
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
    uint32_t starts[3][BUCKETS], least = UINT32_MAX, most = 0, bits = 1;
    if (count < BLOCK) { /* insertion: the histograms would take longer */
        for (int64_t i = 1; i < count; i++) {
            Ranked item = items[i];
            int64_t at = i;
            for (; at > 0 && items[at - 1].key > item.key; at--) items[at] = items[at - 1];
            items[at] = item;
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        least = items[i].key < least ? items[i].key : least;
        most = items[i].key > most ? items[i].key : most;
    }
    while ((uint64_t)(most - least) >> 3 * bits) bits++; /* of a digit; at most DIGIT */
    uint32_t buckets = 1u << bits;
    for (int digit = 0; digit < 3; digit++) memset(starts[digit], 0, buckets * sizeof starts[0][0]);
    for (int64_t i = 0; i < count; i++)
        for (uint32_t digit = 0; digit < 3; digit++)
            starts[digit][(items[i].key - least) >> digit * bits & (buckets - 1)]++;
    Ranked *from = items, *to = spare;
    for (uint32_t digit = 0; digit < 3; digit++) {
        uint32_t sum = 0, *start = starts[digit];
        if (start[(from[0].key - least) >> digit * bits & (buckets - 1)] == count) continue; /* all the same */
        for (uint32_t bucket = 0; bucket < buckets; bucket++) {
            uint32_t size = start[bucket];
            start[bucket] = sum;
            sum += size;
        }
        for (int64_t i = 0; i < count; i++) to[start[(from[i].key - least) >> digit * bits & (buckets - 1)]++] = from[i];
        Ranked *swap = from;
        from = to;
        to = swap;
    }
    if (from != items) memcpy(items, from, (size_t)count * sizeof *items);
}

static void form_values(int form, const float *p, const float *q, float *values, int64_t count) {
    if (form == P) memmove(values, p, (size_t)count * sizeof *values); /* may be the same */
    if (form == PQ)
        for (int64_t i = 0; i < count; i++) values[i] = p[i] * q[i];
    if (form == SQRT_PQ)
        for (int64_t i = 0; i < count; i++) values[i] = sqrtf(p[i] * q[i]);
}

/* Keep the limit best, and of equal ones the first, in their order; how many there are. */
static int64_t keep_best(Ranked *items, int64_t count, int64_t limit) {
    if (count <= limit) return count;
    uint32_t key = 0, known = 0; /* the bits that are known of the key of the last one that stays */
    int64_t equal = limit, left = 0; /* how many stay of those whose key begins with these bits */
    for (int digit = 2; digit >= 0; digit--) {
        uint32_t sizes[BUCKETS] = {0}, bucket = 0;
        for (int64_t i = 0; i < count; i++)
            sizes[items[i].key >> digit * DIGIT & (BUCKETS - 1)] += (items[i].key & known) == key;
        while (sizes[bucket] < equal) equal -= sizes[bucket++];
        key |= bucket << digit * DIGIT;
        known |= (uint32_t)(BUCKETS - 1) << digit * DIGIT;
    }
    for (int64_t i = 0; i < count; i++) {
        Ranked item = items[i];
        int tie = (item.key == key) & (equal > 0);
        equal -= tie;
        items[left] = item;
        left += (item.key < key) | tie;
    }
    return left;
}

/* Indices of the limit best of n scores >= 0, best first, the earlier one first among equals; how many, or NO_MEMORY. */
int64_t host_best(const float *scores, int64_t count, int64_t limit, int64_t *best) {
    Ranked *items = malloc(((size_t)count + 1) * 2 * sizeof *items);
    if (!items) return NO_MEMORY;
    for (int64_t i = 0; i < count; i++) items[i] = (Ranked){best_first_key(scores[i]), (uint32_t)i};
    int64_t left = keep_best(items, count, limit);
    sort_ranked(items, items + count, left);
    for (int64_t i = 0; i < left; i++) best[i] = items[i].index;
    free(items);
    return left;
}

/* Bounds of logits for the locations that are chosen, of each level the limit best by rank: the gate's, or infinity where
   the largest logit is not above it, and for all others. 0, or NO_MEMORY. ranks, largest, bounds: (locations,). */
int64_t host_bounds(const float *ranks, const float *largest, const int64_t *ends, int64_t levels, int64_t limit,
                    float gate, float *bounds) {
    int64_t begin = 0, locations = levels ? ends[levels - 1] : 0;
    Ranked *items = malloc(((size_t)locations + 1) * sizeof *items);
    if (!items) return NO_MEMORY;
    for (int64_t level = 0; level < levels; begin = ends[level++]) {
        int64_t size = ends[level] - begin;
        for (int64_t i = 0; i < size; i++) {
            bounds[begin + i] = INFINITY;
            items[i] = (Ranked){best_first_key(ranks[begin + i]), (uint32_t)i};
        }
        size = keep_best(items, size, limit);
        for (int64_t i = 0; i < size; i++) {
            int64_t location = begin + items[i].index;
            if (!(largest[location] <= gate)) bounds[location] = gate; /* NaN may stand beside others that pass */
        }
    }
    free(items);
    return 0;
}

/* Pairs that passed the scan: p and q (n,) of each flat index, levels one after the other, counts[level] of each.
   host_detect() may write scores in the place of p. */
typedef struct {
    const int32_t *flat;
    float *p;
    const float *q;
    const int64_t *counts;
    const void *distances; /* (locations, 4) float32, or halves */
    int64_t levels;
    int32_t classes, half;
} Pairs;

/* Which of them are candidates. centers: (2, locations) x and y. limit: of a level; sorted: best first in a level,
   otherwise by position. */
typedef struct {
    const float *centers;
    int64_t locations, limit;
    float threshold;
    int32_t gate, rank, score, sorted;
} Selection;

/* (n, 4) xyxy, (n,), (n,) channels or labels; the arrays are the caller's. room: for how many detections there is. */
typedef struct {
    float *boxes, *scores;
    int64_t *labels, room;
} Rows;

static int64_t most_rows(const Pairs *pairs, int64_t limit) {
    int64_t rows = 0;
    for (int64_t level = 0; level < pairs->levels; level++)
        rows += pairs->counts[level] < limit ? pairs->counts[level] : limit;
    return rows;
}

/* Candidates of all levels, up to most_rows(), as indices of pairs; how many, or NO_MEMORY. */
static int64_t choose(const Pairs *pairs, const Selection *rule, int32_t *chosen) {
    int64_t largest = 1, begin = 0, rows = 0;
    const int64_t *counts = pairs->counts;
    for (int64_t level = 0; level < pairs->levels; level++)
        if (counts[level] > largest) largest = counts[level];
    Ranked *items = malloc((size_t)largest * 2 * sizeof *items);
    float *gates = malloc((size_t)largest * 2 * sizeof *gates);
    if (!items || !gates) {
        free(items);
        free(gates);
        return NO_MEMORY;
    }
    float *ranks = rule->gate == rule->rank ? gates : gates + largest;
    for (int64_t level = 0; level < pairs->levels; begin += counts[level++]) {
        const float *p = pairs->p + begin, *q = pairs->q + begin;
        int64_t passed = 0;
        form_values(rule->gate, p, q, gates, counts[level]);
        if (ranks != gates) form_values(rule->rank, p, q, ranks, counts[level]);
        for (int64_t i = 0; i < counts[level]; i++) {
            items[passed] = (Ranked){best_first_key(ranks[i]), (uint32_t)i};
            passed += gates[i] > rule->threshold;
        }
        passed = keep_best(items, passed, rule->limit);
        if (rule->sorted) sort_ranked(items, items + largest, passed);
        for (int64_t i = 0; i < passed; i++) chosen[rows++] = (int32_t)(begin + items[i].index);
    }
    free(items);
    free(gates);
    return rows;
}

INLINE void box_of(const Pairs *pairs, const Selection *rule, int32_t location, float box[4]) {
    float x = rule->centers[location], y = rule->centers[rule->locations + location];
    int64_t at = 4 * (int64_t)location;
    box[0] = x - value_at(pairs->distances, pairs->half, at);
    box[1] = y - value_at(pairs->distances, pairs->half, at + 1);
    box[2] = x + value_at(pairs->distances, pairs->half, at + 2);
    box[3] = y + value_at(pairs->distances, pairs->half, at + 3);
}

/* What decode() in core/decode.py does after the probabilities; how many candidates, or NO_MEMORY. */
int64_t host_select(const Pairs *pairs, const Selection *rule, const Rows *out) {
    int32_t *chosen = malloc(((size_t)most_rows(pairs, rule->limit) + 1) * sizeof *chosen);
    int64_t rows = chosen ? choose(pairs, rule, chosen) : NO_MEMORY;
    double per_class = 1.0 / pairs->classes;
    for (int64_t row = 0; row < rows; row++) {
        int32_t pair = chosen[row], flat = pairs->flat[pair], location = location_of(flat, per_class);
        box_of(pairs, rule, location, out->boxes + 4 * row);
        form_values(rule->score, pairs->p + pair, pairs->q + pair, out->scores + row, 1);
        out->labels[row] = flat - location * pairs->classes;
    }
    free(chosen);
    return rows;
}

/* ---- suppression ---- */

/* Of LANES boxes: corners, share of the area (see may_overlap), label. */
typedef struct {
    float x1[LANES], y1[LANES], x2[LANES], y2[LANES], share[LANES];
    int32_t label[LANES];
} Group;

/* 0 only for boxes of the group of another label, or without IoU > threshold with this one; in float32. Whether any.

   inter / (a + b - inter) > t  <=>  inter > (a + b) * t / (1 + t). A share is an area times t / (1 + t), less a margin
   of 1e-5 for rounding and 1e-37 for underflow; -inf for areas that might overflow, which are always compared. */
INLINE int may_overlap(const Group *group, const float box[4], float share, int32_t label, float offset,
                       int32_t may[LANES]) {
    int32_t any = 0;
    for (int i = 0; i < LANES; i++) {
        float right = box[2] < group->x2[i] ? box[2] : group->x2[i], left = box[0] > group->x1[i] ? box[0] : group->x1[i];
        float low = box[3] < group->y2[i] ? box[3] : group->y2[i], high = box[1] > group->y1[i] ? box[1] : group->y1[i];
        float width = right - left + offset, height = low - high + offset;
        float inter = (width > 0 ? width : 0) * height;
        may[i] = (inter >= share + group->share[i]) & (label == group->label[i]);
        any |= may[i];
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

typedef struct {
    double iou_threshold, iou_offset;
    int64_t limit;
    int32_t keep_ties; /* those that tie with the last one allowed stay */
} Suppression;

/* Boxes that stay. groups: room for all of them. */
typedef struct {
    Group *groups;
    int64_t count;
    double threshold, offset;
    float part, half_offset; /* of a share; the offset in float32 */
} Kept;

INLINE Kept nothing_kept(Group *groups, const Suppression *rule) {
    double threshold = rule->iou_threshold;
    return (Kept){groups, 0, threshold, rule->iou_offset, (float)(threshold / (1 + threshold) * (1 - 1e-5)),
                  (float)rule->iou_offset};
}

/* Whether a box stays beside those that do, which are all before it; it is one of them from then on. */
INLINE int keep(Kept *kept, const float box[4], int32_t label) {
    float offset = kept->half_offset;
    float share = (box[2] - box[0] + offset) * (box[3] - box[1] + offset) * kept->part - 1e-37f;
    if (share > 1e36f) share = -INFINITY;
    int32_t may[LANES];
    for (int64_t first = 0; first < kept->count; first += LANES) {
        const Group *group = kept->groups + first / LANES;
        if (!may_overlap(group, box, share, label, offset, may)) continue;
        for (int lane = 0; lane < LANES && first + lane < kept->count; lane++) {
            const float other[4] = {group->x1[lane], group->y1[lane], group->x2[lane], group->y2[lane]};
            if (may[lane] && box_iou(other, box, kept->offset) > kept->threshold) return 0;
        }
    }
    Group *last = kept->groups + kept->count / LANES;
    int lane = (int)(kept->count++ % LANES);
    if (lane == 0) memset(last, 0, sizeof *last); /* what is compared with a box that is not there has to be defined */
    last->x1[lane] = box[0], last->y1[lane] = box[1], last->x2[lane] = box[2], last->y2[lane] = box[3];
    last->share[lane] = share, last->label[lane] = label;
    return 1;
}

/* Indices of the boxes that stay, best score first; how many, or NO_MEMORY. What suppress() in core/detections.py says.

   boxes: (n, 4) xyxy. indices: n places. */
WIDE int64_t host_suppress(const float *boxes, const float *scores, const int64_t *labels, int64_t count,
                           const Suppression *rule, int64_t *indices) {
    int64_t places = rule->keep_ties || rule->limit > count ? count : rule->limit;
    Ranked *order = malloc(((size_t)count + 1) * 2 * sizeof *order);
    Group *groups = malloc(((size_t)places / LANES + 1) * sizeof *groups);
    if (!order || !groups) {
        free(order);
        free(groups);
        return NO_MEMORY;
    }
    Kept kept = nothing_kept(groups, rule);
    for (int64_t i = 0; i < count; i++) order[i] = (Ranked){best_first_key(scores[i]), (uint32_t)i};
    sort_ranked(order, order + count, count);
    for (int64_t i = 0; i < count; i++) {
        int64_t index = order[i].index;
        if (kept.count >= rule->limit && (!rule->keep_ties || scores[index] < scores[indices[rule->limit - 1]])) break;
        if (keep(&kept, boxes + 4 * index, (int32_t)labels[index])) indices[kept.count - 1] = index;
    }
    free(order);
    free(groups);
    return kept.count;
}

/* ---- detections ---- */

/* From candidates to detections in image pixels.

   clip, final_clip: largest x and y, before suppression and of the result; negative: none. to_image: image pixels per
   input pixel, of x1, y1, x2, y2. drops_small: boxes stay whose sides are longer than min_size, in the pixels in which
   overlaps are measured. The final clip also drops boxes without area. */
typedef struct {
    Suppression suppression;
    const int64_t *label_map; /* the label of each channel; NULL: the channel */
    float clip[2], final_clip[2], to_image[4], min_size;
    int32_t drops_small, in_image_pixels, class_agnostic, sort_by_score;
} Finish;

/* NaN stays. */
static float clipped(float value, float most) {
    value = value < 0 ? 0 : value;
    return value > most ? most : value;
}

static void clip_box(float *box, const float most[2]) {
    for (int side = 0; side < 4; side++)
        if (most[0] >= 0) box[side] = clipped(box[side], most[side & 1]);
}

/* How many scores are at least the bound. */
INLINE int64_t count_from(const float *scores, int64_t count, float bound) {
    int64_t sum = 0;
    for (int64_t begin = 0; begin < count; begin += CHUNK) {
        int32_t in_chunk = 0, size = (int32_t)(count - begin < CHUNK ? count - begin : CHUNK);
        for (int32_t i = 0; i < size; i++) in_chunk += scores[begin + i] >= bound;
        sum += in_chunk;
    }
    return sum;
}

/* A bound that at least `enough` scores reach, and not many more where scores differ: found by bisection. 0, which all
   candidates reach, if there are not so many. size: how many reach it. */
INLINE float bound_of(const float *scores, int64_t count, int64_t enough, int64_t *size) {
    float low = 0, high = 2, middle = 0.5f;
    *size = count;
    while (*size > enough + enough / 2 && middle > low && middle < high) {
        int64_t reach = count_from(scores, count, middle);
        if (reach >= enough) low = middle, *size = reach;
        else high = middle;
        middle = (low + high) / 2;
    }
    return low;
}

/* Those with begin > score >= end, in their order; how many. */
INLINE int64_t collect(const float *scores, int64_t count, float begin, float end, Ranked *items) {
    int64_t size = 0;
    for (int64_t block = 0; block < count; block += BLOCK) {
        uint8_t inside[BLOCK] = {0};
        int64_t left = count - block < BLOCK ? count - block : BLOCK;
        if (left == BLOCK)
            for (int64_t i = 0; i < BLOCK; i++) inside[i] = (scores[block + i] < begin) & (scores[block + i] >= end);
        else
            for (int64_t i = 0; i < left; i++) inside[i] = (scores[block + i] < begin) & (scores[block + i] >= end);
        for (int64_t eight = 0; eight < BLOCK; eight += 8) {
            uint64_t bytes;
            memcpy(&bytes, inside + eight, sizeof bytes);
            for (; bytes; bytes &= bytes - 1) { /* the lowest bit is that of the first one: little endian */
                int64_t i = block + eight + __builtin_ctzll(bytes) / 8;
                items[size++] = (Ranked){best_first_key(scores[i]), (uint32_t)i};
            }
        }
    }
    return size;
}

/* What is allocated for one image. */
typedef struct {
    int32_t *chosen; /* pairs of the candidates; NULL: all pairs, of which some are none */
    float *scores;   /* of candidates; NONE where there is none */
    int32_t *kept; /* candidates that stay */
    Group *groups;
    Ranked *items;
    int64_t *taken; /* candidates of each level so far */
} Workspace;

INLINE void clipped_box(const Pairs *pairs, const Selection *selection, const Finish *finish, int32_t location,
                        float box[4]) {
    box_of(pairs, selection, location, box);
    clip_box(box, finish->clip);
}

/* Greedy suppression of candidates, best first, in portions, of which mostly the first is enough. How many stay, or
   TOO_MANY for the room, or NO_MEMORY. */
INLINE int64_t suppress_candidates(Workspace *work, int64_t count, int64_t room, const Pairs *pairs,
                                   const Selection *selection, const Finish *finish) {
    const Suppression *rule = &finish->suppression;
    Kept kept = nothing_kept(work->groups, rule);
    double per_class = 1.0 / pairs->classes;
    int64_t size, enough = rule->limit < count / 8 ? 8 * rule->limit : count;
    for (float begin = INFINITY, end; begin > 0; begin = end, enough *= 2) {
        end = bound_of(work->scores, count, enough, &size);
        free(work->items);
        work->items = malloc(((size_t)size + 1) * 2 * sizeof *work->items);
        if (!work->items) return NO_MEMORY;
        size = collect(work->scores, count, begin, end, work->items);
        sort_ranked(work->items, work->items + size, size);
        for (int64_t i = 0; i < size; i++) {
            Ranked item = work->items[i];
            int full = kept.count >= rule->limit;
            if (full && (!rule->keep_ties || work->scores[item.index] < work->scores[work->kept[rule->limit - 1]]))
                return kept.count;
            int32_t pair = (int32_t)item.index;
            if (work->chosen) {
                pair = work->chosen[pair];
            } else { /* of each level the best */
                int64_t level = 0, level_end = pairs->counts[0];
                while (pair >= level_end) level_end += pairs->counts[++level];
                if (++work->taken[level] > selection->limit) continue;
            }
            int32_t flat = pairs->flat[pair], location = location_of(flat, per_class);
            float box[4];
            clipped_box(pairs, selection, finish, location, box);
            for (int side = 0; side < 4 && finish->in_image_pixels; side++) box[side] *= finish->to_image[side];
            if (finish->drops_small && !(box[2] - box[0] > finish->min_size && box[3] - box[1] > finish->min_size))
                continue;
            if (kept.count == room) return TOO_MANY;
            if (keep(&kept, box, finish->class_agnostic ? 0 : flat - location * pairs->classes))
                work->kept[kept.count - 1] = (int32_t)item.index;
        }
    }
    return kept.count;
}

/* The candidates and their scores; how many, or NO_MEMORY. */
INLINE int64_t score_candidates(Workspace *work, int64_t count, const Pairs *pairs, const Selection *selection) {
    if (work->chosen) {
        count = choose(pairs, selection, work->chosen);
        for (int64_t i = 0; i < count; i++)
            form_values(selection->score, pairs->p + work->chosen[i], pairs->q + work->chosen[i], work->scores + i, 1);
    } else {
        form_values(selection->score, pairs->p, pairs->q, work->scores, count);
        for (int64_t i = 0; i < count; i++)
            work->scores[i] = work->scores[i] > selection->threshold ? work->scores[i] : NONE;
    }
    return count;
}

/* Kept candidates back in their own order: 0, or NO_MEMORY. */
static int64_t sort_kept(int32_t *kept, int64_t count) {
    Ranked *items = malloc(((size_t)count + 1) * 2 * sizeof *items);
    if (!items) return NO_MEMORY;
    for (int64_t i = 0; i < count; i++) items[i] = (Ranked){(uint32_t)kept[i], (uint32_t)kept[i]};
    sort_ranked(items, items + count, count);
    for (int64_t i = 0; i < count; i++) kept[i] = (int32_t)items[i].index;
    free(items);
    return 0;
}

/* Detections; how many, or NO_MEMORY, or TOO_MANY for the room. What postprocess() in core/detections.py does with
   pairs. */
INLINE int64_t detect(const Pairs *pairs, const Selection *selection, const Finish *finish, const Rows *out) {
    /* Where candidates rank by their score, the best of each level are seen as such while the best of all are. */
    int direct = selection->gate == selection->score && selection->rank == selection->score;
    int64_t count = most_rows(pairs, direct ? INT64_MAX : selection->limit), stay = NO_MEMORY, written = 0;
    int64_t room = count < out->room ? count : out->room;
    double per_class = 1.0 / pairs->classes;
    Workspace work = {direct ? NULL : malloc(((size_t)count + 1) * sizeof *work.chosen),
                      direct ? pairs->p : malloc(((size_t)count + 1) * sizeof *work.scores),
                      malloc(((size_t)room + 1) * sizeof *work.kept),
                      malloc(((size_t)room / LANES + 1) * sizeof *work.groups),
                      NULL,
                      calloc((size_t)pairs->levels + 1, sizeof *work.taken)};
    if ((direct || work.chosen) && work.scores && work.kept && work.groups && work.taken)
        stay = count = score_candidates(&work, count, pairs, selection);
    if (stay > 0) stay = suppress_candidates(&work, count, room, pairs, selection, finish);
    if (stay > 0 && !finish->sort_by_score && sort_kept(work.kept, stay) < 0) stay = NO_MEMORY;
    for (int64_t i = 0; i < stay; i++) {
        int32_t candidate = work.kept[i], flat = pairs->flat[direct ? candidate : work.chosen[candidate]];
        int32_t location = location_of(flat, per_class), channel = flat - location * pairs->classes;
        float *box = out->boxes + 4 * written;
        clipped_box(pairs, selection, finish, location, box);
        for (int side = 0; side < 4; side++) box[side] *= finish->to_image[side];
        clip_box(box, finish->final_clip);
        out->scores[written] = work.scores[candidate];
        out->labels[written] = finish->label_map ? finish->label_map[channel] : channel;
        written += finish->final_clip[0] < 0 || (box[2] > box[0] && box[3] > box[1]);
    }
    free(work.chosen), free(direct ? NULL : work.scores), free(work.kept), free(work.groups), free(work.items), free(work.taken);
    return stay < 0 ? stay : written;
}

WIDE int64_t host_detect(const Pairs *pairs, const Selection *selection, const Finish *finish, const Rows *out) {
    return detect(pairs, selection, finish, out);
}

/* A loop of NumPy's: PyUFuncGenericFunction of numpy/ufuncobject.h. */
typedef void Loop(char **arrays, const intptr_t *count, const intptr_t *steps, void *data);

/* sigmoid() of core/decode.py, in place. */
INLINE void sigmoid(float *values, int64_t count, Loop *exponential, void *data) {
    const intptr_t steps[2] = {sizeof *values, sizeof *values};
    for (int64_t begin = 0; begin < count; begin += CHUNK) {
        float *x = values + begin;
        intptr_t size = (intptr_t)(count - begin < CHUNK ? count - begin : CHUNK);
        char *arrays[2] = {(char *)x, (char *)x};
        for (intptr_t i = 0; i < size; i++) x[i] = -(x[i] > -87 ? x[i] : -87);
        exponential(arrays, &size, steps, data);
        for (intptr_t i = 0; i < size; i++) x[i] = 1 / (x[i] + 1);
    }
}

/* The raw outputs of one image, and all that is done with them. */
typedef struct {
    const void *logits, *centerness, *distances;
    const void *bound;   /* as host_scan() takes it, one for all */
    const int64_t *ends; /* of levels, as locations */
    int64_t levels, capacity;
    int32_t *flat; /* what host_scan() writes */
    float *values;
    int64_t *counts;
    Loop *exponential;
    void *data; /* of the loop */
    const Selection *selection;
    const Finish *finish;
    Rows out;
    int32_t classes, half_logits, half_centerness, half_distances;
} Image;

/* Detections; how many, or NO_MEMORY, NOT_FINITE, or TOO_MANY: pairs for the capacity, or detections for the room. */
WIDE int64_t host_finish(const Image *image) {
    int64_t locations = image->ends[image->levels - 1];
    int32_t finite = all_finite(image->centerness, image->half_centerness, 0, locations)
                     & all_finite(image->distances, image->half_distances, 0, 4 * locations);
    int64_t count = scan(image->logits, image->half_logits, image->centerness, image->half_centerness, image->classes,
                         image->bound, 0, image->ends, image->levels, image->capacity, image->flat, image->values,
                         image->counts, &finite);
    if (!finite) return NOT_FINITE;
    if (count > image->capacity) return TOO_MANY;
    sigmoid(image->values, 2 * count, image->exponential, image->data);
    Pairs pairs = {image->flat, image->values, image->values + count, image->counts, image->distances, image->levels,
                   image->classes, image->half_distances};
    return detect(&pairs, image->selection, image->finish, &image->out);
}

/* ---- resizing ---- */

/* From RGB images, (height, width, 3), into one plane for each colour. room: of host_resize_room() bytes; it has, for
   places columns, what fill_columns() writes, then two rows of the resized width, and then a row at the end of an
   image, behind which nothing may be read. */
typedef struct {
    uint8_t *planes[3];
    int64_t plane_row, height, width, new_height, new_width;
    char *room;
} Resize;

/* An array of NumPy, behind the head of a Python object: the first fields of PyArrayObject_fields in
   numpy/ndarraytypes.h. */
typedef struct {
    const uint8_t *data;
    int dimensions;
    const intptr_t *shape, *strides;
} Array;

#ifdef VECTORS

enum { GROUP = 16 };      /* output pixels of an iteration; rows have room for whole groups */
enum { PIXEL = 16 };      /* bytes that are read at the first of two neighbours, of which 6 to 15 count */
enum { NEAR = 3 };        /* two output pixels lie within as many bytes where the image is at most so many times as wide */
enum { WEIGHT_BITS = 11 }; /* as OpenCV's INTER_RESIZE_COEF_BITS */

/* Where an output pixel lies between two of the source: the first one, and the weights of both. */
typedef struct {
    int64_t low;
    int16_t weights[2];
} Place;

/* As OpenCV: half-pixel coordinates in float32, weights rounded to the nearest even. */
VECTORS static Place place_of(int64_t index, double scale) {
    float at = (float)(((double)index + 0.5) * scale - 0.5), low = floorf(at), part = at - low;
    Place place = {(int64_t)low,
                   {(int16_t)nearbyintf((1 - part) * (1 << WEIGHT_BITS)), (int16_t)nearbyintf(part * (1 << WEIGHT_BITS))}};
    return place;
}

/* A row of width RGB pixels between its neighbours, as four int16 each: the sum of both products, without its lower 4
   of 19 bits. offsets: of the first neighbour; weights: in the order 0, 2, 1, 3 of each four pixels. */
VECTORS static void resize_row(const uint8_t *row, const int64_t *offsets, const char *weights, int64_t width,
                               __m256i *out) {
    const __m128i pairs = _mm_setr_epi8(0, 3, 1, 4, 2, 5, -1, -1, 8, 11, 9, 12, 10, 13, -1, -1);
    for (int64_t x = 0; x < width; x += 4) {
        __m256i sums[2];
        for (int half = 0; half < 2; half++) {
            __m128i first = _mm_loadl_epi64((const __m128i *)(row + offsets[x + half]));
            __m128i second = _mm_loadl_epi64((const __m128i *)(row + offsets[x + half + 2]));
            __m256i values = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(_mm_unpacklo_epi64(first, second), pairs));
            __m256i factors = _mm256_loadu_si256((const __m256i *)(weights + 16 * (x + 2 * half)));
            sums[half] = _mm256_srli_epi32(_mm256_madd_epi16(values, factors), 4);
        }
        _mm256_storeu_si256(out + x / 4, _mm256_packs_epi32(sums[0], sums[1]));
    }
}

/* The same where two output pixels lie within the bytes that are read for one. pairs: where, 8 bytes for a pixel;
   weights: in the order of pixels. One counter serves all arrays: the loop is as fast as it is short. */
VECTORS static void resize_near_row(const uint8_t *row, const int64_t *offsets, const char *weights, const char *pairs,
                                    int64_t width, __m256i *out) {
    for (int64_t at = 0; at < 8 * width; at += 32) { /* four pixels */
        const int64_t *low = (const int64_t *)((const char *)offsets + at);
        __m128i first = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(row + low[0])),
                                         _mm_loadu_si128((const __m128i *)(pairs + at)));
        __m128i second = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(row + low[2])),
                                          _mm_loadu_si128((const __m128i *)(pairs + at + 16)));
        __m256i of_first = _mm256_loadu_si256((const __m256i *)(weights + 2 * at));
        __m256i of_second = _mm256_loadu_si256((const __m256i *)(weights + 2 * at + 32));
        __m256i sum = _mm256_packs_epi32(
            _mm256_srli_epi32(_mm256_madd_epi16(_mm256_cvtepu8_epi16(first), of_first), 4),
            _mm256_srli_epi32(_mm256_madd_epi16(_mm256_cvtepu8_epi16(second), of_second), 4)); /* pixels 0, 2, 1, 3 */
        _mm256_storeu_si256((__m256i *)((char *)out + at), _mm256_permute4x64_epi64(sum, 0xD8));
    }
}

/* Four pixels between two rows, rounded to levels. */
VECTORS static __m256i blend(__m256i upper, __m256i lower, __m256i of_upper, __m256i of_lower) {
    __m256i sum = _mm256_add_epi16(_mm256_mulhi_epi16(upper, of_upper), _mm256_mulhi_epi16(lower, of_lower));
    return _mm256_srai_epi16(_mm256_add_epi16(sum, _mm256_set1_epi16(2)), 2);
}

/* Sixteen pixels between two rows, split into their planes. */
VECTORS static void blend_group(const __m256i *upper, const __m256i *lower, const int16_t weights[2], __m128i planes[3]) {
    const __m256i of_upper = _mm256_set1_epi16(weights[0]), of_lower = _mm256_set1_epi16(weights[1]);
    const __m256i colours = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m128i red_green[2], blue[2];
    for (int half = 0; half < 2; half++) {
        const __m256i *a = upper + 2 * half, *b = lower + 2 * half;
        /* pixels 0, 1, 4, 5 and 2, 3, 6, 7 */
        __m256i levels = _mm256_packus_epi16(blend(_mm256_loadu_si256(a), _mm256_loadu_si256(b), of_upper, of_lower),
                                             blend(_mm256_loadu_si256(a + 1), _mm256_loadu_si256(b + 1), of_upper, of_lower));
        levels = _mm256_shuffle_epi8(levels, colours);
        __m128i outer = _mm256_castsi256_si128(levels), inner = _mm256_extracti128_si256(levels, 1);
        red_green[half] = _mm_unpacklo_epi16(outer, inner);
        blue[half] = _mm_unpackhi_epi16(outer, inner);
    }
    planes[0] = _mm_unpacklo_epi64(red_green[0], red_green[1]);
    planes[1] = _mm_unpackhi_epi64(red_green[0], red_green[1]);
    planes[2] = _mm_unpacklo_epi64(blue[0], blue[1]);
}

enum { OF_PLACE = 16 + 8 + 2 * 8 + 8 }; /* bytes of the room: weights, pairs, two rows, offset */
enum { LINE = 64 };                   /* bytes; what lies across two lines takes longer to read and write */
enum { AHEAD = 2 };                   /* rows that are fetched ahead: the caches hold nothing of a new image */

static char *room_of(const Resize *job) { return job->room + (-(uintptr_t)job->room & (LINE - 1)); }

static int64_t places_of(int64_t new_width) { return (new_width + GROUP - 1) / GROUP * GROUP; }

/* What resize_row() and resize_near_row() read, for each output pixel. */
VECTORS static void fill_columns(int64_t width, int64_t new_width, int64_t *offsets, char *weights, char *pairs) {
    double scale = (double)width / (double)new_width;
    for (int64_t x = 0; x < new_width; x++) {
        Place place = place_of(x, scale);
        if (place.low < 0 || place.low >= width - 1) {
            place.low = place.low < 0 ? 0 : width - 1;
            place.weights[0] = 1 << WEIGHT_BITS, place.weights[1] = 0;
        }
        offsets[x] = 3 * place.low;
        int64_t order = width <= NEAR * new_width ? x : (x & ~3) | (x & 1) << 1 | (x & 2) >> 1;
        for (int colour = 0; colour < 3; colour++) {
            memcpy(weights + 16 * order + 4 * colour, place.weights, 4);
            for (int k = 0; k < 2; k++) pairs[8 * x + 2 * colour + k] = (char)(offsets[x] - offsets[x & ~1] + colour + 3 * k);
        }
        pairs[8 * x + 6] = pairs[8 * x + 7] = -1;
    }
}

VECTORS static void resize(const Resize *job, const uint8_t *image, int64_t row_bytes) {
    int64_t places = places_of(job->new_width), height = job->height, held[2] = {-1, -1};
    int64_t last = 3 * (job->width - 1) + PIXEL, row_size = places * 8;
    char *weights = room_of(job), *pairs = weights + 16 * places, *rows = pairs + 8 * places;
    const int64_t *offsets = (const int64_t *)(rows + 2 * row_size);
    uint8_t *end = (uint8_t *)(offsets + places);
    double scale = (double)height / (double)job->new_height;
    for (int64_t y = 0; y < job->new_height; y++) {
        Place place = place_of(y, scale);
        const __m256i *between[2];
        for (int k = 0; k < 2; k++) {
            int64_t at = place.low + k < 0 ? 0 : place.low + k >= height ? height - 1 : place.low + k;
            int slot = (int)(at & 1); /* neighbours lie in different ones */
            between[k] = (const __m256i *)(rows + slot * row_size);
            if (held[slot] == at) continue;
            const uint8_t *row = image + at * row_bytes;
            for (int64_t x = 0; at + AHEAD < height && x < 3 * job->width; x += LINE)
                __builtin_prefetch(row + AHEAD * row_bytes + x);
            if (at * row_bytes + last > (height - 1) * row_bytes + 3 * job->width)
                row = memcpy(end, row, (size_t)(3 * job->width));
            __m256i *out = (__m256i *)(rows + slot * row_size);
            if (job->width <= NEAR * job->new_width) resize_near_row(row, offsets, weights, pairs, places, out);
            else resize_row(row, offsets, weights, places, out);
            held[slot] = at;
        }
        for (int64_t x = 0; x < job->new_width; x += GROUP) {
            __m128i pixels[3];
            blend_group(between[0] + x / 4, between[1] + x / 4, place.weights, pixels);
            size_t size = (size_t)(job->new_width - x < GROUP ? job->new_width - x : GROUP);
            for (int c = 0; c < 3; c++) {
                uint8_t *to = job->planes[c] + y * job->plane_row + x;
                if (size == GROUP) _mm_storeu_si128((__m128i *)to, pixels[c]);
                else memcpy(to, pixels + c, size);
            }
        }
    }
}

#endif

/* Bytes of the room of host_resize(); 0: this processor does not do it. */
int64_t host_resize_room(int64_t width, int64_t new_width) {
#ifdef VECTORS
    if (__builtin_cpu_supports("avx2")) return places_of(new_width) * OF_PLACE + LINE + 3 * (width - 1) + PIXEL;
#endif
    (void)width, (void)new_width;
    return 0;
}

/* Fill the room, once for a size. */
int64_t host_resize_prepare(const Resize *job) {
#ifdef VECTORS
    int64_t places = places_of(job->new_width);
    char *room = room_of(job);
    memset(room, 0, (size_t)places * OF_PLACE);
    fill_columns(job->width, job->new_width, (int64_t *)(room + 40 * places), room, room + 16 * places);
#endif
    (void)job;
    return 0;
}

/* Resize to the same levels as OpenCV's INTER_LINEAR, which shrinks to the half of both sides in another way. Whether it
   is done: not where the pixels of a row do not lie one after the other. */
int64_t host_resize(const Resize *job, const Array *image) {
#ifdef VECTORS
    const intptr_t *strides = image->strides;
    if (strides[2] == 1 && strides[1] == 3 && strides[0] >= 3 * job->width) {
        resize(job, image->data, strides[0]);
        return 1;
    }
#endif
    (void)job, (void)image;
    return 0;
}
