// What the kernels that test the emulator read and write.
#pragma once

#include "../device/platform.h"
#include "self_test.h"

namespace fuseformer {
namespace {

template <typename T>
const T* in(const SelfTest& test) {
  return static_cast<const T*>(test.in);
}

template <typename T>
T* out(const SelfTest& test) {
  return static_cast<T*>(test.out);
}

template <typename T>
T* shared() {
  return reinterpret_cast<T*>(dynamic_shared());
}

}  // namespace
}  // namespace fuseformer
