// What a call asks and copies before its graphs are replayed, each in a header: tensors (places.h), Python's objects
// (objects.h), both together (state.h), torch's modes (thread_state.h). In Python they are in files of these names, with the contracts of both.
//
// Needs the GIL: build.py does not build it for a free-threaded Python.

#include <Python.h>

#include "objects.h"
#include "places.h"
#include "state.h"
#include "thread_state.h"

namespace {

int add_types(PyObject* module) {
  for (PyType_Spec* spec :
       {&places::AddressCheck_spec, &places::ApartCheck_spec, &places::GroupedCopy_spec, &objects::IdentityCheck_spec,
        &objects::AnswerCheck_spec, &state::StateCheck_spec, &thread_state::ThreadState_spec}) {
    PyObject* type = PyType_FromModuleAndSpec(module, spec, nullptr);
    if (type == nullptr) {
      return -1;
    }
    const int added = PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(type));
    Py_DECREF(type);
    if (added < 0) {
      return -1;
    }
  }
  return 0;
}

PyModuleDef_Slot module_slots[] = {{Py_mod_exec, reinterpret_cast<void*>(add_types)}, {0, nullptr}};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "graphcap_native", nullptr, 0, nullptr, module_slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_graphcap_native() {
  return PyModuleDef_Init(&module_definition);
}
