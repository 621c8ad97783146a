"""The repository as a product: what is shipped, what the documents claim, what imports what."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import trainer
from optim import compiled
from trainer.config import ASSETS
from trainer.storage import record


def python_files(folder):
    return sorted((REPOSITORY / folder).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_optimizers_import_nothing_of_the_trainer():
    for path in python_files("optim"):
        roots = {name.split(".")[0] for name in imported(path)}
        known = {"optim", "torch", *sys.stdlib_module_names}
        if path.name == "gpu.py":
            known.add("cuda")  # cuda-core
        assert roots <= known, path


def places():
    """What the trainer's map lists, from the top down: modules, and folders without their slash."""
    table = trainer.__doc__.split("\n\n")[-1]
    return [line.split()[0].removesuffix("/") for line in table.rstrip().splitlines()]


def test_the_map_of_the_trainer_has_every_module_and_folder_once():
    folder = REPOSITORY / "trainer"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert sorted(places()) == sorted(modules | folders)


def test_the_trainer_imports_only_from_further_down_its_map():
    order = {place: at for at, place in enumerate(places())}
    for path in python_files("trainer"):
        place = path.relative_to(REPOSITORY / "trainer").parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        for name in imported(path):
            above, _, below = name.partition("trainer.")
            if not above and below:
                assert order[place] <= order[below.split(".")[0]], f"{path} imports {name}"


def test_a_run_records_the_revision_of_its_source_tree():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no git repository")
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    revision = record._git_revision()
    assert revision
    assert revision.removesuffix("-dirty") == head.stdout.strip()


def test_only_the_command_line_knows_hydra():
    """`run` and below take dataclasses; only the command line, its errors and sweeps use Hydra."""
    knows = {
        path.name
        for path in python_files("trainer")
        if any(name.split(".")[0] == "hydra" for name in imported(path))
    }
    assert knows == {
        "__main__.py",
        "arguments.py",
        "choices.py",
        "compose.py",
        "explain.py",
        "callback.py",
    }


@pytest.mark.parametrize("argument", ["--help", "optim.lr=many"])
def test_help_and_mistakes_do_not_wait_for_what_only_runs_need(argument):
    """These libraries take seconds to import."""
    script = (
        "import atexit, runpy, sys\n"
        f"sys.argv = ['trainer', {argument!r}]\n"
        "heavy = 'diffusers', 'transformers', 'peft', 'bitsandbytes', 'torch._dynamo'\n"
        "atexit.register(lambda: print('imported', [n for n in heavy if n in sys.modules]))\n"
        "runpy.run_module('trainer', run_name='__main__')\n"
    )
    clean = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}  # set by other tests
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=120, check=False, env=clean,
    )  # fmt: skip
    assert ended.returncode == (0 if argument == "--help" else 2), ended.stderr
    assert ended.stdout.splitlines()[-1] == "imported []"


def test_the_shipped_model_is_small_and_the_pictures_have_captions():
    files = [path for path in (ASSETS / "tiny_sdxl").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert all(path.suffix in {".json", ".txt", ".safetensors"} for path in files)
    pictures = sorted((ASSETS / "emoji24").glob("*.png"))
    assert len(pictures) == 24
    assert all(path.with_suffix(".txt").read_text().strip() for path in pictures)


def test_the_readme_has_the_table_of_optimizers():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    import optimizer_table

    assert optimizer_table.table() in (REPOSITORY / "README.md").read_text()


def test_links_in_the_documents_lead_somewhere():
    for document in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_lists_on_the_command_line_are_shown_in_the_quotes_that_a_shell_needs():
    shown = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]
    shown += REPOSITORY.glob("conf/**/*.yaml")
    bare = re.compile(r"(?<!['\w.+])\+?[a-z_]+\.[a-z_.]+=[\[{][\w{].*")
    for document in shown:
        assert not bare.findall(document.read_text()), document.name


def test_the_gate_runs_the_readmes_test_command():
    readme = (REPOSITORY / "README.md").read_text()
    (command,) = [line for line in readme.splitlines() if "&& pytest" in line]
    assert command == "pip install -e '.[test]' && pytest"
    assert "'&& pytest' README.md" in (REPOSITORY / ".ci" / "run").read_text()


SOURCES = sorted(map(str, (REPOSITORY / "csrc").rglob("*.[hc]*")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "tool",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["clang-format", "--dry-run", "-Werror", *SOURCES],
    ],
    ids=lambda tool: " ".join(tool[:2]),
)
def test_the_code_passes_its_linters(tool):
    program = Path(sys.executable).with_name(tool[0])  # from this environment
    done = subprocess.run(
        [program, *tool[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def installed_wheel(
    folder: Path, built: Path | None = None, **environment: str
) -> tuple[Path, dict[str, str]]:
    """Build a wheel of the repository and install it -> its folder, and the environment for a
    process that uses it.

    built: a compiled module to reuse, since compiling takes minutes.
    """
    source, wheels, site = folder / "source", folder / "wheels", folder / "site"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((REPOSITORY / name).read_bytes())
    if built:
        (source / "setup.cfg").write_text("[build]\nbuild_lib = built\n")
        (source / "built/optim").mkdir(parents=True)
        shutil.copyfile(built, source / "built/optim" / built.name)
    pip = [sys.executable, "-m", "pip", "-q"]
    local = ["--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "wheel", source, *local, "-w", wheels], env=os.environ | environment, check=True
    )
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", wheel, "--no-deps", "--target", site], check=True)
    return site, os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.skipif(compiled.module is None, reason="the engine is not built")
def test_a_wheel_with_the_engine_steps_natively_elsewhere(tmp_path):
    """That it compiles is shown by the installation that runs these tests."""
    site, environment = installed_wheel(tmp_path, Path(compiled.module.__file__))
    (module,) = site.glob("optim/_native*")
    assert module.stat().st_size < 10e6
    assert (site / "optim/csrc/engine/cuda.h").is_file()  # GPU kernels are compiled from it
    program = (
        "import torch, optim; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); "
        "o = optim.AdamW8bit([p], backend='native'); o.step(); print(o.backend, optim.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    backend, file = done.stdout.split()
    assert backend == "native"
    assert Path(file).is_relative_to(site)


@pytest.mark.slow
def test_a_wheel_built_without_a_compiler_runs_the_main_job_elsewhere_and_says_so(tmp_path):
    site, environment = installed_wheel(tmp_path, CC="/nonexistent", CXX="/nonexistent")
    assert not list(site.glob("optim/_native*"))
    program = (  # without the finder of an editable install, which would provide its native module
        "import runpy, sys; "
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]; "
        "sys.argv[1:] = ['experiment=smoke', 'optim=adafactor8bit']; "
        "runpy.run_module('trainer', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout  # the model came out of the wheel
    assert list(tmp_path.glob("runs/*/*/model/model_index.json"))
    who = "stepped by plain PyTorch on a CPU, which is slower; the native engine is not built"
    assert done.stdout.count(who) == 1
    assert "RuntimeWarning" not in done.stderr
