// Runs CUDA kernels on the CPU, a fiber for each thread, and says what they did wrong.
//
// Within a block a thread runs until it waits for others: at a barrier, or at a collective of its
// warp, which the last lane to arrive carries out for all. Blocks run one after the other or, where
// schedules are random, some at the same time: they begin in the order of their numbers, and one
// goes on where another waits for its turn or is at a barrier.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "cuda_keywords.h"

namespace fuseformer::emulator {

enum class Landing { kLate, kEarly, kRandom };          // of cp.async: at the wait, at once
enum class Rounding { kExact, kChained, kTruncating };  // of the sums of mma

struct Options {
  bool random_schedule = false;  // of blocks, of warps, and of the lanes within
  uint64_t seed = 1;
  Landing landing = Landing::kLate;
  Rounding rounding = Rounding::kExact;
  int architecture = 80;  // whose limits launches must keep
};

struct Counters {
  uint64_t mma = 0;
  uint64_t ldmatrix = 0;
  uint64_t ldmatrix_conflicts = 0;  // bank cycles beyond the one that each 8 x 8 matrix takes
  uint64_t shared_conflicts = 0;    // the same of plain accesses, where kernels are instrumented
  uint64_t copies = 0;              // of 16 bytes
  uint64_t barriers = 0;
  uint64_t accesses = 0;  // plain ones, counted where the kernel is instrumented
};

struct Report {
  Counters counters;
  std::map<std::string, uint64_t> errors;  // by how often
};

Options& options();

// The bytes of shared memory that a block may have on the architecture of the options; 0 if there
// is no such architecture.
int shared_limit();

// What launches did since the last call.
Report take_report();

// Global memory with exact bounds, aligned to 256 bytes, uninitialised if `initial` is null. It is
// an error to read what nobody has written, and to touch what lies beside an allocation.
void* allocate(size_t bytes, const void* initial);
void release_all();

// Runs `kernel` for every thread of every block. Where a block cannot go on, as threads wait for
// what never comes, the launch ends there with an error in the report.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Fills with NaN what the function that is called next will keep its registers in.
void poison_registers();

}  // namespace fuseformer::emulator
