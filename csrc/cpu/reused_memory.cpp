// A CPU allocator that keeps freed blocks for the next allocation of about the same size.
//
// A chain step frees gigabytes and allocates them again. malloc returns large blocks to the kernel, which zeroes every
// page again; for a large batch that costs as much as the arithmetic. Used while a frozen pair computes
// (frozen/memory.py); tensors may outlive that, and their memory returns here when they are freed.
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vf {
namespace {

constexpr size_t kLeastKept = 64 << 10;   // smaller blocks go to malloc, which caches them itself
constexpr size_t kHugePage = 2 << 20;     // blocks from here on ask for huge pages
constexpr size_t kAlignment = 64;         // a cache line, and the header's place in front of the data

class ReusedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : take(bytes);
    return {data, data, &give, at::Device(at::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Start keeping freed blocks.
  void keep() {
    const std::lock_guard lock(mutex_);
    keeps_ = true;
  }

  // Frees every kept block and returns their bytes; until `keep`, freed blocks are not kept.
  int64_t release() {
    const std::lock_guard lock(mutex_);
    keeps_ = false;
    const size_t before = owned_;
    while (!kept_.empty()) discard(std::prev(kept_.end()));
    most_used_ = used_;
    return static_cast<int64_t>(before - owned_);
  }

  static ReusedMemory& instance() {
    static auto* memory = new ReusedMemory;  // never destroyed: tensors may outlive static objects
    return *memory;
  }

 private:
  using Kept = std::multimap<size_t, void*>;  // by size of the block

  static void* header_of(void* data) { return static_cast<char*>(data) - kAlignment; }
  static size_t& size_of(void* block) { return *static_cast<size_t*>(block); }

  void* take(size_t bytes) {
    const size_t step = bytes < kHugePage ? kAlignment : kLeastKept;
    const size_t size = (bytes + kAlignment + step - 1) / step * step;
    void* block = size < kLeastKept ? create(size) : reuse_or_create(size);
    return static_cast<char*>(block) + kAlignment;
  }

  // A kept block at most a quarter larger than needed, else a new one.
  void* reuse_or_create(size_t size) {
    const std::lock_guard lock(mutex_);
    const auto found = kept_.lower_bound(size);
    if (found != kept_.end() && found->first <= size + size / 4) {
      void* block = found->second;
      use(found->first);
      kept_.erase(found);
      return block;
    }
    use(size);
    // Limit unused blocks: total memory is at most a quarter above the most ever used at one time.
    while (!kept_.empty() && owned_ + size > most_used_ + most_used_ / 4) discard(std::prev(kept_.end()));
    void* block = create(size);
    owned_ += size;
    return block;
  }

  void use(size_t size) {
    used_ += size;
    most_used_ = std::max(most_used_, used_);
  }

  void discard(Kept::iterator entry) {
    owned_ -= entry->first;
    std::free(entry->second);
    kept_.erase(entry);
  }

  static void* create(size_t size) {
    void* block = nullptr;
    const int failed = posix_memalign(&block, size < kHugePage ? kAlignment : kHugePage, size);
    TORCH_CHECK(failed == 0, "Out of memory: ", size, " bytes are not to be had; take a smaller batch.");
#ifdef MADV_HUGEPAGE
    if (size >= kHugePage) madvise(block, size, MADV_HUGEPAGE);  // advice only: a failure costs only speed
#endif
    size_of(block) = size;
    return block;
  }

  static void give(void* data) {
    if (data == nullptr) return;
    void* block = header_of(data);
    const size_t size = size_of(block);
    if (size < kLeastKept) return std::free(block);
    ReusedMemory& memory = instance();
    const std::lock_guard lock(memory.mutex_);
    memory.used_ -= size;
    if (memory.keeps_) {
      memory.kept_.emplace(size, block);
    } else {
      memory.owned_ -= size;
      std::free(block);
    }
  }

  std::mutex mutex_;
  bool keeps_ = false;
  Kept kept_;
  size_t owned_ = 0, used_ = 0, most_used_ = 0;  // bytes in large blocks: all, handed out, most ever handed out
};

// From begin to the matching end, CPU tensors use blocks that are kept when freed. Counts nested and concurrent uses;
// the last to end restores torch's allocator.
void reuse_memory(bool begin) {
  static std::mutex mutex;
  static int64_t users = 0;
  static c10::Allocator* before = nullptr;
  const std::lock_guard lock(mutex);
  if (begin && users++ == 0) {
    ReusedMemory::instance().keep();
    before = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&ReusedMemory::instance());
  }
  if (!begin && --users == 0) c10::SetCPUAllocator(before);
}

// Frees the kept blocks; returns their bytes.
int64_t release_memory() { return ReusedMemory::instance().release(); }

}  // namespace
}  // namespace vf

TORCH_LIBRARY_FRAGMENT(vaebm_fast, m) {
  constexpr auto key = c10::DispatchKey::CompositeExplicitAutograd;
  m.def("reuse_memory(bool begin) -> ()", torch::dispatch(key, &vf::reuse_memory));
  m.def("release_memory() -> int", torch::dispatch(key, &vf::release_memory));
}
