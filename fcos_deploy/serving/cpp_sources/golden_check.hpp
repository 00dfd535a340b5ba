// golden_check.hpp: whether detections of a bundle's golden images are those that the bundle was certified with.
//
// The judgement of `fcos-deploy verify` (fcos_deploy/accuracy/verify.py and golden.py), rule by rule, on what
// `fcos-deploy package --for cpp` wrote beside this file: golden.json, and each golden image as a PPM file.

#pragma once

#include <map>
#include <numeric>
#include <set>

#include "fcos_deploy.hpp"

namespace fcos_deploy {

enum class Outcome { passed, failed, inconclusive };

inline const char* outcome_name(Outcome outcome) {
    return std::array{"passed", "failed", "inconclusive"}[static_cast<std::size_t>(outcome)];
}

// A preprocessed tensor: SHA-256 of its bytes, and the means of 8x8 cells of each plane, which tolerate rounding.
struct Fingerprint {
    std::string sha256, dtype;
    std::vector<std::int64_t> shape;
    std::vector<double> cells;
};

struct GoldenImage {
    std::string path, pixels;  // in the bundle, and the PPM file here
    Size size;
    double scale = 1;  // image pixels per network-input pixel, at least 1
    Fingerprint fingerprint;
    std::vector<Detection> expected, certified;  // of the reference, and of the artifact where the bundle was made
};

struct Golden {
    std::string bundle, manifest_sha256, artifact, artifact_sha256, model, backend, precision;
    double min_match_rate = 0, min_iou = 0.5, max_score_delta = 1;  // the gate
    bool has_certified = false, same_artifact = false;
    double score_threshold = 0;
    std::int64_t max_detections = 100;
    std::vector<std::string> class_names;
    std::vector<GoldenImage> images;

    std::string name(std::int64_t label) const {
        const bool named = label >= 0 && label < static_cast<std::int64_t>(class_names.size());
        return named ? class_names[static_cast<std::size_t>(label)] : std::to_string(label);
    }
};

struct ImageResult {
    std::string path;
    std::int64_t expected = 0, detected = 0, missed = 0, extra = 0;
    double lowest_iou = 1, largest_score_difference = 0;
};

struct GoldenVerdict {
    Outcome outcome = Outcome::inconclusive, values_outcome = Outcome::inconclusive;
    bool prepared = true;  // whether preprocessing gives the certified tensors
    std::int64_t exact = 0, evidence = 0;
    double difference = 0, matched = 0;
    std::string fault;                  // of preprocessing
    std::vector<std::string> problems;  // of the values
    std::vector<ImageResult> images;
    std::string summary;
};

namespace detail {

inline std::vector<Detection> detections_of(const Json& json) {
    Fields fields(json, "detections");
    const auto scores = fields.numbers("scores");
    const auto labels = fields.integers("labels", 0, max_int);
    const auto& boxes = fields.array("boxes");
    fields.done();
    check(boxes.size() == scores.size() && labels.size() == scores.size(),
          "detections: there are not as many boxes as scores and labels.");
    std::vector<Detection> detections;
    for (std::size_t i = 0; i < boxes.size(); ++i) {
        check(boxes[i].kind == Json::Kind::array && boxes[i].items.size() == 4,
              "detections.boxes must be arrays of four numbers.");
        Detection detection;
        for (std::size_t k = 0; k < 4; ++k) detection.box[k] = static_cast<float>(boxes[i].items[k].number);
        detection.score = static_cast<float>(scores[i]), detection.label = labels[i];
        detections.push_back(detection);
    }
    return detections;
}

inline std::string format(const char* pattern, double value) {
    std::array<char, 64> text{};
    std::snprintf(text.data(), text.size(), pattern, value);
    return text.data();
}

inline std::array<std::uint32_t, 64> sha256_constants() {
    // The first 32 bits of the fractions of the cube roots of the first 64 primes.
    std::array<std::uint32_t, 64> constants{};
    int prime = 2;
    for (auto& constant : constants) {
        const long double root = std::cbrt(static_cast<long double>(prime));
        constant = static_cast<std::uint32_t>((root - std::floor(root)) * 4294967296.0L);
        const auto divides = [&](int n) { return prime % n == 0; };
        bool composite = true;
        while (composite) {
            ++prime, composite = false;
            for (int n = 2; n * n <= prime; ++n) composite = composite || divides(n);
        }
    }
    return constants;
}

}  // namespace detail

// FIPS 180-4, fed in parts.
class Sha256 {
public:
    void add(const void* data, std::size_t size) {
        const auto* bytes = static_cast<const std::uint8_t*>(data);
        total_ += size;
        for (std::size_t i = 0; i < size; ++i) {
            block_[used_++] = bytes[i];
            if (used_ == 64) compress();
        }
    }
    std::string hex() {
        const std::uint64_t bits = total_ * 8;
        const std::uint8_t one = 0x80, zero = 0;
        add(&one, 1);
        while (used_ != 56) add(&zero, 1);
        for (int shift = 56; shift >= 0; shift -= 8) block_[used_++] = static_cast<std::uint8_t>(bits >> shift);
        compress();
        std::string text;
        for (std::uint32_t word : state_)
            for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
        return text;
    }

private:
    void compress() {
        static const auto constants = detail::sha256_constants();
        const auto turn = [](std::uint32_t x, int n) { return x >> n | x << (32 - n); };
        std::array<std::uint32_t, 64> w{};
        for (std::size_t i = 0; i < 64; ++i)
            w[i] = i < 16 ? static_cast<std::uint32_t>(block_[4 * i]) << 24 |
                                static_cast<std::uint32_t>(block_[4 * i + 1]) << 16 |
                                static_cast<std::uint32_t>(block_[4 * i + 2]) << 8 | block_[4 * i + 3]
                          : w[i - 16] + w[i - 7] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3) +
                                (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
        auto [a, b, c, d, e, f, g, h] = state_;
        for (std::size_t i = 0; i < 64; ++i) {
            const std::uint32_t x =
                h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + constants[i] + w[i];
            const std::uint32_t y = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + x, d = c, c = b, b = a, a = x + y;
        }
        const std::array<std::uint32_t, 8> now{a, b, c, d, e, f, g, h};
        for (std::size_t i = 0; i < 8; ++i) state_[i] += now[i];
        used_ = 0;
    }
    std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<std::uint8_t, 64> block_{};
    std::size_t used_ = 0;
    std::uint64_t total_ = 0;
};

inline std::string sha256_file(const std::filesystem::path& path) {
    std::ifstream stream(path, std::ios::binary);
    Sha256 digest;
    std::array<char, 1 << 16> block;
    while (stream.read(block.data(), block.size()), stream.gcount() > 0)
        digest.add(block.data(), static_cast<std::size_t>(stream.gcount()));
    if (!stream.eof()) throw Error("Cannot read '" + path.string() + "'.");
    return digest.hex();
}

inline Golden parse_golden(const Json& json) {
    Fields fields(json, "golden");
    if (fields.text("format") != "fcos-deploy golden, version 1")
        fields.fail("format", "'fcos-deploy golden, version 1'");
    Golden golden;
    golden.bundle = fields.text("bundle"), golden.manifest_sha256 = fields.text("manifest_sha256");
    golden.artifact = fields.text("artifact"), golden.artifact_sha256 = fields.text("artifact_sha256");
    golden.model = fields.text("model"), golden.backend = fields.text("backend"),
    golden.precision = fields.text("precision");
    Fields gate(fields.required("gate"), "golden.gate");
    golden.min_match_rate = gate.number("min_match_rate"), golden.min_iou = gate.number("min_iou");
    golden.max_score_delta = gate.number("max_score_delta");
    gate.done();
    golden.has_certified = fields.flag("has_certified"), golden.same_artifact = fields.flag("same_artifact");
    golden.score_threshold = fields.number("score_threshold");
    golden.max_detections = fields.integer("max_detections", {}, 1, detail::max_int);
    for (const Json& name : fields.array("class_names")) golden.class_names.push_back(name.text);
    for (const Json& item : fields.array("images")) {
        Fields image(item, "golden.images");
        GoldenImage record;
        record.path = image.text("path"), record.pixels = image.text("pixels");
        record.size = {image.integer("height", {}, 1, detail::max_side),
                       image.integer("width", {}, 1, detail::max_side)};
        record.scale = image.number("scale");
        Fields fingerprint(image.required("fingerprint"), "golden.images.fingerprint");
        record.fingerprint.sha256 = fingerprint.text("sha256"), record.fingerprint.dtype = fingerprint.text("dtype");
        record.fingerprint.shape = fingerprint.integers("shape", 1, detail::max_side);
        record.fingerprint.cells = fingerprint.numbers("cells");
        fingerprint.done();
        record.expected = detail::detections_of(image.required("expected"));
        const Json* certified = image.optional("certified");
        if ((certified != nullptr) != golden.has_certified) image.fail("certified", "there, or null for all images");
        if (certified != nullptr) record.certified = detail::detections_of(*certified);
        image.done();
        golden.images.push_back(std::move(record));
    }
    fields.done();
    return golden;
}

inline Fingerprint fingerprint(const TensorView& tensor) {
    const std::int64_t planes = tensor.shape[1], height = tensor.shape[2], width = tensor.shape[3];
    const bool bytes = tensor.dtype == DType::uint8;
    Fingerprint result{{}, bytes ? "uint8" : "float32", {planes, height, width}, {}};
    Sha256 digest;
    digest.add(tensor.data, static_cast<std::size_t>(planes * height * width) * (bytes ? 1 : 4));
    result.sha256 = digest.hex();
    // As NumPy splits n places into 8 parts: the first n % 8 of them have one more.
    const auto edge = [](std::int64_t n, std::int64_t part) { return part * (n / 8) + std::min(part, n % 8); };
    for (std::int64_t p = 0; p < planes; ++p)
        for (std::int64_t r = 0; r < 8; ++r)
            for (std::int64_t c = 0; c < 8; ++c) {
                const std::int64_t y1 = edge(height, r), y2 = edge(height, r + 1), x1 = edge(width, c),
                                   x2 = edge(width, c + 1);
                double sum = 0;
                for (std::int64_t y = y1; y < y2; ++y)
                    for (std::int64_t x = x1; x < x2; ++x) {
                        const std::int64_t at = (p * height + y) * width + x;
                        sum += bytes ? static_cast<const std::uint8_t*>(tensor.data)[at]
                                     : static_cast<const float*>(tensor.data)[at];
                    }
                result.cells.push_back(sum / static_cast<double>(std::max<std::int64_t>((y2 - y1) * (x2 - x1), 1)));
            }
    return result;
}

// Largest difference of two cells in levels of an 8-bit image; infinite when dtype or shape differ.
inline double fingerprint_difference(const Fingerprint& actual, const Fingerprint& expected,
                                     const PreprocessSpec& spec) {
    if (actual.dtype != expected.dtype || actual.shape != expected.shape ||
        actual.cells.size() != expected.cells.size())
        return std::numeric_limits<double>::infinity();
    if (actual.sha256 == expected.sha256) return 0;
    double largest = 0;
    for (std::size_t i = 0; i < actual.cells.size(); ++i) {
        const std::size_t plane = i / 64;
        const double unit = actual.dtype == "float32" ? spec.std[plane] * spec.pixel_scale : 1.0;
        largest = std::max(largest, std::abs(actual.cells[i] - expected.cells[i]) * unit);
    }
    return largest;
}

namespace detail {

constexpr double group_confidence = 0.999;  // of an image, a class or a size: so many that one lies outside by chance
constexpr std::size_t end_boxes = 12;  // of the smallest and largest boxes: that confidence needs eleven
constexpr std::size_t min_evidence = 8;  // the 99 % interval of a median needs eight pairs (2 * 0.5 ** 8 < 0.01)
constexpr double found_again = 0.97, rare = 0.001, score_margin = 0.05, beyond_share = 0.2, max_cell_difference = 0.5;
constexpr double same_edge = 0.05, same_score = 0.002;

struct Matching {
    std::vector<std::size_t> reference, candidate, missed, extra;
    std::vector<double> iou;
};

inline double pair_iou(const Detection& a, const Detection& b) {
    float edges = 0;
    for (std::size_t k = 0; k < 4; ++k) edges = std::max(edges, std::abs(a.box[k] - b.box[k]));
    if (edges <= 0.1F) return 1;  // the overlap of boxes thinner than a pixel says nothing
    const auto side = [&](std::size_t k) {
        return std::max(std::min<double>(a.box[k + 2], b.box[k + 2]) - std::max<double>(a.box[k], b.box[k]), 0.0);
    };
    const auto area = [](const Detection& d) {
        return (static_cast<double>(d.box[2]) - d.box[0]) * (static_cast<double>(d.box[3]) - d.box[1]);
    };
    const double common = side(0) * side(1);
    return common / std::max(area(a) + area(b) - common, 1e-300);
}

inline std::vector<std::size_t> best_first(const std::vector<Detection>& detections) {
    std::vector<std::size_t> order(detections.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return detections[a].score > detections[b].score; });
    return order;
}

// Pairs detections as COCO's evaluation does: each candidate, best score first, takes the free one it overlaps most.
inline Matching match(const std::vector<Detection>& reference, const std::vector<Detection>& candidate, double min_iou,
                      double max_score_delta, double min_score) {
    constexpr auto none = std::numeric_limits<std::size_t>::max();
    std::vector<std::size_t> partner(reference.size(), none);
    std::vector<double> iou(reference.size(), -1);
    std::vector<char> taken(candidate.size());
    for (std::size_t column : best_first(candidate)) {
        double best = -1;
        std::size_t row = none;
        for (std::size_t i = 0; i < reference.size(); ++i) {
            const bool alike =
                reference[i].label == candidate[column].label &&
                std::abs(reference[i].score - candidate[column].score) <= static_cast<float>(max_score_delta);
            const double overlap = alike && partner[i] == none ? pair_iou(reference[i], candidate[column]) : -1;
            if (overlap >= min_iou && overlap > best) best = overlap, row = i;
        }
        if (row != none) partner[row] = column, iou[row] = best, taken[column] = 1;
    }
    Matching matching;
    const auto least = static_cast<float>(min_score);
    for (std::size_t i = 0; i < reference.size(); ++i) {
        if (partner[i] != none)
            matching.reference.push_back(i), matching.candidate.push_back(partner[i]), matching.iou.push_back(iou[i]);
        else if (reference[i].score >= least) matching.missed.push_back(i);
    }
    for (std::size_t i = 0; i < candidate.size(); ++i)
        if (!taken[i] && candidate[i].score >= least) matching.extra.push_back(i);
    return matching;
}

// The score from which a detection must be in both lists: whoever scores less may be on either side of a threshold.
inline double judged_floor(const Golden& golden, const std::vector<Detection>& a, const std::vector<Detection>& b,
                           double margin) {
    double floor = std::max(golden.score_threshold, 0.0);
    for (const auto* list : {&a, &b}) {
        if (static_cast<std::int64_t>(list->size()) < golden.max_detections) continue;
        float lowest = std::numeric_limits<float>::infinity();
        for (const Detection& detection : *list) lowest = std::min(lowest, detection.score);
        floor = std::max<double>(floor, lowest);
    }
    return std::min(floor + margin, 1.0);
}

inline std::size_t count_from(const std::vector<Detection>& detections, double floor) {
    const auto least = static_cast<float>(floor);
    return static_cast<std::size_t>(
        std::count_if(detections.begin(), detections.end(), [&](const Detection& d) { return d.score >= least; }));
}

// P(X >= count) for X binomial in `of` trials of probability `rate`; by logarithms, as combinations leave a double.
inline double chance_of_more(std::size_t count, std::size_t of, double rate) {
    if (count == 0 || rate >= 1) return 1;
    if (rate <= 0) return 0;
    double sum = 0;
    for (std::size_t k = count; k <= of; ++k) {
        const double a = static_cast<double>(k), b = static_cast<double>(of - k);
        sum += std::exp(std::lgamma(a + b + 1) - std::lgamma(a + 1) - std::lgamma(b + 1) + a * std::log(rate) +
                        b * std::log1p(-rate));
    }
    return sum;
}

inline double median(std::vector<double> values) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    const std::size_t half = values.size() / 2;
    return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// Bounds of the median without an assumption on the distribution. Between the k-th smallest and the k-th largest of n
// values it lies unless fewer than k are on one side of it; how many are is binomial with probability one half.
inline std::pair<double, double> median_interval(std::vector<double> values, double confidence) {
    const std::size_t n = values.size();
    double outside = 0;
    std::size_t k = 0;
    while (k < n / 2) {
        const double a = static_cast<double>(n), b = static_cast<double>(k);
        outside += 2 * std::exp(std::lgamma(a + 1) - std::lgamma(b + 1) - std::lgamma(a - b + 1) - a * std::log(2.0));
        if (outside > 1 - confidence) break;
        ++k;
    }
    if (k == 0) return {-std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()};
    std::sort(values.begin(), values.end());
    return {values[k - 1], values[n - k]};
}

struct Pairs {
    std::vector<Detection> before, after;
    std::vector<std::size_t> image;
    std::vector<double> scale;
};

struct Quantity {
    const char* name;
    bool pixels;
    double limit;
    std::vector<double> values;
};

// Shifts are of centres, in image pixels divided by the scale; stretch is the shift away from the middle of all boxes;
// width, height and score are logarithms of ratios. Limits: how far a median may lie from the baseline's.
inline std::vector<Quantity> differences(const Pairs& pairs) {
    std::vector<Quantity> quantities{{"shift in x", true, 0.2, {}},   {"shift in y", true, 0.2, {}},
                                     {"stretch in x", true, 0.2, {}}, {"stretch in y", true, 0.2, {}},
                                     {"width", false, 0.015, {}},     {"height", false, 0.015, {}},
                                     {"score", false, 0.03, {}}};
    const auto centre = [](const Detection& d, std::size_t k) {
        return (static_cast<double>(d.box[k]) + d.box[k + 2]) / 2;
    };
    const auto length = [](const Detection& d, std::size_t k) {
        return std::max(static_cast<double>(d.box[k + 2]) - d.box[k], 1e-3);
    };
    for (std::size_t k = 0; k < 2; ++k) {
        std::vector<double> centres;
        for (const Detection& detection : pairs.before) centres.push_back(centre(detection, k));
        const double middle = median(centres);
        for (std::size_t i = 0; i < centres.size(); ++i) {
            const double move = (centre(pairs.after[i], k) - centres[i]) / pairs.scale[i];
            quantities[k].values.push_back(move);
            quantities[2 + k].values.push_back(centres[i] > middle ? move : centres[i] < middle ? -move : 0);
            quantities[4 + k].values.push_back(std::log(length(pairs.after[i], k) / length(pairs.before[i], k)));
        }
    }
    for (std::size_t i = 0; i < pairs.before.size(); ++i)
        quantities[6].values.push_back(
            std::log(std::max<double>(pairs.after[i].score, 1e-6) / std::max<double>(pairs.before[i].score, 1e-6)));
    return quantities;
}

// Failed when the whole interval of the median lies beyond one of the two limits.
inline Outcome test_median(const Quantity& quantity, const std::vector<char>& chosen, double confidence,
                           const std::string& group, std::string& sentence) {
    std::vector<double> values;
    for (std::size_t i = 0; i < chosen.size(); ++i)
        if (chosen[i]) values.push_back(quantity.values[i]);
    const auto [low, high] = median_interval(values, confidence);
    const auto print = [&](double value) {
        return quantity.pixels ? format("%+.2f px", value) : format("%+.1f%%", 100 * value);
    };
    sentence = quantity.name + (group.empty() ? "" : " in '" + group + "'") + " differs by " + print(median(values)) +
               " over " + std::to_string(values.size()) + " detections (allowed: " + print(quantity.limit).substr(1) +
               ")";
    if (low > quantity.limit || -high > quantity.limit) return Outcome::failed;
    return high <= quantity.limit && -low <= quantity.limit ? Outcome::passed : Outcome::inconclusive;
}

// Edge error in image pixels divided by the scale, and score error, of the better half of each image's detections;
// infinite for one without a partner of its class.
inline std::array<std::vector<double>, 2> detection_errors(const Golden& golden,
                                                           const std::vector<std::vector<Detection>>& detected) {
    std::array<std::vector<double>, 2> errors;
    for (std::size_t n = 0; n < golden.images.size(); ++n) {
        const auto& reference = golden.images[n].expected;
        const Matching matching = match(reference, detected[n], 0.5, 1.0, 0.0);
        std::vector<double> edge(reference.size(), std::numeric_limits<double>::infinity()), score = edge;
        for (std::size_t i = 0; i < matching.reference.size(); ++i) {
            const Detection &a = reference[matching.reference[i]], &b = detected[n][matching.candidate[i]];
            double moved = 0;
            for (std::size_t k = 0; k < 4; ++k)
                moved = std::max(moved, std::abs(static_cast<double>(a.box[k]) - b.box[k]));
            edge[matching.reference[i]] = moved / std::max(1.0, golden.images[n].scale);
            score[matching.reference[i]] = std::abs(static_cast<double>(a.score) - b.score);
        }
        auto order = best_first(reference);
        order.resize((order.size() + 1) / 2);
        for (std::size_t i : order) errors[0].push_back(edge[i]), errors[1].push_back(score[i]);
    }
    return errors;
}

// Whether far more detections are far from the reference's than when the artifact was certified.
inline void check_scatter(const Golden& golden, const std::vector<std::vector<Detection>>& baseline,
                          const std::vector<std::vector<Detection>>& detected, std::vector<std::string>& problems) {
    const auto before = detection_errors(golden, baseline), after = detection_errors(golden, detected);
    for (std::size_t k = 0; k < 2; ++k) {
        std::vector<double> base = before[k];
        const auto& now = after[k];
        if (now.size() < min_evidence) continue;
        std::sort(base.begin(), base.end());
        const double usual = std::max(base[static_cast<std::size_t>(0.9 * static_cast<double>(base.size() - 1))],
                                      k == 0 ? same_edge : same_score);
        const auto beyond = static_cast<std::size_t>(
            std::count_if(now.begin(), now.end(), [&](double error) { return error > 2 * usual; }));
        if (std::isfinite(usual) && chance_of_more(beyond, now.size(), beyond_share) < rare)
            problems.push_back(std::to_string(beyond) + " of " + std::to_string(now.size()) +
                               (k == 0 ? " box edges" : " scores") + " are more than " + format("%.3g", 2 * usual) +
                               (k == 0 ? " px" : "") + " from the reference's");
    }
}

inline double longer_side(const Detection& d) {
    const double width = static_cast<double>(d.box[2]) - d.box[0], height = static_cast<double>(d.box[3]) - d.box[1];
    return std::max({width, height, 1.0});
}

// 6 where the longer side has 64 to 128 pixels; a level of the pyramid sees about as much.
inline int octave(const Detection& d) { return std::ilogb(longer_side(d)); }

inline std::string size_name(int octave) {
    return "boxes of " + std::to_string(1LL << octave) + " to " + std::to_string(2LL << octave) + " px";
}

// Images, classes and sizes of which far fewer are found, or far more are extra, than happens at `rate`.
inline void check_missing(const Golden& golden, const std::vector<std::vector<Detection>>& expected,
                          const std::vector<std::vector<Detection>>& detected, const std::vector<Matching>& matches,
                          const std::vector<double>& floors, double rate, std::vector<std::string>& problems) {
    struct Group {
        std::string name;
        std::array<std::size_t, 4> counts{};  // due, lost, came, extra
    };
    std::vector<Group> groups;
    const auto add = [&](const std::string& name, const std::array<std::size_t, 4>& counts) {
        auto at = std::find_if(groups.begin(), groups.end(), [&](const Group& group) { return group.name == name; });
        if (at == groups.end()) at = groups.insert(groups.end(), {name, {}});
        for (std::size_t k = 0; k < 4; ++k) at->counts[k] += counts[k];
    };
    for (std::size_t n = 0; n < expected.size(); ++n) {
        std::map<std::int64_t, std::array<std::size_t, 4>> by_label;
        std::map<int, std::array<std::size_t, 4>> by_size;
        std::array<std::size_t, 4> all{};
        const auto count = [&](const Detection& d, std::size_t column) {
            ++by_label[d.label][column], ++by_size[octave(d)][column], ++all[column];
        };
        const auto floor = static_cast<float>(floors[n]);
        for (const Detection& d : expected[n])
            if (d.score >= floor) count(d, 0);
        for (std::size_t i : matches[n].missed) count(expected[n][i], 1);
        for (const Detection& d : detected[n])
            if (d.score >= floor) count(d, 2);
        for (std::size_t i : matches[n].extra) count(detected[n][i], 3);
        const std::string path = "'" + golden.images[n].path + "'";
        const std::size_t due = expected[n].size(), came = detected[n].size();
        if (all[0] > 0 && came == 0)
            problems.push_back("nothing is detected in " + path + ", where " + std::to_string(all[0]) +
                               " detections are certified");
        // A list that was cut off at its limit, clear of the score threshold, is shorter for no other reason.
        const bool cut_off = static_cast<std::int64_t>(due) >= golden.max_detections &&
                             count_from(expected[n], golden.score_threshold + score_margin) == due;
        if (cut_off && came > 0 && came < due && chance_of_more(due - came, due, 1 - rate) < rare)
            problems.push_back(std::to_string(came) + " detections in " + path + ", where " + std::to_string(due) +
                               " are certified");
        add(path, all);
        for (const auto& item : by_label) add("class '" + golden.name(item.first) + "'", item.second);
        for (const auto& item : by_size) add(size_name(item.first), item.second);
    }
    for (const Group& group : groups) {
        const auto [due, lost, came, extra] = group.counts;
        if (chance_of_more(lost, due, 1 - rate) < rare)
            problems.push_back(std::to_string(lost) + " of " + std::to_string(due) + " detections of " + group.name +
                               " are missing");
        else if (chance_of_more(extra, came, 1 - rate) < rare)
            problems.push_back(std::to_string(extra) + " of " + std::to_string(came) + " detections of " + group.name +
                               " are extra");
    }
}

// The values of detections against the certified ones, or the reference's where there are none.
inline void check_values(const Golden& golden, const std::vector<std::vector<Detection>>& detected,
                         GoldenVerdict& verdict) {
    std::vector<std::vector<Detection>> expected;
    for (const GoldenImage& image : golden.images)
        expected.push_back(golden.has_certified ? image.certified : image.expected);
    std::vector<double> floors;
    std::size_t held = 0;
    for (std::size_t n = 0; n < expected.size(); ++n) {
        floors.push_back(judged_floor(golden, expected[n], detected[n],
                                      golden.has_certified ? score_margin : golden.max_score_delta));
        held += count_from(expected[n], floors.back());
    }
    if (golden.has_certified && held < min_evidence)  // the better half of each image's, whatever they score
        for (std::size_t n = 0; n < expected.size(); ++n) {
            std::vector<double> scores;
            for (const Detection& d : expected[n]) scores.push_back(d.score);
            if (!scores.empty())
                floors[n] = std::min(floors[n], static_cast<double>(static_cast<float>(median(scores))));
        }
    std::vector<Matching> matches;
    Pairs pairs;
    for (std::size_t n = 0; n < expected.size(); ++n) {
        matches.push_back(match(expected[n], detected[n], golden.min_iou, golden.max_score_delta, floors[n]));
        for (std::size_t i = 0; i < matches[n].reference.size(); ++i) {
            const Detection &a = expected[n][matches[n].reference[i]], &b = detected[n][matches[n].candidate[i]];
            if (std::max(a.score, b.score) < static_cast<float>(floors[n])) continue;
            pairs.before.push_back(a), pairs.after.push_back(b), pairs.image.push_back(n);
            pairs.scale.push_back(std::max(1.0, golden.images[n].scale));
        }
    }
    verdict.evidence = static_cast<std::int64_t>(pairs.image.size());
    auto& problems = verdict.problems;
    const double rate = golden.same_artifact ? found_again : std::min(found_again, golden.min_match_rate);
    check_missing(golden, expected, detected, matches, floors, rate, problems);
    struct Part {
        std::string name;
        std::vector<char> chosen;
    };
    std::vector<Part> parts;
    std::set<std::int64_t> labels;
    for (const Detection& d : pairs.before) labels.insert(d.label);
    const auto choose = [&](const std::string& name, auto rule) {
        Part part{name, std::vector<char>(pairs.image.size())};
        for (std::size_t i = 0; i < part.chosen.size(); ++i) part.chosen[i] = rule(i);
        if (std::count(part.chosen.begin(), part.chosen.end(), char{1}) > 0) parts.push_back(std::move(part));
    };
    for (std::size_t n = 0; n < expected.size(); ++n)
        choose(golden.images[n].path, [&](std::size_t i) { return pairs.image[i] == n; });
    for (std::int64_t label : labels)
        choose(golden.name(label), [&](std::size_t i) { return pairs.before[i].label == label; });
    std::set<int> octaves;
    for (const Detection& d : pairs.before) octaves.insert(octave(d));
    for (int size : octaves)
        choose(size_name(size), [&](std::size_t i) { return octave(pairs.before[i]) == size; });
    // An octave may hold few of the objects that a coarse level sees, and many that a finer one does.
    std::vector<std::size_t> by_size(pairs.before.size()), rank(pairs.before.size());
    std::iota(by_size.begin(), by_size.end(), std::size_t{0});
    std::stable_sort(by_size.begin(), by_size.end(), [&](std::size_t a, std::size_t b) {
        return longer_side(pairs.before[a]) < longer_side(pairs.before[b]);
    });
    for (std::size_t place = 0; place < by_size.size(); ++place) rank[by_size[place]] = place;
    const std::string few = "the " + std::to_string(end_boxes) + " ";
    choose(few + "smallest boxes", [&](std::size_t i) { return rank[i] < end_boxes; });
    choose(few + "largest boxes", [&](std::size_t i) { return rank.size() - 1 - rank[i] < end_boxes; });
    std::vector<std::string> undecided;
    const auto quantities = differences(pairs);
    std::string sentence;
    for (const Quantity& quantity : quantities) {
        const Outcome outcome = test_median(quantity, std::vector<char>(pairs.image.size(), 1), 0.99, "", sentence);
        if (outcome == Outcome::failed) problems.push_back(sentence);
        if (outcome == Outcome::inconclusive)
            undecided.push_back(sentence + ", but the " + std::to_string(pairs.image.size()) +
                                " detections differ too much to decide");
    }
    for (const Part& part : parts)
        for (const Quantity& quantity : quantities)
            if (test_median(quantity, part.chosen, group_confidence, part.name, sentence) == Outcome::failed)
                problems.push_back(sentence);
    if (golden.has_certified) check_scatter(golden, expected, detected, problems);
    if (!problems.empty()) {
        verdict.values_outcome = Outcome::failed;
    } else if (pairs.image.size() < min_evidence) {
        problems.push_back("only " + std::to_string(pairs.image.size()) + " detections could be compared, " +
                           std::to_string(min_evidence) + " are needed");
    } else if (undecided.empty()) {
        verdict.values_outcome = Outcome::passed;
    } else {
        problems = undecided;
    }
}

}  // namespace detail

// Judges the detections of all golden images, in their order; the outcome and the summary are those of `verify`.
inline void judge(const Golden& golden, const std::vector<std::vector<Detection>>& detected, GoldenVerdict& verdict) {
    if (detected.size() != golden.images.size()) throw Error("There must be detections of every golden image.");
    std::int64_t judged = 0, missed = 0, extra = 0;
    for (std::size_t n = 0; n < golden.images.size(); ++n) {
        const auto& expected = golden.images[n].expected;
        const double floor = detail::judged_floor(golden, expected, detected[n], golden.max_score_delta);
        const auto matching = detail::match(expected, detected[n], golden.min_iou, golden.max_score_delta, floor);
        ImageResult result;
        result.path = golden.images[n].path;
        result.expected = static_cast<std::int64_t>(detail::count_from(expected, floor));
        result.detected = static_cast<std::int64_t>(detail::count_from(detected[n], floor));
        result.missed = static_cast<std::int64_t>(matching.missed.size()),
        result.extra = static_cast<std::int64_t>(matching.extra.size());
        for (std::size_t i = 0; i < matching.reference.size(); ++i) {
            const Detection &a = expected[matching.reference[i]], &b = detected[n][matching.candidate[i]];
            if (std::max(a.score, b.score) < static_cast<float>(floor)) continue;
            result.lowest_iou = std::min(result.lowest_iou, matching.iou[i]);
            result.largest_score_difference =
                std::max<double>(result.largest_score_difference, std::abs(a.score - b.score));
        }
        judged += result.expected + result.detected, missed += result.missed, extra += result.extra;
        verdict.images.push_back(result);
    }
    verdict.matched = judged > 0 ? 1 - static_cast<double>(missed + extra) / static_cast<double>(judged) : 0;
    detail::check_values(golden, detected, verdict);
    const bool lost = judged > 0 && verdict.matched < golden.min_match_rate;
    verdict.outcome = lost ? Outcome::failed : verdict.values_outcome;
    const auto percent = [](double share) { return detail::format("%.1f%%", 100 * share); };
    if (verdict.outcome == Outcome::inconclusive) {
        for (const auto& problem : verdict.problems) verdict.summary += (verdict.summary.empty() ? "" : "; ") + problem;
        return;
    }
    verdict.summary = judged == 0 ? "no golden detection is clear of the score threshold"
                                  : percent(verdict.matched) +
                                        " of the golden detections match (needed: " + percent(golden.min_match_rate) +
                                        "); " + std::to_string(missed) + " missed, " + std::to_string(extra) + " extra";
    for (std::size_t i = 0; i < verdict.problems.size() && i < 3; ++i) verdict.summary += "; " + verdict.problems[i];
}

// Compares a preprocessed golden image with its fingerprint; the largest fault of all images is named.
inline void check_preprocessing(const GoldenImage& golden, const Image& image, const TensorView& tensor,
                                const PreprocessSpec& spec, GoldenVerdict& verdict) {
    const Fingerprint actual = fingerprint(tensor);
    const double difference = fingerprint_difference(actual, golden.fingerprint, spec);
    verdict.exact += actual.sha256 == golden.fingerprint.sha256;
    if (difference <= verdict.difference) return;
    verdict.difference = difference;
    verdict.prepared = difference <= detail::max_cell_difference;
    const auto shape = [](const Fingerprint& of) {
        std::string text = of.dtype + "[";
        for (std::size_t i = 0; i < of.shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(of.shape[i]);
        return text + "]";
    };
    verdict.fault = "'" + golden.path + "': ";
    if (!std::isfinite(difference)) {
        verdict.fault += "the tensor must be " + shape(golden.fingerprint) + ", it is " + shape(actual);
    } else {
        PreprocessSpec swapped = spec;
        swapped.channel_order = spec.channel_order == ChannelOrder::rgb ? ChannelOrder::bgr : ChannelOrder::rgb;
        std::vector<std::uint8_t> other(static_cast<std::size_t>(tensor.shape[1] * tensor.shape[2] * tensor.shape[3]) *
                                        (tensor.dtype == DType::uint8 ? 1 : 4));
        double otherwise = std::numeric_limits<double>::infinity();
        if (spec.channels() == 3) {
            preprocess(image.view(), swapped, other.data(), {tensor.shape[2], tensor.shape[3]});
            otherwise = fingerprint_difference(fingerprint({"images", tensor.dtype, tensor.shape, other.data()}),
                                               golden.fingerprint, spec);
        }
        const auto word = [](ChannelOrder order) { return order == ChannelOrder::rgb ? "rgb" : "bgr"; };
        if (otherwise <= detail::max_cell_difference)
            verdict.fault += std::string("the colour channels are swapped: they are ") + word(spec.channel_order) +
                             ", they must be " + word(swapped.channel_order);
        else
            verdict.fault +=
                "a region differs by " + detail::format("%.2f", difference) + " of 255 levels (allowed: 0.5)";
    }
}

// Prepares every golden image of the package `folder`, and detects in it where all of them are prepared as certified.
inline GoldenVerdict verify(const Golden& golden, Detector& detector, const std::filesystem::path& folder) {
    GoldenVerdict verdict;
    std::vector<Image> images;
    Size size;
    Letterbox letterbox;
    for (const GoldenImage& record : golden.images) {
        images.push_back(read_ppm(folder / record.pixels));
        if (images.back().height != record.size.height || images.back().width != record.size.width)
            throw Error("'" + record.pixels + "' does not have the recorded size.");
        const auto inputs = detector.prepare(images.back().view(), size, letterbox);
        check_preprocessing(record, images.back(), inputs.front(), detector.contract().preprocess, verdict);
    }
    if (!verdict.prepared) {
        verdict.outcome = verdict.values_outcome = Outcome::failed;
        verdict.summary = "preprocessing differs: " + verdict.fault;
        return verdict;
    }
    std::vector<std::vector<Detection>> detected;
    for (const Image& image : images) detected.push_back(detector.detect(image.view()));
    judge(golden, detected, verdict);
    return verdict;
}

// The verdict with the names of Python's record, on one line.
inline std::string to_json(const GoldenVerdict& verdict) {
    const auto number = [](double value) { return detail::format("%.9g", std::min(value, 1e9)); };
    std::string out = std::string("{\"outcome\": \"") + outcome_name(verdict.outcome) +
                      "\", \"matched\": " + number(verdict.matched) + ", \"summary\": " + json_text(verdict.summary) +
                      ", \"preprocessing\": {\"passed\": " + (verdict.prepared ? "true" : "false") +
                      ", \"exact\": " + std::to_string(verdict.exact) +
                      ", \"difference\": " + number(verdict.difference) + "}, \"values\": {\"outcome\": \"" +
                      outcome_name(verdict.values_outcome) + "\", \"evidence\": " + std::to_string(verdict.evidence) +
                      ", \"problems\": [";
    for (std::size_t i = 0; i < verdict.problems.size(); ++i)
        out += (i == 0 ? "" : ", ") + json_text(verdict.problems[i]);
    out += "]}, \"images\": [";
    for (std::size_t i = 0; i < verdict.images.size(); ++i) {
        const ImageResult& image = verdict.images[i];
        out += (i == 0 ? "{\"path\": " : ", {\"path\": ") + json_text(image.path) +
               ", \"expected\": " + std::to_string(image.expected) +
               ", \"detected\": " + std::to_string(image.detected) + ", \"missed\": " + std::to_string(image.missed) +
               ", \"extra\": " + std::to_string(image.extra) + ", \"lowest_iou\": " + number(image.lowest_iou) +
               ", \"largest_score_difference\": " + number(image.largest_score_difference) + "}";
    }
    return out + "]}";
}

}  // namespace fcos_deploy
