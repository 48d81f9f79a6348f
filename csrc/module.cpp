// `fuseformer._C` as a module of Python, of any version: importing it is loading the library, which
// registers its ops. It has no names of its own.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
