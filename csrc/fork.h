// Work on a few streams beside the current one, which waits for all of it.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fastcov {

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Streams that only this library uses. One of torch's pool may be what a user trains on: work of a
// side stream that lands there would make the training wait for it.
// They have the lowest priority, a stream's default: blocks of a training that asks for a higher
// one go first.
class BranchStreams {
 public:
  // GPUs have eight hardware queues by default: with more streams a training's launches would wait
  // behind these in one of them.
  static constexpr size_t kMost = 4;

  // Captures have streams of their own: a stream that has joined a capture stays in it until the
  // capture ends, and takes no other work.
  static cudaStream_t next(int device, bool is_capturing) {
    static std::mutex mutex;
    static std::map<std::pair<int, bool>, BranchStreams> of_device;
    const std::lock_guard<std::mutex> lock(mutex);
    BranchStreams& own = of_device[{device, is_capturing}];
    // Captures of several threads must not meet in one stream; queues count when a graph is
    // replayed.
    const size_t used = is_capturing ? own.streams_.size() : kMost;
    cudaStream_t& stream = own.streams_[own.next_++ % used];
    if (!stream) {
      // Making a stream is no work of the capture that may be going on.
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
      const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
      STD_CUDA_CHECK(error);
    }
    return stream;
  }

 private:
  std::array<cudaStream_t, 16> streams_{};
  unsigned next_ = 0;
};

// Branches start after what the current stream holds; what comes next there waits for them. From
// the fifth on they take turns in the streams of the second to the fourth: the first one has the
// longest work.
class Fork {
 public:
  Fork(int device, size_t branches) : device_(device), current_(current_stream(device)) {
    if (branches < 2) return;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaStreamIsCapturing(current_, &status));
    is_capturing_ = status != cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    STD_CUDA_CHECK(cudaEventRecord(event_, current_));
  }
  Fork(const Fork&) = delete;
  Fork& operator=(const Fork&) = delete;
  // After an error too: memory of the call goes back to the current stream.
  ~Fork() {
    join();
    if (event_) cudaEventDestroy(event_);
  }

  cudaStream_t branch() {
    if (!event_) return current_;
    if (streams_.size() == BranchStreams::kMost) {
      return streams_[1 + shared_++ % (BranchStreams::kMost - 1)];
    }
    const cudaStream_t stream = BranchStreams::next(device_, is_capturing_);
    STD_CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0));
    streams_.push_back(stream);
    return stream;
  }
  // A branch waits for what the current stream holds by now too: memory that torch has just filled
  // there, as it does in its deterministic mode.
  void follow(cudaStream_t branch) {
    if (!event_) return;
    STD_CUDA_CHECK(cudaEventRecord(event_, current_));
    STD_CUDA_CHECK(cudaStreamWaitEvent(branch, event_, 0));
  }
  // The first error, if any.
  cudaError_t join() noexcept {
    cudaError_t first = cudaSuccess;
    for (const cudaStream_t stream : streams_) {
      cudaError_t error = cudaEventRecord(event_, stream);
      if (error == cudaSuccess) error = cudaStreamWaitEvent(current_, event_, 0);
      if (first == cudaSuccess) first = error;
    }
    streams_.clear();
    return first;
  }

 private:
  int device_;
  cudaStream_t current_;
  cudaEvent_t event_ = nullptr;
  bool is_capturing_ = false;
  std::vector<cudaStream_t> streams_;
  size_t shared_ = 0;  // branches in a stream that has one already
};

}  // namespace fastcov
