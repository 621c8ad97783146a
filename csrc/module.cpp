// The Python module optim._native.  It does not link torch and owns no memory: tensors are passed
// as addresses.  optim/native.py calls the engine, optim/share.py calls survey.h, and
// optim/compiled.py checks what it was compiled from.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "engine/cpu.h"
#include "survey.h"

namespace py = pybind11;
using namespace engine;

namespace {

// The instruction sets that this machine can run, slowest first.
std::vector<const Isa*> supported() {
    std::vector<const Isa*> isas{&kBaseline};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        isas.push_back(&kAvx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            isas.push_back(&kAvx512);
    }
#endif
    return isas;
}

const Isa& find(const std::string& name) {
    for (const Isa* isa : supported())
        if (name == isa->name) return *isa;
    throw std::invalid_argument("this machine does not run the instruction set '" + name + "'");
}

std::vector<std::string> rules() {
    return std::vector<std::string>(kBaseline.rules, kBaseline.rules + kBaseline.num_rules);
}

const Launch& launch_at(uint64_t address) {
    const Launch& launch = *reinterpret_cast<const Launch*>(address);
    if (launch.rule < 0 || launch.rule >= kBaseline.num_rules)
        throw std::invalid_argument("no rule has the number " + std::to_string(launch.rule) +
                                    ": optim/plan.py has others than csrc/rules/all.h");
    return launch;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The CPU engine of the optimizers in csrc/.";

    m.def(
        "describe",
        [] {
            py::dict about;
            about["Options"] = sizeof(Options);
            about["Moment"] = sizeof(Moment);
            about["Tensor"] = sizeof(Tensor);
            about["Tile"] = sizeof(Tile);
            about["TileSums"] = sizeof(TileSums);
            about["Hyper"] = sizeof(Hyper);
            about["Launch"] = sizeof(Launch);
            about["Projection"] = sizeof(Projection);
            about["Projections"] = sizeof(Projections);
            about["TILE_ROWS"] = kTileRows;
            about["TILE_COLS"] = kTileCols;
            about["VECTOR_PAD"] = kVectorPad;
            about["CHANNELS"] = kChannels;
            about["DRAWS"] = kDraws;
            about["RULES"] = rules();
            about["csrc/"] = ENGINE_SOURCES;
            return about;
        },
        "Sizes in bytes of the structs that optim/plan.py mirrors, the constants it shares, and "
        "what it was compiled from (optim/compiled.py).");

    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (const Isa* isa : supported()) names.push_back(isa->name);
            return names;
        },
        "The instruction sets this machine runs, slowest first.");

    m.def(
        "launch",
        [](uint64_t launch, const std::string& isa, int num_threads) {
            const Isa& chosen = find(isa);
            py::gil_scoped_release unlocked;
            run(chosen, launch_at(launch), num_threads);
        },
        py::arg("launch"), py::arg("isa"), py::arg("num_threads"),
        "One step of the bucket that the Launch struct at this address describes.");

    m.def(
        "grad_sq",
        [](uint64_t launch, const std::string& isa, int num_threads) {
            const Isa& chosen = find(isa);
            py::gil_scoped_release unlocked;
            return grad_sq(chosen, launch_at(launch), num_threads);
        },
        py::arg("launch"), py::arg("isa"), py::arg("num_threads"),
        "The sum of the squares of the bucket's usable gradient elements.");

    m.def(
        "project",
        [](int step, uint64_t launch, int64_t count, const std::string& isa, int num_threads) {
            const Isa& chosen = find(isa);
            py::gil_scoped_release unlocked;
            project(chosen, ProjectionStep(step), *reinterpret_cast<const Projections*>(launch),
                    count, num_threads);
        },
        py::arg("step"), py::arg("launch"), py::arg("count"), py::arg("isa"),
        py::arg("num_threads"),
        "Runs the first `count` items of a step (ProjectionStep) of the Projections struct at this "
        "address.");

    m.def(
        "multiplies_pairs", [](const std::string& isa) { return find(isa).multiplies_pairs(); },
        py::arg("isa"), "Whether projections of bf16 gradients take P in bf16.");

    m.def("parameters", &survey::parameters, py::arg("params"), py::arg("exchange"),
          "Parameters and their gradients, seen through torch's table of DLPack functions.");
    m.def("addresses", &survey::addresses, py::arg("tensors"), py::arg("exchange"),
          "Where tensors are, through the same table.");
    m.def("same_state", &survey::same_state, py::arg("state"), py::arg("params"), py::arg("parts"),
          py::arg("counts"), "Whether a state still consists of these tensors.");
    m.def("same_objects", &survey::same_objects, py::arg("a"), py::arg("b"),
          "Whether two lists hold the very same objects.");
}
