// Where the tensors of a call lie: still where they were, and apart from what captured kernels write; and the copy of
// those that are not used in place to where these kernels read them. What goes by way of Python's and the dispatcher's
// layers is most of such a copy. places.py has the same in Python, and the contracts.

#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_foreach_copy.h>
#include <c10/core/impl/COW.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <vector>

#include "vectorcall.h"

namespace places {

// Not THPVariable_Check: it believes an object's __class__, and a mock has no tensor inside.
inline bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Fills in indices of arguments; false with an exception set.
inline bool read_indices(PyObject* given, std::vector<Py_ssize_t>& indices) {
  given = PySequence_Tuple(given);
  if (given == nullptr) {
    return false;
  }
  bool done = true;
  for (Py_ssize_t i = 0; done && i < PyTuple_GET_SIZE(given); ++i) {
    const Py_ssize_t index = PyLong_AsSsize_t(PyTuple_GET_ITEM(given, i));
    done = index != -1 || PyErr_Occurred() == nullptr;
    if (done && index < 0) {
      PyErr_Format(PyExc_ValueError, "an index must not be negative, got %zd", index);
      done = false;
    }
    if (done) {
      indices.push_back(index);
    }
  }
  Py_DECREF(given);
  return done;
}

// The same for addresses.
inline bool read_addresses(PyObject* given, std::vector<std::uintptr_t>& addresses) {
  given = PySequence_Tuple(given);
  if (given == nullptr) {
    return false;
  }
  bool done = true;
  for (Py_ssize_t i = 0; done && i < PyTuple_GET_SIZE(given); ++i) {
    const unsigned long long address = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(given, i));
    done = address != static_cast<unsigned long long>(-1) || PyErr_Occurred() == nullptr;
    addresses.push_back(static_cast<std::uintptr_t>(address));
  }
  Py_DECREF(given);
  return done;
}

// The sequence that a call was given; NULL with an exception set.
inline PyObject* only_sequence(const char* who, PyObject* const* args, std::size_t nargsf, PyObject* names) {
  if (PyVectorcall_NARGS(nargsf) != 1 || (names != nullptr && PyTuple_GET_SIZE(names) != 0) ||
      !(PyTuple_Check(args[0]) || PyList_Check(args[0]))) {
    PyErr_Format(PyExc_TypeError, "%s takes one argument, a tuple or a list", who);
    return nullptr;
  }
  return args[0];
}

// What the first two types are.
struct PlaceCheck {
  PyObject_HEAD
  vectorcallfunc call;
  std::vector<Py_ssize_t> indices;
  std::vector<std::uintptr_t> addresses;
};

inline PyObject* new_place_check(PyTypeObject* type, PyObject* args, PyObject* kwargs, vectorcallfunc call) {
  static const char* names[] = {"indices", "addresses", nullptr};
  PyObject *indices = nullptr, *addresses = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", const_cast<char**>(names), &indices, &addresses)) {
    return nullptr;
  }
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) {
    return nullptr;
  }
  auto* check = reinterpret_cast<PlaceCheck*>(self);
  check->call = call;
  new (&check->indices) std::vector<Py_ssize_t>();
  new (&check->addresses) std::vector<std::uintptr_t>();
  if (!read_indices(indices, check->indices) || !read_addresses(addresses, check->addresses)) {
    Py_CLEAR(self);
  }
  return self;
}

// ---- AddressCheck ----------------------------------------------------------------------------------------------------

// Tells tensors from what is none. Hundreds of parameters have one type: it is looked up in the bases of that once.
struct Tensors {
  PyTypeObject* seen = nullptr;

  // NULL for what is no tensor.
  const c10::TensorImpl* in(PyObject* object) {
    if (Py_TYPE(object) != seen) {
      if (!is_tensor(object)) {
        return nullptr;
      }
      seen = Py_TYPE(object);
    }
    return THPVariable_Unpack(object).unsafeGetTensorImpl();
  }
};

// May throw: some tensors refuse to name an address.
inline bool lies_at(const c10::TensorImpl* impl, std::uintptr_t address) {
  if (impl == nullptr || !impl->has_storage() || c10::impl::cow::is_cow_data_ptr(impl->unsafe_storage().data_ptr())) {
    // A copy-on-write tensor moves when it is written, but a graph writes to the address: it must not count as in place.
    return false;
  }
  return reinterpret_cast<std::uintptr_t>(impl->data()) == address;
}

// A tensor lies behind three pointers, and between two steps of a model the processor's caches have forgotten all of
// them. Those of later tensors are asked for before they are needed, so that the waits overlap.
constexpr std::size_t kNear = 6, kFar = 12;

inline bool all_lie_there(const PlaceCheck* check, PyObject* const* items, Py_ssize_t size) noexcept {
  const auto item = [&](std::size_t i) {
    return i < check->indices.size() && check->indices[i] < size ? items[check->indices[i]] : Py_None;
  };
  Tensors tensors;
  try {
    for (std::size_t i = 0; i < check->indices.size(); ++i) {
      __builtin_prefetch(item(i + kFar));
      if (const auto* later = reinterpret_cast<const char*>(tensors.in(item(i + kNear)))) {
        __builtin_prefetch(later);
        __builtin_prefetch(later + 128);  // the storage is in front, offset and dtype are behind the sizes
      }
      if (!lies_at(tensors.in(item(i)), check->addresses[i])) {
        return false;
      }
    }
    return true;
  } catch (...) {
    return false;
  }
}

inline PyObject* AddressCheck_call(PyObject* self, PyObject* const* args, std::size_t nargsf, PyObject* names) {
  PyObject* given = only_sequence("AddressCheck", args, nargsf, names);
  if (given == nullptr) {
    return nullptr;
  }
  // Nothing below runs Python code, so nobody can resize the list meanwhile.
  const auto* check = reinterpret_cast<PlaceCheck*>(self);
  return PyBool_FromLong(all_lie_there(check, PySequence_Fast_ITEMS(given), PySequence_Fast_GET_SIZE(given)));
}

inline PyObject* AddressCheck_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  PyObject* self = new_place_check(type, args, kwargs, AddressCheck_call);
  const auto* check = reinterpret_cast<PlaceCheck*>(self);
  if (self != nullptr && check->indices.size() != check->addresses.size()) {
    PyErr_Format(
        PyExc_ValueError, "%zu indices, but %zu addresses", check->indices.size(), check->addresses.size());
    Py_CLEAR(self);
  }
  return self;
}

inline PyType_Slot AddressCheck_slots[] = {
    {Py_tp_doc, const_cast<char*>("AddressCheck(indices, addresses): see graphcap.native.fallback.AddressCheck")},
    {Py_tp_new, reinterpret_cast<void*>(AddressCheck_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(vectorcall::dealloc<PlaceCheck>)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, vectorcall::members<PlaceCheck>},
    {0, nullptr}};

inline PyType_Spec AddressCheck_spec = {
    "graphcap_native.AddressCheck",
    sizeof(PlaceCheck),
    0,
    vectorcall::kFlags,
    AddressCheck_slots};

// ---- ApartCheck ------------------------------------------------------------------------------------------------------

inline bool lies_apart(PyObject* object, const std::vector<std::uintptr_t>& addresses) noexcept {
  if (!is_tensor(object)) {
    return false;
  }
  try {
    const c10::TensorImpl* impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
    if (!impl->has_storage()) {
      return false;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(impl->unsafe_storage().data());
    return std::find(addresses.begin(), addresses.end(), address) == addresses.end();
  } catch (...) {
    return false;
  }
}

inline PyObject* ApartCheck_call(PyObject* self, PyObject* const* args, std::size_t nargsf, PyObject* names) {
  PyObject* given = only_sequence("ApartCheck", args, nargsf, names);
  if (given == nullptr) {
    return nullptr;
  }
  const auto* check = reinterpret_cast<PlaceCheck*>(self);
  for (const Py_ssize_t index : check->indices) {
    if (index >= PySequence_Fast_GET_SIZE(given) ||
        !lies_apart(PySequence_Fast_ITEMS(given)[index], check->addresses)) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

inline PyObject* ApartCheck_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  return new_place_check(type, args, kwargs, ApartCheck_call);
}

inline PyType_Slot ApartCheck_slots[] = {
    {Py_tp_doc, const_cast<char*>("ApartCheck(indices, addresses): see graphcap.native.fallback.ApartCheck")},
    {Py_tp_new, reinterpret_cast<void*>(ApartCheck_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(vectorcall::dealloc<PlaceCheck>)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, vectorcall::members<PlaceCheck>},
    {0, nullptr}};

inline PyType_Spec ApartCheck_spec = {
    "graphcap_native.ApartCheck",
    sizeof(PlaceCheck),
    0,
    vectorcall::kFlags,
    ApartCheck_slots};

// ---- GroupedCopy -----------------------------------------------------------------------------------------------------

struct GroupedCopy {
  PyObject_HEAD
  vectorcallfunc call;
  std::vector<at::Tensor> targets;
  std::vector<Py_ssize_t> indices;
};

inline PyObject* GroupedCopy_call(PyObject* self, PyObject* const* args, std::size_t nargsf, PyObject* names) {
  PyObject* given = only_sequence("GroupedCopy", args, nargsf, names);
  if (given == nullptr) {
    return nullptr;
  }
  const auto* copy = reinterpret_cast<GroupedCopy*>(self);
  std::vector<at::Tensor> sources;
  sources.reserve(copy->indices.size());
  for (const Py_ssize_t index : copy->indices) {
    PyObject* item = index < PySequence_Fast_GET_SIZE(given) ? PySequence_Fast_ITEMS(given)[index] : Py_None;
    if (!is_tensor(item)) {
      return PyErr_Format(PyExc_TypeError, "argument %zd: expected a tensor, got %R", index, item);
    }
    sources.push_back(THPVariable_Unpack(item));
  }
  PyThreadState* state = PyEval_SaveThread();  // a full queue of launches makes this wait
  std::exception_ptr error;
  try {
    const at::AutoDispatchBelowADInplaceOrView below;  // the targets are nobody's but ours
    at::_foreach_copy_(copy->targets, sources);
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) {
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& raised) {
      return PyErr_Format(PyExc_RuntimeError, "%s", raised.what());
    }
  }
  Py_RETURN_NONE;
}

// Appends the tensors; false with an exception set.
inline bool read_tensors(PyObject* given, std::vector<at::Tensor>& tensors) {
  given = PySequence_Tuple(given);
  if (given == nullptr) {
    return false;
  }
  bool done = true;
  for (Py_ssize_t i = 0; done && i < PyTuple_GET_SIZE(given); ++i) {
    PyObject* item = PyTuple_GET_ITEM(given, i);
    done = is_tensor(item);
    if (done) {
      tensors.push_back(THPVariable_Unpack(item));
    } else {
      PyErr_Format(PyExc_TypeError, "target %zd: expected a tensor, got %R", i, item);
    }
  }
  Py_DECREF(given);
  return done;
}

inline PyObject* GroupedCopy_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"targets", "indices", nullptr};
  PyObject *targets = nullptr, *indices = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", const_cast<char**>(names), &targets, &indices)) {
    return nullptr;
  }
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) {
    return nullptr;
  }
  auto* copy = reinterpret_cast<GroupedCopy*>(self);
  copy->call = GroupedCopy_call;
  new (&copy->targets) std::vector<at::Tensor>();
  new (&copy->indices) std::vector<Py_ssize_t>();
  if (!read_tensors(targets, copy->targets) || !read_indices(indices, copy->indices)) {
    Py_CLEAR(self);
  } else if (copy->targets.size() != copy->indices.size()) {
    PyErr_Format(PyExc_ValueError, "%zu targets, but %zu indices", copy->targets.size(), copy->indices.size());
    Py_CLEAR(self);
  }
  return self;
}

inline PyType_Slot GroupedCopy_slots[] = {
    {Py_tp_doc, const_cast<char*>("GroupedCopy(targets, indices): see graphcap.native.fallback.GroupedCopy")},
    {Py_tp_new, reinterpret_cast<void*>(GroupedCopy_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(vectorcall::dealloc<GroupedCopy>)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, vectorcall::members<GroupedCopy>},
    {0, nullptr}};

inline PyType_Spec GroupedCopy_spec = {
    "graphcap_native.GroupedCopy",
    sizeof(GroupedCopy),
    0,
    vectorcall::kFlags,
    GroupedCopy_slots};

}  // namespace places
