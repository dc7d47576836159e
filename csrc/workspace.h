// Scratch memory of the calling thread. It is kept between calls, so that later calls allocate
// nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastcov {

class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    struct Arena {
      std::unique_ptr<char[], decltype(&std::free)> memory{nullptr, &std::free};
      int64_t bytes = 0;
    };
    static thread_local Arena arena;
    if (arena.bytes < bytes) {
      arena.memory.reset();
      arena.bytes = 0;
      arena.memory.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes))));
      if (!arena.memory) throw std::bad_alloc();
      arena.bytes = round_up(bytes);
    }
    next_ = arena.memory.get();
  }

  template <typename T>
  T* take(int64_t values) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += round_up(values * static_cast<int64_t>(sizeof(T)));
    return result;
  }

  static int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  char* next_;
};

}  // namespace fastcov
