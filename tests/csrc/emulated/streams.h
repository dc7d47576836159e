// Streams and events that note their order, over emulated/cuda_runtime.h: what is launched runs at
// once, and a test tells from the notes what a GPU might have run too early.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

using cudaEvent_t = void*;
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };

namespace emulated {

enum Note : int64_t { kWork, kRecord, kWait };

// Threes of note, stream and event; streams and events are numbers from 1 on, 0 is none.
inline std::vector<int64_t> notes;
inline int64_t streams = 1;  // the first is the current one
inline int64_t events = 0;

inline void note(Note what, void* stream, void* event = nullptr) {
  notes.insert(notes.end(),
               {what, reinterpret_cast<int64_t>(stream), reinterpret_cast<int64_t>(event)});
}

}  // namespace emulated

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return *stream = reinterpret_cast<void*>(++emulated::streams), cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<void*>(++emulated::events), cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return emulated::note(emulated::kRecord, stream, event), cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return emulated::note(emulated::kWait, stream, event), cudaSuccess;
}
