// Which of torch's modes a thread is in, as numbers that lie side by side in its own memory.

#pragma once

#include <Python.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/AutogradState.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cstddef>
#include <cstdint>

#include "vectorcall.h"

namespace thread_state {

struct Modes {
  std::uint64_t included = 0;  // dispatch keys: functorch, jit tracing, dispatch modes and autocast show in these
  std::uint64_t excluded = 0;
  std::int64_t dispatch_modes = 0;
  std::int64_t function_modes = 0;
  int functions_disabled = 0;
  bool grad = false;
  bool forward_grad = false;
  bool inference = false;

  static Modes now() {
    const auto keys = c10::impl::tls_local_dispatch_key_set();
    const auto& autograd = c10::AutogradState::get_tls_state();
    Modes modes;
    modes.included = keys.included_.raw_repr();
    modes.excluded = keys.excluded_.raw_repr();
    modes.dispatch_modes = c10::impl::TorchDispatchModeTLS::stack_len();
    modes.function_modes = at::impl::PythonTorchFunctionTLS::stack_len();
    modes.functions_disabled = static_cast<int>(at::impl::PythonTorchFunctionTLS::get_disabled_state());
    modes.grad = autograd.get_grad_mode();
    modes.forward_grad = autograd.get_fw_grad_mode();
    modes.inference = autograd.get_inference_mode();
    return modes;
  }

  bool operator==(const Modes& other) const {
    return included == other.included && excluded == other.excluded && dispatch_modes == other.dispatch_modes &&
        function_modes == other.function_modes && functions_disabled == other.functions_disabled &&
        grad == other.grad && forward_grad == other.forward_grad && inference == other.inference;
  }
};

struct ThreadState {
  PyObject_HEAD
  vectorcallfunc call;
  Modes modes;
};

inline PyObject* ThreadState_call(PyObject* self, PyObject* const*, std::size_t nargsf, PyObject* names) {
  if (PyVectorcall_NARGS(nargsf) != 0 || (names != nullptr && PyTuple_GET_SIZE(names) != 0)) {
    PyErr_SetString(PyExc_TypeError, "ThreadState takes no arguments");
    return nullptr;
  }
  return PyBool_FromLong(reinterpret_cast<ThreadState*>(self)->modes == Modes::now());
}

inline PyObject* ThreadState_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "", const_cast<char**>(names))) {
    return nullptr;
  }
  PyObject* self = type->tp_alloc(type, 0);
  if (self != nullptr) {
    reinterpret_cast<ThreadState*>(self)->call = ThreadState_call;
    reinterpret_cast<ThreadState*>(self)->modes = Modes::now();
  }
  return self;
}

inline PyType_Slot ThreadState_slots[] = {
    {Py_tp_doc, const_cast<char*>("ThreadState(): see graphcap.native.fallback.ThreadState")},
    {Py_tp_new, reinterpret_cast<void*>(ThreadState_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(vectorcall::dealloc<ThreadState>)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, vectorcall::members<ThreadState>},
    {0, nullptr}};

inline PyType_Spec ThreadState_spec = {
    "graphcap_native.ThreadState",
    sizeof(ThreadState),
    0,
    vectorcall::kFlags,
    ThreadState_slots};

}  // namespace thread_state
