// Small kernels that show what the emulator does, and make every mistake that it must see.
#pragma once

#include <string>

namespace fuseformer {

struct SelfTest {
  const void* in;
  void* out;
  int value;
};

// Launches the kernel of that name; false if there is none.
bool run_self_test(const std::string& name, const SelfTest& test);

}  // namespace fuseformer
