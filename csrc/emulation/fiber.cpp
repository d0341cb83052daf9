// Stacks and the switch between them; interface: fiber.h.

#include "emulation/fiber.h"

#include <cstring>
#include <new>

#include <sys/mman.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cu_fast::emulation {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 256 << 10;  // redzones make frames several times larger
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif
constexpr std::size_t kGuardBytes = 64;
constexpr char kGuard = 0x5c;
constexpr std::size_t kShifts = 32, kShiftBytes = 192;

std::size_t page_bytes() {
  static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

Context* left = nullptr;  // the context that the last switch left

void arrived(Context* self) {
#ifdef __SANITIZE_ADDRESS__
  const void* low;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(self ? self->fake_stack : nullptr, &low, &bytes);
  left->low = low;  // this is how the bounds of the host's own stack become known
  left->bytes = bytes;
#else
  static_cast<void>(self);
#endif
}

}  // namespace

Stack::Stack() {
  // Stacks that began at the same offset in a page would compete for the same cache sets.
  static std::size_t count = 0;
  shift_ = count++ % kShifts * kShiftBytes;
  void* const at = mmap(nullptr, page_bytes() + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED || mprotect(at, page_bytes(), PROT_NONE) != 0) throw std::bad_alloc();
  low_ = static_cast<char*>(at) + page_bytes();
  std::memset(low_, kGuard, kGuardBytes);
}

Stack::~Stack() {
  CU_FAST_PERMIT(low_, kStackBytes);
  munmap(low_ - page_bytes(), page_bytes() + kStackBytes);
}

bool Stack::unwritten() const {
  char guard[kGuardBytes];
  std::memset(guard, kGuard, kGuardBytes);
  return std::memcmp(low_, guard, kGuardBytes) == 0;
}

#ifdef CU_FAST_EMULATION_UCONTEXT

void Stack::prepare(Context& context, void (*entry)()) {
  CU_FAST_PERMIT(low_, kStackBytes);  // an abandoned thread leaves its redzones
  if (!unwritten()) std::memset(low_, kGuard, kGuardBytes);
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = low_;
  context.registers.uc_stack.ss_size = kStackBytes - shift_;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
  context.fake_stack = nullptr;
  context.low = low_;
  context.bytes = kStackBytes;
}

#else

// Saves the callee-saved registers; the compiler saves the others around the call.
extern "C" void cu_fast_switch_stack(void** from, void* to);
asm(R"(
  .text
  .p2align 4
  .globl cu_fast_switch_stack
  .hidden cu_fast_switch_stack
  .type cu_fast_switch_stack, @function
cu_fast_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cu_fast_switch_stack, . - cu_fast_switch_stack
)");

void Stack::prepare(Context& context, void (*entry)()) {
  CU_FAST_PERMIT(low_, kStackBytes);  // an abandoned thread leaves its redzones
  if (!unwritten()) std::memset(low_, kGuard, kGuardBytes);
  // Six registers, the entry's address, and a null return address for the entry. This aligns the stack as the
  // ABI demands at a function's entry.
  void** const top = reinterpret_cast<void**>(low_ + kStackBytes - shift_) - 8;
  std::memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = top;
  context.fake_stack = nullptr;
  context.low = low_;
  context.bytes = kStackBytes;
}

#endif

void switch_context(Context& from, Context& to, [[maybe_unused]] bool last) {
  left = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.low, to.bytes);
#endif
#ifdef CU_FAST_EMULATION_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  cu_fast_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  arrived(&from);
}

void entered() {
  arrived(nullptr);
}

}  // namespace cu_fast::emulation
