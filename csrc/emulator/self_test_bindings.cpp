// The emulator with its own tests, for Python.
#include "python.h"
#include "self_test.h"

namespace fuseformer {

PYBIND11_MODULE(_emulator, m) {
  emulator::bind(m);
  m.def("run", [](const std::string& name, uintptr_t in, uintptr_t out, int value) {
    const SelfTest test{reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), value};
    if (!run_self_test(name, test)) throw std::invalid_argument("no self test: " + name);
  });
  m.def("launch_nothing", [](unsigned blocks, unsigned threads, size_t shared_bytes) {
    emulator::launch({blocks}, {threads}, shared_bytes, [] {});
  });
}

}  // namespace fuseformer
