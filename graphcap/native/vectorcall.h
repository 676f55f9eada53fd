// What the types of the extension have in common: an object is called through a pointer to a function in it, `call`.

#pragma once

#include <Python.h>

#include <cstddef>

#include <structmember.h>

namespace vectorcall {

template <typename T>
inline constexpr PyMemberDef offset_of_call() {
  return {"__vectorcalloffset__", T_PYSSIZET, offsetof(T, call), READONLY, nullptr};
}

template <typename T>
inline PyMemberDef members[] = {offset_of_call<T>(), {nullptr, 0, 0, 0, nullptr}};

// For types that the garbage collector does not look into.
template <typename T>
void dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<T*>(self)->~T();
  type->tp_free(self);
  Py_DECREF(type);
}

constexpr unsigned int kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE;

}  // namespace vectorcall
