"""How is the documentation built? `make docs`: every reference is checked, every example is run, nothing is fetched.

In a page, a fence ```py is a script and a fence ```pycon a session: both run, in the order of the page, and the
session's output is compared. A fence ```python is shown only.
"""

import doctest
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.doctest import DoctestDirective, TestcodeDirective

# The checkout's package, wherever another one is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import misa_kernels

project = "misa_kernels"
version = release = misa_kernels.__version__
copyright = "the authors of misa_kernels"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"misa_kernels {release}"
# No copy of every page's source, which the checkout has.
html_copy_source = False
highlight_language = "none"
# Dashes only: quotes stand around values that are to be typed.
smartquotes_action = "D"
python_maximum_signature_line_length = 100

myst_heading_anchors = 3
myst_fence_as_directive = ["py", "pycon"]

# Messages of errors are compared, too.
doctest_default_flags = doctest.ELLIPSIS

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Single backticks in docstrings: a link where something has that name, code where nothing has.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    # What belongs to others, whose pages are not fetched; aliases; what the optimizer alone makes.
    ("py:.*", r"(torch|nn|dist|numpy|npt|os|pathlib|collections|contextlib|transformers|matplotlib)\..*"),
    ("py:class", r"Tensor|ProcessGroup|Axes|Figure|Params|ParamsT|RuleFactory|Sampler"),
    ("py:class", r"misa_kernels\.(draw\.partition\.(Partition|Block)|clock\.Clock)"),
]


class Session(DoctestDirective):
    """A fence ```pycon, which GitHub colours too."""

    def run(self) -> list[nodes.Node]:
        """Read it as a doctest."""
        self.name = "doctest"
        return super().run()


class Script(TestcodeDirective):
    """A fence ```py, which a reader can copy."""

    def run(self) -> list[nodes.Node]:
        """Read it as code that is run."""
        self.name = "testcode"
        return super().run()


def keep_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Put back what Napoleon took for a type since it stands before a colon; here annotations tell types."""
    for number, line in enumerate(lines):
        field, _, before = line.partition(": ")
        if field in (":type", ":rtype"):
            first = next((n for n, other in enumerate(lines) if other.startswith(":returns:")), 0)
            head = ":returns: " if field == ":rtype" else ""
            lines[first] = f"{head}{before}: {lines[first].removeprefix(head).lstrip()}"
            del lines[number]
            return


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the two kinds of fences that are run."""
    # After Napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", keep_colons, priority=600)
    app.add_directive("py", Script)
    app.add_directive("pycon", Session)
    return {"parallel_read_safe": True}
