// Fibers, their meetings and launches. Compiled without ThreadSanitizer, to which it says what a
// GPU orders: what a barrier or a counter makes visible, and nothing else.
//
// Environment: EMULATED_ORDER is 0 (fibers in order), 1 (in reverse) or a seed that shuffles them;
// EMULATED_WITHOUT=block, warp or cluster takes those barriers away, a control for the tests.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(FASTCOV_CHECK_RACES)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulated {

Device device;
thread_local Indices here;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kNoSync = 1;

#if defined(FASTCOV_CHECK_RACES)
constexpr bool kChecksRaces = true;
void release(void* place) { __tsan_release(place); }
void acquire(void* place) { __tsan_acquire(place); }
void* create_tracked() { return __tsan_create_fiber(0); }
void* current_tracked() { return __tsan_get_current_fiber(); }
void destroy_tracked(void* fiber) { __tsan_destroy_fiber(fiber); }
inline __attribute__((always_inline)) void track(void* fiber) {
  __tsan_switch_to_fiber(fiber, kNoSync);
}
#else
constexpr bool kChecksRaces = false;
void release(void*) {}
void acquire(void*) {}
void* create_tracked() { return nullptr; }
void* current_tracked() { return nullptr; }
void destroy_tracked(void*) {}
inline void track(void*) {}
#endif

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated launch: %s\n", what);
  std::_Exit(5);
}

std::string environment(const char* name) {
  const char* const value = std::getenv(name);
  return value ? value : "";
}

// Threads that wait for each other, any number of times. What is used in turn belongs to one
// meeting: nobody reaches the next but one while another has not left this one.
struct Meeting {
  unsigned arrived = 0;
  unsigned generation = 0;
  uint64_t slots[2][32] = {};
  int flags[2] = {};
};

// Turns of blocks that wait for each other: one runs at a time, and gives its turn on where it can
// only wait. Threads that spun until another had run would wait for the whole machine. Under
// ThreadSanitizer blocks run side by side instead.
class Turns {
 public:
  explicit Turns(unsigned blocks) : blocks_(blocks), calls_(blocks), is_running_(blocks, true) {}

  void begin(unsigned block) {
    std::unique_lock<std::mutex> lock(mutex_);
    calls_[block].wait(lock, [&] { return turn_ == block; });
  }
  void give_on(unsigned block) {
    std::unique_lock<std::mutex> lock(mutex_);
    call_next(block);
    calls_[block].wait(lock, [&] { return turn_ == block; });
  }
  void end(unsigned block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_running_[block] = false;
    call_next(block);
  }

 private:
  void call_next(unsigned block) {
    for (unsigned step = 1; step <= blocks_; ++step) {
      const unsigned next = (block + step) % blocks_;
      if (!is_running_[next]) continue;
      turn_ = next;
      calls_[next].notify_one();
      return;
    }
  }

  const unsigned blocks_;
  std::mutex mutex_;
  std::vector<std::condition_variable> calls_;
  std::vector<bool> is_running_;
  unsigned turn_ = 0;
};

thread_local Turns* turns = nullptr;
thread_local unsigned own_block = 0;

void let_others_run() {
  if (turns) {
    turns->give_on(own_block);
  } else {
    std::this_thread::yield();
  }
}

// Blocks of a cluster.
struct Cluster {
  std::atomic<unsigned> arrived{0};
  char places[2];
};

struct Fiber {
  ucontext_t context;
  jmp_buf place;  // where it gave way
  bool has_begun = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* tracked = nullptr;
  dim3 thread;
  const unsigned* awaited = nullptr;  // a generation that has to pass `seen`
  unsigned seen = 0;
  unsigned cluster_waits = 0;
  unsigned cluster_expected = 0;  // arrivals of blocks that it waits for
  bool is_done = false;
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned blocks_of_cluster;
  unsigned char* (*shared)();
  const std::function<void()>* body;
};

class Block {
 public:
  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  void run(const Launch& launch, dim3 index, Cluster* cluster) {
    current() = this;
    launch_ = &launch;
    cluster_ = cluster;
    here = {{}, index, launch.grid};
    meetings_.assign(launch.block.x + 1, Meeting{});
    cluster_arrived_ = 0;
    fibers_.resize(launch.block.x);
    tracked_ = current_tracked();
    unsigned char* const shared = launch.shared();
    std::fill_n(shared, kSharedCapacity, kUnwritten);
    std::vector<unsigned> order(fibers_.size());
    std::iota(order.begin(), order.end(), 0u);
    const unsigned seed = static_cast<unsigned>(std::atoi(environment("EMULATED_ORDER").c_str()));
    if (seed == 1) std::reverse(order.begin(), order.end());
    std::mt19937 generator(seed);
    for (unsigned t = 0; t < launch.block.x; ++t) prepare(fibers_[t], t);
    for (size_t left = fibers_.size(); left > 0;) {
      if (seed > 1) std::shuffle(order.begin(), order.end(), generator);
      bool has_run = false, has_entered = false;
      for (const unsigned t : order) {
        Fiber& fiber = fibers_[t];
        if (fiber.is_done || (fiber.awaited && *fiber.awaited == fiber.seen)) continue;
        has_run = true;
        if (cluster_->arrived.load(std::memory_order_acquire) < fiber.cluster_expected) continue;
        has_entered = true;
        fiber_ = &fiber;
        here.thread = fiber.thread;
        track(fiber.tracked);
        enter(fiber);
        if (fiber.is_done) --left;
      }
      if (!has_run) fail("threads of a block wait at different barriers");
      // Every thread waits for other blocks.
      if (!has_entered) let_others_run();
    }
    for (Fiber& fiber : fibers_) destroy_tracked(fiber.tracked);
    for (size_t byte = launch.shared_bytes; byte < kSharedCapacity; ++byte) {
      if (shared[byte] != kUnwritten) fail("a write beyond the dynamic shared memory");
    }
  }

  void give_way() {
    Fiber* const fiber = fiber_;
    track(tracked_);
    if constexpr (kChecksRaces) {
      swapcontext(&fiber->context, &scheduler_);
    } else if (_setjmp(fiber->place) == 0) {
      _longjmp(scheduler_place_, 1);
    }
  }

  // Returns the meeting, and which of its two sides it used. Shuffles and votes wait for the lanes
  // but order no access to memory: only a barrier does.
  std::pair<Meeting*, unsigned> meet(unsigned mask, bool orders, int lane, uint64_t value,
                                     int flag) {
    const unsigned first = fiber_->thread.x / 32 * 32;
    const unsigned group = mask ? first + static_cast<unsigned>(__builtin_ctz(mask))
                                : static_cast<unsigned>(fibers_.size());
    const unsigned expected = mask ? static_cast<unsigned>(__builtin_popcount(mask))
                                   : static_cast<unsigned>(fibers_.size());
    Meeting& meeting = meetings_[group];
    const unsigned side = meeting.generation & 1;
    if (meeting.arrived == 0) meeting.flags[side] = 0;
    if (lane >= 0) meeting.slots[side][lane] = value;
    meeting.flags[side] |= flag;
    if (orders) release(&meeting.slots[side]);
    if (++meeting.arrived == expected) {
      meeting.arrived = 0;
      ++meeting.generation;
    } else {
      fiber_->awaited = &meeting.generation;
      fiber_->seen = meeting.generation;
      give_way();
      fiber_->awaited = nullptr;
    }
    if (orders) acquire(&meeting.slots[side]);
    return {&meeting, side};
  }

  void arrive_at_cluster() {
    release(&cluster_->places[fiber_->cluster_waits % 2]);
    if (++cluster_arrived_ == fibers_.size()) {
      cluster_arrived_ = 0;
      cluster_->arrived.fetch_add(1, std::memory_order_release);
    }
  }
  void wait_for_cluster() {
    const unsigned side = fiber_->cluster_waits % 2;
    fiber_->cluster_expected = ++fiber_->cluster_waits * launch_->blocks_of_cluster;
    give_way();
    acquire(&cluster_->places[side]);
  }

 private:
  static constexpr unsigned char kUnwritten = 0xff;

  // Runs a fiber until it gives way. swapcontext asks the system for the signal mask every time,
  // four times as slow as a jump; ThreadSanitizer knows fibers by the former alone.
  __attribute__((noinline)) void enter(Fiber& fiber) {
    if constexpr (kChecksRaces) {
      swapcontext(&scheduler_, &fiber.context);
    } else if (_setjmp(scheduler_place_) == 0) {
      if (fiber.has_begun) _longjmp(fiber.place, 1);
      fiber.has_begun = true;
      setcontext(&fiber.context);
    }
  }

  void prepare(Fiber& fiber, unsigned number) {
    fiber.thread = dim3(number, 0, 0);
    fiber.tracked = create_tracked();
    fiber.awaited = nullptr;
    fiber.cluster_waits = 0;
    fiber.cluster_expected = 0;
    fiber.has_begun = false;
    fiber.is_done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::start, 0);
  }
  static void start() {
    Block* const block = current();
    (*block->launch_->body)();
    block->fiber_->is_done = true;
    release(const_cast<Launch*>(block->launch_));
    block->give_way();
  }

  const Launch* launch_ = nullptr;
  Cluster* cluster_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> meetings_;  // by the first lane of a group; the last is the block's
  size_t cluster_arrived_ = 0;
  Fiber* fiber_ = nullptr;
  void* tracked_ = nullptr;
  ucontext_t scheduler_;
  jmp_buf scheduler_place_;
};

}  // namespace

int& shared_limit(const void* kernel) {
  static std::map<const void*, int> limits;
  return limits.try_emplace(kernel, 48 << 10).first->second;
}

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, unsigned char* (*shared)(),
                const std::function<void()>& body) {
  Launch launch{config.gridDim, config.blockDim, config.dynamicSmemBytes, 1, shared, &body};
  bool is_cooperative = false;
  for (unsigned a = 0; a < config.numAttrs; ++a) {
    const cudaLaunchAttribute& attribute = config.attrs[a];
    if (attribute.id == cudaLaunchAttributeCooperative) is_cooperative = attribute.val.cooperative;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      launch.blocks_of_cluster = attribute.val.clusterDim.x;
    }
  }
  const unsigned blocks = launch.grid.x * launch.grid.y;
  if (launch.grid.x == 0 || launch.grid.x > 0x7fffffffu || launch.grid.y == 0 ||
      launch.grid.y > 65535 || launch.block.x == 0 || launch.block.x > 1024 ||
      launch.blocks_of_cluster > 8 || launch.grid.x % launch.blocks_of_cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (launch.shared_bytes > static_cast<size_t>(shared_limit(kernel))) return cudaErrorInvalidValue;
  if (is_cooperative && blocks > static_cast<unsigned>(device.multiprocessors)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }

  std::vector<Cluster> clusters(blocks / launch.blocks_of_cluster);
  const auto run_block = [&](Block& block, unsigned number) {
    block.run(launch, dim3(number % launch.grid.x, number / launch.grid.x),
              &clusters[number / launch.blocks_of_cluster]);
  };
  std::vector<std::thread> threads;
  Turns all(blocks);
  if (is_cooperative || launch.blocks_of_cluster > 1 || kChecksRaces) {
    for (unsigned number = 0; number < blocks; ++number) {
      threads.emplace_back([&run_block, &all, number] {
        turns = kChecksRaces ? nullptr : &all;
        own_block = number;
        if (turns) turns->begin(number);
        Block block;
        run_block(block, number);
        if (turns) turns->end(number);
      });
    }
  } else {
    // One after the other, in memory that the one before has left behind.
    threads.emplace_back([&] {
      Block block;
      for (unsigned number = 0; number < blocks; ++number) run_block(block, number);
    });
  }
  for (std::thread& thread : threads) thread.join();
  acquire(&launch);
  return cudaSuccess;
}

static bool is_without(const char* barriers) {
  static const std::string without = environment("EMULATED_WITHOUT");
  return without == barriers;
}

int meet(unsigned mask, int flag, bool is_barrier) {
  if (is_barrier && is_without(mask ? "warp" : "block")) return 0;
  const bool orders = is_barrier || mask == kWholeBlock;
  const auto [meeting, side] = Block::current()->meet(mask, orders, -1, 0, flag);
  return meeting->flags[side];
}

uint64_t exchange(unsigned mask, uint64_t bits, unsigned other_lane) {
  const int lane = static_cast<int>(here.thread.x % 32);
  const auto [meeting, side] = Block::current()->meet(mask, false, lane, bits, 0);
  return meeting->slots[side][other_lane];
}

void arrive_at_cluster() {
  if (!is_without("cluster")) Block::current()->arrive_at_cluster();
}
void wait_for_cluster() {
  if (!is_without("cluster")) Block::current()->wait_for_cluster();
}

void fetch_add(unsigned* target, unsigned value) {
  release(target);
  __atomic_fetch_add(target, value, __ATOMIC_RELEASE);
}
unsigned load(const unsigned* source) {
  const unsigned value = __atomic_load_n(source, __ATOMIC_ACQUIRE);
  acquire(const_cast<unsigned*>(source));
  let_others_run();
  return value;
}

// As rcp.approx.ftz: within an ulp, no subnormal numbers; here off by one where a hash says so.
float reciprocal(float value) {
  constexpr float least = 0x1p-126f;
  if (value > -least && value < least) value = __builtin_copysignf(0.0f, value);
  float result = 1 / value;
  if (result > -least && result < least) return __builtin_copysignf(0.0f, result);
  uint32_t bits, hash;
  std::memcpy(&bits, &result, sizeof(bits));
  std::memcpy(&hash, &value, sizeof(hash));
  if ((bits & 0x7f800000u) == 0x7f800000u) return result;
  hash = (hash ^ hash >> 15) * 0x2c1b3c6du;
  constexpr uint32_t kOff[4] = {0, 1, ~0u, 0};
  bits += kOff[hash >> 30];
  std::memcpy(&result, &bits, sizeof(bits));
  return result;
}

}  // namespace emulated
