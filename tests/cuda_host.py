"""A stand-in for a GPU: CUDA kernels compiled for the host (`cuda_on_host.h`)."""

import contextlib
import ctypes
import subprocess
import sysconfig

import pytest
import torch
from conftest import REPOSITORY

from optim import backend, cuda
from optim.projected_cuda import CudaProjectedEngine

_HEAD = """#include "cuda_on_host.h"
#include "engine/cuda.h"
struct Argument {
    const void* address;
    template <class T>
    operator const T*() const { return static_cast<const T*>(address); }
};
"""


def _compile(*arguments):
    compiler = sysconfig.get_config_var("CXX").split()[0]
    flags = ["-std=c++17", "-Og", "-fPIC", "-w", "-ffp-contract=off"]
    paths = [f"-I{REPOSITORY / 'csrc'}", f"-I{REPOSITORY / 'tests'}"]
    subprocess.run([compiler, *flags, *paths, *arguments], check=True)


class Host:
    """Replaces a GPU: kernels are compiled for the host and run on its memory."""

    def __init__(self, folder):
        self.folder, self.loaded, self.launches = folder, {}, 0
        self.num_compiled = 0

    def _read_head(self):
        """Precompile the headers once for all kernels; compilers look for a .gch of that name."""
        head = self.folder / "head.h"
        if not head.exists():
            head.write_text(_HEAD)
            _compile("-x", "c++-header", head, "-o", head.with_suffix(".h.gch"))

    def load(self, names):
        missing = [name for name in dict.fromkeys(names) if name not in self.loaded]
        if missing:
            self.num_compiled += len(missing)
            self._read_head()
            stem = self.folder / f"kernels{len(self.loaded)}"
            lines = [
                f'extern "C" void kernel{i}(Argument launch, int grid, int threads) '
                f"{{ cuda_on_host::run(grid, threads, [=] {{ {name}(launch); }}); }}"
                for i, name in enumerate(missing)
            ]
            stem.with_suffix(".cpp").write_text('#include "head.h"\n' + "\n".join(lines))
            _compile("-shared", stem.with_suffix(".cpp"), "-o", stem.with_suffix(".so"))
            library = ctypes.CDLL(str(stem.with_suffix(".so")))
            for i, name in enumerate(missing):
                self.loaded[name] = getattr(library, f"kernel{i}")
        return self.loaded

    def launch(self, kernel, grid, block, shared, address):
        assert grid > 0
        assert shared <= 48 << 10
        self.launches += 1
        kernel(ctypes.c_void_p(address), grid, block)

    def here(self):
        return contextlib.nullcontext()

    def capturing(self):
        return False

    def pinned(self, *shape, dtype):
        return torch.empty(shape, dtype=dtype)


@contextlib.contextmanager
def on_host(host):
    """Optimizers that take their first step in this context use the CUDA kernels from then on."""

    def engine(optimizer, device, rule):
        return cuda.CudaEngine(optimizer, rule, device, host)

    def projected(optimizer, device, dense):
        return CudaProjectedEngine(
            optimizer, dense, lambda owner, rule: engine(owner, device, rule), device, host
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "descriptor_engine", engine)
        patch.setattr(backend, "projected_engine", projected)
        yield
