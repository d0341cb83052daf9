// Fibers: a stack and saved registers each, switched without a system call.

#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(CU_FAST_EMULATION_UCONTEXT)
#define CU_FAST_EMULATION_UCONTEXT
#endif

#ifdef CU_FAST_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define CU_FAST_FORBID(at, bytes) ASAN_POISON_MEMORY_REGION(at, bytes)
#define CU_FAST_PERMIT(at, bytes) ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#else
#define CU_FAST_FORBID(at, bytes) ((void)(at), (void)(bytes))
#define CU_FAST_PERMIT(at, bytes) ((void)(at), (void)(bytes))
#endif

namespace cu_fast::emulation {

// Where a fiber, or the host, that does not run will resume.
struct Context {
#ifdef CU_FAST_EMULATION_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  // For the address sanitizer: its fake stack, and the stack's bounds.
  void* fake_stack = nullptr;
  const void* low = nullptr;
  std::size_t bytes = 0;
};

// A stack with an inaccessible page below it. Its lowest bytes hold a pattern: unwritten() tells, when the
// thread ends, whether it came too close to the end of the stack. A frame that skips the pattern faults on
// the page below (SIGSEGV).
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // Makes the context start in `entry`, which never returns.
  void prepare(Context& context, void (*entry)());
  bool unwritten() const;
  const char* low() const { return low_; }

 private:
  char* low_;
  std::size_t shift_;
};

// Saves the state in `from` and resumes `to`; returns when `from` is resumed. `last`: it never is.
void switch_context(Context& from, Context& to, bool last);
// Every entry calls this first.
void entered();

}  // namespace cu_fast::emulation
