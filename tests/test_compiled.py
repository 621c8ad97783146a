"""The compiled module must match its sources; the error message if it does not."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
from conftest import REPOSITORY

from optim import compiled, plan, sources

CSRC = REPOSITORY / "csrc"
needs_module = pytest.mark.skipif(compiled.module is None, reason="it is not built")


def digest(root):
    return sources.digest(root, sources.of_module(root))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_digest_is_of_all_that_the_compiler_reads_and_of_nothing_else():
    files = [CSRC / "module.cpp", *(CSRC / "engine" / "isa").glob("*.cpp")]
    system = [sysconfig.get_path("include"), pybind11.get_include()]
    done = subprocess.run(
        ["c++", "-std=c++17", "-MM", f"-I{CSRC}", *(f"-isystem{x}" for x in system), *files],
        capture_output=True,
        text=True,
        check=True,
    )
    read = {Path(word).resolve() for word in re.findall(r"[^\s\\]+\.(?:h|cpp)\b", done.stdout)}
    assert read == {path.resolve() for path in sources.of_module(CSRC)}


def change(name, old, new):
    def act(root):
        text = (root / name).read_bytes()
        assert old in text
        (root / name).write_bytes(text.replace(old, new))

    return act


def add(name):
    return lambda root: (root / name).write_text("")


CHANGES = [
    (change("rules/lion.h", b"weight1", b"weight2"), True),
    (change("module.cpp", b"launch", b"lunch"), True),
    (change("engine/isa/avx2.cpp", b"avx2", b"avx3"), True),
    (lambda root: (root / "rules" / "lion.h").rename(root / "rules" / "tiger.h"), True),
    (lambda root: (root / "rules" / "lion.h").unlink(), True),
    (add("rules/tiger.h"), True),
    (change("rules/lion.h", b"\n", b"\r\n"), False),  # git may check it out this way
    (change("engine/exec_cuda.h", b"lanes", b"planes"), False),  # not part of the module
    (add("rules/lion.h~"), False),
]


@pytest.mark.parametrize(("act", "matters"), CHANGES)
def test_what_changes_the_module_changes_the_digest(act, matters, tmp_path):
    shutil.copytree(CSRC, tmp_path / "csrc")
    assert digest(tmp_path / "csrc") == digest(CSRC)
    act(tmp_path / "csrc")
    assert (digest(tmp_path / "csrc") != digest(CSRC)) == matters


@needs_module
def test_what_the_module_says_of_itself_is_compared_word_for_word():
    described = compiled.module.describe()
    compiled.check(described, "FILE")
    for name, value in described.items():
        with pytest.raises(
            ImportError, match=rf"^FILE (is|was) not .*\({name} changed .*pip install -e"
        ):
            compiled.check(described | {name: f"{value}x"}, "FILE")


@needs_module
@pytest.mark.parametrize("module", ["of other sources", "of other times"])
def test_a_module_that_is_not_of_its_sources_is_an_error_at_the_import(module, tmp_path):
    """Rather than a step without effect, or an obscure error about a missing function."""
    (tmp_path / "optim").mkdir()
    for path in (REPOSITORY / "optim").glob("*.py"):
        (tmp_path / "optim" / path.name).symlink_to(path)
    shutil.copytree(CSRC, tmp_path / "csrc")
    built = Path(compiled.module.__file__)
    if module == "of other sources":
        (tmp_path / "optim" / built.name).symlink_to(built)
        change("rules/lion.h", b"weight1", b"weight2")(tmp_path / "csrc")
    else:
        (tmp_path / "optim" / "_native.py").write_text("def describe(): return {}\n")
    done = subprocess.run(
        [sys.executable, "-c", "import optim"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    *_, said = done.stderr.splitlines()
    assert said.startswith(f"ImportError: {tmp_path}/optim/_native")
    assert "csrc/ changed since): compile it again, `pip install -e .`" in said


@needs_module
@pytest.mark.parametrize("number", [-1, len(plan.RULES)])
def test_a_launch_of_a_rule_that_does_not_exist_is_an_error(number):
    launch = plan.Launch(rule=number)
    with pytest.raises(ValueError, match=f"no rule has the number {number}: .*rules/all.h"):
        compiled.module.launch(ctypes.addressof(launch), "baseline", 1)
