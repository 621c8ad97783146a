"""What pyproject.toml cannot say: how the native engine is compiled, where there is a compiler, and
which folders a package has.

`optional` lets the install go on without one; `optim` then runs on plain PyTorch and says so.
"""

import os
import platform
import runpy
import sys
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

# One object for each instruction set; which of them runs is chosen on the user's machine.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    # Hardly any CPU since 2013 lacks AVX2.  -O3 takes those 0.8 times as long, the compiler 1.6.
    ISA_FLAGS["baseline"] = ["-O1"]
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]

CSRC = Path("csrc")
SOURCES = runpy.run_path("optim/sources.py")  # importing the package would import torch
FILES = SOURCES["of_module"](CSRC)


class BuildEngine(build_ext):
    """Compiles each instruction set's file with flags of its own, side by side."""

    def build_extension(self, ext: Any) -> None:
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], *args: Any, **options: Any) -> list[str]:
            from concurrent.futures import ThreadPoolExecutor

            shared = options.pop("extra_postargs") or []
            jobs = [
                ([f"csrc/engine/isa/{isa}.cpp"], [*shared, *flags])
                for isa, flags in ISA_FLAGS.items()
            ] + [([source], shared) for source in sources]
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # the longest job begins first
                objects = pool.map(
                    lambda job: compile_one(job[0], *args, extra_postargs=job[1], **options), jobs
                )
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_all
        super().build_extension(ext)


engine = Pybind11Extension(
    "optim._native",
    ["csrc/module.cpp"],
    include_dirs=["csrc"],
    depends=["setup.py", *map(str, FILES)],
    define_macros=[("ENGINE_SOURCES", f'"{SOURCES["digest"](CSRC, FILES)}"')],
    cxx_std=17,
    # The same bits everywhere: only the written fused multiply-adds.  An errno of sqrt would keep
    # loops scalar; Python's own -fwrapv, indices unlike addresses (an eighth of Adafactor's step).
    extra_compile_args=[
        *("-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-wrapv", "-Wno-psabi")
    ],
    extra_link_args=["-fopenmp"],
    optional=True,
)

packages = [*find_packages(include=["optim", "trainer", "trainer.*"]), "trainer.assets"]
package_dir = {"": "."}
if "editable_wheel" not in sys.argv:
    # The YAML files live at the top level, where people look for them, and travel inside the
    # package.  So do the sources of the engine: GPU kernels are compiled from them, and the
    # compiled module is compared with them.  (An editable install finds both where they are, and is
    # a line in a .pth file, which type checkers and editors follow; these folders would make it
    # code of setuptools', which they do not.)
    moved = {"optim.csrc": "csrc", "trainer.conf": "conf"}
    packages, package_dir = [*packages, *moved], package_dir | moved

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[engine],
    cmdclass={"build_ext": BuildEngine},
)
