// Work on a few streams beside the current one, which waits for all of them.
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

// Streams that this library alone uses. A stream of torch's pool may be the one that a user trains
// on, and training would then wait for the work of this library. They have the lowest priority,
// which is also the default, so that blocks of a training with a higher priority go first.
class BranchStreams {
 public:
  // GPUs have eight hardware queues by default. With more streams a training's launches could wait
  // in a queue behind launches of this library.
  static constexpr size_t kMost = 4;

  // Returns the stream to be used next. Captures have streams of their own: a stream that has
  // joined a capture stays in it until the capture ends, and takes no other work.
  static cudaStream_t next(int device, bool is_capturing) {
    static std::mutex mutex;
    static std::map<std::pair<int, bool>, BranchStreams> of_device;
    const std::lock_guard<std::mutex> lock(mutex);
    BranchStreams& own = of_device[{device, is_capturing}];
    // Captures of several threads must not meet in one stream, so they take turns in all of these.
    // Hardware queues matter only when a graph is replayed.
    const size_t used = is_capturing ? own.streams_.size() : kMost;
    cudaStream_t& stream = own.streams_[own.next_++ % used];
    if (!stream) {
      // Making a stream is not work of a capture that may be going on. In relaxed mode the capture
      // does not forbid it.
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

// Branches start after the work that the current stream holds, and later work of the current stream
// waits for them. The fifth branch and those after it take turns in the streams of the second to
// the fourth, because the first branch has the longest work.
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
  // Joins after an error too, because memory of the call goes back to the current stream.
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
  // Lets a branch also wait for what the current stream holds by now, such as memory that torch has
  // just filled there in its deterministic mode.
  void follow(cudaStream_t branch) {
    if (!event_) return;
    STD_CUDA_CHECK(cudaEventRecord(event_, current_));
    STD_CUDA_CHECK(cudaStreamWaitEvent(branch, event_, 0));
  }
  // Makes the current stream wait for all branches. Returns the first error, if any.
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
  size_t shared_ = 0;  // branches that share a stream with an earlier one
};

}  // namespace fastcov
