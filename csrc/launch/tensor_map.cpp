#include "launch/tensor_map.h"

#include <cuda_runtime_api.h>

#include <memory>

#include "launch/cuda_status.h"

namespace pixelfly {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, looked up at run time: nothing links libcuda, so the library also loads on
// machines without a driver.
Encode encoder() {
  static const Encode function = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol,
                                                               12000, cudaEnableDefault, &result);
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<Encode>(symbol) : nullptr;
  }();
  return function;
}

CUtensorMapDataType type_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kUInt8: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    default: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

// What a map is made of. `planes` == 0: a matrix, else so many, one behind the other.
struct MapKey {
  const void* data;
  int64_t planes, rows, cols, stride;
  int box_rows, box_cols;
  DType dtype;

  bool operator==(const MapKey& k) const {
    return data == k.data && planes == k.planes && rows == k.rows && cols == k.cols &&
           stride == k.stride && box_rows == k.box_rows && box_cols == k.box_cols &&
           dtype == k.dtype;
  }
  size_t hash() const {
    uint64_t h = reinterpret_cast<uintptr_t>(data);
    for (const int64_t part : {planes, rows, cols, stride, int64_t{box_rows} << 32 | box_cols}) {
      h = (h ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u;
      h ^= h >> 29;
    }
    return static_cast<size_t>(h);
  }
};

// The maps a thread made last: training calls with the same pointers in every step, and the driver
// takes microseconds for a map. A map says nothing but its key, so none is ever out of date.
struct MapCache {
  static constexpr size_t kEntries = 2048;
  struct Entry {
    MapKey key{};
    CUtensorMap map;
  };
  std::unique_ptr<Entry[]> entries{new Entry[kEntries]};
  Entry& of(const MapKey& key) { return entries[key.hash() % kEntries]; }
};

Status make_map(CUtensorMap* out, const MapKey& key) {
  const auto [data, planes, rows, cols, stride, box_rows, box_cols, dtype] = key;
  const Encode encode = encoder();
  if (encode == nullptr) return Status::cuda("the driver has no cuTensorMapEncodeTiled (CUDA 12)");
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(stride * size_of(dtype));
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(planes)};
  const cuuint64_t strides[2] = {row_bytes, row_bytes * static_cast<cuuint64_t>(rows)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows),
                             1};
  const cuuint32_t steps[3] = {1, 1, 1};
  // The driver wants a context; a thread that has made no runtime call yet has none (autograd's,
  // when ours is the first operator of a backward pass).
  thread_local const cudaError_t context = [] {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error == cudaSuccess ? cudaSetDevice(device) : error;
  }();
  PIXELFLY_CUDA(context);
  const CUresult result = encode(
      out, type_of(dtype), planes > 0 ? 3 : 2, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      box_cols * size_of(dtype) == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::success();
  return Status::cuda("cuTensorMapEncodeTiled failed with " + std::to_string(result) + " for a " +
                      std::to_string(rows) + " x " + std::to_string(cols) + " matrix of stride " +
                      std::to_string(stride));
}

Status find_map(CUtensorMap* out, const MapKey& key) {
  thread_local MapCache cache;
  MapCache::Entry& entry = cache.of(key);
  if (!(entry.key == key)) {
    entry.key = {};  // until the map is there
    PIXELFLY_RETURN_IF_ERROR(make_map(&entry.map, key));
    entry.key = key;
  }
  *out = entry.map;
  return Status::success();
}

}  // namespace

Status encode_tile_map(CUtensorMap* out, DType dtype, const void* data, int64_t rows, int64_t cols,
                       int64_t stride, int box_rows, int box_cols) {
  return find_map(out, {data, 0, rows, cols, stride, box_rows, box_cols, dtype});
}

Status encode_plane_map(CUtensorMap* out, DType dtype, const void* data, int64_t planes,
                        int64_t rows, int64_t cols, int box_rows, int box_cols) {
  return find_map(out, {data, planes, rows, cols, cols, box_rows, box_cols, dtype});
}

}  // namespace pixelfly
