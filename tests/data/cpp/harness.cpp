// Calls fcos_deploy.hpp for the tests: reads the names of files from standard input, and prints a JSON object a line.
//
//   harness contract     each line a contract, sidecar, manifest or model
//   harness preprocess   each line "IMAGE.ppm ORDER CONTRACT": writes CONTRACT.tensor
//   harness postprocess  each line a case: contract, tensors in files, sizes; `repeat` for the median CPU time

#include <ctime>
#include <iostream>

#include "fcos_deploy.hpp"

namespace fcos_deploy {
namespace {

std::string contract_line(const std::string& path) {
    const Contract contract = read_contract(path);
    return "{\"classes\": " + std::to_string(contract.classes()) +
           ", \"first\": " + json_text(contract.name(contract.label(0))) + "}";
}

std::string preprocess_line(const std::string& line) {
    std::istringstream words(line);
    std::string image_path, order, contract_path;
    words >> image_path >> order >> contract_path;
    const Contract contract = read_contract(contract_path);
    Image image = read_ppm(image_path);
    ImageView view = image.view();
    if (order == "bgr") {
        for (std::size_t i = 0; i < image.pixels.size(); i += 3) std::swap(image.pixels[i], image.pixels[i + 2]);
        view.order = ChannelOrder::bgr;
    }
    const Size size = padded_size({view.height, view.width}, contract.preprocess);
    const std::size_t bytes = contract.preprocess.input_dtype == DType::uint8 ? 1 : 4;
    std::vector<char> tensor(contract.preprocess.channels() * static_cast<std::size_t>(size.height * size.width) *
                             bytes);
    const Letterbox letterbox = preprocess(view, contract.preprocess, tensor.data(), size);
    std::ofstream(contract_path + ".tensor", std::ios::binary)
        .write(tensor.data(), static_cast<std::streamsize>(tensor.size()));
    const auto number = [](std::int64_t n) { return std::to_string(n); };
    return "{\"size\": [" + number(size.height) + ", " + number(size.width) + "], \"resized\": [" +
           number(letterbox.resized.height) + ", " + number(letterbox.resized.width) + "]}";
}

std::string postprocess_line(const std::string& path) {
    const Json json = Json::parse(read_file(path));
    Fields fields(json, "case");
    const Contract contract = parse_contract(fields.required("contract"));
    const auto sizes = fields.integers("sizes", 1, 65536);  // input, image, resized: height and width each
    std::vector<TensorView> tensors;
    std::vector<std::string> contents;
    contents.reserve(8);
    for (const Json& item : fields.array("tensors")) {
        Fields tensor(item, "tensor");
        contents.push_back(read_file(tensor.text("file")));
        const auto dtype =
            static_cast<DType>(tensor.one_of("dtype", {"uint8", "float32", "float16", "int32", "int64"}));
        tensors.push_back({tensor.text("name"), dtype, tensor.integers("shape", 0, 1 << 30), contents.back().data()});
    }
    const Letterbox letterbox{{sizes[2], sizes[3]}, {sizes[4], sizes[5]}};
    const auto index = fields.integer("index", 0, 0, 100);
    std::vector<Detection> detections;
    std::vector<double> times;
    for (auto left = fields.integer("repeat", 1, 1, 1000); left > 0; --left) {
        const std::clock_t start = std::clock();
        detections = postprocess(tensors, contract, index, {sizes[0], sizes[1]}, letterbox);
        times.push_back(1e3 * static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
    }
    std::sort(times.begin(), times.end());
    std::ostringstream out;
    out.precision(9);
    out << "{\"milliseconds\": " << times[times.size() / 2] << ", \"detections\": [";
    for (std::size_t i = 0; i < detections.size(); ++i) {
        out << (i == 0 ? "[" : ", [");
        for (float edge : detections[i].box) out << edge << ", ";
        out << detections[i].score << ", " << detections[i].label << "]";
    }
    out << "]}";
    return out.str();
}

}  // namespace
}  // namespace fcos_deploy

int main(int, char** arguments) {
    const std::string mode = arguments[1];
    for (std::string line; std::getline(std::cin, line);) {
        try {
            const auto answer = mode == "contract"     ? fcos_deploy::contract_line
                                : mode == "preprocess" ? fcos_deploy::preprocess_line
                                                       : fcos_deploy::postprocess_line;
            std::cout << answer(line) << '\n';
        } catch (const fcos_deploy::Error& error) {
            std::cout << "{\"error\": " << fcos_deploy::json_text(error.what()) << "}\n";
        }
    }
}
