// Launch of the counted gather on a GPU.
#pragma once

#include <cuda_runtime.h>

#include "gather_counted.h"

namespace fastcov {

// Copies the rows that are due, on a stream of the current device.
cudaError_t launch_gather_counted(const CountedGather& at, const void* rows, cudaStream_t stream);

}  // namespace fastcov
