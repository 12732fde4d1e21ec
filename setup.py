"""Build of the native libraries with CMake; everything else that setuptools needs stands in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = "misa_kernels"
LIBRARIES = ("misa_cpu", "misa_cuda")
SUFFIXES = {".so", ".dylib", ".dll"}
CMAKE_CUDA = {"": "AUTO", "0": "OFF", "1": "ON"}


def libraries(folder: Path) -> list[Path]:
    """Return the built libraries in a folder."""
    files = (file for name in LIBRARIES for file in folder.glob(f"*{name}.*"))
    return [file for file in files if file.suffix in SUFFIXES]


def cmake(*arguments: str) -> bool:
    """Run CMake, its output going to ours, and return whether it succeeded."""
    # CMake and Ninja may have been installed beside this Python alone.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    program = shutil.which("cmake", path=path)
    if program is None:
        print("cmake was not found", flush=True)
        return False
    return subprocess.call([program, *arguments], env={**os.environ, "PATH": path}) == 0


class BuildLibraries(build_ext):
    """Put the libraries that this machine can build into the package, in place for editable installs."""

    def run(self) -> None:
        """Build what can be built, and say on one line what was."""
        setting = os.environ.get("MISA_CUDA", "")
        if setting not in CMAKE_CUDA:
            raise SystemExit(f"MISA_CUDA={setting!r} must be 0 (no CUDA library), 1 (fail without one) or unset")
        folder = Path(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE)
        for stale in libraries(folder):
            stale.unlink()
        # What CMake remembers of an earlier build are tools that may be gone, or hidden since.
        shutil.rmtree(self.build_temp, ignore_errors=True)
        out = folder.absolute()
        if cmake(
            *("-S", ".", "-B", self.build_temp, "-G", "Ninja", f"-DMISA_CUDA={CMAKE_CUDA[setting]}"),
            *(f"-DCMAKE_{kind}_OUTPUT_DIRECTORY={out}" for kind in ("LIBRARY", "RUNTIME")),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ):
            # One library that fails need not stop the other.
            cmake("--build", self.build_temp, "--", "-k", "0")
        built = libraries(folder)
        names = " and ".join(file.name for file in built)
        if setting == "1" and "misa_cuda" not in names:
            raise SystemExit("MISA_CUDA=1, but the CUDA library could not be built, for the reason given above")
        if "misa_cpu" in names:
            print(f"{PACKAGE}: built {names}")
        else:
            print(
                f"{PACKAGE}: the CPU library was not built, for the reason given above, and steps on CPUs will be "
                "slow: install a C++ compiler, then install this again"
            )
        if not built:
            # The wheel is then for any platform.
            self.get_finalized_command("bdist_wheel").root_is_pure = True
            self.distribution.ext_modules = []

    def get_outputs(self) -> list[str]:
        """Return the files that were built."""
        return list(map(str, libraries(Path(self.build_lib, PACKAGE))))

    def get_output_mapping(self) -> dict[str, str]:
        """Return what of them has its place in the checkout: CMake has put it there."""
        return {}


class Wheel(bdist_wheel):
    """One wheel serves every Python and torch: the libraries know neither, ctypes loads them."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag for any Python 3, on this platform or any."""
        return "py3", "none", super().get_tag()[2]


setup(
    # A name for setuptools to build by; no such module comes of it.
    ext_modules=[Extension(f"{PACKAGE}.libraries", [])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
