// Launch records, and what the stand-ins are given at import.
#include <dlfcn.h>

#include "standin.h"

namespace reft {

State state;

namespace {

// PyObject_Vectorcall where Python does not export it (3.10).
PyObject* call_by_tuple(PyObject* callable, PyObject* const* args, size_t nargsf, PyObject* names) {
  const Py_ssize_t count = static_cast<Py_ssize_t>(nargsf & ~kOffset);
  const Ref positional(PyTuple_New(count));
  if (!positional) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Py_INCREF(args[i]);
    PyTuple_SetItem(positional.get(), i, args[i]);
  }
  const Py_ssize_t named = names == nullptr ? 0 : PyTuple_Size(names);
  if (named == 0) return PyObject_Call(callable, positional.get(), nullptr);
  const Ref keywords(PyDict_New());
  if (!keywords) return nullptr;
  for (Py_ssize_t i = 0; i < named; ++i) {
    if (PyDict_SetItem(keywords.get(), PyTuple_GetItem(names, i), args[count + i]) < 0) {
      return nullptr;
    }
  }
  return PyObject_Call(callable, positional.get(), keywords.get());
}

bool is_int32(const DLTensor& view) {
  return view.dtype.code == kDLInt && view.dtype.bits == 32 && view.dtype.lanes == 1;
}

// Types whose instances hold addresses: a copy or a pickle of one is None.
PyObject* reduce(PyObject*, PyObject*) {
  return Py_BuildValue("(O())", reinterpret_cast<PyObject*>(Py_TYPE(Py_None)));
}

PyMethodDef record_methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};

void free_record(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

void free_launch(PyObject* self) {
  Launch* const launch = reinterpret_cast<Launch*>(self);
  for (PyObject* one : {launch->pool_object, launch->pool_rows, launch->spans}) Py_XDECREF(one);
  free_record(self);
}

void free_rows(PyObject* self) {
  Py_XDECREF(reinterpret_cast<PlanRows*>(self)->rows_object);
  Py_XDECREF(reinterpret_cast<PlanRows*>(self)->tiles_object);
  free_record(self);
}

PyObject* record_type(const char* name, size_t size, destructor free) {
  PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(free)},
                         {Py_tp_methods, record_methods},
                         {0, nullptr}};
  PyType_Spec spec{name, static_cast<int>(size), 0, Py_TPFLAGS_DEFAULT, slots};
  return PyType_FromSpec(&spec);
}

template <class Record>
Record* new_record(PyObject* type) {
  PyTypeObject* const made = reinterpret_cast<PyTypeObject*>(type);
  return reinterpret_cast<Record*>(
      reinterpret_cast<allocfunc>(PyType_GetSlot(made, Py_tp_alloc))(made, 0));
}

// Reads the addresses; false where the tensors are not what the kernels take.
bool fill(Launch* launch) {
  PyObject* const pool = launch->pool_rows;  // ops/arguments.py, PoolRows
  if (!PyTuple_Check(pool) || PyTuple_Size(pool) != 4) return false;
  DLTensor down, up, bias, kind, spans;
  if (!look_at(PyTuple_GetItem(pool, 0), &down) || !look_at(PyTuple_GetItem(pool, 1), &up) ||
      !look_at(PyTuple_GetItem(pool, 2), &bias) || !look_at(PyTuple_GetItem(pool, 3), &kind) ||
      !look_at(launch->spans, &spans)) {
    return false;
  }
  if (down.ndim != 2 || up.ndim != 2 || bias.ndim != 1 || kind.ndim != 1 || spans.ndim != 2) {
    return false;
  }
  const int64_t rows = down.shape[0], d = down.shape[1];
  const int32_t dtype = dtype_of(down.dtype);
  if (up.shape[0] != rows || up.shape[1] != d || bias.shape[0] != rows || kind.shape[0] != rows ||
      spans.shape[1] != 2 || dtype < 0 || dtype_of(up.dtype) != dtype ||
      dtype_of(bias.dtype) != kReftF32 || !is_int32(kind) || !is_int32(spans) ||
      (dtype != launch->dtype && dtype != kReftF32)) {
    return false;
  }
  launch->pool = {down.data,
                  up.data,
                  static_cast<const float*>(bias.data),
                  static_cast<const int32_t*>(kind.data),
                  rows,
                  d,
                  dtype,
                  static_cast<const int32_t*>(spans.data),
                  spans.shape[0]};
  return true;
}

}  // namespace

bool look_at(PyObject* tensor, DLTensor* out) {
  if (state.look(tensor, out) != 0) {
    PyErr_Clear();  // without memory of its own: a functorch wrapper, sparse, and the like
    return false;
  }
  if (out->device.device_type != kDLCPU || out->data == nullptr) return false;
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  if (out->strides == nullptr) return true;
  int64_t expected = 1;
  for (int32_t i = out->ndim - 1; i >= 0; --i) {
    if (out->shape[i] != 1 && out->strides[i] != expected) return false;
    expected *= out->shape[i];
  }
  return true;
}

bool as_rows(const DLTensor& view, ReftHidden* out) {
  if (view.ndim < 1) return false;
  int64_t count = 1;
  for (int32_t i = 0; i + 1 < view.ndim; ++i) count *= view.shape[i];
  *out = {view.data, count, view.shape[view.ndim - 1], dtype_of(view.dtype)};
  return out->dtype >= 0;
}

PyObject* make_launch(PyObject* site) {
  // Not of a site with several stages, nor of one whose edits are no pool of the low-rank form's.
  const Ref low_rank(PyObject_GetAttr(site, state.low_rank));
  if (low_rank.get() != Py_True) return nullptr;
  Launch* const launch = new_record<Launch>(state.launch_type);
  Ref holder(reinterpret_cast<PyObject*>(launch));
  if (launch == nullptr) return nullptr;
  PyObject* const pool = launch->pool_object = PyObject_GetAttr(site, state.pool);
  if (pool == nullptr) return nullptr;
  launch->pool_rows = PyObject_GetAttr(pool, state.rows);
  launch->spans = PyObject_GetAttr(site, state.spans);
  const Ref slot(PyObject_GetAttr(site, state.slot)), place(PyObject_GetAttr(site, state.place));
  if (PyErr_Occurred()) return nullptr;
  launch->slot = PyLong_AsSsize_t(slot.get());
  const Ref dtype(PyObject_GetAttr(place.get(), state.dtype));
  if (!dtype || PyErr_Occurred()) return nullptr;
  launch->dtype = -1;
  for (int32_t code = 0; code < 3; ++code) {
    if (PyTuple_GetItem(state.dtypes, code) == dtype.get()) launch->dtype = code;
  }
  return launch->dtype >= 0 && fill(launch) ? holder.release() : nullptr;
}

PyObject* plan_rows(PyObject*, PyObject* args) {
  PyObject *rows, *tiles;
  long long tokens;
  if (!PyArg_ParseTuple(args, "OOL", &rows, &tiles, &tokens)) return nullptr;
  DLTensor row_view, tile_view;
  if (!is_exactly(rows, state.tensor) || !is_exactly(tiles, state.tensor) ||
      !look_at(rows, &row_view) || !look_at(tiles, &tile_view) || row_view.ndim != 1 ||
      tile_view.ndim != 2 || tile_view.shape[1] != 3 || !is_int32(row_view) ||
      !is_int32(tile_view)) {
    Py_RETURN_NONE;
  }
  PlanRows* const made = new_record<PlanRows>(state.rows_type);
  if (made == nullptr) return nullptr;
  Py_INCREF(rows);
  Py_INCREF(tiles);
  made->rows_object = rows;
  made->tiles_object = tiles;
  made->rows = {static_cast<const int32_t*>(row_view.data),
                static_cast<const int32_t*>(tile_view.data), row_view.shape[0], tile_view.shape[0],
                static_cast<int64_t>(tokens)};
  return reinterpret_cast<PyObject*>(made);
}

// set_up(exchange, launches, Tensor, Parameter, empty_like, watchers, autocast, dtypes)
PyObject* set_up(PyObject*, PyObject* args) {
  PyObject *exchange, *tensor, *parameter, *empty_like, *watchers, *autocast, *dtypes;
  unsigned long long address;
  if (!PyArg_ParseTuple(args, "OKOOOO!OO!", &exchange, &address, &tensor, &parameter, &empty_like,
                        &PyTuple_Type, &watchers, &autocast, &PyTuple_Type, &dtypes)) {
    return nullptr;
  }
  const auto* const api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange, "dlpack_exchange_api"));
  if (api == nullptr) return nullptr;
  const auto* const launches = reinterpret_cast<const ReftLaunches*>(address);
  if (api->header.version.major != DLPACK_MAJOR_VERSION ||
      api->dltensor_from_py_object_no_sync == nullptr) {
    PyErr_SetString(PyExc_ImportError, "torch speaks another DLPack than this was built for");
    return nullptr;
  }
  if (launches->version != kReftLaunchesVersion) {
    PyErr_SetString(PyExc_ImportError, "the CPU library is of another build");
    return nullptr;
  }
  for (PyObject* one : {tensor, parameter, empty_like, watchers, autocast, dtypes}) Py_INCREF(one);
  state.look = api->dltensor_from_py_object_no_sync;
  state.launches = launches;
  state.tensor = tensor;
  state.parameter = parameter;
  state.empty_like = empty_like;
  state.watchers = watchers;
  state.autocast = autocast;
  state.dtypes = dtypes;
  state.on = true;
  Py_RETURN_NONE;
}

PyObject* turn(PyObject*, PyObject* on) {
  const int wanted = PyObject_IsTrue(on);
  if (wanted < 0) return nullptr;
  const bool before = state.on;
  state.on = wanted != 0 && state.launches != nullptr;
  return PyBool_FromLong(before);
}

bool prepare_state() {
  void* const exported = dlsym(RTLD_DEFAULT, "PyObject_Vectorcall");
  state.vectorcall = exported ? reinterpret_cast<Vectorcall>(exported) : call_by_tuple;
  const std::pair<PyObject**, const char*> names[] = {
      {&state.runtime, "runtime"},   {&state.plan, "plan"},
      {&state.original, "original"}, {&state.key, "key"},
      {&state.norm, "norm"},         {&state.sites, "sites"},
      {&state.launch, "launch"},     {&state.launch_rows, "launch_rows"},
      {&state.call, "__call__"},     {&state.after, "after"},
      {&state.fused, "fused"},       {&state.offered, "_offered"},
      {&state.how, "how"},           {&state.weights, "weights"},
      {&state.weight, "weight"},     {&state.bias, "bias"},
      {&state.module, "module"},     {&state.training, "training"},
      {&state.pool, "pool"},         {&state.spans, "spans"},
      {&state.slot, "slot"},         {&state.place, "place"},
      {&state.dtype, "dtype"},       {&state.rows, "rows"},
      {&state.low_rank, "low_rank"}};
  for (const auto& [slot, name] : names) {
    if ((*slot = PyUnicode_InternFromString(name)) == nullptr) return false;
  }
  state.launch_type = record_type("reft_kernels.Launch", sizeof(Launch), free_launch);
  state.rows_type = record_type("reft_kernels.PlanRows", sizeof(PlanRows), free_rows);
  return state.launch_type != nullptr && state.rows_type != nullptr;
}

}  // namespace reft
