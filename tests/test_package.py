"""The repository as a product: what is shipped, what the documents claim, who imports whom."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from trainer.config import ASSETS


def python_files(folder):
    return sorted((REPOSITORY / folder).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_optimizers_import_nothing_of_the_trainer():
    for path in python_files("optim"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots <= {"optim", "torch", *sys.stdlib_module_names}, path


def test_only_the_command_line_knows_hydra():
    """`run` and below take dataclasses; the command line, its errors and sweeps are Hydra's."""
    knows = {
        path.name
        for path in python_files("trainer")
        if any(name.split(".")[0] == "hydra" for name in imported(path))
    }
    assert knows == {"__main__.py", "cli.py", "explain.py", "sweep.py"}


def test_the_shipped_model_is_small_and_the_pictures_have_captions():
    files = [path for path in (ASSETS / "tiny_sdxl").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert all(path.suffix in {".json", ".txt", ".safetensors"} for path in files)
    pictures = sorted((ASSETS / "emoji24").glob("*.png"))
    assert len(pictures) == 24
    assert all(path.with_suffix(".txt").read_text().strip() for path in pictures)


def test_the_readme_has_the_measured_state_table():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    import state_table

    assert state_table.table() in (REPOSITORY / "README.md").read_text()


def test_links_in_the_documents_lead_somewhere():
    for document in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_gate_runs_the_readmes_test_command():
    readme = (REPOSITORY / "README.md").read_text()
    (command,) = [line for line in readme.splitlines() if "&& pytest" in line]
    assert command == "pip install -e '.[test]' && pytest"
    assert "'&& pytest' README.md" in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "tool", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_the_code_passes_its_linters(tool):
    done = subprocess.run(
        [sys.executable, "-m", *tool], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_runs_the_main_job(tmp_path):
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
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
    pip = [sys.executable, "-m", "pip", "-q"]
    local = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", source, *local, "-w", wheels], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", wheel, "--no-deps", "--target", site], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import trainer; print(trainer.__file__)"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(site)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "experiment=smoke", "optim=adafactor8bit"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout  # the model came out of the wheel
    assert list(elsewhere.glob("runs/*/*/model/model_index.json"))
