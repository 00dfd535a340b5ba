// verify: replays the golden images of a package of `fcos-deploy package --for cpp` in the runtime that this program
// was built for, and prints the verdict of `fcos-deploy verify`. Exit code 0: passed, 4: not, 1: an error.
//
// Usage: fcos_deploy_verify [--json] [--allow-inconclusive] [--device NAME] PACKAGE

#include <chrono>
#include <iostream>

#include "golden_check.hpp"
#include "sessions.hpp"

namespace fcos_deploy {

int run(const std::vector<std::string>& arguments) {
    bool json = false, allow_inconclusive = false;
    std::string device;
    std::filesystem::path folder;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        if (arguments[i] == "--json") json = true;
        else if (arguments[i] == "--allow-inconclusive") allow_inconclusive = true;
        else if (arguments[i] == "--device" && i + 1 < arguments.size()) device = arguments[++i];
        else if (folder.empty() && arguments[i].substr(0, 1) != "-") folder = arguments[i];
        else throw Error("Usage: fcos_deploy_verify [--json] [--allow-inconclusive] [--device NAME] PACKAGE");
    }
    const auto start = std::chrono::steady_clock::now();
    const Golden golden = parse_golden(Json::parse(read_file(folder / "golden.json")));
    if (golden.images.empty()) throw Error("The package has no golden images to verify with.");
    const auto model = folder / golden.model;
    if (sha256_file(model) != golden.artifact_sha256)
        throw Error("'" + model.string() + "' was changed: copy the package again.");
    const Contract contract = read_contract(folder / "contract.json");
    Detector detector(open_session(golden.backend, model, contract, device), contract);
    const GoldenVerdict verdict = verify(golden, detector, folder);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (json) std::cout << to_json(verdict) << std::endl;
    const std::string what = "'" + golden.artifact + "' on '" + golden.backend + "'";
    if (verdict.outcome == Outcome::failed) {
        std::cerr << what << " is not the certified detector: " << verdict.summary << "." << std::endl;
    } else if (verdict.outcome == Outcome::inconclusive && !allow_inconclusive) {
        std::cerr << "Inconclusive: " << what << ": " << verdict.summary << "." << std::endl;
    } else {
        std::cerr << (verdict.outcome == Outcome::passed ? "verified" : outcome_name(verdict.outcome)) << ": "
                  << golden.artifact << " on " << detector.session().description() << " in "
                  << detail::format("%.1f", seconds.count()) << " s; " << verdict.summary << std::endl;
        return 0;
    }
    return 4;
}

}  // namespace fcos_deploy

int main(int count, char** values) {
    try {
        return fcos_deploy::run({values + 1, values + count});
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << std::endl;
        return 1;
    }
}
