// Blocks whose threads wait for each other and share memory: the second half of cuda_emulation.h.
#pragma once

#include "fibers.h"

#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#ifndef VF_MAX_SHARED_KB
#define VF_MAX_SHARED_KB 163  // of a block on an A100; 227 on an H100
#endif

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kMaxExchangeBytes = 64;

struct Warp;

// A CUDA thread. Its place is in threadIdx, lane and warp while it runs.
struct Thread {
  dim3 index;
  Warp* warp = nullptr;
  int lane = 0;
  Fiber fiber;

  explicit Thread(std::function<void()> body) : fiber(std::move(body)) {}
};

inline Thread* running;
inline std::deque<Thread*> ready;  // in the order of their turns

// `complete` runs when all have come, before any goes on.
class Barrier {
 public:
  explicit Barrier(int threads, std::function<void()> complete = [] {})
      : expected_(threads), missing_(threads), complete_(std::move(complete)) {}

  void arrive_and_wait() {
    const Unwatched unwatched;
    Order& order = orders_[phase_];
    waiting_.push_back(running);
    arrive();
    running->fiber.pause();
    order.acquire();
  }

  void arrive_and_drop() {
    const Unwatched unwatched;
    --expected_;
    arrive();
  }

 private:
  void arrive() {
    orders_[phase_].release();
    if (--missing_ > 0) return;
    complete_();
    missing_ = expected_;
    phase_ = 1 - phase_;
    ready.insert(ready.end(), waiting_.begin(), waiting_.end());
    waiting_.clear();
  }

  int expected_, missing_;
  int phase_ = 0;
  Order orders_[2];  // in turns: who goes on late must not come after what others did since
  std::vector<Thread*> waiting_;
  std::function<void()> complete_;
};

// A thread that returns counts as arriving at every later barrier, as on a GPU; but warp functions are for all lanes.
struct Warp {
  int lanes;
  int waiting = 0;
  Barrier barrier;
  alignas(16) std::byte words[kWarpSize][kMaxExchangeBytes];

  explicit Warp(int lanes_) : lanes(lanes_), barrier(lanes_, [this] { check(); }) {}

  void check() {
    require(waiting == 0 || waiting == kWarpSize, "a warp function is called after a lane returned");
    waiting = 0;
  }

  void wait() {
    require(lanes == kWarpSize, "a warp function is called by a warp of less than 32 threads");
    const Unwatched unwatched;
    ++waiting;
    barrier.arrive_and_wait();
  }
};

struct Block {
  Barrier barrier;
  std::deque<Warp> warps;
  std::unique_ptr<std::byte[]> dynamic_shared;  // on the heap, for AddressSanitizer to watch both ends

  Block(int threads, size_t shared_bytes) : barrier(threads), dynamic_shared(new std::byte[shared_bytes]) {
    for (int first = 0; first < threads; first += kWarpSize) warps.emplace_back(std::min(kWarpSize, threads - first));
    std::memset(dynamic_shared.get(), 0xff, shared_bytes);
  }
};

inline Block* block;
inline Warp* warp;
inline int lane;

// Every VF_SHARED that a kernel has met. The memory itself is on the heap too; all ones is NaN in every floating type.
class SharedMemory {
 public:
  struct Object {
    void* memory;
    size_t bytes;
    std::atomic<bool> used{false};  // by this launch
  };

  Object& add(void* memory, size_t bytes) {
    std::memset(memory, 0xff, bytes);
    return objects_.emplace_back(memory, bytes);
  }

  void begin_launch(size_t dynamic_bytes) {
    dynamic_bytes_ = dynamic_bytes;
    for (Object& object : objects_) object.used = false;
  }

  // Between two blocks, when no thread runs.
  void check_and_poison() {
    size_t bytes = 0;
    for (Object& object : objects_) {
      if (!object.used) continue;
      bytes += object.bytes;
      std::memset(object.memory, 0xff, object.bytes);
    }
    require(bytes <= 48 << 10, "a kernel has more than 48 KB of static shared memory; take VF_DYNAMIC_SHARED");
    require(bytes + dynamic_bytes_ <= size_t{VF_MAX_SHARED_KB} << 10, "a block has more shared memory than a GPU");
  }

 private:
  std::deque<Object> objects_;
  size_t dynamic_bytes_ = 0;
};

inline SharedMemory shared_memory;

template <class T>
class Shared {
  static_assert(std::is_trivially_copyable_v<T>, "shared memory has no constructors");

 public:
  T& get() {
    object_.used.store(true, std::memory_order_relaxed);  // relaxed: or it would hide a missing barrier
    return *memory_;
  }

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, std::align_val_t{alignof(T)}); }
  };
  std::unique_ptr<T, Free> memory_{static_cast<T*>(::operator new(sizeof(T), std::align_val_t{alignof(T)}))};
  SharedMemory::Object& object_ = shared_memory.add(memory_.get(), sizeof(T));
};

// What every lane of the warp has given.
template <class T>
std::array<T, kWarpSize> exchange(const T& mine) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMaxExchangeBytes);
  std::array<T, kWarpSize> all;
  std::memcpy(warp->words[lane], &mine, sizeof(T));
  warp->wait();
  for (int l = 0; l < kWarpSize; ++l) std::memcpy(&all[l], warp->words[l], sizeof(T));
  warp->wait();  // nobody writes again before all have read
  return all;
}

inline void require_full(unsigned mask) { require(mask == ~0u, "a warp function's mask is not 0xffffffff"); }

// The threads of a block, in turns from barrier to barrier.
class Team {
 public:
  void run(const dim3& size, const std::function<void()>& kernel) {
    const Unwatched unwatched;
    kernel_ = &kernel;
    unfinished_ = 0;
    dim3 index;
    for_each(size, index, [&] { enlist(index); });
    before_.release();
    while (!ready.empty()) {
      running = ready.front();
      ready.pop_front();
      threadIdx = running->index;
      warp = running->warp;
      lane = running->lane;
      running->fiber.resume();
    }
    require(unfinished_ == 0, "threads wait for each other for ever");
    after_.acquire();
  }

 private:
  void enlist(const dim3& index) {
    const size_t number = unfinished_++;
    if (number == threads_.size()) threads_.emplace_back([this] { run_one(); });
    Thread& thread = threads_[number];
    thread.index = index;
    thread.warp = &block->warps[number / kWarpSize];
    thread.lane = static_cast<int>(number % kWarpSize);
    ready.push_back(&thread);
  }

  void run_one() {
    before_.acquire();
    (*kernel_)();
    block->barrier.arrive_and_drop();
    warp->barrier.arrive_and_drop();
    after_.release();
    const Unwatched unwatched;
    --unfinished_;
  }

  std::deque<Thread> threads_;  // those of earlier blocks too: making a stack takes longer than most kernels
  const std::function<void()>* kernel_ = nullptr;
  size_t unfinished_ = 0;
  Order before_, after_;
};

inline Team team;

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block_size, size_t shared_bytes, Arguments... arguments) {
  check_launch(grid, block_size);
  shared_memory.begin_launch(shared_bytes);
  gridDim = grid;
  blockDim = block_size;
  for_each(grid, blockIdx, [&] {
    Block current(static_cast<int>(block_size.x * block_size.y * block_size.z), shared_bytes);
    block = &current;
    team.run(block_size, [&] { kernel(arguments...); });
    shared_memory.check_and_poison();
  });
}

// Whether the barrier on this line is the one to leave out.
inline bool is_dropped(const char* file, int line) {
  static const std::string dropped = [] {
    const char* name = std::getenv("VF_DROP_BARRIER");
    return std::string(name == nullptr ? "" : name);
  }();
  return !dropped.empty() && (std::string(file) + ":" + std::to_string(line)).ends_with("/" + dropped);
}

}  // namespace emulation

#define VF_SHARED(Type, name)                   \
  static emulation::Shared<Type> name##_shared; \
  Type& name = name##_shared.get()
#define VF_DYNAMIC_SHARED(Type, name) Type* name = reinterpret_cast<Type*>(emulation::block->dynamic_shared.get())

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!emulation::is_dropped(file, line)) emulation::block->barrier.arrive_and_wait();
}

inline void __syncwarp(unsigned mask = ~0u) {
  emulation::require_full(mask);
  emulation::warp->wait();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  emulation::require_full(mask);
  return emulation::exchange(value)[source % emulation::kWarpSize];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  emulation::require_full(mask);
  return emulation::exchange(value)[emulation::lane ^ lane_mask];
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  emulation::require_full(mask);
  const unsigned source = emulation::lane + delta;
  const std::array<T, emulation::kWarpSize> all = emulation::exchange(value);
  return source < emulation::kWarpSize ? all[source] : value;
}
