// Bounding-box parser for DeepStream's nvinfer, for engines with the `nms` tail of fcos-deploy.
//
// Outputs: boxes float[D, 4] xyxy in network-input pixels, scores float[D], labels int32[D], num_detections int32[1].
// The engine has suppressed already, so nvinfer's own clustering must be off (cluster-mode=4).
//
// Build: make (see the Makefile beside this file); needs the DeepStream headers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "nvdsinfer_custom_impl.h"

namespace {

const NvDsInferLayerInfo* find(const std::vector<NvDsInferLayerInfo>& layers, const char* name) {
    for (const NvDsInferLayerInfo& layer : layers) {
        if (layer.layerName != nullptr && std::strcmp(layer.layerName, name) == 0) {
            return &layer;
        }
    }
    std::cerr << "fcos-deploy: the engine has no output '" << name << "'; export it with the nms tail" << std::endl;
    return nullptr;
}

}  // namespace

extern "C" bool NvDsInferParseFcos(
    std::vector<NvDsInferLayerInfo> const& outputLayersInfo,
    NvDsInferNetworkInfo const& networkInfo,
    NvDsInferParseDetectionParams const& detectionParams,
    std::vector<NvDsInferObjectDetectionInfo>& objectList) {
    const NvDsInferLayerInfo* boxLayer = find(outputLayersInfo, "boxes");
    const NvDsInferLayerInfo* scoreLayer = find(outputLayersInfo, "scores");
    const NvDsInferLayerInfo* labelLayer = find(outputLayersInfo, "labels");
    const NvDsInferLayerInfo* countLayer = find(outputLayersInfo, "num_detections");
    if (boxLayer == nullptr || scoreLayer == nullptr || labelLayer == nullptr || countLayer == nullptr) {
        return false;
    }
    const float* boxes = static_cast<const float*>(boxLayer->buffer);
    const float* scores = static_cast<const float*>(scoreLayer->buffer);
    const std::int32_t* labels = static_cast<const std::int32_t*>(labelLayer->buffer);
    const std::int32_t limit = static_cast<std::int32_t>(scoreLayer->inferDims.numElements);
    const std::int32_t count = std::clamp(*static_cast<const std::int32_t*>(countLayer->buffer), 0, limit);
    const float width = static_cast<float>(networkInfo.width);
    const float height = static_cast<float>(networkInfo.height);

    for (std::int32_t i = 0; i < count; ++i) {
        const std::int32_t label = labels[i];
        if (label < 0 || static_cast<unsigned>(label) >= detectionParams.numClassesConfigured ||
            scores[i] < detectionParams.perClassPreclusterThreshold[label]) {
            continue;
        }
        const float x1 = std::clamp(boxes[4 * i], 0.0F, width);
        const float y1 = std::clamp(boxes[4 * i + 1], 0.0F, height);
        const float x2 = std::clamp(boxes[4 * i + 2], 0.0F, width);
        const float y2 = std::clamp(boxes[4 * i + 3], 0.0F, height);
        if (x2 <= x1 || y2 <= y1) {
            continue;
        }
        NvDsInferObjectDetectionInfo object{};
        object.classId = static_cast<unsigned>(label);
        object.detectionConfidence = scores[i];
        object.left = x1;
        object.top = y1;
        object.width = x2 - x1;
        object.height = y2 - y1;
        objectList.push_back(object);
    }
    return true;
}

// Engines whose profile clips or suppresses in image pixels have the input image_sizes, float[N, 4]: resized height
// and width, original height and width. nvinfer scales boxes back itself, so both are the network's.
extern "C" bool NvDsInferInitializeInputLayers(
    std::vector<NvDsInferLayerInfo> const& inputLayersInfo,
    NvDsInferNetworkInfo const& networkInfo,
    unsigned int maxBatchSize) {
    const NvDsInferLayerInfo* sizes = nullptr;
    for (const NvDsInferLayerInfo& layer : inputLayersInfo) {
        if (std::strcmp(layer.layerName, "image_sizes") == 0) {
            sizes = &layer;
        }
    }
    if (sizes == nullptr) {
        return true;
    }
    float* rows = static_cast<float*>(sizes->buffer);
    for (unsigned int i = 0; i < maxBatchSize; ++i) {
        rows[4 * i] = rows[4 * i + 2] = static_cast<float>(networkInfo.height);
        rows[4 * i + 1] = rows[4 * i + 3] = static_cast<float>(networkInfo.width);
    }
    return true;
}

CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParseFcos);
