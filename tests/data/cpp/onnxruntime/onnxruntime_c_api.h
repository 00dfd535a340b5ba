// The part of ONNX Runtime's C interface that onnxruntime_session.hpp uses, by its public documentation
// (https://onnxruntime.ai/docs/api/c). The wheel has the shared library and no headers.
//
// The library hands out one table of functions. A function never changes its place in it, so that the places of those
// in between need no names.

#pragma once

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 17

extern "C" {

struct OrtEnv;
struct OrtStatus;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtMemoryInfo;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_FATAL = 4 };
enum GraphOptimizationLevel { ORT_ENABLE_ALL = 99 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
};

struct OrtApi {
    void* before_2[2];
    const char* (*GetErrorMessage)(const OrtStatus*);  // 2
    OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char*, OrtEnv**);
    void* before_7[3];
    OrtStatus* (*CreateSession)(const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**);  // 7
    void* before_9[1];
    OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, size_t,
                      const char* const*, size_t, OrtValue**);  // 9
    OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);    // 10
    void* before_23[12];
    OrtStatus* (*SetSessionGraphOptimizationLevel)(OrtSessionOptions*, GraphOptimizationLevel);  // 23
    void* before_49[25];
    OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t,
                                                 ONNXTensorElementDataType, OrtValue**);  // 49
    void* before_51[1];
    OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);  // 51
    void* before_60[8];
    OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType*);  // 60
    OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);
    OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);  // 62
    void* before_65[2];
    OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);  // 65
    void* before_69[3];
    OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);  // 69
    void* before_92[22];
    void (*ReleaseEnv)(OrtEnv*);  // 92
    void (*ReleaseStatus)(OrtStatus*);
    void (*ReleaseMemoryInfo)(OrtMemoryInfo*);
    void (*ReleaseSession)(OrtSession*);
    void (*ReleaseValue)(OrtValue*);  // 96
    void* before_99[2];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);  // 99
    void (*ReleaseSessionOptions)(OrtSessionOptions*);                  // 100
    void* before_130[29];
    OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions*, const char*, const char*);  // 130
};

static_assert(offsetof(OrtApi, AddSessionConfigEntry) == 130 * sizeof(void*));

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t);
    const char* (*GetVersionString)();
};

const OrtApiBase* OrtGetApiBase();

}  // extern "C"
