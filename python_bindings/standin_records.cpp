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

void free_table(PyObject* self) {
  TableLaunches* const table = reinterpret_cast<TableLaunches*>(self);
  for (Py_ssize_t i = 0; i < table->count; ++i) {
    const Launch& one = table->sites[i];
    for (PyObject* kept : {one.pool_object, one.pool_rows, one.spans}) Py_XDECREF(kept);
  }
  PyMem_Free(table->sites);
  free_record(self);
}

void free_plan(PyObject* self) {
  PlanLaunches* const plan = reinterpret_cast<PlanLaunches*>(self);
  for (Py_ssize_t i = 0; i < plan->count; ++i) {
    Py_XDECREF(plan->rows[i].rows_object);
    Py_XDECREF(plan->rows[i].tiles_object);
  }
  PyMem_Free(plan->rows);
  Py_XDECREF(reinterpret_cast<PyObject*>(plan->table));
  free_record(self);
}

// plan.close(): its sites are others now, and all goes by name.
PyObject* close(PyObject* self, PyObject*) {
  reinterpret_cast<PlanLaunches*>(self)->open = false;
  Py_RETURN_NONE;
}

PyMethodDef plan_methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr},
                              {"close", close, METH_NOARGS, nullptr},
                              {nullptr, nullptr, 0, nullptr}};

Cell* free_cells = nullptr;

void let_go(Cell* cell, Cell::Mode mode, PlanLaunches* plan) {
  PyObject* const before = reinterpret_cast<PyObject*>(cell->plan);
  Py_XINCREF(reinterpret_cast<PyObject*>(plan));
  cell->plan = plan;
  cell->mode = mode;
  Py_XDECREF(before);
}

// cell.hold(plan): False for none, None for one whose ops are all called by name, or its launches.
PyObject* hold(PyObject* self, PyObject* plan) {
  Cell* const cell = reinterpret_cast<CellHandle*>(self)->cell;
  if (plan == Py_False) {
    let_go(cell, Cell::kIdle, nullptr);
  } else if (is_exactly(plan, state.plan_type)) {
    let_go(cell, Cell::kShort, reinterpret_cast<PlanLaunches*>(plan));
  } else {
    let_go(cell, Cell::kByName, nullptr);
  }
  Py_RETURN_NONE;
}

PyMethodDef cell_methods[] = {{"__reduce__", reduce, METH_NOARGS, nullptr},
                              {"hold", hold, METH_O, nullptr},
                              {nullptr, nullptr, 0, nullptr}};

void free_cell(PyObject* self) {
  Cell* const cell = reinterpret_cast<CellHandle*>(self)->cell;
  if (cell != nullptr) {
    let_go(cell, Cell::kIdle, nullptr);
    ++cell->serial;
    cell->next = free_cells;
    free_cells = cell;
  }
  free_record(self);
}

PyObject* record_type(const char* name, size_t size, destructor free, PyMethodDef* methods) {
  PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(free)}, {Py_tp_methods, methods}, {0, nullptr}};
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
  launch->moves = state.moves;
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

bool renew(Launch* launch) {
  PyObject* const rows = PyObject_GetAttr(launch->pool_object, state.rows);
  if (rows == nullptr) return false;
  PyObject* const before = launch->pool_rows;
  launch->pool_rows = rows;
  const bool same = rows == before;
  if (same) {
    launch->moves = state.moves;
  } else if (!fill(launch)) {
    launch->kind = Launch::kByName;
  }
  Py_DECREF(before);
  return launch->kind == Launch::kByAddress;
}

// table(count, [(number, pool, spans, slot, dtype), …]): pool is None where ops are called by name.
PyObject* table_launches(PyObject*, PyObject* args) {
  Py_ssize_t count;
  PyObject* sites;
  if (!PyArg_ParseTuple(args, "nO!", &count, &PyList_Type, &sites)) return nullptr;
  TableLaunches* const table = new_record<TableLaunches>(state.table_type);
  Ref holder(reinterpret_cast<PyObject*>(table));
  if (table == nullptr) return nullptr;
  table->sites = static_cast<Launch*>(PyMem_Calloc(count > 0 ? count : 1, sizeof(Launch)));
  if (table->sites == nullptr) return PyErr_NoMemory();
  table->count = count;
  for (Py_ssize_t i = 0; i < PyList_Size(sites); ++i) {
    Py_ssize_t number;
    PyObject *pool, *spans, *dtype;
    int slot;
    if (!PyArg_ParseTuple(PyList_GetItem(sites, i), "nOOiO", &number, &pool, &spans, &slot,
                          &dtype)) {
      return nullptr;
    }
    if (number < 0 || number >= count) {
      PyErr_SetString(PyExc_IndexError, "a site's number is beyond the table");
      return nullptr;
    }
    Launch* const launch = &table->sites[number];
    launch->kind = Launch::kByName;
    launch->slot = slot;
    launch->dtype = -1;
    for (int32_t code = 0; code < 3; ++code) {
      if (PyTuple_GetItem(state.dtypes, code) == dtype) launch->dtype = code;
    }
    if (pool == Py_None || launch->dtype < 0) continue;
    Py_INCREF(pool);
    Py_INCREF(spans);
    launch->pool_object = pool;
    launch->spans = spans;
    launch->pool_rows = PyObject_GetAttr(pool, state.rows);
    if (launch->pool_rows == nullptr) return nullptr;
    if (fill(launch)) launch->kind = Launch::kByAddress;
  }
  return holder.release();
}

namespace {

// Reads one device's rows [n] and tiles [n_tiles, 3]; where they are not the CPU's, nothing.
void fill_rows(PyObject* rows, PyObject* tiles, int64_t tokens, PlanRows* out) {
  DLTensor row_view, tile_view;
  if (!is_exactly(rows, state.tensor) || !is_exactly(tiles, state.tensor) ||
      !look_at(rows, &row_view) || !look_at(tiles, &tile_view) || row_view.ndim != 1 ||
      tile_view.ndim != 2 || tile_view.shape[1] != 3 || !is_int32(row_view) ||
      !is_int32(tile_view)) {
    return;
  }
  Py_INCREF(rows);
  Py_INCREF(tiles);
  out->rows_object = rows;
  out->tiles_object = tiles;
  out->rows = {static_cast<const int32_t*>(row_view.data),
               static_cast<const int32_t*>(tile_view.data), row_view.shape[0], tile_view.shape[0],
               tokens};
}

}  // namespace

// plan(table, [(rows, tiles), …], tokens): for each slot.
PyObject* plan_launches(PyObject*, PyObject* args) {
  PyObject *table, *listed;
  long long tokens;
  if (!PyArg_ParseTuple(args, "OO!L", &table, &PyList_Type, &listed, &tokens)) return nullptr;
  if (!is_exactly(table, state.table_type)) {
    PyErr_SetString(PyExc_TypeError, "table: must be one that `table` made");
    return nullptr;
  }
  PlanLaunches* const plan = new_record<PlanLaunches>(state.plan_type);
  Ref holder(reinterpret_cast<PyObject*>(plan));
  if (plan == nullptr) return nullptr;
  Py_INCREF(table);
  plan->table = reinterpret_cast<TableLaunches*>(table);
  plan->open = true;
  const Py_ssize_t count = PyList_Size(listed);
  plan->rows = static_cast<PlanRows*>(PyMem_Calloc(count > 0 ? count : 1, sizeof(PlanRows)));
  if (plan->rows == nullptr) return PyErr_NoMemory();
  plan->count = count;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject *rows, *tiles;
    if (!PyArg_ParseTuple(PyList_GetItem(listed, i), "OO", &rows, &tiles)) return nullptr;
    fill_rows(rows, tiles, tokens, &plan->rows[i]);
  }
  return holder.release();
}

PyObject* make_cell(PyObject*, PyObject*) {
  CellHandle* const handle = new_record<CellHandle>(state.cell_type);
  if (handle == nullptr) return nullptr;
  Cell* cell = free_cells;
  if (cell != nullptr) {
    free_cells = cell->next;
  } else {
    cell = static_cast<Cell*>(PyMem_Calloc(1, sizeof(Cell)));
    if (cell == nullptr) {
      Py_DECREF(reinterpret_cast<PyObject*>(handle));
      return PyErr_NoMemory();
    }
  }
  handle->cell = cell;
  return reinterpret_cast<PyObject*>(handle);
}

PyObject* note_move(PyObject*, PyObject*) {
  ++state.moves;
  Py_RETURN_NONE;
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
      {&state.runtime, "runtime"},   {&state.plan, "plan"},     {&state.original, "original"},
      {&state.norm, "norm"},         {&state.call, "__call__"}, {&state.after, "after"},
      {&state.cell, "cell"},         {&state.index, "index"},   {&state.fused, "fused"},
      {&state.offered, "_offered"},  {&state.how, "how"},       {&state.weights, "weights"},
      {&state.weight, "weight"},     {&state.bias, "bias"},     {&state.module, "module"},
      {&state.training, "training"}, {&state.rows, "rows"}};
  for (const auto& [slot, name] : names) {
    if ((*slot = PyUnicode_InternFromString(name)) == nullptr) return false;
  }
  state.table_type =
      record_type("reft_kernels.TableLaunches", sizeof(TableLaunches), free_table, record_methods);
  state.plan_type =
      record_type("reft_kernels.PlanLaunches", sizeof(PlanLaunches), free_plan, plan_methods);
  state.cell_type = record_type("reft_kernels.Cell", sizeof(CellHandle), free_cell, cell_methods);
  return state.table_type != nullptr && state.plan_type != nullptr && state.cell_type != nullptr;
}

}  // namespace reft
