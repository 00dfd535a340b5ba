// onnxruntime_session.hpp: an ONNX file in ONNX Runtime, by its C interface, which stays the same from release to
// release.

#pragma once

#include <onnxruntime_c_api.h>

#include "fcos_deploy.hpp"

namespace fcos_deploy {

class OnnxRuntimeSession : public Session {
public:
    OnnxRuntimeSession(const std::filesystem::path& model, const Contract& contract, const std::string& device)
        : names_(contract.outputs()) {
        if (!device.empty() && device != "cpu")
            throw Error("This adapter runs on the device 'cpu' only, got '" + device + "'.");
        api_ = OrtGetApiBase()->GetApi(ORT_API_VERSION);
        if (api_ == nullptr)
            throw Error("The ONNX Runtime library is older than the headers that this program was built with.");
        OrtSessionOptions* options = nullptr;
        require(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "fcos-deploy", &env_));
        require(api_->CreateSessionOptions(&options));
        const std::unique_ptr<OrtSessionOptions, decltype(api_->ReleaseSessionOptions)> owner(
            options, api_->ReleaseSessionOptions);
        require(api_->SetSessionGraphOptimizationLevel(options, ORT_ENABLE_ALL));
        // As the Python runtime sets it: workers spin within a run, and sleep as soon as it is over.
        require(api_->AddSessionConfigEntry(options, "session.force_spinning_stop", "1"));
        require(api_->CreateSession(env_, model.c_str(), options, &session_));
        require(api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
    }
    ~OnnxRuntimeSession() override {
        release();
        if (memory_ != nullptr) api_->ReleaseMemoryInfo(memory_);
        if (session_ != nullptr) api_->ReleaseSession(session_);
        if (env_ != nullptr) api_->ReleaseEnv(env_);
    }
    OnnxRuntimeSession(const OnnxRuntimeSession&) = delete;
    OnnxRuntimeSession& operator=(const OnnxRuntimeSession&) = delete;

    std::vector<TensorView> run(const std::vector<TensorView>& inputs) override {
        release();
        std::vector<const char*> input_names;
        for (const TensorView& input : inputs) {
            std::size_t bytes = input.dtype == DType::uint8 ? 1 : 4;
            for (std::int64_t n : input.shape) bytes *= static_cast<std::size_t>(n);
            const auto type =
                input.dtype == DType::uint8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
            OrtValue* value = nullptr;
            require(api_->CreateTensorWithDataAsOrtValue(memory_, const_cast<void*>(input.data), bytes,
                                                         input.shape.data(), input.shape.size(), type, &value));
            inputs_.push_back(value), input_names.push_back(input.name.c_str());
        }
        outputs_.assign(names_.size(), nullptr);
        require(api_->Run(session_, nullptr, input_names.data(), inputs_.data(), inputs_.size(), names_.data(),
                          names_.size(), outputs_.data()));
        std::vector<TensorView> views;
        for (std::size_t i = 0; i < names_.size(); ++i) views.push_back(view(names_[i], outputs_[i]));
        return views;
    }
    std::string description() const override {
        return std::string("onnxruntime ") + OrtGetApiBase()->GetVersionString();
    }

private:
    void require(OrtStatus* status) const {
        if (status == nullptr) return;
        const std::string message = api_->GetErrorMessage(status);
        api_->ReleaseStatus(status);
        throw Error("ONNX Runtime failed: " + message);
    }
    TensorView view(const char* name, OrtValue* value) const {
        OrtTensorTypeAndShapeInfo* info = nullptr;
        require(api_->GetTensorTypeAndShape(value, &info));
        const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api_->ReleaseTensorTypeAndShapeInfo)> owner(
            info, api_->ReleaseTensorTypeAndShapeInfo);
        ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        std::size_t rank = 0;
        require(api_->GetTensorElementType(info, &type));
        require(api_->GetDimensionsCount(info, &rank));
        TensorView result;
        result.name = name, result.shape.resize(rank);
        require(api_->GetDimensions(info, result.shape.data(), rank));
        void* data = nullptr;
        require(api_->GetTensorMutableData(value, &data));
        result.data = data;
        switch (type) {
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: result.dtype = DType::float32; break;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: result.dtype = DType::float16; break;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: result.dtype = DType::int32; break;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: result.dtype = DType::int64; break;
            default: throw Error("Output '" + result.name + "' has a dtype that is not supported.");
        }
        return result;
    }
    void release() {
        for (auto* values : {&inputs_, &outputs_}) {
            for (OrtValue* value : *values)
                if (value != nullptr) api_->ReleaseValue(value);
            values->clear();
        }
    }
    const OrtApi* api_ = nullptr;
    OrtEnv* env_ = nullptr;
    OrtSession* session_ = nullptr;
    OrtMemoryInfo* memory_ = nullptr;
    std::vector<const char*> names_;
    std::vector<OrtValue*> inputs_, outputs_;
};

}  // namespace fcos_deploy
