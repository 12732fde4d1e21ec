"""What is each tensor of a model: a matrix of a layer, one beside the layers, or something else, and what tells?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from torch import nn

from misa_kernels.draw.adapters import adapters
from misa_kernels.draw.matrices import Widths, is_embedding, is_known, is_vector, matrices_of
from misa_kernels.draw.tree import Node

EMBEDDING = "embedding"
# What a tensor is if it is a weight matrix.
MATRIX, EXPERTS, ADAPTER = "matrix", "matrices of experts", "adapter"
MATRICES = (MATRIX, EXPERTS, ADAPTER)


class Place(NamedTuple):
    """Where a parameter lies in the module tree.

    Attributes:
        name: Its first name in the model.
        param: The parameter.
        own_name: Its name in the module that it is an attribute of.
        node: That module.
    """

    name: str
    param: nn.Parameter
    own_name: str
    node: Node

    @property
    def owner(self) -> nn.Module:
        """The module that it is an attribute of."""
        return self.node.module


class Kind(NamedTuple):
    """What a tensor is.

    Attributes:
        what: One of the constants of this file, or words for what is no weight matrix.
        module: Name of the module that it makes if it is sampled: its adapter's, or its owner's if that holds no other
            matrix, else its own; for matrices of experts what comes before their numbers.
        widths: Between which widths it maps, if it is a matrix.
    """

    what: str
    module: str
    widths: Widths | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it is sampled where it lies in a layer."""
        return self.what in MATRICES


def places_of(nodes: Sequence[Node]) -> list[Place]:
    """Return the place of every parameter once, in the order and under the names of `model.named_parameters()`."""
    seen: set[int] = set()
    found = []
    for node in nodes:
        prefix = f"{node.name}." if node.name else ""
        for name, param in node.module._parameters.items():
            if param is not None and id(param) not in seen:
                seen.add(id(param))
                found.append(Place(prefix + name, param, name, node))
    return found


def kinds_of(places: Sequence[Place], nodes: Sequence[Node], layers: Mapping[int, str]) -> list[Kind]:
    """Return what each tensor is.

    Args:
        places: The parameters of a model.
        nodes: Its modules.
        layers: The layer that each module lies in, by its identity; it may be missing.
    """
    adapted = adapters([(node.name, node.module) for node in nodes])
    beside = _Beside(nodes, layers)
    kinds: list[Kind] = []
    for node, own in groupby(places, attrgetter("node")):
        kinds += _kinds_of_owner(node, list(own), adapted, beside)
    return kinds


def _kinds_of_owner(
    node: Node, own: Sequence[Place], adapted: Mapping[int, str | None], beside: _Beside
) -> Iterator[Kind]:
    owner = node.module
    matrices = node.matrices if node.inner is owner else matrices_of(owner)
    is_own = is_known(owner)
    experts = {} if is_own else _experts(own, beside)
    for place in own:
        name, param = place.own_name, place.param
        widths = matrices.get(name)
        module = node.name if node.name and node.several == 1 else place.name
        if adapted and id(param) in adapted:
            adapter = adapted[id(param)]
            yield Kind(ADAPTER if adapter else "adapter of several modules", adapter or module, widths)
        elif widths is None and is_embedding(owner):
            yield Kind(EMBEDDING, module)
        elif param.is_complex():
            yield Kind("complex", module)
        elif name in experts:
            yield Kind(experts[name], _stem(place, own, experts) if experts[name] == EXPERTS else module, widths)
        elif widths is None:
            yield Kind("vector" if is_vector(param) else "table", module)
        elif not is_own and _is_table(param, beside.widths(owner)):
            yield Kind("table of positions or biases", module)
        else:
            yield Kind(MATRIX, module, widths)


def _stem(place: Place, own: Sequence[Place], experts: Mapping[str, str]) -> str:
    """Return what comes before an expert's number: the owner, unless it holds different numbers of experts."""
    sizes = {len(other.param) for other in own if experts.get(other.own_name) == EXPERTS}
    return place.node.name if place.node.name and len(sizes) == 1 else place.name


def _is_table(param: nn.Parameter, widths: Collection[int]) -> bool:
    """Whether nothing beside a tensor is as wide as one of its axes, as a matrix reads or writes it."""
    axes = param.shape
    # The blocks of a block-diagonal matrix.
    is_diagonal = len(axes) == 3 and axes[1] == axes[2] and axes[0] * axes[1] in widths
    return bool(widths) and not is_diagonal and widths.isdisjoint(axes)  # type: ignore[attr-defined]


def _experts(own: Sequence[Place], beside: _Beside) -> dict[str, str]:
    """Return what the tensors of an owner are if it holds the matrices of experts, stacked along their first axis.

    Three axes alone do not say so: there is a router with a number for each expert, or several such tensors, and
    nothing in the layer reads as many features as there are experts.
    """
    sizes = Counter(len(place.param) for place in own if place.param.ndim == 3)
    found: dict[str, str] = {}
    for size, several in sizes.items():
        stacked = [place for place in own if place.param.ndim == 3 and len(place.param) == size]
        widths = beside.widths(own[0].owner)
        is_diagonal = all(p.param.shape[1] == p.param.shape[2] and size * p.param.shape[1] in widths for p in stacked)
        tables = [place for place in own if place.param.ndim == 2 and len(place.param) == size]
        is_routed = beside.rows(own[0].owner)[size] > 0 or bool(tables)
        if size < 2 or size in beside.read(own[0].owner) or is_diagonal or not (several > 1 or is_routed):
            continue
        found |= dict.fromkeys((place.own_name for place in stacked), EXPERTS)
        found |= dict.fromkeys((place.own_name for place in tables), "bias of experts")
        # Either all of the matrices have a bias or none has, unless the router is known; what is beyond that routes.
        routers = (
            0 if beside.known_rows(own[0].owner)[size] else len(tables) - (several if len(tables) >= several else 0)
        )
        lengths = Counter(place.param.shape[1] for place in tables)
        likely = sorted(tables, key=lambda place: -lengths[place.param.shape[1]])
        found |= {place.own_name: MATRIX for place in likely[:routers]}
    return found


class _Beside:
    """What else lies in the layer of a tensor, or outside of all as it does; found when it is asked for, as of few."""

    def __init__(self, nodes: Sequence[Node], layers: Mapping[int, str]) -> None:
        self._nodes, self._layers = nodes, layers
        self._modules: dict[str | None, list[nn.Module]] = {}
        self._embeddings: set[int] = set()
        self._found: dict[str | None, tuple[set[int], set[int], Counter[int], Counter[int]]] = {}

    def widths(self, owner: nn.Module) -> set[int]:
        """Return the widths between which known modules map there, and the lengths of vectors and of embeddings."""
        return self._at(owner)[0]

    def read(self, owner: nn.Module) -> set[int]:
        """Return the widths that known modules read there, and those of norms and of embeddings."""
        return self._at(owner)[1]

    def known_rows(self, owner: nn.Module) -> Counter[int]:
        """Return how many matrices of known modules write each width there."""
        return self._at(owner)[3]

    def rows(self, owner: nn.Module) -> Counter[int]:
        """Return how many matrices may write each width there."""
        return self._at(owner)[2]

    def _at(self, owner: nn.Module) -> tuple[set[int], set[int], Counter[int], Counter[int]]:
        if not self._modules:
            for module in (node.module for node in self._nodes):
                self._modules.setdefault(self._layers.get(id(module)), []).append(module)
                if isinstance(module, nn.Embedding):
                    self._embeddings.add(module.embedding_dim)
        layer = self._layers.get(id(owner))
        if layer not in self._found:
            self._found[layer] = self._look(self._modules[layer])
        return self._found[layer]

    def _look(self, modules: Sequence[nn.Module]) -> tuple[set[int], set[int], Counter[int], Counter[int]]:
        widths, read = set(self._embeddings), set(self._embeddings)
        rows, known_rows = Counter[int](), Counter[int]()
        for module in modules:
            known = matrices_of(module).values() if is_known(module) else ()
            for found in known:
                widths |= found.reads | found.writes
                read |= found.reads
                known_rows.update(found.writes)
            own = [param for param in module._parameters.values() if param is not None]
            vectors = {len(param) for param in own if param.ndim == 1}
            widths |= vectors
            if not known and all(param.ndim == 1 for param in own):
                read |= vectors
            if not is_known(module):
                rows.update(len(param) for param in own if param.ndim == 2)
        return widths, read, rows + known_rows, known_rows
