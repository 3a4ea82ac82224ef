// What the stand-ins in C share: references, the module's state, tensors seen through DLPack,
// launch records.
#pragma once

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
// Pure C, without torch.
#include <ATen/dlpack.h>
#include <structmember.h>

#include <cstring>
#include <list>
#include <string>

#include "launch.h"

namespace reft {

// In the limited API from 3.12 on only; these have been what they are since 3.9.
using Vectorcall = PyObject* (*)(PyObject*, PyObject* const*, size_t, PyObject*);
constexpr unsigned long kHaveVectorcall = 1UL << 11;
constexpr size_t kOffset = size_t{1} << (8 * sizeof(size_t) - 1);

// A reference that is let go at the end of its scope.
class Ref {
 public:
  explicit Ref(PyObject* object = nullptr) : object_(object) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  void reset(PyObject* object) {
    PyObject* const before = object_;
    object_ = object;
    Py_XDECREF(before);
  }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// What `set_up` was given, and names of attributes.
struct State {
  bool on = false;
  Vectorcall vectorcall = nullptr;
  const ReftLaunches* launches = nullptr;
  DLPackDLTensorFromPyObjectNoSync look = nullptr;
  uint64_t moves = 0;  // how often a pool got other tensors
  PyObject *tensor, *parameter, *empty_like, *watchers, *autocast, *dtypes;
  PyObject *table_type, *plan_type, *cell_type;
  PyObject *runtime, *plan, *original, *norm, *call, *after, *cell, *index;
  PyObject *fused, *offered, *how, *weights, *weight, *bias, *module, *training, *rows;
};
extern State state;

// One site's pool and ranges, by address. It keeps the tensors (pool_rows is a tuple of four).
struct Launch {
  enum Kind { kNothing, kByAddress, kByName };
  Kind kind;
  int32_t dtype;  // of hidden states
  int32_t slot;
  uint64_t moves;  // up to which the pool's tensors are known to be these
  ReftPool pool;
  PyObject *pool_object, *pool_rows, *spans;
};

// The sites of a table, by their numbers.
struct TableLaunches {
  PyObject_HEAD;
  Py_ssize_t count;
  Launch* sites;
};

// The rows of a plan on one device, by address; null rows_object where they are not the CPU's.
struct PlanRows {
  ReftRows rows;
  PyObject *rows_object, *tiles_object;
};

// All that the short way reads of a plan.
struct PlanLaunches {
  PyObject_HEAD;
  TableLaunches* table;
  bool open;  // until the plan's sites are others
  Py_ssize_t count;
  PlanRows* rows;
};

// The plan that a model is under. Its memory is never given back, only used again, with another
// serial: so stand-ins point to it without owning it (a derived class can't tell Python's collector
// what it owns).
struct Cell {
  enum Mode : int32_t { kIdle, kByName, kShort };
  Mode mode;
  uint32_t serial;
  PlanLaunches* plan;
  Cell* next;  // of those that are free
};

struct CellHandle {
  PyObject_HEAD;
  Cell* cell;
};

// What an instance ends in. cell: as it was when it was bound, and null before.
struct Tail {
  Vectorcall call;
  Cell* cell;
  uint32_t serial;
  int32_t index;  // of the one site, kNoSite or kSeveral
};

// As huggingface/sites.py has them.
enum : int32_t { kNoSite = -1, kSeveral = -2 };

inline bool is_exactly(PyObject* object, PyObject* type) {
  return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type;
}

// Whether a result is true; −1 where there is none.
inline int truth(const Ref& result) {
  PyObject* const object = result.get();
  if (object == Py_False || object == Py_None) return 0;
  return object == nullptr ? -1 : PyObject_IsTrue(object);
}

// A dtype of the kernels; −1 for others.
inline int32_t dtype_of(const DLDataType& type) {
  if (type.lanes != 1) return -1;
  if (type.code == kDLFloat && type.bits == 32) return kReftF32;
  if (type.code == kDLBfloat && type.bits == 16) return kReftBf16;
  if (type.code == kDLFloat && type.bits == 16) return kReftF16;
  return -1;
}

// What lies behind a tensor; false (and no error) where that is not contiguous memory of the CPU's.
bool look_at(PyObject* tensor, DLTensor* out);

// The rows of a tensor [..., d]; false where the kernels don't take its dtype.
bool as_rows(const DLTensor& view, ReftHidden* out);

// Elements from which on Python's lock is handed over.
constexpr int64_t kLong = 1 << 15;

// Runs what does not touch Python, without Python's lock where it takes longer than handing that
// over.
template <class Body>
const char* unlocked(int64_t elements, const Body& body) {
  if (elements < kLong) return body();
  PyThreadState* const thread = PyEval_SaveThread();
  const char* const result = body();
  PyEval_RestoreThread(thread);
  return result;
}

// The launch once more, after pools moved; false where its tensors are no longer what the kernels
// take.
bool renew(Launch* launch);

bool prepare_state();
PyObject* set_up(PyObject*, PyObject* args);
PyObject* table_launches(PyObject*, PyObject* args);
PyObject* plan_launches(PyObject*, PyObject* args);
PyObject* make_cell(PyObject*, PyObject*);
PyObject* note_move(PyObject*, PyObject*);
PyObject* turn(PyObject*, PyObject* on);

}  // namespace reft
