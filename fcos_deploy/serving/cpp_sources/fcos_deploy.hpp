// fcos_deploy.hpp: everything around an exported FCOS network, in C++17 with the standard library alone.
//
// What a contract says is done here as fcos-deploy's Python does it: preprocessing, decoding of the raw, candidates and
// nms tails, non-maximum suppression of each ecosystem, labels. An adapter beside this file runs the network.
// Everything is checked on the way in; what does not fit raises `fcos_deploy::Error`. Functions keep no state.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fcos_deploy_contract.hpp"

namespace fcos_deploy {

// ------------------------------------------------------------------------------------------------- preprocessing

// Pixels in memory: (height, width, 3) uint8, rows `row_bytes` apart, in RGB order or OpenCV's BGR.
struct ImageView {
    const std::uint8_t* pixels = nullptr;
    std::int64_t height = 0, width = 0, row_bytes = 0;
    ChannelOrder order = ChannelOrder::rgb;
};

// Sizes in pixels of an image and of its resized copy in the upper left of the input tensor.
struct Letterbox {
    Size image, resized;
    float scale_x() const { return static_cast<float>(image.width) / static_cast<float>(resized.width); }
    float scale_y() const { return static_cast<float>(image.height) / static_cast<float>(resized.height); }
};

// (h, w, 3) uint8 RGB of a binary PPM file (P6, 8 bits).
struct Image {
    std::vector<std::uint8_t> pixels;
    std::int64_t height = 0, width = 0;

    ImageView view() const { return {pixels.data(), height, width, 3 * width, ChannelOrder::rgb}; }
};

inline Image read_ppm(const std::filesystem::path& path) {
    const std::string content = read_file(path, std::size_t{1} << 30);
    std::istringstream header(content.substr(0, 64));
    header.imbue(std::locale::classic());
    std::string magic;
    Image image;
    int white = 0;
    if (!(header >> magic >> image.width >> image.height >> white) || magic != "P6" || white != 255 ||
        image.width < 1 || image.height < 1 || image.width > detail::max_side || image.height > detail::max_side)
        throw Error("'" + path.string() + "' is not a binary PPM file with 255 for white.");
    const auto first = static_cast<std::size_t>(header.tellg()) + 1,
               size = static_cast<std::size_t>(3 * image.width * image.height);
    if (content.size() != first + size)
        throw Error("'" + path.string() + "' is cut off, or has something behind its pixels.");
    image.pixels.assign(content.begin() + static_cast<std::ptrdiff_t>(first), content.end());
    return image;
}

// Height and width of an image after resizing, before padding.
inline Size resized_size(Size image, const PreprocessSpec& spec) {
    const double h = static_cast<double>(image.height), w = static_cast<double>(image.width);
    const bool canvas = spec.canvas.height > 0;
    const Size bounds = spec.content.height > 0 ? spec.content
                        : canvas                ? spec.canvas
                                                : Size{spec.shortest, spec.longest};
    const double first = static_cast<double>(bounds.height), second = static_cast<double>(bounds.width);
    const auto whole = [](double value) { return static_cast<std::int64_t>(value); };
    Size size;
    if (spec.size_rule == SizeRule::letterbox) {
        const double scale = std::min(first / h, second / w);
        size = {std::min(whole(h * scale + 0.5), bounds.height), std::min(whole(w * scale + 0.5), bounds.width)};
    } else if (spec.size_rule == SizeRule::stretch) {
        size = bounds;
    } else if (spec.size_rule == SizeRule::detectron2) {
        const double scale = first / std::min(h, w);
        double new_h = h < w ? first : scale * h, new_w = h < w ? scale * w : first;
        if (std::max(new_h, new_w) > second) {
            const double shrink = second / std::max(new_h, new_w);
            new_h *= shrink, new_w *= shrink;
        }
        size = {whole(new_h + 0.5), whole(new_w + 0.5)};
    } else if (spec.size_rule == SizeRule::tianzhi) {
        const double low = std::min(h, w), high = std::max(h, w);
        double edge = first;
        if (high / low * edge > second) edge = std::nearbyint(second * low / high);
        if (edge == low) size = image;
        else size = w < h ? Size{whole(edge * h / w), whole(edge)} : Size{whole(edge), whole(edge * w / h)};
    } else {
        const double scale = std::min(first / std::min(h, w), second / std::max(h, w));
        const double rounding = spec.size_rule == SizeRule::mmdetection ? 0.5 : 0.0;
        size = {whole(h * scale + rounding), whole(w * scale + rounding)};
    }
    return {std::max<std::int64_t>(size.height, 1), std::max<std::int64_t>(size.width, 1)};
}

// Height and width of the input tensor for an image.
inline Size padded_size(Size image, const PreprocessSpec& spec) {
    if (spec.canvas.height > 0) return spec.canvas;
    const Size size = resized_size(image, spec);
    const auto up = [&](std::int64_t n) { return (n + spec.size_divisor - 1) / spec.size_divisor * spec.size_divisor; };
    return {up(size.height), up(size.width)};
}

namespace detail {

// Where output place i of n comes from among `count` inputs: the lower of two neighbours, and the upper one's weight.
template <typename Coordinate>
std::vector<std::pair<std::int64_t, float>> neighbours(std::int64_t count, std::int64_t n) {
    const double scale = static_cast<double>(count) / static_cast<double>(n);
    std::vector<std::pair<std::int64_t, float>> places(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<Coordinate>((static_cast<double>(i) + 0.5) * scale - 0.5);
        const auto low = static_cast<std::int64_t>(std::floor(at));
        places[static_cast<std::size_t>(i)] = {low, static_cast<float>(at - static_cast<Coordinate>(low))};
    }
    return places;
}

// Half-pixel bilinear: each source row is resized horizontally once (`across`), pairs are blended (`down`).
template <typename Sum, typename Coordinate, typename Weight, typename Across, typename Down>
void bilinear(Size from, Size to, std::int64_t channels, Weight weight, Across across, Down down) {
    auto columns = neighbours<Coordinate>(from.width, to.width);
    for (auto& [low, part] : columns) {
        if (low < 0) low = 0, part = 0;
        if (low >= from.width - 1) low = from.width - 1, part = 0;
    }
    using Factor = decltype(weight(0.0F));
    std::vector<Factor> lower, upper;
    std::vector<std::int64_t> left, right;
    for (const auto& [low, part] : columns) {
        lower.push_back(weight(1 - part)), upper.push_back(weight(part));
        left.push_back(low * channels), right.push_back(std::min(low + 1, from.width - 1) * channels);
    }
    const auto row_values = static_cast<std::size_t>(to.width * channels);
    std::array<std::vector<Sum>, 2> rows{std::vector<Sum>(row_values), std::vector<Sum>(row_values)};
    std::array<std::int64_t, 2> held{-1, -1};
    const auto row = [&](std::int64_t y, int other) {
        y = std::min(std::max<std::int64_t>(y, 0), from.height - 1);
        for (int k = 0; k < 2; ++k)
            if (held[static_cast<std::size_t>(k)] == y) return k;
        const int k = other == 0 ? 1 : 0;
        Sum* out = rows[static_cast<std::size_t>(k)].data();
        for (std::size_t i = 0; i < left.size(); ++i)
            for (std::int64_t c = 0; c < channels; ++c)
                *out++ = across(y, left[i] + c) * lower[i] + across(y, right[i] + c) * upper[i];
        held[static_cast<std::size_t>(k)] = y;
        return k;
    };
    const auto places = neighbours<Coordinate>(from.height, to.height);
    for (std::int64_t y = 0; y < to.height; ++y) {
        const auto [low, part] = places[static_cast<std::size_t>(y)];
        const int a = row(low, held[1] == std::min(std::max<std::int64_t>(low + 1, 0), from.height - 1) ? 1 : 0);
        const int b = row(low + 1, a);
        down(y, rows[static_cast<std::size_t>(a)].data(), weight(1 - part), rows[static_cast<std::size_t>(b)].data(),
             weight(part));
    }
}

// Pillow's antialiased bilinear along one axis of `lines` lines: weights in 22-bit fixed point, result rounded to levels.
inline void pillow_axis(const std::uint8_t* in, std::uint8_t* out, std::int64_t count, std::int64_t n,
                        std::int64_t lines, std::int64_t step, std::int64_t line_in, std::int64_t line_out,
                        std::int64_t run) {
    const double scale = static_cast<double>(count) / static_cast<double>(n), support = std::max(scale, 1.0);
    std::vector<double> exact;
    std::vector<std::int64_t> weights, sums(static_cast<std::size_t>(run));
    for (std::int64_t i = 0; i < n; ++i) {
        const double center = (static_cast<double>(i) + 0.5) * scale;
        const auto first = std::max<std::int64_t>(static_cast<std::int64_t>(center - support + 0.5), 0);
        const auto end = std::min<std::int64_t>(static_cast<std::int64_t>(center + support + 0.5), count);
        exact.clear(), weights.clear();
        double total = 0;
        for (std::int64_t k = first; k < end; ++k) {
            const double far = std::abs((static_cast<double>(k) - center + 0.5) * (1.0 / support));
            exact.push_back(far < 1 ? 1 - far : 0);
            total += exact.back();
        }
        for (double weight : exact)
            weights.push_back(static_cast<std::int64_t>(0.5 + (total != 0 ? weight / total : weight) * (1 << 22)));
        for (std::int64_t line = 0; line < lines; ++line) {
            std::fill(sums.begin(), sums.end(), std::int64_t{1} << 21);
            for (std::int64_t k = first; k < end; ++k) {
                const std::uint8_t* source = in + line * line_in + k * step;
                const std::int64_t weight = weights[static_cast<std::size_t>(k - first)];
                for (std::int64_t c = 0; c < run; ++c) sums[static_cast<std::size_t>(c)] += source[c] * weight;
            }
            std::uint8_t* target = out + line * line_out + i * step;
            for (std::int64_t c = 0; c < run; ++c)
                target[c] =
                    static_cast<std::uint8_t>(std::min<std::int64_t>(sums[static_cast<std::size_t>(c)] >> 22, 255));
        }
    }
}

}  // namespace detail

// Resize, normalise where the input is float32, order the channels and pad: fills `out`, (channels, H, W) of the
// contract's input dtype with (H, W) = `size`, which must have room for the resized image (see `padded_size`).
inline Letterbox preprocess(const ImageView& image, const PreprocessSpec& spec, void* out, Size size) {
    using detail::check;
    check(image.pixels != nullptr && image.height >= 1 && image.width >= 1 && image.height <= detail::max_side &&
              image.width <= detail::max_side && image.order != ChannelOrder::gray &&
              image.row_bytes >= 3 * image.width,
          "An image must be uint8 (height, width, 3) in RGB or BGR order, of at most 65536 pixels a side.");
    const Size from{image.height, image.width}, to = resized_size(from, spec);
    check(to.height <= size.height && to.width <= size.width, "The input tensor is too small for this image.");
    const std::int64_t channels = static_cast<std::int64_t>(spec.channels());
    std::vector<std::uint8_t> gray;
    const std::uint8_t* pixels = image.pixels;
    std::int64_t pitch = image.row_bytes;
    if (channels == 1) {  // OpenCV's 0.299 R + 0.587 G + 0.114 B in 15-bit fixed point
        gray.resize(static_cast<std::size_t>(from.height * from.width));
        const int red = image.order == ChannelOrder::rgb ? 0 : 2;
        for (std::int64_t y = 0, i = 0; y < from.height; ++y)
            for (const std::uint8_t* p = pixels + y * pitch; p < pixels + y * pitch + 3 * from.width; p += 3, ++i)
                gray[static_cast<std::size_t>(i)] =
                    static_cast<std::uint8_t>((9798 * p[red] + 19235 * p[1] + 3735 * p[2 - red] + 16384) >> 15);
        pixels = gray.data(), pitch = from.width;
    }
    // The plane of each channel as it lies in memory, and what its 256 levels become.
    const bool swap = (spec.channel_order == ChannelOrder::bgr) != (image.order == ChannelOrder::bgr);
    std::array<std::int64_t, 3> plane{};
    std::vector<std::array<float, 256>> levels(static_cast<std::size_t>(channels));
    std::array<float, 3> mean{}, deviation{};
    const float pixel_scale = static_cast<float>(spec.pixel_scale);
    for (std::size_t c = 0; c < levels.size(); ++c) {
        plane[c] = channels == 3 && swap ? 2 - static_cast<std::int64_t>(c) : static_cast<std::int64_t>(c);
        mean[c] = static_cast<float>(spec.mean[static_cast<std::size_t>(plane[c])]);
        deviation[c] = static_cast<float>(spec.std[static_cast<std::size_t>(plane[c])]);
        for (int level = 0; level < 256; ++level)
            levels[c][static_cast<std::size_t>(level)] =
                (static_cast<float>(level) / pixel_scale - mean[c]) / deviation[c];
    }
    const bool as_float = spec.input_dtype == DType::float32;
    auto* bytes = static_cast<std::uint8_t*>(out);
    auto* floats = static_cast<float*>(out);
    const auto place = [&](std::int64_t c, std::int64_t y) {
        return (plane[static_cast<std::size_t>(c)] * size.height + y) * size.width;
    };
    const auto store_levels = [&](std::int64_t y, const std::uint8_t* row) {
        for (std::int64_t c = 0; c < channels; ++c) {
            const auto& table = levels[static_cast<std::size_t>(c)];
            if (as_float)
                for (std::int64_t x = 0; x < to.width; ++x) floats[place(c, y) + x] = table[row[x * channels + c]];
            else
                for (std::int64_t x = 0; x < to.width; ++x) bytes[place(c, y) + x] = row[x * channels + c];
        }
    };
    const bool same = from.height == to.height && from.width == to.width;
    const auto row_bytes = static_cast<std::size_t>(to.width * channels);
    std::vector<std::uint8_t> line(row_bytes);
    if (as_float && (spec.resize_order == ResizeOrder::normalize_first || spec.resize_filter == ResizeFilter::torch)) {
        const bool first = spec.resize_order == ResizeOrder::normalize_first;
        const auto load = [&](std::int64_t y, std::int64_t i) {
            const std::uint8_t level = pixels[y * pitch + i];
            return first ? levels[static_cast<std::size_t>(i % channels)][level] : static_cast<float>(level);
        };
        const auto blend = [&](std::int64_t y, const float* a, float wa, const float* b, float wb) {
            for (std::int64_t c = 0; c < channels; ++c)
                for (std::int64_t x = 0; x < to.width; ++x) {
                    const float value = a[x * channels + c] * wa + b[x * channels + c] * wb;
                    const auto k = static_cast<std::size_t>(c);
                    floats[place(c, y) + x] = first ? value : (value / pixel_scale - mean[k]) / deviation[k];
                }
        };
        detail::bilinear<float, double>(from, to, channels, [](float part) { return part; }, load, blend);
    } else if (same) {
        for (std::int64_t y = 0; y < to.height; ++y) store_levels(y, pixels + y * pitch);
    } else if (spec.resize_filter == ResizeFilter::pil) {
        std::vector<std::uint8_t> wide(static_cast<std::size_t>(from.height) * row_bytes), tall;
        if (from.width != to.width)
            detail::pillow_axis(pixels, wide.data(), from.width, to.width, from.height, channels, pitch,
                                to.width * channels, channels);
        else
            for (std::int64_t y = 0; y < from.height; ++y)
                std::memcpy(&wide[static_cast<std::size_t>(y) * row_bytes], pixels + y * pitch, row_bytes);
        tall.resize(static_cast<std::size_t>(to.height) * row_bytes);
        const auto step = static_cast<std::int64_t>(row_bytes);
        if (from.height != to.height)
            detail::pillow_axis(wide.data(), tall.data(), from.height, to.height, 1, step, 0, 0, step);
        else tall.swap(wide);
        for (std::int64_t y = 0; y < to.height; ++y) store_levels(y, &tall[static_cast<std::size_t>(y) * row_bytes]);
    } else if (from.height == 2 * to.height && from.width == 2 * to.width) {  // OpenCV takes the mean of each 2x2 here
        for (std::int64_t y = 0; y < to.height; ++y) {
            const std::uint8_t *a = pixels + 2 * y * pitch, *b = a + pitch;
            for (std::int64_t x = 0, i = 0; x < to.width; ++x)
                for (std::int64_t c = 0; c < channels; ++c, ++i) {
                    const std::int64_t l = 2 * x * channels + c, r = l + channels;
                    line[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>((a[l] + a[r] + b[l] + b[r] + 2) >> 2);
                }
            store_levels(y, line.data());
        }
    } else {  // OpenCV's fixed point: 11-bit weights, sums cut to 16 bits between the two directions
        const auto weight = [](float part) { return static_cast<int>(std::nearbyint(part * 2048)); };
        const auto blend = [&](std::int64_t y, const int* a, int wa, const int* b, int wb) {
            for (std::size_t i = 0; i < row_bytes; ++i)
                line[i] = static_cast<std::uint8_t>((((wa * (a[i] >> 4)) >> 16) + ((wb * (b[i] >> 4)) >> 16) + 2) >> 2);
            store_levels(y, line.data());
        };
        detail::bilinear<int, float>(
            from, to, channels, weight, [&](std::int64_t y, std::int64_t i) { return int{pixels[y * pitch + i]}; },
            blend);
    }
    for (std::int64_t p = 0; p < channels; ++p)
        for (std::int64_t y = 0; y < size.height; ++y) {
            const std::int64_t first = (p * size.height + y) * size.width, content = y < to.height ? to.width : 0;
            const double padding = spec.padding(static_cast<std::size_t>(p));
            if (as_float) std::fill(floats + first + content, floats + first + size.width, static_cast<float>(padding));
            else std::fill(bytes + first + content, bytes + first + size.width, static_cast<std::uint8_t>(padding));
        }
    return {from, to};
}

// ------------------------------------------------------------------------------------- decoding and suppression

// A tensor in memory that somebody else owns: C order, without padding.
struct TensorView {
    std::string name;
    DType dtype = DType::float32;
    std::vector<std::int64_t> shape;
    const void* data = nullptr;
};

// Box xyxy in image pixels; `label` with the contract's label map applied.
struct Detection {
    std::array<float, 4> box{};
    float score = 0;
    std::int64_t label = 0;
};

namespace detail {

inline float half_to_float(std::uint16_t bits) {
    const float magnitude =
        (bits & 0x7C00) == 0x7C00
            ? ((bits & 0x3FF) ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
        : (bits & 0x7C00) == 0 ? std::ldexp(static_cast<float>(bits & 0x3FF), -24)
                               : std::ldexp(static_cast<float>((bits & 0x3FF) | 0x400), ((bits >> 10) & 31) - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

// The values of image `index` of a batch, (rows, columns); columns 0: any number. Halves are widened into `widened`.
struct Values {
    const float* floats = nullptr;
    const void* raw = nullptr;
    DType dtype = DType::float32;
    std::int64_t rows = 0, columns = 1;
    std::vector<float> widened;

    std::int64_t integer(std::int64_t i) const {
        if (dtype == DType::int64) return static_cast<const std::int64_t*>(raw)[i];
        return static_cast<const std::int32_t*>(raw)[i];
    }
};

inline Values values_of(const std::vector<TensorView>& outputs, const char* name, std::int64_t index,
                        std::int64_t columns) {
    const auto at = std::find_if(outputs.begin(), outputs.end(), [&](const TensorView& t) { return t.name == name; });
    const std::string what = "Output '" + std::string(name) + "'";
    if (at == outputs.end() || at->data == nullptr) throw Error(what + " is missing.");
    const bool integers = at->dtype == DType::int32 || at->dtype == DType::int64;
    const bool due = std::string_view(name) == "labels" || std::string_view(name) == "num_detections" ||
                     std::string_view(name) == "settled";
    if (integers != due || at->dtype == DType::uint8) throw Error(what + " has another dtype than the contract's.");
    const auto& shape = at->shape;
    const std::size_t rank = columns < 0 ? 2 : 3;
    if (shape.size() != rank || index < 0 || index >= shape[0] || shape[1] < 0 ||
        (rank == 3 && (shape[2] < 1 || (columns > 0 && shape[2] != columns))))
        throw Error(what + " does not have the contract's shape.");
    Values values;
    values.dtype = at->dtype, values.rows = shape[1], values.columns = rank == 3 ? shape[2] : 1;
    const auto count = static_cast<std::size_t>(values.rows * values.columns);
    const auto first = static_cast<std::size_t>(index) * count;
    if (integers) {
        values.raw = static_cast<const char*>(at->data) + first * (at->dtype == DType::int64 ? 8 : 4);
    } else if (at->dtype == DType::float32) {
        values.floats = static_cast<const float*>(at->data) + first;
    } else {
        const auto* halves = static_cast<const std::uint16_t*>(at->data) + first;
        values.widened.resize(count);
        std::transform(halves, halves + count, values.widened.begin(), half_to_float);
        values.floats = values.widened.data();
    }
    return values;
}

// A NaN passes no threshold, so that a broken engine would look like an empty image.
inline void check_finite(const Values& values, std::int64_t rows, const char* name) {
    std::uint32_t largest = 0;  // magnitude, as bits: those of infinity and NaN are above all others
    for (std::int64_t i = 0; i < rows * values.columns; ++i) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, values.floats + i, sizeof bits);
        largest = std::max(largest, bits & 0x7FFFFFFF);
    }
    if (largest >= 0x7F800000)
        throw Error("Output '" + std::string(name) +
                    "' is not finite: the model is damaged, or overflows in this precision.");
}

inline float sigmoid(float logit) {
    return 1.0F / (1.0F + std::exp(-std::max(logit, -87.0F)));
}

inline float apply(ScoreForm form, float p, float q) {
    return form == ScoreForm::p ? p : form == ScoreForm::pq ? p * q : std::sqrt(p * q);
}

struct Candidate {
    std::array<float, 4> box{};  // network-input pixels
    float score = 0, rank = 0;
    std::int64_t channel = 0, position = 0;  // position: location * classes + channel
};

inline bool better(const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.position < b.position;
}

// Leave the `limit` that come first by `before`, in that order.
template <typename Item, typename Before>
void keep_first(std::vector<Item>& items, std::int64_t limit, Before before) {
    if (static_cast<std::int64_t>(items.size()) > limit) {
        std::nth_element(items.begin(), items.begin() + limit, items.end(), before);
        items.resize(static_cast<std::size_t>(limit));
    }
    std::sort(items.begin(), items.end(), before);
}

// The pairs of location and class that pass the gate, of each level the best; `size` is the padded (H, W).
inline std::vector<Candidate> decode(const Values& logits, const Values& distances, const Values& centerness,
                                     const DecodeSpec& spec, Size size) {
    std::vector<Candidate> candidates, level;
    const std::int64_t classes = logits.columns;
    // q <= 1, so that p * q >= t needs p >= t: a logit below that of t fails whatever the centerness is. The margin of
    // 1e-5 is ten times what sigmoid, product and root round by in float32.
    double least = spec.score_threshold * (1 - 1e-5);
    if (spec.gate == ScoreForm::sqrt_pq) least *= least;
    const float least_logit =
        least > 0 ? static_cast<float>(std::log(least / (1 - least))) : -std::numeric_limits<float>::infinity();
    const float threshold = static_cast<float>(spec.score_threshold);
    std::int64_t first = 0;
    for (std::int64_t stride : spec.strides) {
        const std::int64_t rows = (size.height + stride - 1) / stride, columns = (size.width + stride - 1) / stride,
                           end = first + rows * columns;
        check(end <= logits.rows, "The head outputs have fewer locations than the input size asks for.");
        std::vector<char> chosen;
        if (spec.rank_per_location && end - first > spec.pre_nms_top_k) {
            std::vector<std::pair<float, std::int64_t>> best;
            for (std::int64_t i = first; i < end; ++i) {
                const float* row = logits.floats + i * classes;
                best.emplace_back(
                    -apply(spec.rank, sigmoid(*std::max_element(row, row + classes)), sigmoid(centerness.floats[i])),
                    i);
            }
            keep_first(best, spec.pre_nms_top_k, std::less<>());
            chosen.resize(static_cast<std::size_t>(end - first));
            for (const auto& location : best) chosen[static_cast<std::size_t>(location.second - first)] = 1;
        }
        const bool torchvision = spec.centers == CenterMode::torchvision;
        const double step_x = static_cast<double>(torchvision ? size.width / columns : stride),
                     step_y = static_cast<double>(torchvision ? size.height / rows : stride);
        level.clear();
        float floor = 0;  // the rank of the worst of the best so far, once there are enough
        for (std::int64_t i = first; i < end; ++i) {
            const float* row = logits.floats + i * classes;
            int above = 0;
            for (std::int64_t c = 0; c < classes; ++c) above |= row[c] > least_logit;
            if (!above || (!chosen.empty() && !chosen[static_cast<std::size_t>(i - first)])) continue;
            const float q = sigmoid(centerness.floats[i]), *d = distances.floats + i * 4;
            float bar = least_logit;
            if (floor > 0) {
                // rank(p, q) >= floor needs p >= floor / q, or floor^2 / q: one logarithm in place of many
                // exponentials.
                double needed = static_cast<double>(floor) * (1 - 1e-5);
                if (spec.rank == ScoreForm::sqrt_pq) needed *= needed;
                if (spec.rank != ScoreForm::p) needed /= static_cast<double>(q);
                if (!(needed < 1)) continue;
                bar = std::max(bar, static_cast<float>(std::log(needed / (1 - needed)) - 1e-5));
            }
            const double offset = torchvision ? 0.0 : 0.5;
            const float x = static_cast<float>((static_cast<double>((i - first) % columns) + offset) * step_x);
            const float y = static_cast<float>((static_cast<double>((i - first) / columns) + offset) * step_y);
            for (std::int64_t c = 0; c < classes; ++c) {
                if (!(row[c] > bar)) continue;
                const float p = sigmoid(row[c]);
                if (apply(spec.gate, p, q) > threshold)
                    level.push_back({{x - d[0], y - d[1], x + d[2], y + d[3]},
                                     apply(spec.score, p, q),
                                     apply(spec.rank, p, q),
                                     c,
                                     i * classes + c});
            }
            const std::int64_t enough = spec.pre_nms_top_k;
            if (!spec.rank_per_location && static_cast<std::int64_t>(level.size()) > 2 * enough) {
                std::nth_element(level.begin(), level.begin() + enough - 1, level.end(), better);
                level.resize(static_cast<std::size_t>(enough));
                floor = level.back().rank;
            }
        }
        keep_first(level, spec.rank_per_location ? static_cast<std::int64_t>(level.size()) : spec.pre_nms_top_k,
                   better);
        if (!spec.sort_by_score)
            std::sort(level.begin(), level.end(),
                      [](const Candidate& a, const Candidate& b) { return a.position < b.position; });
        candidates.insert(candidates.end(), level.begin(), level.end());
        first = end;
    }
    check(first == logits.rows && first == distances.rows && first == centerness.rows,
          "The head outputs do not have as many locations as the input size asks for.");
    return candidates;
}

// Whether two boxes overlap by more than the threshold; in double, as COCO's evaluation measures.
inline bool overlap(const std::array<float, 4>& a, const std::array<float, 4>& b, const DecodeSpec& spec) {
    const auto side = [&](std::size_t k, double low, double high) {
        return std::max(std::min<double>(a[k + 2], b[k + 2]) - std::max<double>(a[k], b[k]) + low, high);
    };
    const double common = side(0, spec.iou_offset, 0.0) * side(1, spec.iou_offset, 0.0);
    const auto area = [&](const std::array<float, 4>& box) {
        return (static_cast<double>(box[2]) - box[0] + spec.iou_offset) *
               (static_cast<double>(box[3]) - box[1] + spec.iou_offset);
    };
    return common / std::max(area(a) + area(b) - common, 1e-300) > spec.iou_threshold;
}

inline void clip(std::array<float, 4>& box, float width, float height) {
    for (std::size_t k : {0U, 2U}) box[k] = std::min(std::max(box[k], 0.0F), width);
    for (std::size_t k : {1U, 3U}) box[k] = std::min(std::max(box[k], 0.0F), height);
}

inline std::array<float, 4> to_image(const std::array<float, 4>& box, const Letterbox& letterbox) {
    const float x = letterbox.scale_x(), y = letterbox.scale_y();
    return {box[0] * x, box[1] * y, box[2] * x, box[3] * y};
}

// Greedy, within each class, best score first and earlier ones first among equals; in the profile's order.
inline std::vector<Candidate> suppress(std::vector<Candidate> candidates, const DecodeSpec& spec, Size size,
                                       const Letterbox& letterbox) {
    const float less = spec.clip == BoxClip::image_minus_one ? 1.0F : 0.0F;
    const Size bounds = spec.clip == BoxClip::input ? size : letterbox.resized;
    std::vector<std::array<float, 4>> measured;
    std::vector<std::size_t> order;
    for (Candidate& candidate : candidates) {
        if (spec.clip != BoxClip::none)
            clip(candidate.box, static_cast<float>(bounds.width) - less, static_cast<float>(bounds.height) - less);
        measured.push_back(spec.nms_space == NmsSpace::original ? to_image(candidate.box, letterbox) : candidate.box);
        const auto& box = measured.back();
        if (spec.box_filter != BoxFilter::before_nms || std::min(box[2] - box[0], box[3] - box[1]) > spec.min_box_size)
            order.push_back(measured.size() - 1);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return candidates[a].score > candidates[b].score; });
    std::vector<std::size_t> kept;
    const auto limit = static_cast<std::size_t>(spec.max_detections);
    for (std::size_t i : order) {
        if (kept.size() >= limit && (!spec.keep_ties || candidates[i].score < candidates[kept[limit - 1]].score)) break;
        const bool free = std::none_of(kept.begin(), kept.end(), [&](std::size_t k) {
            return (spec.class_agnostic || candidates[k].channel == candidates[i].channel) &&
                   overlap(measured[k], measured[i], spec);
        });
        if (free) kept.push_back(i);
    }
    if (!spec.sort_by_score) std::sort(kept.begin(), kept.end());
    std::vector<Candidate> survivors;
    for (std::size_t i : kept) survivors.push_back(candidates[i]);
    return survivors;
}

}  // namespace detail

// Detections of image `index` of a batch in image pixels. `outputs`: those of the contract's tail, float32 or float16
// and int32 or int64. `size`: the padded (H, W) of the batch.
inline std::vector<Detection> postprocess(const std::vector<TensorView>& outputs, const Contract& contract,
                                          std::int64_t index, Size size, const Letterbox& letterbox) {
    const DecodeSpec& spec = contract.decode;
    std::vector<detail::Candidate> candidates;
    if (contract.tail == Tail::raw) {
        const auto logits = detail::values_of(outputs, "cls_logits", index, contract.classes());
        const auto distances = detail::values_of(outputs, "distances", index, 4),
                   centerness = detail::values_of(outputs, "centerness", index, 1);
        detail::check_finite(logits, logits.rows, "cls_logits");
        detail::check_finite(distances, distances.rows, "distances"),
            detail::check_finite(centerness, centerness.rows, "centerness");
        candidates = detail::decode(logits, distances, centerness, spec, size);
    } else {
        const auto boxes = detail::values_of(outputs, "boxes", index, 4),
                   scores = detail::values_of(outputs, "scores", index, -1);
        const auto labels = detail::values_of(outputs, "labels", index, -1);
        std::int64_t rows = scores.rows;
        if (boxes.rows != rows || labels.rows != rows)
            throw Error("Outputs 'boxes', 'scores' and 'labels' do not belong together.");
        if (contract.tail == Tail::nms) {
            rows = detail::values_of(outputs, "num_detections", index, -1).integer(0);
            if (rows < 0 || rows > scores.rows)
                throw Error("Output 'num_detections' must be in 0.." + std::to_string(scores.rows) + ", got " +
                            std::to_string(rows) + ".");
        }
        detail::check_finite(boxes, rows, "boxes"), detail::check_finite(scores, rows, "scores");
        for (std::int64_t i = 0; i < rows; ++i) {
            if (contract.tail == Tail::candidates && !(scores.floats[i] >= 0)) continue;
            const float* box = boxes.floats + 4 * i;
            candidates.push_back({{box[0], box[1], box[2], box[3]}, scores.floats[i], 0, labels.integer(i), i});
        }
    }
    if (contract.tail != Tail::nms) candidates = detail::suppress(std::move(candidates), spec, size, letterbox);
    std::vector<Detection> detections;
    for (const detail::Candidate& candidate : candidates) {
        if (candidate.channel < 0 || candidate.channel >= contract.classes())
            throw Error("Output 'labels' has a class that the contract does not.");
        auto box = detail::to_image(candidate.box, letterbox);
        if (spec.box_filter == BoxFilter::after_final_clip) {
            detail::clip(box, static_cast<float>(letterbox.image.width), static_cast<float>(letterbox.image.height));
            if (!(box[2] > box[0] && box[3] > box[1])) continue;
        }
        detections.push_back({box, candidate.score, contract.label(candidate.channel)});
    }
    return detections;
}

// ------------------------------------------------------------------------------------------------------- detector

// A model in a runtime; the adapters beside this file are sessions. Outputs stay valid until the next run.
class Session {
public:
    virtual ~Session() = default;
    virtual std::vector<TensorView> run(const std::vector<TensorView>& inputs) = 0;
    virtual std::string description() const = 0;
};

// Image in, detections out, one at a time. Not for several threads at once: give each a detector of its own.
class Detector {
public:
    Detector(std::unique_ptr<Session> session, Contract contract)
        : contract_(std::move(contract)), session_(std::move(session)) {}

    const Contract& contract() const { return contract_; }
    Session& session() { return *session_; }

    // The input tensors of an image, which the next call overwrites; `size` and `letterbox` are what `postprocess`
    // needs.
    std::vector<TensorView> prepare(const ImageView& image, Size& size, Letterbox& letterbox) {
        size = padded_size({std::max<std::int64_t>(image.height, 1), std::max<std::int64_t>(image.width, 1)},
                           contract_.preprocess);
        const auto channels = static_cast<std::int64_t>(contract_.preprocess.channels());
        if (size.height > detail::max_values / size.width / channels)
            throw Error("The input tensor would have more than 2^28 values.");
        const DType dtype = contract_.preprocess.input_dtype;
        pixels_.resize(static_cast<std::size_t>(channels * size.height * size.width * (dtype == DType::uint8 ? 1 : 4)));
        letterbox = preprocess(image, contract_.preprocess, pixels_.data(), size);
        std::vector<TensorView> inputs{{"images", dtype, {1, channels, size.height, size.width}, pixels_.data()}};
        const Size a = letterbox.resized, b = letterbox.image;
        sizes_ = {static_cast<float>(a.height), static_cast<float>(a.width), static_cast<float>(b.height),
                  static_cast<float>(b.width)};
        if (contract_.needs_image_sizes()) inputs.push_back({"image_sizes", DType::float32, {1, 4}, sizes_.data()});
        return inputs;
    }

    std::vector<Detection> detect(const ImageView& image) {
        Size size;
        Letterbox letterbox;
        const auto inputs = prepare(image, size, letterbox);
        return postprocess(session_->run(inputs), contract_, 0, size, letterbox);
    }

private:
    Contract contract_;
    std::unique_ptr<Session> session_;
    std::vector<std::uint8_t> pixels_;
    std::array<float, 4> sizes_{};
};

}  // namespace fcos_deploy
