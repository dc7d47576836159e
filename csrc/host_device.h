// Attributes of functions that host and device compile from one source.
#pragma once

#if defined(__CUDACC__)
#define FASTCOV_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTCOV_HOST_DEVICE inline
#endif
