// Whether functions still answer what they answered. Each is called without the interpreter between two of them, which
// costs more than the functions do: they read a flag.

#pragma once

#include <Python.h>

#include <cstddef>

#include <structmember.h>

namespace answers {

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

inline PyMemberDef AnswerCheck_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(AnswerCheck, call), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

inline PyType_Slot AnswerCheck_slots[] = {
    {Py_tp_doc, const_cast<char*>("AnswerCheck(questions): see graphcap.native.fallback.AnswerCheck")},
    {Py_tp_new, reinterpret_cast<void*>(AnswerCheck_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(AnswerCheck_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(AnswerCheck_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(AnswerCheck_clear)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, AnswerCheck_members},
    {0, nullptr}};

inline PyType_Spec AnswerCheck_spec = {
    "graphcap_native.AnswerCheck",
    sizeof(AnswerCheck),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE,
    AnswerCheck_slots};

}  // namespace answers
