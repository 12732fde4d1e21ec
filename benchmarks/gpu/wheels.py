"""The packages that the formats are compared with, for a GPU machine without network: `make wheels` fills out/peers.

Installed for that machine's Python instead of packed: whoever carries the folder has nothing to unpack, and without
the native code for other devices bitsandbytes takes 5 of its 130 MB and torchao 6 of 19.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "out" / "peers"
# What such a machine takes of a checkout in one call, and what the tracked files may grow to.
LIMIT_BYTES, TRACKED_BYTES = 64 * 2**20, 5 * 2**20
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")
# In the order of their worth, with the shared libraries that stay of each: those of torch's CUDA 13.0. FlashOptim and
# optimi are Triton, torchao's optimizers are compiled by torch, BAdam's and GaLore's are PyTorch. What they need beyond
# torch, transformers among it, the machine has to have.
PACKAGES: dict[str, Collection[str]] = {
    "bitsandbytes==0.50.2": ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"),
    "torchao==0.18.0": (),
    "flashoptim==0.1.4": (),
    "torch-optimi==0.3.3": (),
    "badam==1.4": (),
    "galore-torch==1.0": (),
}


def main() -> int:
    """Fill the folder; print what each package takes; 1 if one is missing from it."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    left_bytes, absent = LIMIT_BYTES - TRACKED_BYTES, 0
    for requirement, libraries in PACKAGES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            error = install(requirement, folder)
            if error is None:
                prune(folder, libraries)
                size = size_bytes(folder)
                if size > left_bytes:
                    error = f"{size / 2**20:.1f} MiB do not fit into the {left_bytes / 2**20:.1f} that are left"
            if error is not None:
                absent += 1
                print(f"{requirement}: left out: {error}")
                continue
            shutil.copytree(folder, FOLDER, dirs_exist_ok=True)
            left_bytes -= size
            print(f"{requirement}: {size / 2**20:.1f} MiB")
    print(f"{FOLDER.relative_to(ROOT)}: {size_bytes(FOLDER) / 2**20:.1f} MiB for Python {PYTHON} on x86-64")
    return 1 if absent else 0


def install(requirement: str, folder: Path) -> str | None:
    """Install a package without its dependencies; return pip's last line if it failed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    done = subprocess.run([*command, "--target", str(folder), requirement], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]


def prune(folder: Path, libraries: Collection[str]) -> None:
    """Delete the shared libraries but those named."""
    for path in folder.rglob("*.so"):
        if path.name not in libraries:
            path.unlink()


def size_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
