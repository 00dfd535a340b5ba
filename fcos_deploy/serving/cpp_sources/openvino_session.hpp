// openvino_session.hpp: an IR or ONNX file in OpenVINO, by its C interface, which does not depend on the compiler.

#pragma once

#include <openvino/c/openvino.h>

#include "fcos_deploy.hpp"

namespace fcos_deploy {

class OpenVinoSession : public Session {
public:
    OpenVinoSession(const std::filesystem::path& model, const Contract& contract, const std::string& device)
        : names_(contract.outputs()) {
        require(ov_core_create(&core_), "start");
        // The precision is explicit: left alone, OpenVINO computes fp32 graphs in bf16 where the processor can.
        const std::string path = model.string(), target = device.empty() ? "CPU" : device;
        require(ov_core_compile_model_from_file(core_, path.c_str(), target.c_str(), 4, &compiled_,
                                                "INFERENCE_PRECISION_HINT", "f32", "PERFORMANCE_HINT", "LATENCY"),
                "open '" + path + "' on " + target);
        require(ov_compiled_model_create_infer_request(compiled_, &request_), "make a request");
    }
    ~OpenVinoSession() override {
        release();
        if (request_ != nullptr) ov_infer_request_free(request_);
        if (compiled_ != nullptr) ov_compiled_model_free(compiled_);
        if (core_ != nullptr) ov_core_free(core_);
    }
    OpenVinoSession(const OpenVinoSession&) = delete;
    OpenVinoSession& operator=(const OpenVinoSession&) = delete;

    std::vector<TensorView> run(const std::vector<TensorView>& inputs) override {
        release();
        for (const TensorView& input : inputs) {
            ov_shape_t shape{};
            require(ov_shape_create(static_cast<std::int64_t>(input.shape.size()), input.shape.data(), &shape),
                    "make a shape");
            ov_tensor_t* tensor = nullptr;
            const auto type = input.dtype == DType::uint8 ? ov_element_type_e::U8 : ov_element_type_e::F32;
            const auto status = ov_tensor_create_from_host_ptr(type, shape, const_cast<void*>(input.data), &tensor);
            ov_shape_free(&shape);
            require(status, "make a tensor");
            tensors_.push_back(tensor);
            require(ov_infer_request_set_tensor(request_, input.name.c_str(), tensor),
                    "take the input '" + input.name + "'");
        }
        require(ov_infer_request_infer(request_), "run");
        std::vector<TensorView> views;
        for (const char* name : names_) views.push_back(output(name));
        return views;
    }
    std::string description() const override {
        ov_version_t version{};
        if (ov_get_openvino_version(&version) != ov_status_e::OK) return "openvino";
        const std::string text = std::string("openvino ") + version.buildNumber;
        ov_version_free(&version);
        return text;
    }

private:
    static void require(ov_status_e status, const std::string& what) {
        if (status == ov_status_e::OK) return;
        const char* reason = ov_get_last_err_msg();
        throw Error("OpenVINO could not " + what + ": " +
                    (reason != nullptr && *reason != 0 ? reason : ov_get_error_info(status)));
    }
    // By name: an output may have several, and the compiled model lists them in an order of its own.
    TensorView output(const char* name) {
        ov_tensor_t* tensor = nullptr;
        require(ov_infer_request_get_tensor(request_, name, &tensor), std::string("give the output '") + name + "'");
        tensors_.push_back(tensor);
        ov_shape_t shape{};
        require(ov_tensor_get_shape(tensor, &shape), "tell a shape");
        TensorView view;
        view.name = name, view.shape.assign(shape.dims, shape.dims + shape.rank);
        ov_shape_free(&shape);
        ov_element_type_e type = ov_element_type_e::DYNAMIC;
        require(ov_tensor_get_element_type(tensor, &type), "tell a dtype");
        void* data = nullptr;
        require(ov_tensor_data(tensor, &data), "give its memory");
        view.data = data;
        switch (type) {
            case ov_element_type_e::F32: view.dtype = DType::float32; break;
            case ov_element_type_e::F16: view.dtype = DType::float16; break;
            case ov_element_type_e::I32: view.dtype = DType::int32; break;
            case ov_element_type_e::I64: view.dtype = DType::int64; break;
            default: throw Error("Output '" + view.name + "' has a dtype that is not supported.");
        }
        return view;
    }
    void release() {
        for (ov_tensor_t* tensor : tensors_) ov_tensor_free(tensor);
        tensors_.clear();
    }
    ov_core_t* core_ = nullptr;
    ov_compiled_model_t* compiled_ = nullptr;
    ov_infer_request_t* request_ = nullptr;
    std::vector<const char*> names_;
    std::vector<ov_tensor_t*> tensors_;
};

}  // namespace fcos_deploy
