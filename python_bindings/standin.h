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
  PyObject *tensor, *parameter, *empty_like, *watchers, *autocast, *dtypes;
  PyObject *launch_type, *rows_type;
  PyObject *runtime, *plan, *original, *key, *norm, *sites, *launch, *launch_rows, *call, *after;
  PyObject *fused, *offered, *how, *weights, *weight, *bias, *module, *training;
  PyObject *pool, *spans, *slot, *place, *dtype, *rows, *low_rank;
};
extern State state;

// One site's pool and ranges, by address. It keeps the tensors (pool_rows is a tuple of four), and
// is no good (and made anew) once the pool's are others.
struct Launch {
  PyObject_HEAD;
  ReftPool pool;
  int32_t dtype;  // of hidden states
  Py_ssize_t slot;
  PyObject *pool_object, *pool_rows, *spans;
};

// The rows of a plan, by address.
struct PlanRows {
  PyObject_HEAD;
  ReftRows rows;
  PyObject *rows_object, *tiles_object;
};

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

// Runs what does not touch Python, without Python's lock where it takes longer than handing that
// over.
template <class Body>
const char* unlocked(int64_t elements, const Body& body) {
  constexpr int64_t kLong = 1 << 15;
  if (elements < kLong) return body();
  PyThreadState* const thread = PyEval_SaveThread();
  const char* const result = body();
  PyEval_RestoreThread(thread);
  return result;
}

// A new Launch for a SiteTable; null where its stages or tensors are not what the kernels take, or
// with an error.
PyObject* make_launch(PyObject* site);

bool prepare_state();
PyObject* set_up(PyObject*, PyObject* args);
PyObject* plan_rows(PyObject*, PyObject* args);
PyObject* turn(PyObject*, PyObject* on);

}  // namespace reft
