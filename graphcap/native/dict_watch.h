// Learns of writes to dicts, so that nobody has to look at their entries on every call. Python 3.12 and later have
// watchers for that: a function that is told of each write to a chosen dict before it happens. A process has eight of
// them; this takes one, for all dicts. Where there are none, nothing can be watched and callers look for themselves.
//
// Needs the GIL, which the writer of a dict holds as well.

#pragma once

#include <Python.h>

#include <unordered_map>
#include <vector>

namespace dict_watch {

#if PY_VERSION_HEX >= 0x030C0000

// What one owner expects of one dict: that `key` keeps its object or, without a key, that the number of keys stays.
struct Watch {
  PyObject* key;
  PyObject* object;
  bool* changed;  // identifies the owner, and is set by a write to something else
};

// Never destroyed: dicts are written to until the very end of the process.
inline std::unordered_map<PyObject*, std::vector<Watch>>& watches() {
  static auto* const all = new std::unordered_map<PyObject*, std::vector<Watch>>();
  return *all;
}

// Equal strings that are interned are one object; of other keys only Python could say whether they are equal.
inline bool are_different(PyObject* key, PyObject* other) {
  return key != other && PyUnicode_CheckExact(key) && PyUnicode_CheckExact(other) && PyUnicode_CHECK_INTERNED(key) &&
         PyUnicode_CHECK_INTERNED(other);
}

// Whether a key is new to a dict though the event says that its value is replaced: 3.12 says so where another object of
// the class has had an attribute of that name, as their dicts share their keys, which are strings.
inline bool is_added(PyObject* dict, PyObject* key) {
  return reinterpret_cast<PyDictObject*>(dict)->ma_values != nullptr && PyDict_GetItemWithError(dict, key) == nullptr;
}

inline bool is_broken(
    const Watch& watch, PyDict_WatchEvent event, PyObject* dict, PyObject* key, PyObject* value) {
  if (event != PyDict_EVENT_ADDED && event != PyDict_EVENT_MODIFIED && event != PyDict_EVENT_DELETED) {
    return true;  // cleared, filled from another one, or at its end
  }
  if (watch.key == nullptr) {
    return event != PyDict_EVENT_MODIFIED || is_added(dict, key);
  }
  if (are_different(watch.key, key)) {
    return false;
  }
  return key != watch.key || value != watch.object;
}

// At the end of a process dicts and who watches them go in any order, the last of them untold.
inline bool is_end_of_process() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Runs inside of every write to a watched dict: must be quick, and neither fail nor run Python code.
inline int on_write(PyDict_WatchEvent event, PyObject* dict, PyObject* key, PyObject* value) {
  const auto found = is_end_of_process() ? watches().end() : watches().find(dict);
  if (found != watches().end()) {
    for (const Watch& watch : found->second) {
      if (!*watch.changed && is_broken(watch, event, dict, key, value)) {
        *watch.changed = true;
      }
    }
    if (event == PyDict_EVENT_DEALLOCATED) {
      watches().erase(found);  // another dict may come to lie at this address
    }
  }
  return 0;
}

// -1 where all are taken.
inline int watcher() {
  static const int id = [] {
    const int got = PyDict_AddWatcher(on_write);
    if (got < 0) {
      PyErr_Clear();
    }
    return got;
  }();
  return id;
}

// Whether somebody who writes to the dict is sure to go through functions that tell watchers. Another subclass may have
// its own way, and the attributes of an object may from 3.13 on be stored past its dict while the two share their values.
inline bool can_watch(PyObject* dict) {
  if (watcher() < 0 || !(PyDict_CheckExact(dict) || PyODict_CheckExact(dict))) {
    return false;
  }
#if PY_VERSION_HEX >= 0x030D0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_values == nullptr;
#else
  return true;
#endif
}

// Whether `*changed` will be set by a write after which `dict[key] is object` may no longer hold or, where `key` is
// null, after which `dict` may have another number of keys. The dict must be one that can be watched. Its end is
// a write as well, after which `remove` does nothing.
inline bool add(PyObject* dict, PyObject* key, PyObject* object, bool* changed) {
  try {
    watches()[dict].push_back({key, object, changed});
  } catch (...) {
    return false;
  }
  if (PyDict_Watch(watcher(), dict) < 0) {
    PyErr_Clear();
    return false;
  }
  return true;
}

// Forget what the owner of `changed` expects of `dict`.
inline void remove(PyObject* dict, const bool* changed) {
  const auto found = is_end_of_process() ? watches().end() : watches().find(dict);
  if (found == watches().end()) {
    return;
  }
  auto& of_dict = found->second;
  std::size_t kept = 0;
  for (const Watch& watch : of_dict) {
    if (watch.changed != changed) {
      of_dict[kept++] = watch;
    }
  }
  of_dict.resize(kept);
  if (of_dict.empty()) {
    watches().erase(found);
    PyObject* error = PyErr_GetRaisedException();  // this runs at the end of objects
    if (PyDict_Unwatch(watcher(), dict) < 0) {
      PyErr_Clear();
    }
    PyErr_SetRaisedException(error);
  }
}

#else

inline bool can_watch(PyObject*) {
  return false;
}

inline bool add(PyObject*, PyObject*, PyObject*, bool*) {
  return false;
}

inline void remove(PyObject*, const bool*) {}

#endif

}  // namespace dict_watch
