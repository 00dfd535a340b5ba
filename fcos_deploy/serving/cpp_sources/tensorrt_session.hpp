// tensorrt_session.hpp: an engine in TensorRT 8.5 or later, on the GPU. Pixels go up and outputs come back once a run.

#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <map>

#include "fcos_deploy.hpp"

namespace fcos_deploy {

class TensorRtSession : public Session {
public:
    TensorRtSession(const std::filesystem::path& model, const Contract& contract, const std::string& device)
        : names_(contract.outputs()) {
        if (!device.empty()) require(cudaSetDevice(std::stoi(device)), "use the GPU " + device);
        const std::string plan = read_file(model, std::size_t{1} << 34);
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_) throw Error("TensorRT does not start: is there a GPU with its driver?");
        engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (!engine_)
            throw Error("'" + model.string() + "' is not an engine of this TensorRT and this GPU: build it here.");
        context_.reset(engine_->createExecutionContext());
        if (!context_) throw Error("TensorRT has no memory for an execution context.");
        require(cudaStreamCreate(&stream_), "make a stream");
    }
    ~TensorRtSession() override {
        for (auto& item : buffers_) cudaFree(item.second.device);
        if (stream_ != nullptr) cudaStreamDestroy(stream_);
    }
    TensorRtSession(const TensorRtSession&) = delete;
    TensorRtSession& operator=(const TensorRtSession&) = delete;

    std::vector<TensorView> run(const std::vector<TensorView>& inputs) override {
        for (const TensorView& input : inputs) {
            nvinfer1::Dims dims{};
            dims.nbDims = static_cast<std::int32_t>(input.shape.size());
            for (std::size_t i = 0; i < input.shape.size(); ++i)
                dims.d[i] = static_cast<std::remove_reference_t<decltype(dims.d[0])>>(input.shape[i]);
            Buffer& buffer = room(input.name, count(input.shape) * size_of(input.dtype));
            if (type_of(input.name) != input.dtype || !context_->setInputShape(input.name.c_str(), dims))
                throw Error("The engine does not take this shape or dtype for the input '" + input.name + "'.");
            require(cudaMemcpyAsync(buffer.device, input.data, buffer.bytes, cudaMemcpyHostToDevice, stream_),
                    "copy the input");
        }
        std::vector<TensorView> views;
        for (const char* name : names_) {
            const nvinfer1::Dims dims = context_->getTensorShape(name);
            TensorView view;
            view.name = name, view.dtype = type_of(name);
            if (dims.nbDims < 0) throw Error("The engine has no output '" + view.name + "'.");
            view.shape.assign(dims.d, dims.d + dims.nbDims);
            room(view.name, count(view.shape) * size_of(view.dtype));
            views.push_back(view);
        }
        if (!context_->enqueueV3(stream_)) throw Error("TensorRT could not run: " + logger_.last + ".");
        for (TensorView& view : views) {
            Buffer& buffer = buffers_.at(view.name);
            buffer.host.resize(buffer.bytes);
            require(cudaMemcpyAsync(buffer.host.data(), buffer.device, buffer.bytes, cudaMemcpyDeviceToHost, stream_),
                    "copy an output");
            view.data = buffer.host.data();
        }
        require(cudaStreamSynchronize(stream_), "run");
        return views;
    }
    std::string description() const override {
        return "tensorrt " + std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR);
    }

private:
    struct Logger : nvinfer1::ILogger {
        std::string last = "no reason was given";
        void log(Severity severity, const char* message) noexcept override {
            if (severity <= Severity::kERROR) last = message;
        }
    };
    struct Buffer {
        void* device = nullptr;
        std::size_t bytes = 0, capacity = 0;
        std::vector<char> host;
    };
    static void require(cudaError_t status, const std::string& what) {
        if (status != cudaSuccess) throw Error("CUDA could not " + what + ": " + cudaGetErrorString(status) + ".");
    }
    static std::size_t size_of(DType dtype) { return dtype == DType::uint8 ? 1 : dtype == DType::float16 ? 2 : 4; }
    static std::size_t count(const std::vector<std::int64_t>& shape) {
        std::size_t product = 1;
        for (std::int64_t n : shape) {
            if (n < 0) throw Error("An output of the engine has a shape that depends on the data.");
            product *= static_cast<std::size_t>(n);
        }
        return product;
    }
    DType type_of(const std::string& name) const {
        switch (engine_->getTensorDataType(name.c_str())) {
            case nvinfer1::DataType::kFLOAT: return DType::float32;
            case nvinfer1::DataType::kHALF: return DType::float16;
            case nvinfer1::DataType::kINT32: return DType::int32;
            case nvinfer1::DataType::kUINT8: return DType::uint8;
            default: throw Error("Tensor '" + name + "' of the engine has a dtype that is not supported.");
        }
    }
    // Device memory for a tensor, of at least 1 byte: it grows, and is told to the context each time.
    Buffer& room(const std::string& name, std::size_t bytes) {
        Buffer& buffer = buffers_[name];
        buffer.bytes = bytes;
        if (buffer.device == nullptr || bytes > buffer.capacity) {
            require(cudaFree(buffer.device), "free memory");
            buffer.device = nullptr;
            buffer.capacity = std::max<std::size_t>(bytes, 1);
            require(cudaMalloc(&buffer.device, buffer.capacity), "get memory");
        }
        if (!context_->setTensorAddress(name.c_str(), buffer.device))
            throw Error("The engine has no tensor '" + name + "'.");
        return buffer;
    }
    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    cudaStream_t stream_ = nullptr;
    std::vector<const char*> names_;
    std::map<std::string, Buffer> buffers_;
};

}  // namespace fcos_deploy
