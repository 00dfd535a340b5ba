// Detects objects in a picture with a package of `fcos-deploy package --for cpp`, and prints one JSON object a line.
//
// Usage: detect PACKAGE IMAGE.ppm [REPEAT]
//
// With REPEAT the three parts of a detection are timed: their medians in milliseconds go to standard error.

#include <chrono>
#include <iostream>

#include "sessions.hpp"

namespace {

using fcos_deploy::Detection;

void print(const std::vector<Detection>& detections, const fcos_deploy::Contract& contract) {
    for (const Detection& d : detections) {
        std::cout << "{\"box\": [" << d.box[0] << ", " << d.box[1] << ", " << d.box[2] << ", " << d.box[3]
                  << "], \"score\": " << d.score << ", \"label\": " << d.label
                  << ", \"name\": " << fcos_deploy::json_text(contract.name(d.label)) << "}\n";
    }
}

// Milliseconds since the last call, appended to `times`.
void lap(std::chrono::steady_clock::time_point& last, std::vector<double>& times) {
    const auto now = std::chrono::steady_clock::now();
    times.push_back(std::chrono::duration<double, std::milli>(now - last).count());
    last = now;
}

double median(std::vector<double> times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

}  // namespace

int main(int count, char** arguments) {
    try {
        if (count < 3) throw fcos_deploy::Error("Usage: detect PACKAGE IMAGE.ppm [REPEAT]");
        const std::filesystem::path package = arguments[1];
        const auto golden = fcos_deploy::Json::parse(fcos_deploy::read_file(package / "golden.json"));
        const auto backend = golden.find("backend"), model = golden.find("model");
        if (backend == nullptr || model == nullptr) throw fcos_deploy::Error("golden.json names no model.");
        const auto contract = fcos_deploy::read_contract(package / "contract.json");
        fcos_deploy::Detector detector(fcos_deploy::open_session(backend->text, package / model->text, contract),
                                       contract);

        // Pixels of a camera or of OpenCV: {mat.data, mat.rows, mat.cols, mat.step, fcos_deploy::ChannelOrder::bgr}
        const auto image = fcos_deploy::read_ppm(arguments[2]);
        std::cout.precision(9);
        print(detector.detect(image.view()), contract);

        const int repeat = count > 3 ? std::stoi(arguments[3]) : 0;
        std::vector<double> prepare, network, finish;
        for (int i = 0; i < repeat; ++i) {
            auto last = std::chrono::steady_clock::now();
            fcos_deploy::Size size;
            fcos_deploy::Letterbox letterbox;
            const auto inputs = detector.prepare(image.view(), size, letterbox);
            lap(last, prepare);
            const auto outputs = detector.session().run(inputs);
            lap(last, network);
            fcos_deploy::postprocess(outputs, contract, 0, size, letterbox);
            lap(last, finish);
        }
        if (repeat > 0)
            std::cerr << "{\"preprocess_ms\": " << median(prepare) << ", \"network_ms\": " << median(network)
                      << ", \"postprocess_ms\": " << median(finish) << "}" << std::endl;
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << std::endl;
        return 1;
    }
}
