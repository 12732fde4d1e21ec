"""Public modules under the names that they had in 0.1: for the length of 0.2, each with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "backward": "tools.backward",
    "coverage": "draw.coverage",
    "modules": "draw.groups",
    "partition": "draw.partition",
    "planner": "tools.planner",
    "plots": "tools.plots",
    "sampler": "draw.sampler",
}
# Where else to look for what an old module held, and what has another name now.
APART = {"sampler": ("draw.scores", "draw.rehearsal", "draw.limits", "draw.probability")}
RENAMED = {"planner.step": {"Run": "Workload"}, "planner.methods": {"Options": "Setup"}}


class Moved(MetaPathFinder, Loader):
    """Finds what nobody else does: an old name, which becomes a module that looks everything up in the new one."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return how to load an old name, None for any other."""
        package, _, rest = name.partition(".")
        old, _, inner = rest.partition(".")
        if package != "misa_kernels" or old not in MOVED:
            return None
        new = f"{package}.{MOVED[old]}" + (f".{inner}" if inner else "")
        warnings.warn(f"{name} is {new} from 0.2 on, and the old name goes in 0.3", DeprecationWarning, stacklevel=2)
        return ModuleSpec(name, self, loader_state=new, is_package=old == "planner" and not inner)

    def exec_module(self, module: ModuleType) -> None:
        """Make a module show what the new one holds."""
        spec = module.__spec__
        assert spec is not None
        new = importlib.import_module(spec.loader_state)
        old = spec.name.partition(".")[2]
        held = [new, *(importlib.import_module(f"misa_kernels.{other}") for other in APART.get(old, ()))]
        module.__doc__ = new.__doc__

        def look_up(name: str) -> object:
            name = RENAMED.get(old, {}).get(name, name)
            return getattr(next((other for other in held if hasattr(other, name)), new), name)

        module.__dict__["__getattr__"] = look_up


sys.meta_path.append(Moved())
