"""MISA: train all weights of a large model in the memory of a few (arXiv 2511.00056).

`from misa_kernels import MISA, param_groups` is all that most programs need.
"""

from misa_kernels.draw.candidates import Candidates
from misa_kernels.draw.groups import param_groups
from misa_kernels.draw.sampler import CyclicSampler, Draw, ImportanceSampler, Sampler, UniformSampler
from misa_kernels.optimizer import MISA
from misa_kernels.presets import authors, badam, lisa, paper, slices
from misa_kernels.tools.backward import watch_backward

__version__ = "0.3.0"

__all__ = [
    "MISA",
    "Candidates",
    "CyclicSampler",
    "Draw",
    "ImportanceSampler",
    "Sampler",
    "UniformSampler",
    "__version__",
    "authors",
    "badam",
    "lisa",
    "paper",
    "param_groups",
    "slices",
    "watch_backward",
]
