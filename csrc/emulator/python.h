// What every build of the emulator offers Python: memory, options, and what went wrong.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "emulator.h"

namespace fuseformer {

namespace py = pybind11;

namespace emulator {

inline py::dict taken_report() {
  const Report taken = take_report();
  py::dict counters;
  counters["mma"] = taken.counters.mma;
  counters["ldmatrix"] = taken.counters.ldmatrix;
  counters["ldmatrix_conflicts"] = taken.counters.ldmatrix_conflicts;
  counters["shared_conflicts"] = taken.counters.shared_conflicts;
  counters["copies"] = taken.counters.copies;
  counters["barriers"] = taken.counters.barriers;
  counters["accesses"] = taken.counters.accesses;
  py::dict found;
  found["counters"] = counters;
  found["errors"] = taken.errors;
  return found;
}

inline void set_options(bool random_schedule, uint64_t seed, const std::string& landing,
                        const std::string& rounding, int architecture) {
  const std::map<std::string, Landing> landings = {
      {"late", Landing::kLate}, {"early", Landing::kEarly}, {"random", Landing::kRandom}};
  const std::map<std::string, Rounding> roundings = {{"exact", Rounding::kExact},
                                                     {"chained", Rounding::kChained},
                                                     {"truncating", Rounding::kTruncating}};
  options() = {random_schedule, seed, landings.at(landing), roundings.at(rounding), architecture};
}

inline void bind(py::module_& m) {
  m.def("allocate", [](size_t bytes, uintptr_t initial) {
    return reinterpret_cast<uintptr_t>(allocate(bytes, reinterpret_cast<const void*>(initial)));
  });
  m.def("copy", [](uintptr_t target, uintptr_t source, size_t bytes) {
    std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), bytes);
  });
  m.def("release_all", &release_all);
  m.def("report", &taken_report);
  m.def("set_options", &set_options);
}

}  // namespace emulator
}  // namespace fuseformer
