// sessions.hpp: opens a model in one of the runtimes that the program was built with (CMakeLists.txt sets the macros).

#pragma once

#include "fcos_deploy.hpp"

#ifdef FCOS_DEPLOY_WITH_ONNXRUNTIME
#include "onnxruntime_session.hpp"
#endif
#ifdef FCOS_DEPLOY_WITH_OPENVINO
#include "openvino_session.hpp"
#endif
#ifdef FCOS_DEPLOY_WITH_TENSORRT
#include "tensorrt_session.hpp"
#endif

namespace fcos_deploy {

// `device` empty: the runtime's default, the CPU or the current GPU.
inline std::unique_ptr<Session> open_session(const std::string& runtime, const std::filesystem::path& model,
                                             [[maybe_unused]] const Contract& contract,
                                             const std::string& device = "") {
    std::string built;
#ifdef FCOS_DEPLOY_WITH_ONNXRUNTIME
    if (runtime == "onnxruntime") return std::make_unique<OnnxRuntimeSession>(model, contract, device);
    built += " onnxruntime";
#endif
#ifdef FCOS_DEPLOY_WITH_OPENVINO
    if (runtime == "openvino") return std::make_unique<OpenVinoSession>(model, contract, device);
    built += " openvino";
#endif
#ifdef FCOS_DEPLOY_WITH_TENSORRT
    if (runtime == "tensorrt") return std::make_unique<TensorRtSession>(model, contract, device);
    built += " tensorrt";
#endif
    throw Error("'" + model.string() + "' is for the runtime '" + runtime + "' on the device '" + device +
                "', and this program has:" + built + ".");
}

}  // namespace fcos_deploy
