"""What a measurement was taken on: device, driver, versions, commit and command, for every JSON record."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "deepspeed")
PACKAGES += ("bitsandbytes", "torchao", "flashoptim", "torch-optimi", "badam", "galore-torch")


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, driver, versions, commit, command and time as plain types."""
    return {
        "device": describe_device(device),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return name and memory of a device, its driver, and the threads that torch uses."""
    described: dict[str, Any] = {"type": device.type, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        drivers = (output_of(*query) or "unknown").splitlines()
        return described | {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "driver": drivers[0],
        }
    return described | {"name": processor(), "driver": None}


def processor() -> str:
    """Return name, family and model of the processor, where they are known, and how many of them there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    # Clouds give processors of several generations one name.
    kind = f" ({said['cpu family']}/{said['model']})" if {"cpu family", "model"} <= said.keys() else ""
    return f"{said.get('model name', platform.machine())}{kind}, {os.cpu_count()} cores"


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Return the commit, followed by "+" where tracked files differ from it; without git what MISA_COMMIT says."""
    head = output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        # A copy of a checkout on another machine comes without its history.
        return os.environ.get("MISA_COMMIT", "unknown")
    return head + ("+" if output_of("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def output_of(*command: str) -> str | None:
    """Return what a command prints, stripped, or None when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def text_of(content: Mapping[str, Any]) -> str:
    """Return JSON with a line for each key, and for each entry of a list there: a run or a row is a line of a diff."""

    def value_of(value: Any) -> str:
        entries = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else ""
        return f"[\n{entries}\n]" if entries else json.dumps(value)

    lines = ",\n".join(f"{json.dumps(key)}: {value_of(value)}" for key, value in content.items())
    return f"{{\n{lines}\n}}\n"


def write(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write `content` to folder/name.json and return the path; the folder is made where it is missing.

    Whoever is killed meanwhile leaves what was there before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / f"{name}.json", folder / f"{name}.json.new"
    new.write_text(text_of(content))
    new.replace(path)
    return path
