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

// The launch of a site's table, made or made anew where there is none or the pool moved; null where
// there is none to be had, with or without an error.
Launch* launch_of(PyObject* site, Ref* holder) {
  holder->reset(PyObject_GetAttr(site, state.launch));
  if (!*holder) return nullptr;
  if (is_exactly(holder->get(), state.launch_type)) {
    Launch* const launch = reinterpret_cast<Launch*>(holder->get());
    const Ref rows(PyObject_GetAttr(launch->pool_object, state.rows));
    if (!rows) return nullptr;
    if (rows.get() == launch->pool_rows) return launch;
  }
  holder->reset(make_launch(site));
  if (!*holder || PyObject_SetAttr(site, state.launch, holder->get()) < 0) return nullptr;
  return reinterpret_cast<Launch*>(holder->get());
}

// Edits a module's output by a plan: 1 where that is done or nothing is to do, 0 where Python must
// do it (an op that is watched, say), −1 on error.
int edit(PyObject* self, PyObject* key, PyObject* plan, PyObject* output) {
  const Ref sites(PyObject_GetAttr(plan, state.sites));
  if (!sites || !PyDict_Check(sites.get())) return sites ? 0 : -1;
  // Of a block without sites `key` is False, which is in no table.
  PyObject* const site = PyDict_GetItemWithError(sites.get(), key);
  if (site == nullptr && PyErr_Occurred()) return -1;
  if (site == nullptr) {
    const Ref norm(PyObject_GetAttr(self, state.norm));
    if (!norm || norm.get() == Py_None) return norm ? 1 : -1;
  }
  PyObject* const h = hidden_of(output);
  if (h == nullptr) return 0;
  const int unwatched = nobody_watches();
  if (unwatched <= 0) return unwatched;
  DLTensor view;
  if (!look_at(h, &view)) return 0;
  if (site == nullptr) return 1;  // a norm that waits for this block's output takes care of itself
  const Ref listed(PyObject_GetAttr(plan, state.launch_rows));
  if (!listed || !PyTuple_Check(listed.get())) return listed ? 0 : -1;
  Ref holder;
  Launch* const launch = launch_of(site, &holder);
  if (launch == nullptr) return PyErr_Occurred() ? -1 : 0;
  PyObject* const rows_object = PyTuple_GetItem(listed.get(), launch->slot);
  if (rows_object == nullptr) return -1;
  if (!is_exactly(rows_object, state.rows_type)) return 0;
  const ReftRows* const rows = &reinterpret_cast<PlanRows*>(rows_object)->rows;
  ReftHidden hidden;
  if (!as_rows(view, &hidden) || hidden.dtype != launch->dtype || hidden.d != launch->pool.d ||
      hidden.count != rows->count) {
    return 0;
  }
  const char* const error = unlocked(rows->positions * hidden.d, [&] {
    return state.launches->intervene_(&hidden, &launch->pool, rows);
  });
  if (error == nullptr) return 1;
  PyErr_SetString(PyExc_RuntimeError, error);
  return -1;
}

// A module at which something is edited: SiteForward.
PyObject* call_site(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  const Ref runtime(PyObject_GetAttr(self, state.runtime));
  if (!runtime) return nullptr;
  const Ref plan(PyObject_GetAttr(runtime.get(), state.plan));
  if (!plan) return nullptr;
  const bool idle = plan.get() == Py_None;
  Ref key;
  if (!idle) {
    key.reset(PyObject_GetAttr(self, state.key));
    if (!key) return nullptr;
    if (key.get() == Py_None || !state.on) return as_python(self, args, nargsf, names);
  }
  const Ref original(PyObject_GetAttr(self, state.original));
  if (!original) return nullptr;
  Ref output(state.vectorcall(original.get(), args, nargsf, names));
  if (idle || !output) return output.release();
  const int done = edit(self, key.get(), plan.get(), output.get());
  if (done < 0) return nullptr;
  if (done > 0) return output.release();
  return PyObject_CallMethodObjArgs(self, state.after, output.get(), plan.get(), nullptr);
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
  const Ref runtime(PyObject_GetAttr(self, state.runtime));
  if (!runtime) return nullptr;
  const Ref plan(PyObject_GetAttr(runtime.get(), state.plan));
  if (!plan) return nullptr;
  if (plan.get() == Py_None) {  // called by itself, not by its model
    const Ref original(PyObject_GetAttr(self, state.original));
    return original ? state.vectorcall(original.get(), args, nargsf, names) : nullptr;
  }
  if (state.on && (nargsf & ~kOffset) == 1 && (names == nullptr || PyTuple_Size(names) == 0)) {
    const Ref fused(PyObject_GetAttr(self, state.fused));
    if (!fused) return nullptr;
    const Ref offered(PyObject_GetAttr(fused.get(), state.offered));
    const Ref listed(PyObject_GetAttr(plan.get(), state.launch_rows));
    if (!offered || !listed) return nullptr;
    if (offered.get() == Py_None && PyTuple_Check(listed.get())) {
      PyObject* const result = norm_of(self, args[0]);
      if (result != nullptr || PyErr_Occurred()) return result;
    }
  }
  return as_python(self, args, nargsf, names);
}

// Instances end in a pointer to the function that calls them.
Vectorcall* pointer_of(PyObject* self, Py_ssize_t size) {
  return reinterpret_cast<Vectorcall*>(reinterpret_cast<char*>(self) + size) - 1;
}

template <Vectorcall kCall>
PyObject* make(PyTypeObject* type, PyObject*, PyObject*) {
  const Ref size(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__basicsize__"));
  if (!size) return nullptr;
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* const self = allocate(type, 0);  // filled with zeros, which means: not called by us
  if (self != nullptr) *pointer_of(self, PyLong_AsSsize_t(size.get())) = kCall;
  return self;
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
  const newfunc creator = std::strcmp(kind, "norm") == 0 ? make<call_norm> : make<call_site>;
  PyType_Slot slots[] = {
      {Py_tp_members, members}, {Py_tp_new, reinterpret_cast<void*>(creator)}, {0, nullptr}};
  // No Py_tp_call: the class's `__call__` stays the one that it inherits.
  PyType_Spec spec{names.back().c_str(), static_cast<int>(offset + sizeof(Vectorcall)), 0,
                   static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | kHaveVectorcall), slots};
  const Ref bases(PyTuple_Pack(1, base));
  return bases ? PyType_FromSpecWithBases(&spec, bases.get()) : nullptr;
}

PyMethodDef methods[] = {
    {"set_up", set_up, METH_VARARGS, "What is called: see huggingface/short_way.py."},
    {"shorten", shorten, METH_VARARGS, "A class whose instances are called in C."},
    {"plan_rows", plan_rows, METH_VARARGS, "(rows, tiles, tokens) for a plan, or None."},
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
