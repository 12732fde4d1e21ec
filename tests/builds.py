"""Wheels built from the sdist as a user's pip would, without network: for the tests of the build and the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "misa_kernels").rglob("*")
    if path.suffix == ".py" or path.name == "py.typed"
}
NO_COMPILER = {"CXX": "/nonexistent/c++"}
NOT_SOURCES = (".git", ".venv", "build", "dist", "out", "*.egg-info", ".*_cache", "__pycache__", "*.so", "*.dylib")
# Of the machine's owner, and not what is tested.
TOOLS = ("MISA_CUDA", "CMAKE_ARGS", "CUDA_HOME", "CUDA_PATH", "CUDACXX")


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command; its output and errors come together, since builds write to either."""
    clean = {name: value for name, value in os.environ.items() if name not in TOOLS}
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "2", **environment},
    )


def unpack_sdist(folder: Path) -> Path:
    """Make an sdist of this checkout and return the folder it unpacks to."""
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    done = run([sys.executable, "setup.py", "-q", "sdist", "-d", str(folder)], checkout)
    assert done.returncode == 0, done.stdout
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


def pip_wheel(source: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `pip wheel` with what this Python has installed."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    return run([*command, "-w", str(folder), str(source)], folder, **environment)


def build_wheel(source: Path, folder: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """Return a wheel and what pip printed with -v."""
    done = pip_wheel(source, folder, **environment)
    assert done.returncode == 0, done.stdout
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path), done.stdout


def package_files(wheel: zipfile.ZipFile) -> set[str]:
    """Return the files that a wheel holds beside its own description."""
    return {name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith("/")}
