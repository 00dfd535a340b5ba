// fcos_deploy_contract.hpp: what is around a network, as fcos-deploy wrote it: the contract, and the JSON that it is
// in.
//
// For files of any origin: the JSON reader is strict and bounded, a field that is missing, unknown or ill-typed is an
// error with its place, and what no detector can have is refused. All errors are `fcos_deploy::Error`.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <locale>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fcos_deploy {

// A file, tensor or image that does not fit; what() is one sentence.
class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// A JSON value (RFC 8259) of text of any origin: UTF-8, no key twice in an object, at most 64 levels deep.
class Json {
public:
    enum class Kind { null, boolean, integer, number, text, array, object };
    static constexpr std::size_t max_bytes = std::size_t{64} << 20;

    static Json parse(std::string_view text) {
        Parser parser{text};
        Json value = parser.value(0);
        parser.skip_space();
        if (parser.at != text.size()) parser.fail("text after the end");
        return value;
    }

    Kind kind = Kind::null;
    bool boolean = false;
    std::int64_t integer = 0;
    double number = 0;  // of integers too; integers beyond 64 bits are numbers only
    std::string text;
    std::vector<std::string> keys;  // of an object, in the order of `items`
    std::vector<Json> items;

    const Json* find(std::string_view key) const {
        for (std::size_t i = 0; i < keys.size(); ++i)
            if (keys[i] == key) return &items[i];
        return nullptr;
    }

private:
    struct Parser {
        std::string_view text;
        std::size_t at = 0;

        [[noreturn]] void fail(const std::string& why) const {
            throw Error("It is not JSON: " + why + " at byte " + std::to_string(at) + ".");
        }
        int peek() const { return at < text.size() ? static_cast<unsigned char>(text[at]) : -1; }
        void skip_space() {
            while (at < text.size() && std::strchr(" \t\n\r", text[at]) != nullptr && text[at] != 0) ++at;
        }
        bool take(char expected) {
            skip_space();
            if (peek() != expected) return false;
            ++at;
            return true;
        }
        void word(std::string_view expected) {
            if (text.substr(at, expected.size()) != expected) fail("an unknown word");
            at += expected.size();
        }
        Json value(int depth) {
            if (depth > 64) fail("nested too deeply");
            skip_space();
            Json result;
            switch (peek()) {
                case -1: fail("the text ends early");
                case '{': object(result, depth); break;
                case '[': array(result, depth); break;
                case '"': result.kind = Kind::text, result.text = string(); break;
                case 't': word("true"), result.kind = Kind::boolean, result.boolean = true; break;
                case 'f': word("false"), result.kind = Kind::boolean; break;
                case 'n': word("null"); break;
                default: numeral(result);
            }
            return result;
        }
        void object(Json& result, int depth) {
            result.kind = Kind::object;
            ++at;
            if (take('}')) return;
            do {
                skip_space();
                if (peek() != '"') fail("a key was expected");
                result.keys.push_back(string());
                if (!take(':')) fail("a colon was expected");
                result.items.push_back(value(depth + 1));
            } while (take(','));
            if (!take('}')) fail("a comma or the end of the object was expected");
            std::vector<std::string_view> sorted(result.keys.begin(), result.keys.end());
            std::sort(sorted.begin(), sorted.end());
            if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
                fail("a key comes twice in an object");
        }
        void array(Json& result, int depth) {
            result.kind = Kind::array;
            ++at;
            if (take(']')) return;
            do result.items.push_back(value(depth + 1));
            while (take(','));
            if (!take(']')) fail("a comma or the end of the array was expected");
        }
        void digits() {
            if (peek() < '0' || peek() > '9') fail("a digit was expected");
            while (peek() >= '0' && peek() <= '9') ++at;
        }
        void numeral(Json& result) {
            const std::size_t first = at;
            if (peek() == '-') ++at;
            if (peek() == '0') ++at;
            else digits();
            bool whole = true;
            if (peek() == '.') whole = false, ++at, digits();
            if (peek() == 'e' || peek() == 'E') {
                whole = false, ++at;
                if (peek() == '+' || peek() == '-') ++at;
                digits();
            }
            const std::string numeral(text.substr(first, at - first));
            std::istringstream stream(numeral);  // std::strtod would read by the user's locale
            stream.imbue(std::locale::classic());
            if (!(stream >> result.number) || !std::isfinite(result.number)) fail("a number is too large");
            result.kind = whole && numeral.size() <= 18 ? Kind::integer : Kind::number;
            if (result.kind == Kind::integer) result.integer = std::stoll(numeral);
        }
        unsigned hex4() {
            unsigned code = 0;
            for (int i = 0; i < 4; ++i, ++at) {
                const int c = peek();
                const int digit = c >= '0' && c <= '9'   ? c - '0'
                                  : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                  : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                         : -1;
                if (digit < 0) fail("four hexadecimal digits were expected");
                code = code * 16 + static_cast<unsigned>(digit);
            }
            return code;
        }
        static void append_utf8(std::string& out, unsigned code) {
            if (code < 0x80) {
                out += static_cast<char>(code);
                return;
            }
            const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
            static constexpr unsigned leads[] = {0, 0xC0, 0xE0, 0xF0};
            out += static_cast<char>(leads[more] | code >> (6 * more));
            for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
        }
        std::string string() {
            static constexpr std::string_view escapes = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
            std::string out;
            ++at;
            for (;;) {
                const int c = peek();
                if (c < 0x20) fail(c < 0 ? "the text ends early" : "a control character in a string");
                if (c == '"') return ++at, out;
                if (c >= 0x80) {
                    utf8(out);
                } else if (c != '\\') {
                    out += static_cast<char>(c), ++at;
                } else {
                    ++at;
                    const int escape = peek();
                    const auto place = escape < 0 ? escapes.npos : escapes.find(static_cast<char>(escape));
                    if (escape != 'u' && place == escapes.npos) fail("an unknown escape");
                    ++at;
                    if (escape == 'u') append_utf8(out, code_point());
                    else out += meanings[place];
                }
            }
        }
        unsigned code_point() {
            const unsigned code = hex4();
            if (code < 0xD800 || code > 0xDFFF) return code;
            if (code > 0xDBFF || text.substr(at, 2) != "\\u") fail("half of a surrogate pair");
            at += 2;
            const unsigned low = hex4();
            if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair");
            return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        void utf8(std::string& out) {
            const int lead = peek();
            const int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : lead >= 0xC2 ? 1 : 0;
            unsigned code = static_cast<unsigned>(lead & (0x3F >> more));
            const std::size_t first = at++;
            for (int i = 0; i < more; ++i, ++at) {
                if (peek() < 0 || (peek() & 0xC0) != 0x80) fail("bytes that are not UTF-8");
                code = code << 6 | static_cast<unsigned>(peek() & 0x3F);
            }
            static constexpr unsigned least[] = {0, 0x80, 0x800, 0x10000};
            if (more == 0 || code < least[more] || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF))
                fail("bytes that are not UTF-8");
            out += text.substr(first, at - first);
        }
    };
};

// Text as a JSON string.
inline std::string json_text(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        std::array<char, 16> escape{};
        if (static_cast<unsigned char>(c) < 0x20) std::snprintf(escape.data(), escape.size(), "\\u%04x", c);
        if (escape[0] != 0) out += escape.data();
        else if (c == '"' || c == '\\') out += std::string("\\") + c;
        else out += c;
    }
    return out + "\"";
}

// The fields of a JSON object of a known type: a missing, unknown or ill-typed one is an error with its place.
class Fields {
public:
    Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
        if (object.kind != Json::Kind::object) throw Error(where_ + " must be an object.");
    }
    Fields(Json&&, std::string) = delete;  // the object must outlive its fields
    // Null where the key is missing, or its value is null and that is allowed.
    const Json* optional(const char* key, bool or_null = true) {
        used_.push_back(key);
        const Json* value = object_.find(key);
        return value != nullptr && or_null && value->kind == Json::Kind::null ? nullptr : value;
    }
    const Json& required(const char* key) {
        if (const Json* value = optional(key, false)) return *value;
        throw Error(where_ + " lacks '" + key + "'.");
    }
    [[noreturn]] void fail(const char* key, const std::string& expected) const {
        throw Error(where_ + "." + key + " must be " + expected + ".");
    }
    const std::string& place() const { return where_; }

    double number(const char* key, std::optional<double> fallback = {}) {
        const Json* value = fallback ? optional(key, false) : &required(key);
        return value == nullptr ? *fallback : as_number(key, *value);
    }
    std::int64_t integer(const char* key, std::optional<std::int64_t> fallback, std::int64_t low, std::int64_t high) {
        const Json* value = fallback ? optional(key, false) : &required(key);
        return value == nullptr ? *fallback : as_integer(key, *value, low, high);
    }
    bool flag(const char* key) {
        const Json* value = optional(key, false);
        if (value != nullptr && value->kind != Json::Kind::boolean) fail(key, "true or false");
        return value != nullptr && value->boolean;
    }
    std::string text(const char* key, std::optional<std::string> fallback = {}) {
        const Json* value = fallback ? optional(key, false) : &required(key);
        if (value != nullptr && value->kind != Json::Kind::text) fail(key, "text");
        return value == nullptr ? *fallback : value->text;
    }
    // The position of the text among `words`; `fallback` -1: the key is required.
    int one_of(const char* key, std::initializer_list<const char*> words, int fallback = -1) {
        if (fallback >= 0 && optional(key, false) == nullptr) return fallback;
        const std::string word = text(key);
        const auto place = std::find(words.begin(), words.end(), word);
        std::string list;
        for (const char* each : words) list += (list.empty() ? "" : ", ") + std::string(each);
        if (place == words.end()) fail(key, "one of " + list);
        return static_cast<int>(place - words.begin());
    }
    const std::vector<Json>& array(const char* key) {
        const Json& value = required(key);
        if (value.kind != Json::Kind::array) fail(key, "an array");
        return value.items;
    }
    std::vector<double> numbers(const char* key) {
        std::vector<double> values;
        for (const Json& item : array(key)) values.push_back(as_number(key, item));
        return values;
    }
    std::vector<std::int64_t> integers(const char* key, std::int64_t low, std::int64_t high) {
        std::vector<std::int64_t> values;
        for (const Json& item : array(key)) values.push_back(as_integer(key, item, low, high));
        return values;
    }
    // Refuses keys that nobody asked for: they are of a newer fcos-deploy, whose meaning this header does not know.
    void done() const {
        for (const std::string& key : object_.keys)
            if (std::find(used_.begin(), used_.end(), key) == used_.end())
                throw Error(where_ + " has the unknown key '" + key.substr(0, 80) +
                            "'; was it written by a newer fcos-deploy?");
    }

private:
    double as_number(const char* key, const Json& value) const {
        if (value.kind != Json::Kind::integer && value.kind != Json::Kind::number) fail(key, "a number");
        return value.number;
    }
    std::int64_t as_integer(const char* key, const Json& value, std::int64_t low, std::int64_t high) const {
        if (value.kind != Json::Kind::integer || value.integer < low || value.integer > high)
            fail(key, "an integer from " + std::to_string(low) + " to " + std::to_string(high));
        return value.integer;
    }
    const Json& object_;
    std::string where_;
    std::vector<std::string> used_;
};

// The whole of a file of at most `limit` bytes.
inline std::string read_file(const std::filesystem::path& path, std::size_t limit = Json::max_bytes) {
    std::ifstream stream(path, std::ios::binary);
    std::string content;
    std::array<char, 1 << 16> block;
    while (stream.read(block.data(), block.size()), stream.gcount() > 0) {
        content.append(block.data(), static_cast<std::size_t>(stream.gcount()));
        if (content.size() > limit)
            throw Error("'" + path.string() + "' is larger than " + std::to_string(limit) + " bytes.");
    }
    if (!stream.eof()) throw Error("Cannot read '" + path.string() + "'.");
    return content;
}

enum class ResizeFilter { torch, cv2, pil };
enum class SizeRule { letterbox, stretch, torchvision, mmdetection, mmdetection_fix_scale, detectron2, tianzhi };
enum class ResizeOrder { normalize_first, resize_first };
enum class ChannelOrder { rgb, bgr, gray };
enum class DType { uint8, float32, float16, int32, int64 };
enum class ScoreForm { p, pq, sqrt_pq };
enum class BoxClip { none, input, image, image_minus_one };
enum class NmsSpace { input, original };
enum class BoxFilter { none, before_nms, after_final_clip };
enum class CenterMode { half, torchvision };
enum class Tail { raw, candidates, nms };

struct Size {
    std::int64_t height = 0, width = 0;
};

// From an image to the input tensor; fields as in the contract. Zero sizes and empty `pad_pixel`: not given.
struct PreprocessSpec {
    std::vector<double> mean, std, pad_pixel;
    double pixel_scale = 1;
    ChannelOrder channel_order = ChannelOrder::rgb;
    Size canvas, content;
    std::int64_t shortest = 0, longest = 0, size_divisor = 32;
    SizeRule size_rule = SizeRule::letterbox;
    ResizeFilter resize_filter = ResizeFilter::cv2;
    ResizeOrder resize_order = ResizeOrder::resize_first;
    DType input_dtype = DType::uint8;
    bool by_exif = true;  // how image files are turned before all of it

    std::size_t channels() const { return channel_order == ChannelOrder::gray ? 1 : 3; }
    // What padding of plane `c` is: a level for uint8 input, a normalised number for float32.
    double padding(std::size_t c) const {
        if (input_dtype == DType::uint8) {
            const double level = pad_pixel.empty() ? mean[c] * pixel_scale : pad_pixel[c];
            return std::min(std::max(std::nearbyint(level), 0.0), 255.0);
        }
        return pad_pixel.empty() ? 0.0 : (pad_pixel[c] / pixel_scale - mean[c]) / std[c];
    }
};

struct DecodeSpec {
    std::string profile;
    ScoreForm gate = ScoreForm::p, rank = ScoreForm::p, score = ScoreForm::p;
    CenterMode centers = CenterMode::half;
    BoxClip clip = BoxClip::none;
    NmsSpace nms_space = NmsSpace::input;
    BoxFilter box_filter = BoxFilter::none;
    double iou_offset = 0, score_threshold = 0, iou_threshold = 0, min_box_size = 0;
    bool keep_ties = false, sort_by_score = true, rank_per_location = false, class_agnostic = false;
    std::int64_t pre_nms_top_k = 1000, max_detections = 100;
    std::vector<std::int64_t> strides{8, 16, 32, 64, 128}, label_map;
};

struct Contract {
    std::vector<std::string> class_names;
    PreprocessSpec preprocess;
    DecodeSpec decode;
    Tail tail = Tail::raw;
    bool static_nms = false;
    std::string precision, placement, ecosystem, source_sha256;

    std::int64_t classes() const {
        return static_cast<std::int64_t>(decode.label_map.empty() ? class_names.size() : decode.label_map.size());
    }
    std::int64_t label(std::int64_t channel) const {
        return decode.label_map.empty() ? channel : decode.label_map[static_cast<std::size_t>(channel)];
    }
    // The name of a label; one without a name gets its number.
    std::string name(std::int64_t label) const {
        const bool named = label >= 0 && label < static_cast<std::int64_t>(class_names.size());
        return named ? class_names[static_cast<std::size_t>(label)] : std::to_string(label);
    }
    // Whether the graph has the second input `image_sizes`.
    bool needs_image_sizes() const {
        const bool clips = decode.clip != BoxClip::none && decode.clip != BoxClip::input;
        return tail == Tail::nms && (clips || decode.nms_space != NmsSpace::input);
    }
    std::vector<const char*> outputs() const {
        if (tail == Tail::raw) return {"cls_logits", "distances", "centerness"};
        if (tail == Tail::candidates) return {"boxes", "scores", "labels"};
        if (!static_nms) return {"boxes", "scores", "labels", "num_detections"};
        return {"boxes", "scores", "labels", "num_detections", "settled"};
    }
};

namespace detail {

constexpr std::int64_t max_side = 65536, max_int = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t max_values = std::int64_t{1} << 28;  // of an input tensor
constexpr double max_level = 1e6;

inline void check(bool holds, const char* message) {
    if (!holds) throw Error(message);
}

inline PreprocessSpec preprocess_spec(const Json& json) {
    Fields fields(json, "contract.preprocess");
    PreprocessSpec spec;
    spec.mean = fields.numbers("mean"), spec.std = fields.numbers("std");
    if (fields.optional("pad_pixel") != nullptr) {
        spec.pad_pixel = fields.numbers("pad_pixel");
        if (spec.pad_pixel.empty()) fields.fail("pad_pixel", "a number for each channel");
    }
    spec.pixel_scale = fields.number("pixel_scale", 1.0);
    spec.channel_order = static_cast<ChannelOrder>(fields.one_of("channel_order", {"rgb", "bgr", "gray"}, 0));
    const auto side = [&](const char* key) {
        return fields.optional(key) == nullptr ? 0 : fields.integer(key, {}, 1, max_side);
    };
    spec.canvas = {side("height"), side("width")};
    spec.shortest = side("shortest"), spec.longest = side("longest");
    spec.size_rule = static_cast<SizeRule>(fields.one_of(
        "size_rule",
        {"letterbox", "stretch", "torchvision", "mmdetection", "mmdetection-fix-scale", "detectron2", "tianzhi"}, 0));
    spec.resize_filter = static_cast<ResizeFilter>(fields.one_of("resize_filter", {"torch", "cv2", "pil"}, 1));
    spec.resize_order = static_cast<ResizeOrder>(fields.one_of("resize_order", {"normalize-first", "resize-first"}, 1));
    spec.input_dtype = static_cast<DType>(fields.one_of("input_dtype", {"uint8", "float32"}, 0));
    spec.size_divisor = fields.integer("size_divisor", 32, 1, max_side);
    if (fields.optional("content") != nullptr) {
        const auto sides = fields.integers("content", 1, max_side);
        if (sides.size() != 2) fields.fail("content", "two integers");
        spec.content = {sides[0], sides[1]};
    }
    spec.by_exif = fields.one_of("orientation", {"exif", "stored"}, 0) == 0;
    fields.done();

    for (const auto* values : {&spec.mean, &spec.std, &spec.pad_pixel})
        check(values->size() == spec.channels() || (values == &spec.pad_pixel && values->empty()),
              "contract.preprocess: mean, std and pad_pixel must have a number for each channel.");
    for (const auto* values : {&spec.mean, &spec.std})
        for (double value : *values)
            check(std::abs(value) <= max_level, "contract.preprocess: mean and std are too large.");
    for (double value : spec.std) check(value > 0, "contract.preprocess: std must be positive.");
    check(spec.pixel_scale > 0 && spec.pixel_scale <= max_level,
          "contract.preprocess.pixel_scale must be positive and at most 1e6.");
    const bool canvas = spec.canvas.height > 0 && spec.canvas.width > 0, edges = spec.shortest > 0 && spec.longest > 0;
    const int given = (spec.canvas.height > 0) + (spec.canvas.width > 0) + (spec.shortest > 0) + (spec.longest > 0);
    check(canvas != edges && given == 2, "contract.preprocess: give either height and width, or shortest and longest.");
    check((spec.size_rule <= SizeRule::stretch) == canvas, "contract.preprocess.size_rule does not go with the sizes.");
    check(!canvas || (spec.canvas.height % spec.size_divisor == 0 && spec.canvas.width % spec.size_divisor == 0),
          "contract.preprocess: the input size is not a multiple of size_divisor.");
    const bool normalize_first = spec.resize_order == ResizeOrder::normalize_first;
    check(!normalize_first || (spec.input_dtype == DType::float32 && spec.resize_filter != ResizeFilter::pil),
          "contract.preprocess: uint8 input and the filter 'pil' need the order 'resize-first'.");
    check(spec.content.height <= spec.canvas.height && spec.content.width <= spec.canvas.width,
          "contract.preprocess.content must lie within the input size.");
    return spec;
}

inline DecodeSpec decode_spec(const Json& json) {
    Fields fields(json, "contract.decode");
    DecodeSpec spec;
    Fields profile(fields.required("profile"), "contract.decode.profile");
    spec.profile = profile.text("name");
    const auto form = [&](const char* key) {
        return static_cast<ScoreForm>(profile.one_of(key, {"p", "p*q", "sqrt(p*q)"}));
    };
    spec.gate = form("gate"), spec.rank = form("rank"), spec.score = form("score");
    spec.centers = static_cast<CenterMode>(profile.one_of("centers", {"half", "torchvision"}));
    spec.clip = static_cast<BoxClip>(profile.one_of("clip", {"none", "input", "image", "image-1"}));
    spec.nms_space = static_cast<NmsSpace>(profile.one_of("nms_space", {"input", "original"}, 0));
    spec.box_filter =
        static_cast<BoxFilter>(profile.one_of("box_filter", {"none", "before-nms", "after-final-clip"}, 0));
    spec.iou_offset = profile.number("iou_offset", 0.0);
    spec.keep_ties = profile.flag("keep_ties");
    spec.sort_by_score = profile.optional("sort_by_score", false) == nullptr || profile.flag("sort_by_score");
    spec.rank_per_location = profile.flag("rank_per_location");
    profile.done();
    spec.score_threshold = fields.number("score_threshold"), spec.iou_threshold = fields.number("iou_threshold");
    if (fields.optional("strides", false) != nullptr) spec.strides = fields.integers("strides", 1, max_side);
    spec.pre_nms_top_k = fields.integer("pre_nms_top_k", 1000, 1, max_int);
    spec.max_detections = fields.integer("max_detections", 100, 1, max_int);
    if (fields.optional("label_map", false) != nullptr) spec.label_map = fields.integers("label_map", 0, max_int);
    spec.class_agnostic = fields.flag("class_agnostic");
    spec.min_box_size = fields.number("min_box_size", 0.0);
    fields.done();
    check(spec.score_threshold >= 0 && spec.score_threshold < 1, "contract.decode.score_threshold must be in [0, 1).");
    check(spec.iou_threshold > 0 && spec.iou_threshold <= 1, "contract.decode.iou_threshold must be in (0, 1].");
    check(!spec.strides.empty() && spec.strides.size() <= 64, "contract.decode.strides must name 1 to 64 levels.");
    check(spec.min_box_size <= 0 || spec.box_filter == BoxFilter::before_nms,
          "contract.decode.min_box_size: the profile does not drop boxes by their size.");
    return spec;
}

}  // namespace detail

// A contract from its JSON.
inline Contract parse_contract(const Json& json) {
    Fields fields(json, "contract");
    if (fields.integer("schema_version", 1, 0, detail::max_int) != 1) fields.fail("schema_version", "1");
    Contract contract;
    for (const Json& name : fields.array("class_names")) {
        if (name.kind != Json::Kind::text || name.text.size() > 4 * 256) fields.fail("class_names", "short texts");
        contract.class_names.push_back(name.text);
    }
    if (contract.class_names.empty()) fields.fail("class_names", "at least one name");
    contract.preprocess = detail::preprocess_spec(fields.required("preprocess"));
    contract.decode = detail::decode_spec(fields.required("decode"));
    contract.tail = static_cast<Tail>(fields.one_of("tail", {"raw", "candidates", "nms"}, 0));
    contract.static_nms = fields.one_of("nms_form", {"onnx", "static"}, 0) == 1;
    fields.one_of("precision", {"fp32", "fp16", "int8"}, 0);
    contract.precision = fields.text("precision", "fp32");
    contract.placement = fields.text("placement", ""), contract.ecosystem = fields.text("ecosystem", "");
    contract.source_sha256 = fields.text("source_sha256", "");
    if (fields.optional("decisions", false) != nullptr)
        for (const Json& item : fields.array("decisions")) {
            Fields decision(item, "contract.decisions");
            decision.text("name"), decision.text("value"), decision.text("source"), decision.done();
        }
    fields.done();
    return contract;
}

// The contract that fcos-deploy stored in an ONNX file (ModelProto.metadata_props); nothing else of it is read.
inline std::string onnx_contract_text(const std::filesystem::path& path) {
    std::ifstream stream(path, std::ios::binary | std::ios::ate);
    if (!stream) throw Error("Cannot read '" + path.string() + "'.");
    const auto size = static_cast<std::uint64_t>(stream.tellg());
    stream.seekg(0);
    const auto varint = [&](std::istream& from) {
        std::uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const int byte = from.get();
            if (byte < 0) break;
            value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
            if (byte < 0x80) return value;
        }
        throw Error("'" + path.string() + "' is not an ONNX file.");
    };
    const auto field = [&](std::istream& from, std::uint64_t end, std::uint64_t& key) -> std::optional<std::string> {
        key = varint(from);
        const auto wire = key & 7;
        std::uint64_t length = wire == 1 ? 8 : wire == 5 ? 4 : 0;
        if (wire == 0) varint(from);
        else if (wire == 2) length = varint(from);
        else if (length == 0) throw Error("'" + path.string() + "' is not an ONNX file.");
        const auto at = static_cast<std::uint64_t>(from.tellg());
        if (at > end || length > end - at) throw Error("'" + path.string() + "' is cut off.");
        if (wire != 2 || (key >> 3 != 14 && end == size) || length > Json::max_bytes) {  // 14: metadata_props
            from.seekg(static_cast<std::streamoff>(at + length));
            return {};
        }
        std::string bytes(static_cast<std::size_t>(length), '\0');
        from.read(bytes.data(), static_cast<std::streamsize>(length));
        return bytes;
    };
    while (static_cast<std::uint64_t>(stream.tellg()) < size) {
        std::uint64_t key = 0;
        const auto entry = field(stream, size, key);
        if (!entry || entry->size() == size) continue;
        std::istringstream inner(*entry);
        std::string name, value;
        while (static_cast<std::uint64_t>(inner.tellg()) < entry->size()) {
            const auto part = field(inner, entry->size(), key);
            if (part) (key >> 3 == 1 ? name : value) = *part;
        }
        if (name == "fcos_deploy.contract") return value;
    }
    throw Error("'" + path.string() + "' carries no fcos-deploy contract.");
}

// The contract in a JSON file (alone, or as its key "contract", as sidecars and manifests have it), in an ONNX file, or
// in the sidecar of an engine or IR: model.int8.xml -> model.int8.json.
inline Contract read_contract(const std::filesystem::path& path) {
    try {
        const auto sidecar = std::filesystem::path(path).replace_extension(".json");
        const Json json = Json::parse(path.extension() == ".onnx" ? onnx_contract_text(path) : read_file(sidecar));
        const Json* inner = json.find("contract");
        return parse_contract(inner != nullptr ? *inner : json);
    } catch (const Error& error) {
        throw Error("Cannot read the contract of '" + path.string() + "': " + error.what());
    }
}

}  // namespace fcos_deploy
