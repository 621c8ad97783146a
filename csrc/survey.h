// The properties of parameters, gradients and state that a step needs, read in one pass.
//
// There are thousands of tensors, whose objects are scattered over memory: a pass for each property
// costs more than a step's arithmetic.  Tensors are read through DLPack's exchange interface for C
// (https://dmlc.github.io/dlpack, version 1.3), whose table of functions torch has from 2.10 on;
// with older versions they are read in Python (optim/share.py).
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>

namespace survey {

namespace py = pybind11;

// DLPack's view of a tensor and the part of its table of functions that is used here.
struct View {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t dtype_code, dtype_bits;
    uint16_t dtype_lanes;
    const int64_t *shape, *strides;  // strides: in elements; null where contiguous
    uint64_t byte_offset;
};
struct Exchange {
    uint32_t major, minor;
    void *previous, *allocate, *to_managed, *from_managed;
    int (*view)(void* object, View* view);
    void* stream;
};
constexpr int32_t kCpu = 1;

// What holds for some parameter or gradient; optim/share.py mirrors these bits.
enum Trait : int {
    kMissing = 1 << 0,    // a parameter has no gradient
    kScattered = 1 << 1,  // a tensor is not contiguous
    kElsewhere = 1 << 2,  // a tensor is not on the CPU
    kForeign = 1 << 3,    // a tensor is neither fp32, bf16 nor fp16
    kMisshapen = 1 << 5,  // a gradient has another shape than its parameter
};

// A tensor's properties without its address, as bytes: the `kinds` of optim/share.py.
struct Kind {
    int64_t numel;
    int32_t device_type;
    uint8_t dtype_code, dtype_bits, contiguous, present;
};
static_assert(sizeof(Kind) == 16, "compared as bytes, so there is no padding");

inline const Exchange* exchange_of(const py::object& capsule) {
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* exchange =
        static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    return exchange->major == 1 && exchange->view ? exchange : nullptr;
}

// Whether a tensor can be read this way: a sparse one, for example, has no view.
inline bool look(const Exchange& exchange, PyObject* tensor, View& view, Kind& kind,
                 uint64_t& address) {
    if (exchange.view(tensor, &view) != 0) {
        PyErr_Clear();
        return false;
    }
    int64_t numel = 1;
    bool contiguous = true;
    for (int dim = view.ndim - 1; dim >= 0; --dim) {
        if (view.strides && view.shape[dim] != 1 && view.strides[dim] != numel) contiguous = false;
        numel *= view.shape[dim];
    }
    if (numel && !view.data) return false;
    contiguous = contiguous || numel == 0;
    kind = {numel, view.device_type, view.dtype_code, view.dtype_bits, contiguous, 1};
    address = reinterpret_cast<uint64_t>(view.data) + view.byte_offset;
    return true;
}

inline int traits_of(const Kind& kind) {
    constexpr uint8_t kFloat = 2, kBfloat = 4;  // DLPack's codes
    const bool ours =
        (kind.dtype_code == kFloat && (kind.dtype_bits == 32 || kind.dtype_bits == 16)) ||
        (kind.dtype_code == kBfloat && kind.dtype_bits == 16);
    return (kind.contiguous ? 0 : kScattered) | (kind.device_type == kCpu ? 0 : kElsewhere) |
           (ours ? 0 : kForeign);
}

inline bool have_same_shape(const View& a, const View& b) {
    return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// Whether a tensor's negative bit is set (torch.conj of a complex tensor), which a view does not
// show.  Autograd accumulates such a gradient into a contiguous one without it, unless it has a
// single element.
inline bool is_turned(PyObject* grad, const Kind& kind) {
    if (kind.contiguous && kind.numel != 1) return false;
    static PyObject* const kIsNeg = PyUnicode_InternFromString("is_neg");
    auto turned = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(grad, kIsNeg));
    if (!turned) throw py::error_already_set();
    return turned.ptr() == Py_True;
}

// Parameters and their gradients: (gradients, kinds, addresses, traits), or None if one of them
// cannot be read.  Kinds and addresses alternate: a parameter's, then its gradient's.
inline py::object parameters(const py::list& params, const py::object& capsule) {
    static PyObject* const kGrad = PyUnicode_InternFromString("grad");
    const Exchange* exchange = exchange_of(capsule);
    if (!exchange) return py::none();
    const size_t count = params.size();
    py::list grads(count);
    auto kinds = py::reinterpret_steal<py::bytes>(
        PyBytes_FromStringAndSize(nullptr, Py_ssize_t(2 * count * sizeof(Kind))));
    auto addresses = py::reinterpret_steal<py::bytearray>(
        PyByteArray_FromStringAndSize(nullptr, Py_ssize_t(2 * count * sizeof(uint64_t))));
    if (!kinds || !addresses) throw py::error_already_set();
    auto* kind = reinterpret_cast<Kind*>(PyBytes_AS_STRING(kinds.ptr()));
    auto* address = reinterpret_cast<uint64_t*>(PyByteArray_AS_STRING(addresses.ptr()));
    int traits = 0;
    for (size_t i = 0; i < count; ++i, kind += 2, address += 2) {
        PyObject* param = PyList_GET_ITEM(params.ptr(), Py_ssize_t(i));
        PyObject* grad = PyObject_GetAttr(param, kGrad);
        if (!grad) throw py::error_already_set();
        PyList_SET_ITEM(grads.ptr(), Py_ssize_t(i), grad);
        View weight, gradient;
        if (!look(*exchange, param, weight, kind[0], address[0])) return py::none();
        traits |= traits_of(kind[0]);
        if (grad == Py_None) {
            kind[1] = {};
            address[1] = 0;
            traits |= kMissing;
        } else {
            if (!look(*exchange, grad, gradient, kind[1], address[1])) return py::none();
            if (is_turned(grad, kind[1])) return py::none();
            traits |= traits_of(kind[1]) | (have_same_shape(weight, gradient) ? 0 : kMisshapen);
        }
    }
    return py::make_tuple(grads, kinds, addresses, traits);
}

// The addresses of these tensors, uint64 each, or None if one of them cannot be read.
inline py::object addresses(const py::list& tensors, const py::object& capsule) {
    const Exchange* exchange = exchange_of(capsule);
    if (!exchange) return py::none();
    auto found = py::reinterpret_steal<py::bytes>(
        PyBytes_FromStringAndSize(nullptr, Py_ssize_t(tensors.size() * sizeof(uint64_t))));
    if (!found) throw py::error_already_set();
    auto* address = reinterpret_cast<uint64_t*>(PyBytes_AS_STRING(found.ptr()));
    for (size_t i = 0; i < tensors.size(); ++i) {
        View view;
        Kind kind;
        PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(i));
        if (!look(*exchange, tensor, view, kind, address[i])) return py::none();
    }
    return found;
}

// Whether `state[param]` holds, for each parameter, the same tensor objects as `parts`: those of
// all parameters in order, with their int32 numbers in `counts`.
//
// A state usually has the parameters in this order, which saves lookups.
inline bool same_state(const py::dict& state, const py::list& params, const py::list& parts,
                       const py::bytes& counts) {
    auto* count = reinterpret_cast<const int32_t*>(PyBytes_AS_STRING(counts.ptr()));
    if (params.size() * sizeof(*count) != size_t(PyBytes_GET_SIZE(counts.ptr()))) return false;
    PyObject *key, *value;
    Py_ssize_t next = 0, at = 0;
    bool in_order = true;
    for (size_t i = 0; i < params.size(); ++i, ++count) {
        PyObject* param = PyList_GET_ITEM(params.ptr(), Py_ssize_t(i));
        in_order = in_order && PyDict_Next(state.ptr(), &next, &key, &value) && key == param;
        if (!in_order) value = PyDict_GetItemWithError(state.ptr(), param);
        if (!value && PyErr_Occurred()) throw py::error_already_set();
        if (!value || !PyDict_Check(value) || PyDict_Size(value) != *count) return false;
        if (at + *count > Py_ssize_t(parts.size())) return false;
        PyObject *name, *tensor;
        for (Py_ssize_t position = 0; PyDict_Next(value, &position, &name, &tensor); ++at)
            if (tensor != PyList_GET_ITEM(parts.ptr(), at)) return false;
    }
    return at == Py_ssize_t(parts.size());
}

// Whether two lists hold the very same objects.
inline bool same_objects(const py::list& a, const py::list& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i)
        if (PyList_GET_ITEM(a.ptr(), Py_ssize_t(i)) != PyList_GET_ITEM(b.ptr(), Py_ssize_t(i)))
            return false;
    return true;
}

}  // namespace survey
