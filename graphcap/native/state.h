// Whether nothing was written to dicts, and objects and tensors have kept their form. Writes are told (dict_watch.h);
// the rest is read on every call, hundreds of objects that the processor's caches have forgotten between two steps of a
// model. state.py has the same in Python, and the contract.
//
// Nothing but keys is kept alive. That an object in here lives is known before it is looked at: a dict holds it that has
// neither been written to nor come to its end, or a function that comes before it and has its code and defaults still.

#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "dict_watch.h"
#include "places.h"
#include "vectorcall.h"

namespace state {

// What an object was.
struct Form {
  PyObject* object;
  PyTypeObject* type;
  PyObject* dict;
  PyObject *code, *defaults, *keyword_defaults;  // of a function
};

// What a tensor was, besides.
struct Layout {
  std::uint64_t keys;
  caffe2::TypeMeta dtype;
  c10::Device device;
  bool requires_grad;
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;
};

struct StateCheck {
  PyObject_HEAD
  vectorcallfunc call;
  std::vector<PyObject*> roots;
  std::vector<PyObject*> watched;
  std::vector<PyObject*> keys;  // references
  std::vector<Form> objects;
  std::vector<Form> tensors;
  std::vector<Layout> layouts;  // of the tensors
  bool changed;

  ~StateCheck() {
    for (PyObject* dict : watched) {
      dict_watch::remove(dict, &changed);
    }
    for (PyObject* key : keys) {
      Py_DECREF(key);
    }
  }
};

inline PyObject* own_dict(PyObject* object) {
  PyObject** const place = _PyObject_GetDictPtr(object);
  return place == nullptr ? nullptr : *place;
}

inline Form form_of(PyObject* object) {
  if (!PyFunction_Check(object)) {
    return {object, Py_TYPE(object), own_dict(object), nullptr, nullptr, nullptr};
  }
  const auto* function = reinterpret_cast<PyFunctionObject*>(object);
  return {object, Py_TYPE(object), own_dict(object), function->func_code, function->func_defaults,
          function->func_kwdefaults};
}

inline bool has_form(const Form& form) {
  if (Py_TYPE(form.object) != form.type || own_dict(form.object) != form.dict) {
    return false;
  }
  const auto* function = reinterpret_cast<PyFunctionObject*>(form.object);
  return form.code == nullptr || (function->func_code == form.code && function->func_defaults == form.defaults &&
                                  function->func_kwdefaults == form.keyword_defaults);
}

inline const c10::TensorImpl* impl_of(const Form& tensor) {
  return THPVariable_Unpack(tensor.object).unsafeGetTensorImpl();
}

// Throws for tensors without strides, or with symbols for sizes.
inline Layout layout_of(const c10::TensorImpl* impl) {
  return {impl->key_set().raw_repr(), impl->dtype(),          impl->device(),
          impl->requires_grad(),      impl->sizes().vec(),    impl->strides().vec()};
}

inline bool has_layout(const Layout& layout, const c10::TensorImpl* impl) {
  return impl->key_set().raw_repr() == layout.keys && impl->dtype() == layout.dtype &&
         impl->device() == layout.device && impl->sizes().equals(layout.sizes) &&
         impl->strides().equals(layout.strides) && impl->requires_grad() == layout.requires_grad;
}

using places::kFar, places::kNear;

inline void fetch(PyObject* object) {
  __builtin_prefetch(object);
  __builtin_prefetch(reinterpret_cast<const char*>(object) - 32);  // where Python keeps the object's dict
}

inline bool holds(const StateCheck* check, PyObject* const* roots) noexcept {
  if (check->changed || !std::equal(check->roots.begin(), check->roots.end(), roots)) {
    return false;
  }
  const auto& objects = check->objects;
  for (std::size_t i = 0; i < objects.size(); ++i) {
    if (i + kFar < objects.size()) {
      fetch(objects[i + kFar].object);
    }
    if (!has_form(objects[i])) {
      return false;
    }
  }
  const auto& tensors = check->tensors;
  try {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (i + kFar < tensors.size()) {
        fetch(tensors[i + kFar].object);
      }
      if (i + kNear < tensors.size() && Py_TYPE(tensors[i + kNear].object) == tensors[i + kNear].type) {
        const auto* later = reinterpret_cast<const char*>(impl_of(tensors[i + kNear]));
        for (std::size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) {
          __builtin_prefetch(later + line);
        }
      }
      if (!has_form(tensors[i]) || !has_layout(check->layouts[i], impl_of(tensors[i]))) {
        return false;
      }
    }
    return true;
  } catch (...) {
    return false;
  }
}

inline PyObject* StateCheck_call(PyObject* self, PyObject* const* args, std::size_t nargsf, PyObject* names) {
  const auto* check = reinterpret_cast<StateCheck*>(self);
  const bool fits = static_cast<std::size_t>(PyVectorcall_NARGS(nargsf)) == check->roots.size() &&
                    (names == nullptr || PyTuple_GET_SIZE(names) == 0);
  return PyBool_FromLong(fits && holds(check, args));
}

// Whether writes to the dict will be told; otherwise an exception is set.
inline bool watch(StateCheck* check, PyObject* dict, PyObject* key, PyObject* object) {
  if (!PyDict_Check(dict)) {
    PyErr_Format(PyExc_TypeError, "expected a dict, got %R", dict);
    return false;
  }
  if (!dict_watch::can_watch(dict) || !dict_watch::add(dict, key, object, &check->changed)) {
    PyErr_SetString(PyExc_ValueError, "nobody tells of writes to one of the dicts");
    return false;
  }
  check->watched.push_back(dict);
  return true;
}

inline bool take_root(StateCheck* check, PyObject* root) {
  check->roots.push_back(root);
  return true;
}

inline bool take_entry(StateCheck* check, PyObject* entry) {
  if (!PyTuple_Check(entry) || PyTuple_GET_SIZE(entry) != 3) {
    PyErr_Format(PyExc_TypeError, "expected a tuple (dict, key, object), got %R", entry);
    return false;
  }
  PyObject *dict = PyTuple_GET_ITEM(entry, 0), *key = PyTuple_GET_ITEM(entry, 1), *held = PyTuple_GET_ITEM(entry, 2);
  Py_INCREF(key);
  if (PyUnicode_CheckExact(key)) {
    PyUnicode_InternInPlace(&key);  // as the names of attributes are: dict_watch.h tells such ones apart
  }
  check->keys.push_back(key);
  if (!watch(check, dict, key, held)) {
    return false;
  }
  PyObject* found = PyDict_GetItemWithError(dict, key);  // borrowed
  check->changed |= found != held;
  return found != nullptr || PyErr_Occurred() == nullptr;
}

inline bool take_sized(StateCheck* check, PyObject* dict) {
  return watch(check, dict, nullptr, nullptr);
}

inline bool take_object(StateCheck* check, PyObject* object) {
  check->objects.push_back(form_of(object));
  return true;
}

inline bool take_tensor(StateCheck* check, PyObject* object) {
  if (!places::is_tensor(object)) {
    PyErr_Format(PyExc_TypeError, "expected a tensor, got %R", object);
    return false;
  }
  try {
    check->layouts.push_back(layout_of(THPVariable_Unpack(object).unsafeGetTensorImpl()));
  } catch (...) {
    PyErr_SetString(PyExc_TypeError, "expected a tensor with sizes and strides");
    return false;
  }
  check->tensors.push_back(form_of(object));
  return true;
}

// Hands every item to `take`; false with an exception set.
inline bool take_each(StateCheck* check, PyObject* given, bool (*take)(StateCheck*, PyObject*)) {
  given = PySequence_Tuple(given);
  if (given == nullptr) {
    return false;
  }
  bool done = true;
  for (Py_ssize_t i = 0; done && i < PyTuple_GET_SIZE(given); ++i) {
    done = take(check, PyTuple_GET_ITEM(given, i));
  }
  Py_DECREF(given);
  return done;
}

inline PyObject* StateCheck_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"roots", "entries", "sized", "objects", "tensors", nullptr};
  PyObject *roots = nullptr, *entries = nullptr, *sized = nullptr, *objects = nullptr, *tensors = nullptr;
  if (!PyArg_ParseTupleAndKeywords(
          args, kwargs, "OOOOO", const_cast<char**>(names), &roots, &entries, &sized, &objects, &tensors)) {
    return nullptr;
  }
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) {
    return nullptr;
  }
  auto* check = reinterpret_cast<StateCheck*>(self);
  check->call = StateCheck_call;
  check->changed = false;
  new (&check->roots) std::vector<PyObject*>();
  new (&check->watched) std::vector<PyObject*>();
  new (&check->keys) std::vector<PyObject*>();
  new (&check->objects) std::vector<Form>();
  new (&check->tensors) std::vector<Form>();
  new (&check->layouts) std::vector<Layout>();
  if (!take_each(check, roots, take_root) || !take_each(check, entries, take_entry) ||
      !take_each(check, sized, take_sized) || !take_each(check, objects, take_object) ||
      !take_each(check, tensors, take_tensor)) {
    Py_CLEAR(self);
  }
  return self;
}

inline PyType_Slot StateCheck_slots[] = {
    {Py_tp_doc, const_cast<char*>("StateCheck(roots, entries, sized, objects, tensors): see graphcap.native.fallback")},
    {Py_tp_new, reinterpret_cast<void*>(StateCheck_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(vectorcall::dealloc<StateCheck>)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, vectorcall::members<StateCheck>},
    {0, nullptr}};

inline PyType_Spec StateCheck_spec = {
    "graphcap_native.StateCheck",
    sizeof(StateCheck),
    0,
    vectorcall::kFlags,
    StateCheck_slots};

}  // namespace state
