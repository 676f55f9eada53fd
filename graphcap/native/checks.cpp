// Two questions about hundreds of objects, asked on every call: are these tensors still where they were, and do these
// dicts still hold the objects that they held? fallback.py has the same in Python and the contract of both; where dicts
// can be watched (dict_watch.h), the second question costs nothing until somebody writes to one of them. What a call
// needs besides is in answers.h, thread_state.h and copies.h.
//
// Needs the GIL: build.py does not build it for a free-threaded Python.

#include <torch/csrc/autograd/python_variable.h>

#include <c10/core/impl/COW.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include <structmember.h>

#include "answers.h"
#include "copies.h"
#include "dict_watch.h"
#include "thread_state.h"

namespace {

// ---- AddressCheck ----------------------------------------------------------------------------------------------------

struct Place {
  Py_ssize_t index;
  std::uintptr_t address;
};

struct AddressCheck {
  PyObject_HEAD
  vectorcallfunc call;
  std::vector<Place> places;
};

// Tells tensors from what is none. Hundreds of parameters have one type: it is looked up in the bases of that once.
struct Tensors {
  PyTypeObject* seen = nullptr;

  // NULL for what is no tensor. Not THPVariable_Check: it believes an object's __class__, and a mock has none inside.
  const c10::TensorImpl* in(PyObject* object) {
    if (Py_TYPE(object) != seen) {
      if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass))) {
        return nullptr;
      }
      seen = Py_TYPE(object);
    }
    return THPVariable_Unpack(object).unsafeGetTensorImpl();
  }
};

// May throw: some tensors refuse to name an address.
bool lies_at(const c10::TensorImpl* impl, std::uintptr_t address) {
  if (impl == nullptr || !impl->has_storage() || c10::impl::cow::is_cow_data_ptr(impl->unsafe_storage().data_ptr())) {
    // A copy-on-write tensor moves when it is written, but a graph writes to the address: it must not count as in place.
    return false;
  }
  return reinterpret_cast<std::uintptr_t>(impl->data()) == address;
}

// A tensor lies behind three pointers, and between two steps of a model the processor's caches have forgotten all of
// them. Those of later tensors are asked for before they are needed, so that the waits overlap.
constexpr std::size_t kNear = 6, kFar = 12;

bool all_lie_there(const std::vector<Place>& places, PyObject* const* items, Py_ssize_t size) noexcept {
  const auto item = [&](std::size_t i) {
    return i < places.size() && places[i].index < size ? items[places[i].index] : Py_None;
  };
  Tensors tensors;
  try {
    for (std::size_t i = 0; i < places.size(); ++i) {
      __builtin_prefetch(item(i + kFar));
      if (const auto* later = reinterpret_cast<const char*>(tensors.in(item(i + kNear)))) {
        __builtin_prefetch(later);
        __builtin_prefetch(later + 128);  // the storage is in front, offset and dtype are behind the sizes
      }
      if (!lies_at(tensors.in(item(i)), places[i].address)) {
        return false;
      }
    }
    return true;
  } catch (...) {
    return false;
  }
}

PyObject* AddressCheck_call(PyObject* self, PyObject* const* args, std::size_t nargsf, PyObject* names) {
  if (PyVectorcall_NARGS(nargsf) != 1 || (names != nullptr && PyTuple_GET_SIZE(names) != 0) ||
      !(PyTuple_Check(args[0]) || PyList_Check(args[0]))) {
    PyErr_SetString(PyExc_TypeError, "AddressCheck takes one argument, a tuple or a list");
    return nullptr;
  }
  // Nothing below runs Python code, so nobody can resize the list meanwhile.
  const auto& places = reinterpret_cast<AddressCheck*>(self)->places;
  const bool holds = all_lie_there(places, PySequence_Fast_ITEMS(args[0]), PySequence_Fast_GET_SIZE(args[0]));
  return PyBool_FromLong(holds);
}

// Appends one Place for each pair of items; false with an exception set.
bool read_places(PyObject* indices, PyObject* addresses, std::vector<Place>& places) {
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(indices);
  if (count != PySequence_Fast_GET_SIZE(addresses)) {
    PyErr_Format(PyExc_ValueError, "%zd indices, but %zd addresses", count, PySequence_Fast_GET_SIZE(addresses));
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    const Py_ssize_t index = PyLong_AsSsize_t(PySequence_Fast_GET_ITEM(indices, i));
    if (index == -1 && PyErr_Occurred() != nullptr) {
      return false;
    }
    if (index < 0) {
      PyErr_Format(PyExc_ValueError, "an index must not be negative, got %zd", index);
      return false;
    }
    const unsigned long long address = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(addresses, i));
    if (address == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) {
      return false;
    }
    places.push_back({index, static_cast<std::uintptr_t>(address)});
  }
  return true;
}

PyObject* AddressCheck_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"indices", "addresses", nullptr};
  PyObject *indices = nullptr, *addresses = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", const_cast<char**>(names), &indices, &addresses)) {
    return nullptr;
  }
  // Tuples of our own: reading an item as an integer may run code that changes the caller's list.
  indices = PySequence_Tuple(indices);
  addresses = indices == nullptr ? nullptr : PySequence_Tuple(addresses);
  PyObject* self = addresses == nullptr ? nullptr : type->tp_alloc(type, 0);
  if (self != nullptr) {
    auto* check = reinterpret_cast<AddressCheck*>(self);
    check->call = AddressCheck_call;
    new (&check->places) std::vector<Place>();
    try {
      if (!read_places(indices, addresses, check->places)) {
        Py_CLEAR(self);
      }
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
      Py_CLEAR(self);
    }
  }
  Py_XDECREF(indices);
  Py_XDECREF(addresses);
  return self;
}

void AddressCheck_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<AddressCheck*>(self)->places.~vector();
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef AddressCheck_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(AddressCheck, call), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

PyType_Slot AddressCheck_slots[] = {
    {Py_tp_doc, const_cast<char*>("AddressCheck(indices, addresses): see graphcap.native.fallback.AddressCheck")},
    {Py_tp_new, reinterpret_cast<void*>(AddressCheck_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(AddressCheck_dealloc)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, AddressCheck_members},
    {0, nullptr}};

PyType_Spec AddressCheck_spec = {
    "graphcap_native.AddressCheck",
    sizeof(AddressCheck),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE,
    AddressCheck_slots};

// ---- IdentityCheck ---------------------------------------------------------------------------------------------------

struct IdentityCheck {
  PyObject_HEAD
  vectorcallfunc call;
  // (dict, key, held, dict, key, held, ...); held is a weak reference, or a tuple of one where the object cannot be
  // referred to weakly. Instead of a dict there may be the number of an argument. NULL once cleared. A tuple, so that a
  // call can keep all of it alive with one reference. Those that every call looks at come first.
  PyObject* entries;
  Py_ssize_t end_of_open_entries;
  // (dict, number of keys, dict, number of keys, ...), in the same way.
  PyObject* sizes;
  Py_ssize_t end_of_open_sizes;
  Py_ssize_t num_arguments;
  // Whether the others are watched, and whether a write since the last look may have changed something.
  bool watches;
  bool changed;
  bool is_watched;  // whether these are all but the arguments
};

// Borrowed; NULL once the object is dead.
PyObject* expected_object(PyObject* held) {
  if (PyTuple_CheckExact(held)) {
    return PyTuple_GET_ITEM(held, 0);
  }
  PyObject* object = reinterpret_cast<PyWeakReference*>(held)->wr_object;
  return object == Py_None ? nullptr : object;
}

PyObject* dict_at(PyObject* place, PyObject* const* arguments) {
  return PyLong_Check(place) ? arguments[PyLong_AsSsize_t(place)] : place;
}

bool all_hold(PyObject* entries, Py_ssize_t begin, Py_ssize_t end, PyObject* const* arguments) {
  for (Py_ssize_t i = begin; i < end; i += 3) {
    PyObject* dict = dict_at(PyTuple_GET_ITEM(entries, i), arguments);
    PyObject* found = PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(entries, i + 1));
    if (found == nullptr) {
      PyErr_Clear();  // a key's __eq__ raised; without an error there is nothing to clear
      return false;
    }
    if (found != expected_object(PyTuple_GET_ITEM(entries, i + 2))) {
      return false;
    }
  }
  return true;
}

bool all_have_their_size(PyObject* sizes, Py_ssize_t begin, Py_ssize_t end, PyObject* const* arguments) {
  for (Py_ssize_t i = begin; i < end; i += 2) {
    PyObject* dict = dict_at(PyTuple_GET_ITEM(sizes, i), arguments);
    if (PyDict_GET_SIZE(dict) != PyLong_AsSsize_t(PyTuple_GET_ITEM(sizes, i + 1))) {
      return false;
    }
  }
  return true;
}

PyObject* IdentityCheck_call(PyObject* self, PyObject* const* args, std::size_t nargsf, PyObject* names) {
  auto* check = reinterpret_cast<IdentityCheck*>(self);
  const Py_ssize_t num_arguments = PyVectorcall_NARGS(nargsf);
  bool fits = names == nullptr || PyTuple_GET_SIZE(names) == 0;
  for (Py_ssize_t i = 0; i < num_arguments; ++i) {
    fits = fits && PyDict_Check(args[i]);
  }
  if (!fits || (num_arguments != check->num_arguments && check->entries != nullptr)) {
    PyErr_Format(PyExc_TypeError, "IdentityCheck takes %zd dicts", check->num_arguments);
    return nullptr;
  }
  PyObject *entries = check->entries, *sizes = check->sizes;
  if (entries == nullptr) {
    Py_RETURN_FALSE;
  }
  Py_INCREF(self);  // a key's __eq__ may call clear(), or let go of the check itself
  Py_INCREF(entries);
  const bool all_was_there = check->watches && !check->changed;
  check->changed = false;  // before the look: a write in the middle of it sets it again
  const bool all_is_there =
      all_was_there || (all_have_their_size(sizes, check->end_of_open_sizes, PyTuple_GET_SIZE(sizes), args) &&
                        all_hold(entries, check->end_of_open_entries, PyTuple_GET_SIZE(entries), args));
  check->changed = check->changed || !all_is_there;
  const bool holds = all_is_there && check->sizes != nullptr &&
                     all_have_their_size(check->sizes, 0, check->end_of_open_sizes, args) &&
                     all_hold(entries, 0, check->end_of_open_entries, args);
  Py_DECREF(entries);
  Py_DECREF(self);
  return PyBool_FromLong(holds);
}

// A weak reference, or a tuple of one; new, NULL with an exception set.
PyObject* hold(PyObject* object) {
  PyObject* held = PyWeakref_NewRef(object, nullptr);
  if (held == nullptr && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    held = PyTuple_Pack(1, object);
  }
  return held;
}

// Whether it is the number of an argument; counts arguments.
bool is_argument(PyObject* place, Py_ssize_t* num_arguments) {
  if (!PyLong_CheckExact(place)) {
    return false;
  }
  const Py_ssize_t number = PyLong_AsSsize_t(place);
  if (number < 0) {
    PyErr_Clear();
    return false;
  }
  *num_arguments = std::max(*num_arguments, number + 1);
  return true;
}

// Where the next part of a flat tuple goes: what every call looks at from the begin, what is watched from the end.
struct Cursor {
  Py_ssize_t begin;
  Py_ssize_t end;
  bool all_watched = true;  // but for arguments

  Py_ssize_t next(bool is_given, PyObject* dict, Py_ssize_t length) {
    const bool is_open = is_given || !dict_watch::can_watch(dict);
    all_watched = all_watched && (is_given || !is_open);
    begin += is_open ? length : 0;
    end -= is_open ? 0 : length;
    return is_open ? begin - length : end;
  }
};

// Fills in three items of `flat`; false with an exception set.
bool read_entry(PyObject* entry, Py_ssize_t number, PyObject* flat, Cursor& cursor, Py_ssize_t* num_arguments) {
  const bool is_tuple = PyTuple_Check(entry) && PyTuple_GET_SIZE(entry) == 3;
  const bool is_given = is_tuple && is_argument(PyTuple_GET_ITEM(entry, 0), num_arguments);
  if (!is_given && !(is_tuple && PyDict_Check(PyTuple_GET_ITEM(entry, 0)))) {
    PyErr_Format(PyExc_TypeError, "entry %zd: expected a tuple (dict, key, object), got %R", number, entry);
    return false;
  }
  PyObject* key = PyTuple_GET_ITEM(entry, 1);
  if (PyObject_Hash(key) == -1) {
    return false;
  }
  PyObject* held = hold(PyTuple_GET_ITEM(entry, 2));
  if (held == nullptr) {
    return false;
  }
  PyObject* dict = PyTuple_GET_ITEM(entry, 0);
  const Py_ssize_t i = cursor.next(is_given, dict, 3);
  Py_INCREF(dict);
  PyTuple_SET_ITEM(flat, i, dict);
  Py_INCREF(key);
  if (PyUnicode_CheckExact(key)) {
    PyUnicode_InternInPlace(&key);  // names of attributes are interned: the look-up then compares no characters
  }
  PyTuple_SET_ITEM(flat, i + 1, key);
  PyTuple_SET_ITEM(flat, i + 2, held);
  return true;
}

// Fills in entries; false with an exception set.
bool read_entries(PyObject* given, IdentityCheck* check) {
  given = PySequence_Tuple(given);
  if (given == nullptr) {
    return false;
  }
  const Py_ssize_t count = PyTuple_GET_SIZE(given);
  Cursor cursor{0, 3 * count};
  PyObject* flat = PyTuple_New(3 * count);
  bool done = flat != nullptr;
  for (Py_ssize_t i = 0; done && i < count; ++i) {
    done = read_entry(PyTuple_GET_ITEM(given, i), i, flat, cursor, &check->num_arguments);
  }
  Py_DECREF(given);
  check->entries = flat;
  check->end_of_open_entries = cursor.begin;
  check->is_watched = cursor.all_watched;
  return done;
}

// Fills in the dicts with the number of keys that each has now; false with an exception set.
bool read_sizes(PyObject* given, IdentityCheck* check) {
  given = given == nullptr ? PyTuple_New(0) : PySequence_Tuple(given);
  if (given == nullptr) {
    return false;
  }
  const Py_ssize_t count = PyTuple_GET_SIZE(given);
  Cursor cursor{0, 2 * count};
  PyObject* flat = PyTuple_New(2 * count);
  bool done = flat != nullptr;
  for (Py_ssize_t i = 0; done && i < count; ++i) {
    PyObject *dict = PyTuple_GET_ITEM(given, i), *place = dict;
    if (PyTuple_Check(dict) && PyTuple_GET_SIZE(dict) == 2) {
      place = PyTuple_GET_ITEM(dict, 0);
      dict = PyTuple_GET_ITEM(dict, 1);
    }
    const bool is_given = is_argument(place, &check->num_arguments);
    done = PyDict_Check(dict) && (is_given || place == dict);
    if (!done) {
      PyErr_Format(PyExc_TypeError, "sized %zd: expected a dict, got %R", i, PyTuple_GET_ITEM(given, i));
      break;
    }
    PyObject* size = PyLong_FromSsize_t(PyDict_GET_SIZE(dict));
    done = size != nullptr;
    const Py_ssize_t k = cursor.next(is_given, dict, 2);
    Py_INCREF(place);
    PyTuple_SET_ITEM(flat, k, place);
    PyTuple_SET_ITEM(flat, k + 1, size);
  }
  Py_DECREF(given);
  check->sizes = flat;
  check->end_of_open_sizes = cursor.begin;
  check->is_watched = check->is_watched && cursor.all_watched;
  return done;
}

void unwatch(IdentityCheck* check) {
  check->watches = false;
  check->is_watched = false;
  PyObject *entries = check->entries, *sizes = check->sizes;
  for (Py_ssize_t i = check->end_of_open_entries; entries != nullptr && i < PyTuple_GET_SIZE(entries); i += 3) {
    dict_watch::remove(PyTuple_GET_ITEM(entries, i), &check->changed);
  }
  for (Py_ssize_t i = check->end_of_open_sizes; sizes != nullptr && i < PyTuple_GET_SIZE(sizes); i += 2) {
    dict_watch::remove(PyTuple_GET_ITEM(sizes, i), &check->changed);
  }
}

void watch(IdentityCheck* check) {
  bool all = true;
  for (Py_ssize_t i = check->end_of_open_entries; all && i < PyTuple_GET_SIZE(check->entries); i += 3) {
    PyObject* const* entry = &PyTuple_GET_ITEM(check->entries, i);
    // As long as nobody writes to the dict it holds the object, which so keeps its address to itself.
    all = dict_watch::add(entry[0], entry[1], expected_object(entry[2]), &check->changed);
  }
  for (Py_ssize_t i = check->end_of_open_sizes; all && i < PyTuple_GET_SIZE(check->sizes); i += 2) {
    all = dict_watch::add(PyTuple_GET_ITEM(check->sizes, i), nullptr, nullptr, &check->changed);
  }
  check->watches = all;
  if (!all) {
    unwatch(check);
  }
}

PyObject* IdentityCheck_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"entries", "sized", nullptr};
  PyObject *given = nullptr, *sized = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O", const_cast<char**>(names), &given, &sized)) {
    return nullptr;
  }
  PyObject* self = type->tp_alloc(type, 0);  // zeroed
  if (self == nullptr) {
    return nullptr;
  }
  auto* check = reinterpret_cast<IdentityCheck*>(self);
  check->call = IdentityCheck_call;
  check->changed = true;  // nobody has looked yet
  if (!read_entries(given, check) || !read_sizes(sized, check)) {
    Py_DECREF(self);
    return nullptr;
  }
  watch(check);
  return self;
}

int IdentityCheck_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<IdentityCheck*>(self)->entries);
  Py_VISIT(reinterpret_cast<IdentityCheck*>(self)->sizes);
  return 0;
}

int IdentityCheck_clear(PyObject* self) {
  auto* check = reinterpret_cast<IdentityCheck*>(self);
  unwatch(check);
  Py_CLEAR(check->entries);
  Py_CLEAR(check->sizes);
  return 0;
}

PyObject* IdentityCheck_clear_method(PyObject* self, PyObject*) {
  IdentityCheck_clear(self);
  Py_RETURN_NONE;
}

void IdentityCheck_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  IdentityCheck_clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef IdentityCheck_methods[] = {
    {"clear", IdentityCheck_clear_method, METH_NOARGS, "Let go of everything; the check is false from here on."},
    {nullptr, nullptr, 0, nullptr}};

PyMemberDef IdentityCheck_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(IdentityCheck, call), READONLY, nullptr},
    {"is_watched", T_BOOL, offsetof(IdentityCheck, is_watched), READONLY, "Whether writes are waited for."},
    {nullptr, 0, 0, 0, nullptr}};

PyType_Slot IdentityCheck_slots[] = {
    {Py_tp_doc, const_cast<char*>("IdentityCheck(entries, sized=()): see graphcap.native.fallback.IdentityCheck")},
    {Py_tp_new, reinterpret_cast<void*>(IdentityCheck_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(IdentityCheck_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(IdentityCheck_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(IdentityCheck_clear)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, IdentityCheck_methods},
    {Py_tp_members, IdentityCheck_members},
    {0, nullptr}};

PyType_Spec IdentityCheck_spec = {
    "graphcap_native.IdentityCheck",
    sizeof(IdentityCheck),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE,
    IdentityCheck_slots};

// ---- the module ------------------------------------------------------------------------------------------------------

int add_types(PyObject* module) {
  for (PyType_Spec* spec : {&AddressCheck_spec, &IdentityCheck_spec, &answers::AnswerCheck_spec,
                            &copies::ApartCheck_spec, &copies::GroupedCopy_spec, &thread_state::ThreadState_spec}) {
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
