// Faults of a kernel, as errors of its launch: whoever runs the emulator is to live on.
//
// The handler cannot unwind what has faulted. It makes the thread go on in `abandon`, at the top of
// its own stack, which ends the launch: no frame of the kernel is entered again.
#include <signal.h>
#include <ucontext.h>

#include <sstream>

#include "state.h"

namespace fuseformer::emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr int kCount = 4;

struct sigaction former[kCount];
stack_t former_stack;
alignas(16) char handler_stack[64 << 10];

// Of the fault that has happened, for `abandon`.
int fault_signal;
const void* fault_address;
const void* fault_pc;

[[noreturn]] void abandon() {
  std::ostringstream text;
  if (fault_signal == SIGFPE) {
    text << "fault: a division of integers by zero";
  } else if (fault_signal == SIGILL) {
    text << "fault: undefined behaviour, such as an index that the array does not have";
  } else {
    text << "fault: access to address " << fault_address << ", which is nobody's";
  }
  give_up(text.str(), fault_pc);
}

void handle(int signal, siginfo_t* info, void* context) {
  if (current == nullptr) {
    // The host's own: it happens again, to whoever would have been told.
    for (int i = 0; i < kCount; ++i) {
      if (kSignals[i] == signal) sigaction(signal, &former[i], nullptr);
    }
    return;
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  fault_signal = signal;
  fault_address = info->si_addr;
  // Reports name the byte before: else the address is where a call returns to.
  fault_pc = reinterpret_cast<const void*>(registers[REG_RIP] + 1);
  registers[REG_RIP] = reinterpret_cast<greg_t>(abandon);
  registers[REG_RSP] = reinterpret_cast<greg_t>(current->stack_top) - 8;  // as behind a call
}

}  // namespace

FaultsAreErrors::FaultsAreErrors() {
  stack_t stack = {};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &former_stack);
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &action, &former[i]);
}

FaultsAreErrors::~FaultsAreErrors() {
  for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &former[i], nullptr);
  sigaltstack(&former_stack, nullptr);
}

}  // namespace fuseformer::emulator
