// Blocks whose threads wait for each other and share memory: the second half of cuda_emulation.h.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#ifndef VF_MAX_SHARED_KB
#define VF_MAX_SHARED_KB 163  // of a block on an A100; 227 on an H100
#endif

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kMaxExchangeBytes = 64;

// As std::barrier, but that one's waiting threads meet in a table that all barriers share: to ThreadSanitizer this
// orders what no barrier of ours does, and it misses races. `complete` runs when all have come, before any goes on.
class Barrier {
 public:
  explicit Barrier(int threads, std::function<void()> complete = [] {})
      : expected_(threads), missing_(threads), complete_(std::move(complete)) {}

  void arrive_and_wait() {
    std::unique_lock lock(mutex_);
    const int64_t phase = phase_;
    arrive();
    all_here_.wait(lock, [&] { return phase_ != phase; });
  }

  void arrive_and_drop() {
    const std::lock_guard lock(mutex_);
    --expected_;
    arrive();
  }

 private:
  void arrive() {
    if (--missing_ > 0) return;
    complete_();
    missing_ = expected_;
    ++phase_;
    all_here_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable all_here_;
  int expected_, missing_;
  int64_t phase_ = 0;
  std::function<void()> complete_;
};

// A thread that returns counts as arriving at every later barrier, as on a GPU; but warp functions are for all lanes.
struct Warp {
  int lanes;
  std::atomic<int> waiting{0};
  Barrier barrier;
  alignas(16) std::byte words[kWarpSize][kMaxExchangeBytes];

  explicit Warp(int lanes_) : lanes(lanes_), barrier(lanes_, [this] { check(); }) {}

  void check() {
    const int all = waiting.exchange(0, std::memory_order_relaxed);
    require(all == 0 || all == kWarpSize, "a warp function is called after a lane returned");
  }

  void wait() {
    require(lanes == kWarpSize, "a warp function is called by a warp of less than 32 threads");
    waiting.fetch_add(1, std::memory_order_relaxed);
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

inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local int lane;

// Every VF_SHARED that a kernel has met. The memory itself is on the heap too; all ones is NaN in every floating type.
class SharedMemory {
 public:
  struct Object {
    void* memory;
    size_t bytes;
    std::atomic<bool> used{false};  // by this launch
  };

  Object& add(void* memory, size_t bytes) {
    const std::lock_guard guard(mutex_);
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
  std::mutex mutex_;
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

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, dim3 block_size, size_t shared_bytes, Arguments... arguments) {
  check_launch(grid, block_size);
  const int threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  shared_memory.begin_launch(shared_bytes);
  std::optional<Block> current(std::in_place, threads, shared_bytes);
  Barrier end_of_block(threads, [&] {
    shared_memory.check_and_poison();
    current.emplace(threads, shared_bytes);
  });

  const auto run = [&](dim3 index, int thread) {
    gridDim = grid;
    blockDim = block_size;
    threadIdx = index;
    lane = thread % kWarpSize;
    for_each(grid, blockIdx, [&] {
      block = &*current;
      warp = &block->warps[thread / kWarpSize];
      kernel(arguments...);
      block->barrier.arrive_and_drop();
      warp->barrier.arrive_and_drop();
      end_of_block.arrive_and_wait();
    });
  };
  std::vector<std::jthread> team;
  dim3 index;
  for_each(block_size, index, [&] { team.emplace_back(run, index, static_cast<int>(team.size())); });
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
