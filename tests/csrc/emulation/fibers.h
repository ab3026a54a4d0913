// Functions that run in turns on one CPU thread, each on a stack of its own, and what sanitisers must be told of them.
//
// VF_ADDRESS_SANITIZER, VF_THREAD_SANITIZER, defined beforehand: which of them watches.
#pragma once

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>
#ifdef VF_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef VF_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

#include <cstddef>
#include <functional>

namespace emulation {

// While one lives, ThreadSanitizer does not see what this fiber reads and writes: what fibers share to take turns would
// be races otherwise, as turns order nothing.
class Unwatched {
 public:
#ifdef VF_THREAD_SANITIZER
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
};

// To ThreadSanitizer, what fibers did before `release` comes before what others do after their next `acquire`.
class Order {
 public:
#ifdef VF_THREAD_SANITIZER
  void release() { __tsan_release(this); }
  void acquire() { __tsan_acquire(this); }
#else
  void release() {}
  void acquire() {}
#endif
};

// Runs body() on its own stack from `resume` on, until that pauses, or ends; then, from the next `resume`, once more.
class Fiber {
 public:
  explicit Fiber(std::function<void()> body) : body_(std::move(body)) {
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(memory != MAP_FAILED && mprotect(memory, kGuardBytes, PROT_NONE) == 0, "there is no memory for a stack");
    getcontext(&own_);
    own_.uc_stack.ss_sp = static_cast<std::byte*>(memory) + kGuardBytes;
    own_.uc_stack.ss_size = kStackBytes;
    makecontext(&own_, enter, 0);
#ifdef VF_THREAD_SANITIZER
    own_to_tsan_ = __tsan_create_fiber(0);
#endif
  }

  void resume() {
    entering_ = this;
#ifdef VF_THREAD_SANITIZER
    caller_to_tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(own_to_tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef VF_ADDRESS_SANITIZER
    void* frames;
    __sanitizer_start_switch_fiber(&frames, own_.uc_stack.ss_sp, own_.uc_stack.ss_size);
#endif
    swap(&caller_, &own_);
#ifdef VF_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
  }

  // Called by the body: `resume` returns.
  void pause() {
#ifdef VF_THREAD_SANITIZER
    __tsan_switch_to_fiber(caller_to_tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef VF_ADDRESS_SANITIZER
    void* frames;
    __sanitizer_start_switch_fiber(&frames, caller_stack_, caller_stack_bytes_);
#endif
    swap(&own_, &caller_);
#ifdef VF_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(frames, &caller_stack_, &caller_stack_bytes_);
#endif
  }

 private:
  static constexpr size_t kGuardBytes = 64 << 10, kStackBytes = 256 << 10;

  static void enter() {
    Fiber& self = *entering_;
#ifdef VF_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(nullptr, &self.caller_stack_, &self.caller_stack_bytes_);
#endif
    for (;;) {
      self.body_();
      self.pause();
    }
  }

  // libc's own: AddressSanitizer's would forget, at every turn, where the arrays on a stack end.
  static void swap(ucontext_t* from, ucontext_t* to) {
    static const auto libc = dlopen("libc.so.6", RTLD_LAZY);
    static const auto swapcontext_ = reinterpret_cast<decltype(&swapcontext)>(dlsym(libc, "swapcontext"));
    swapcontext_(from, to);
  }

  static inline Fiber* entering_;
  std::function<void()> body_;
  ucontext_t own_, caller_;
#ifdef VF_THREAD_SANITIZER
  void *own_to_tsan_, *caller_to_tsan_;
#endif
#ifdef VF_ADDRESS_SANITIZER
  const void* caller_stack_;
  size_t caller_stack_bytes_;
#endif
};

}  // namespace emulation
