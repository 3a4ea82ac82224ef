// The short way through a patched model: how its stand-ins are called, in C.
//
// `shorten(cls, kind)` derives from a Python class of stand-ins (huggingface/standin.py) one whose
// instances behave the same and are called by the functions below, through the vectorcall protocol.
// A call goes
//   - straight to the module's own forward, where no plan is set;
//   - through that forward and then to the CPU kernel, past torch's dispatcher, where nobody
//   watches what is
//     dispatched (docs/architecture.md says what is asked, and where);
//   - to the class's own `__call__`, in Python, in every other case. A compiler that looks
//   `__call__` up finds
//     that one, too.
//
// The limited API of Python 3.10: one binary serves every Python from there on. All state of a
// stand-in stays in its `__dict__`; what is here is only how it is called.
#include "standin.h"

namespace reft {
namespace {

// Whether the op may be passed by: no gradient is recorded, and nobody would see it in the
// dispatcher. −1 with an error set.
int nobody_watches() {
  if (state.launches->grad_enabled()) return 0;
  const Py_ssize_t count = PyTuple_Size(state.watchers);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const int watched = truth(Ref(PyObject_CallNoArgs(PyTuple_GetItem(state.watchers, i))));
    if (watched != 0) return watched < 0 ? -1 : 0;
  }
  return 1;
}

PyObject* as_python(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  const Ref method(PyObject_GetAttr(self, state.call));
  return method ? state.vectorcall(method.get(), args, nargsf, names) : nullptr;
}

// The hidden states of a module's output: itself or its first element (borrowed), where that is a
// plain tensor.
PyObject* hidden_of(PyObject* output) {
  if (PyTuple_Check(output)) {
    if (PyTuple_Size(output) < 1) return nullptr;
    output = PyTuple_GetItem(output, 0);
  }
  return is_exactly(output, state.tensor) ? output : nullptr;
}

// Instances end in a Tail. There is one class of each kind.
template <bool kNorm>
Py_ssize_t tail_offset = 0;

template <bool kNorm>
Tail* tail_of(PyObject* self) {
  return reinterpret_cast<Tail*>(reinterpret_cast<char*>(self) + tail_offset<kNorm>);
}

// The cell of the model's runtime; null with an error.
template <bool kNorm>
Cell* cell_of(PyObject* self) {
  Tail* const tail = tail_of<kNorm>(self);
  if (tail->cell != nullptr && tail->cell->serial == tail->serial) return tail->cell;
  const Ref runtime(PyObject_GetAttr(self, state.runtime));
  if (!runtime) return nullptr;
  const Ref handle(PyObject_GetAttr(runtime.get(), state.cell));
  if (!handle) return nullptr;
  if (!is_exactly(handle.get(), state.cell_type)) {
    PyErr_SetString(PyExc_TypeError, "the runtime has no cell");
    return nullptr;
  }
  int32_t index = kNoSite;
  if (!kNorm) {
    const Ref number(PyObject_GetAttr(self, state.index));
    if (!number) return nullptr;
    index = static_cast<int32_t>(PyLong_AsLong(number.get()));
    if (PyErr_Occurred()) return nullptr;
  }
  Cell* const cell = reinterpret_cast<CellHandle*>(handle.get())->cell;
  *tail = {tail->call, cell, cell->serial, index};
  return cell;
}

// Edits a module's output by a plan: 1 where that is done or nothing is to do, 0 where Python must
// do it (an op that is watched, say), −1 on error.
int edit(PyObject* self, int32_t index, const PlanLaunches* plan, PyObject* output) {
  if (plan == nullptr || !plan->open) return 0;
  const TableLaunches* const table = plan->table;
  Launch* const launch = index >= 0 && index < table->count ? &table->sites[index] : nullptr;
  const bool nothing = launch == nullptr || launch->kind == Launch::kNothing;
  if (nothing) {
    const Ref norm(PyObject_GetAttr(self, state.norm));
    if (!norm || norm.get() == Py_None) return norm ? 1 : -1;
  } else if (launch->kind == Launch::kByName) {
    return 0;
  }
  PyObject* const h = hidden_of(output);
  if (h == nullptr) return 0;
  const int unwatched = nobody_watches();
  if (unwatched <= 0) return unwatched;
  DLTensor view;
  if (!look_at(h, &view)) return 0;
  if (nothing) return 1;  // a norm that waits for this block's output takes care of itself
  if (launch->moves != state.moves && !renew(launch)) return PyErr_Occurred() ? -1 : 0;
  if (launch->slot >= plan->count) return 0;
  const PlanRows& listed = plan->rows[launch->slot];
  ReftHidden hidden;
  if (listed.rows_object == nullptr || !as_rows(view, &hidden) || hidden.dtype != launch->dtype ||
      hidden.d != launch->pool.d || hidden.count != listed.rows.count) {
    return 0;
  }
  // Without Python's lock another thread may renew the launch: these tensors are kept until then.
  const int64_t elements = listed.rows.positions * hidden.d;
  const bool shared = elements >= kLong;
  if (shared) Py_INCREF(launch->pool_rows);
  const Ref kept(shared ? launch->pool_rows : nullptr);
  const ReftPool pool = launch->pool;
  const char* const error =
      unlocked(elements, [&] { return state.launches->intervene_(&hidden, &pool, &listed.rows); });
  if (error == nullptr) return 1;
  PyErr_SetString(PyExc_RuntimeError, error);
  return -1;
}

// What the short way leaves to Python: the output with its edits.
PyObject* edit_in_python(PyObject* self, PyObject* output) {
  const Ref runtime(PyObject_GetAttr(self, state.runtime));
  if (!runtime) return nullptr;
  const Ref plan(PyObject_GetAttr(runtime.get(), state.plan));
  return plan ? PyObject_CallMethodObjArgs(self, state.after, output, plan.get(), nullptr)
              : nullptr;
}

// A module at which something is edited: SiteForward.
PyObject* call_site(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  const Cell* const cell = cell_of<false>(self);
  if (cell == nullptr) return nullptr;
  const bool idle = cell->mode == Cell::kIdle;
  const int32_t index = tail_of<false>(self)->index;
  if (!idle && (index == kSeveral || !state.on)) return as_python(self, args, nargsf, names);
  const Ref original(PyObject_GetAttr(self, state.original));
  if (!original) return nullptr;
  if (idle) return state.vectorcall(original.get(), args, nargsf, names);
  PlanLaunches* const plan = cell->plan;
  Py_XINCREF(reinterpret_cast<PyObject*>(plan));
  const Ref kept(reinterpret_cast<PyObject*>(plan));
  Ref output(state.vectorcall(original.get(), args, nargsf, names));
  if (!output) return nullptr;
  const int done = edit(self, index, plan, output.get());
  if (done < 0) return nullptr;
  return done > 0 ? output.release() : edit_in_python(self, output.get());
}

// The norm of x by the kernel, past the dispatcher; null where it can't be had so, with or without
// an error.
PyObject* norm_of(PyObject* self, PyObject* x) {
  const Ref how(PyObject_GetAttr(self, state.how));  // (kind, eps), or None
  if (!how || !PyTuple_Check(how.get()) || !is_exactly(x, state.tensor)) return nullptr;
  const Ref module(PyObject_GetAttr(self, state.module));
  if (!module || truth(Ref(PyObject_GetAttr(module.get(), state.training))) != 0) return nullptr;
  if (nobody_watches() <= 0 || truth(Ref(PyObject_CallNoArgs(state.autocast))) != 0) return nullptr;
  const Ref weights(PyObject_GetAttr(self, state.weights));
  if (!weights || !PyDict_Check(weights.get())) return nullptr;
  PyObject* const weight = PyDict_GetItemWithError(weights.get(), state.weight);
  PyObject* const bias = PyDict_GetItemWithError(weights.get(), state.bias);
  const auto plain = [](PyObject* one) {
    return is_exactly(one, state.parameter) || is_exactly(one, state.tensor);
  };
  const bool shifted = bias != nullptr && bias != Py_None;
  if (weight == nullptr || !plain(weight) || (shifted && !plain(bias))) return nullptr;
  DLTensor seen, scale, shift{};
  ReftHidden hidden;
  if (!look_at(x, &seen) || !as_rows(seen, &hidden) || !look_at(weight, &scale)) return nullptr;
  if (shifted && !look_at(bias, &shift)) return nullptr;
  const auto fits = [&](const DLTensor& one) {
    return one.ndim == 1 && one.shape[0] == hidden.d && dtype_of(one.dtype) == hidden.dtype;
  };
  if (!fits(scale) || (shifted && !fits(shift))) return nullptr;
  const ReftNorm norm{scale.data, shifted ? shift.data : nullptr,
                      PyFloat_AsDouble(PyTuple_GetItem(how.get(), 1)),
                      PyLong_AsLongLong(PyTuple_GetItem(how.get(), 0))};
  Ref out(PyObject_CallFunctionObjArgs(state.empty_like, x, nullptr));
  DLTensor made;
  if (!out || !look_at(out.get(), &made)) return nullptr;
  const char* const error = unlocked(
      hidden.count * hidden.d, [&] { return state.launches->norm(&hidden, made.data, &norm); });
  if (error == nullptr) return out.release();
  PyErr_SetString(PyExc_RuntimeError, error);
  return nullptr;
}

// A norm whose kind is known: NormForward.
PyObject* call_norm(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  const Cell* const cell = cell_of<true>(self);
  if (cell == nullptr) return nullptr;
  if (cell->mode == Cell::kIdle) {  // called by itself, not by its model
    const Ref original(PyObject_GetAttr(self, state.original));
    return original ? state.vectorcall(original.get(), args, nargsf, names) : nullptr;
  }
  if (state.on && (nargsf & ~kOffset) == 1 && (names == nullptr || PyTuple_Size(names) == 0) &&
      cell->plan != nullptr && cell->plan->open) {
    const Ref fused(PyObject_GetAttr(self, state.fused));
    if (!fused) return nullptr;
    const Ref offered(PyObject_GetAttr(fused.get(), state.offered));
    if (!offered) return nullptr;
    if (offered.get() == Py_None) {
      PyObject* const result = norm_of(self, args[0]);
      if (result != nullptr || PyErr_Occurred()) return result;
    }
  }
  return as_python(self, args, nargsf, names);
}

template <bool kNorm>
PyObject* make(PyTypeObject* type, PyObject*, PyObject*) {
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* const self = allocate(type, 0);  // filled with zeros, which means: not called by us
  if (self != nullptr) tail_of<kNorm>(self)->call = kNorm ? call_norm : call_site;
  return self;
}

// What a stand-in was bound to is looked up again: its sites are others.
PyObject* unbind(PyObject*, PyObject* self) {
  tail_of<false>(self)->cell = nullptr;
  Py_RETURN_NONE;
}

// shorten(cls, kind, name): a class derived from a Python class, whose instances are called from
// here.
PyObject* shorten(PyObject*, PyObject* args) {
  PyObject* base;
  const char *kind, *name;
  if (!PyArg_ParseTuple(args, "Oss", &base, &kind, &name)) return nullptr;
  const Ref size(PyObject_GetAttrString(base, "__basicsize__"));
  if (!size) return nullptr;
  const Py_ssize_t offset = PyLong_AsSsize_t(size.get());
  if (offset < 0) return nullptr;
  // Python 3.10 keeps the name's address; there are two such classes for as long as the process
  // runs.
  static std::list<std::string> names;
  names.emplace_back(name);
  PyMemberDef members[] = {{"__vectorcalloffset__", T_PYSSIZET, offset, READONLY, nullptr},
                           {nullptr, 0, 0, 0, nullptr}};
  const bool norm = std::strcmp(kind, "norm") == 0;
  Py_ssize_t& tail = norm ? tail_offset<true> : tail_offset<false>;
  if (tail != 0) {
    PyErr_SetString(PyExc_ValueError, "kind: there is a class of this kind already");
    return nullptr;
  }
  tail = offset;
  const newfunc creator = norm ? make<true> : make<false>;
  PyType_Slot slots[] = {
      {Py_tp_members, members}, {Py_tp_new, reinterpret_cast<void*>(creator)}, {0, nullptr}};
  // No Py_tp_call: the class's `__call__` stays the one that it inherits.
  PyType_Spec spec{names.back().c_str(), static_cast<int>(offset + sizeof(Tail)), 0,
                   static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | kHaveVectorcall), slots};
  const Ref bases(PyTuple_Pack(1, base));
  return bases ? PyType_FromSpecWithBases(&spec, bases.get()) : nullptr;
}

PyMethodDef methods[] = {
    {"set_up", set_up, METH_VARARGS, "What is called: see huggingface/short_way.py."},
    {"shorten", shorten, METH_VARARGS, "A class whose instances are called in C."},
    {"unbind", unbind, METH_O, "Looks up anew what a stand-in of a site is about."},
    {"table", table_launches, METH_VARARGS, "The sites of a table by address."},
    {"plan", plan_launches, METH_VARARGS, "The rows of a plan by address, beside its table."},
    {"cell", make_cell, METH_NOARGS, "What a runtime tells its stand-ins through."},
    {"moved", note_move, METH_NOARGS, "A pool has other tensors."},
    {"switch", turn, METH_O, "Turns the short way on or off; returns whether it was on."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT,
                          "reft_kernels_standin",
                          nullptr,
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace
}  // namespace reft

PyMODINIT_FUNC PyInit_reft_kernels_standin() {
  return reft::prepare_state() ? PyModule_Create(&reft::module_def) : nullptr;
}
