// Whether dicts still hold the very objects that they held, and functions answer what they answered. Where dicts can be
// watched (dict_watch.h), the first question costs nothing until somebody writes to one of them; the functions are called
// without the interpreter between two of them, which costs more than they do: they read a flag. objects.py has the same
// in Python, and the contracts.

#pragma once

#include <Python.h>

#include <algorithm>
#include <cstddef>

#include <structmember.h>

#include "dict_watch.h"
#include "vectorcall.h"

namespace objects {

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
inline PyObject* expected_object(PyObject* held) {
  if (PyTuple_CheckExact(held)) {
    return PyTuple_GET_ITEM(held, 0);
  }
  PyObject* object = reinterpret_cast<PyWeakReference*>(held)->wr_object;
  return object == Py_None ? nullptr : object;
}

inline PyObject* dict_at(PyObject* place, PyObject* const* arguments) {
  return PyLong_Check(place) ? arguments[PyLong_AsSsize_t(place)] : place;
}

inline bool all_hold(PyObject* entries, Py_ssize_t begin, Py_ssize_t end, PyObject* const* arguments) {
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

inline bool all_have_their_size(PyObject* sizes, Py_ssize_t begin, Py_ssize_t end, PyObject* const* arguments) {
  for (Py_ssize_t i = begin; i < end; i += 2) {
    PyObject* dict = dict_at(PyTuple_GET_ITEM(sizes, i), arguments);
    if (PyDict_GET_SIZE(dict) != PyLong_AsSsize_t(PyTuple_GET_ITEM(sizes, i + 1))) {
      return false;
    }
  }
  return true;
}

inline PyObject* IdentityCheck_call(PyObject* self, PyObject* const* args, std::size_t nargsf, PyObject* names) {
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
inline PyObject* hold(PyObject* object) {
  PyObject* held = PyWeakref_NewRef(object, nullptr);
  if (held == nullptr && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    held = PyTuple_Pack(1, object);
  }
  return held;
}

// Whether it is the number of an argument; counts arguments.
inline bool is_argument(PyObject* place, Py_ssize_t* num_arguments) {
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
inline bool read_entry(PyObject* entry, Py_ssize_t number, PyObject* flat, Cursor& cursor, Py_ssize_t* num_arguments) {
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
inline bool read_entries(PyObject* given, IdentityCheck* check) {
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
inline bool read_sizes(PyObject* given, IdentityCheck* check) {
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

inline void unwatch(IdentityCheck* check) {
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

inline void watch(IdentityCheck* check) {
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

inline PyObject* IdentityCheck_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
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

inline int IdentityCheck_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<IdentityCheck*>(self)->entries);
  Py_VISIT(reinterpret_cast<IdentityCheck*>(self)->sizes);
  return 0;
}

inline int IdentityCheck_clear(PyObject* self) {
  auto* check = reinterpret_cast<IdentityCheck*>(self);
  unwatch(check);
  Py_CLEAR(check->entries);
  Py_CLEAR(check->sizes);
  return 0;
}

inline PyObject* IdentityCheck_clear_method(PyObject* self, PyObject*) {
  IdentityCheck_clear(self);
  Py_RETURN_NONE;
}

inline void IdentityCheck_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  IdentityCheck_clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

inline PyMethodDef IdentityCheck_methods[] = {
    {"clear", IdentityCheck_clear_method, METH_NOARGS, "Let go of everything; the check is false from here on."},
    {nullptr, nullptr, 0, nullptr}};

inline PyMemberDef IdentityCheck_members[] = {
    vectorcall::offset_of_call<IdentityCheck>(),
    {"is_watched", T_BOOL, offsetof(IdentityCheck, is_watched), READONLY, "Whether writes are waited for."},
    {nullptr, 0, 0, 0, nullptr}};

inline PyType_Slot IdentityCheck_slots[] = {
    {Py_tp_doc, const_cast<char*>("IdentityCheck(entries, sized=()): see graphcap.native.fallback.IdentityCheck")},
    {Py_tp_new, reinterpret_cast<void*>(IdentityCheck_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(IdentityCheck_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(IdentityCheck_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(IdentityCheck_clear)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_methods, IdentityCheck_methods},
    {Py_tp_members, IdentityCheck_members},
    {0, nullptr}};

inline PyType_Spec IdentityCheck_spec = {
    "graphcap_native.IdentityCheck",
    sizeof(IdentityCheck),
    0,
    vectorcall::kFlags | Py_TPFLAGS_HAVE_GC,
    IdentityCheck_slots};

// ---- AnswerCheck -----------------------------------------------------------------------------------------------------

struct AnswerCheck {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject* questions;  // (function, arguments, answer, function, ...); NULL once cleared
};

inline PyObject* AnswerCheck_call(PyObject* self, PyObject* const*, std::size_t nargsf, PyObject* names) {
  if (PyVectorcall_NARGS(nargsf) != 0 || (names != nullptr && PyTuple_GET_SIZE(names) != 0)) {
    PyErr_SetString(PyExc_TypeError, "AnswerCheck takes no arguments");
    return nullptr;
  }
  PyObject* questions = reinterpret_cast<AnswerCheck*>(self)->questions;
  if (questions == nullptr) {
    Py_RETURN_FALSE;
  }
  Py_INCREF(questions);  // a function may lead to a collection that clears this object
  bool same = true;
  for (Py_ssize_t i = 0; same && i < PyTuple_GET_SIZE(questions); i += 3) {
    PyObject* given = PyTuple_GET_ITEM(questions, i + 1);
    PyObject* const* items = PySequence_Fast_ITEMS(given);
    PyObject* answer = PyObject_Vectorcall(PyTuple_GET_ITEM(questions, i), items, PyTuple_GET_SIZE(given), nullptr);
    same = answer == PyTuple_GET_ITEM(questions, i + 2);
    if (answer == nullptr) {
      PyErr_Clear();
    }
    Py_XDECREF(answer);
  }
  Py_DECREF(questions);
  return PyBool_FromLong(same);
}

// A flat tuple of all questions; NULL with an exception set.
inline PyObject* flat_questions(PyObject* given) {
  given = PySequence_Tuple(given);
  if (given == nullptr) {
    return nullptr;
  }
  const Py_ssize_t count = PyTuple_GET_SIZE(given);
  PyObject* flat = PyTuple_New(3 * count);
  for (Py_ssize_t i = 0; flat != nullptr && i < count; ++i) {
    PyObject* question = PyTuple_GET_ITEM(given, i);
    if (!PyTuple_Check(question) || PyTuple_GET_SIZE(question) != 3 || !PyTuple_Check(PyTuple_GET_ITEM(question, 1)) ||
        !PyCallable_Check(PyTuple_GET_ITEM(question, 0))) {
      PyErr_Format(PyExc_TypeError, "question %zd: expected a tuple (function, arguments, answer), got %R", i, question);
      Py_CLEAR(flat);
      break;
    }
    for (Py_ssize_t k = 0; k < 3; ++k) {
      PyObject* item = PyTuple_GET_ITEM(question, k);
      Py_INCREF(item);
      PyTuple_SET_ITEM(flat, 3 * i + k, item);
    }
  }
  Py_DECREF(given);
  return flat;
}

inline PyObject* AnswerCheck_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"questions", nullptr};
  PyObject* given = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", const_cast<char**>(names), &given)) {
    return nullptr;
  }
  PyObject* questions = flat_questions(given);
  if (questions == nullptr) {
    return nullptr;
  }
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) {
    Py_DECREF(questions);
    return nullptr;
  }
  reinterpret_cast<AnswerCheck*>(self)->call = AnswerCheck_call;
  reinterpret_cast<AnswerCheck*>(self)->questions = questions;
  return self;
}

inline int AnswerCheck_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<AnswerCheck*>(self)->questions);
  return 0;
}

inline int AnswerCheck_clear(PyObject* self) {
  Py_CLEAR(reinterpret_cast<AnswerCheck*>(self)->questions);
  return 0;
}

inline void AnswerCheck_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  AnswerCheck_clear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

inline PyType_Slot AnswerCheck_slots[] = {
    {Py_tp_doc, const_cast<char*>("AnswerCheck(questions): see graphcap.native.fallback.AnswerCheck")},
    {Py_tp_new, reinterpret_cast<void*>(AnswerCheck_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(AnswerCheck_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(AnswerCheck_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(AnswerCheck_clear)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, vectorcall::members<AnswerCheck>},
    {0, nullptr}};

inline PyType_Spec AnswerCheck_spec = {
    "graphcap_native.AnswerCheck",
    sizeof(AnswerCheck),
    0,
    vectorcall::kFlags | Py_TPFLAGS_HAVE_GC,
    AnswerCheck_slots};

}  // namespace objects
