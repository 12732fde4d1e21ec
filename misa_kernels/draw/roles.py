"""What is each tensor of a model: a matrix of a layer, one beside the layers, or something else, and what tells?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from torch import nn

from misa_kernels.draw.adapters import adapters
from misa_kernels.draw.matrices import Widths, is_embedding, is_known, is_norm, is_told, is_vector, matrices_of
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
    experts = {} if is_known(owner) else _experts(own, beside)
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
        elif not is_told(owner, name) and _is_table(param, beside.at(owner)):
            yield Kind("table of positions or biases", module)
        else:
            yield Kind(MATRIX, module, widths)


def _stem(place: Place, own: Sequence[Place], experts: Mapping[str, str]) -> str:
    """Return what comes before an expert's number: the owner, unless it holds different numbers of experts."""
    sizes = {len(other.param) for other in own if experts.get(other.own_name) == EXPERTS}
    return place.node.name if place.node.name and len(sizes) == 1 else place.name


def _is_table(param: nn.Parameter, around: _Surroundings) -> bool:
    """Whether nothing beside a tensor is as wide as one of its axes, as a matrix reads or writes it."""
    return bool(around.widths) and not _is_diagonal(param, around) and around.widths.isdisjoint(param.shape)


def _is_diagonal(param: nn.Parameter, around: _Surroundings) -> bool:
    """Whether a tensor holds the blocks of a block-diagonal matrix."""
    axes = param.shape
    return len(axes) == 3 and axes[1] == axes[2] and axes[0] * axes[1] in around.widths


def _experts(own: Sequence[Place], beside: _Beside) -> dict[str, str]:
    """Return what the tensors of an owner are if it holds the matrices of experts, stacked along their first axis.

    Three axes alone do not say so: each maps between widths of the layer, there is a router with a number for each
    expert, or several such tensors, and nothing in the layer reads as many features as there are experts.
    """
    sizes: dict[int, list[Place]] = {}
    for place in own:
        if place.param.ndim == 3 and len(place.param) > 1 and not is_vector(place.param):
            sizes.setdefault(len(place.param), []).append(place)
    found: dict[str, str] = {}
    for size, stacked in sizes.items():
        around = beside.at(own[0].owner)
        tables = [place for place in own if place.param.ndim == 2 and len(place.param) == size]
        is_mapping = not around.widths or not any(around.widths.isdisjoint(place.param.shape[1:]) for place in stacked)
        is_routed = len(stacked) > 1 or around.rows[size] > len(tables)
        is_diagonal = all(_is_diagonal(place.param, around) for place in stacked)
        if size in around.read or is_diagonal or not (is_mapping and is_routed):
            continue
        found |= dict.fromkeys((place.own_name for place in stacked), EXPERTS)
        found |= dict.fromkeys((place.own_name for place in tables), "bias of experts")
        if not around.known_rows[size]:
            # Either all of the matrices have a bias or none has. What is beyond that routes, and is as wide as a bias.
            routers = len(tables) - (len(stacked) if len(tables) >= len(stacked) else 0)
            lengths = Counter(place.param.shape[1] for place in tables)
            likely = sorted(tables, key=lambda place: -lengths[place.param.shape[1]])
            found |= {place.own_name: MATRIX for place in likely[:routers]}
    return found


class _Surroundings(NamedTuple):
    """What lies in a layer.

    Attributes:
        widths: Those between which modules of known classes map, and the lengths of vectors and of embeddings.
        read: Those that such modules read, and the lengths of norms and of embeddings.
        rows: How many matrices may write each width.
        known_rows: How many of modules of known classes write it.
    """

    widths: set[int]
    read: set[int]
    rows: Counter[int]
    known_rows: Counter[int]


class _Beside:
    """What else lies in the layer of a tensor, or outside of all as it does; found when it is asked for, as of few."""

    def __init__(self, nodes: Sequence[Node], layers: Mapping[int, str]) -> None:
        self._nodes, self._layers = nodes, layers
        self._inside: dict[str | None, list[Node]] = {}
        self._embeddings: set[int] = set()
        self._found: dict[str | None, _Surroundings] = {}

    def at(self, owner: nn.Module) -> _Surroundings:
        """Return what lies in the layer of a module."""
        if not self._inside:
            for node in self._nodes:
                self._inside.setdefault(self._layers.get(id(node.module)), []).append(node)
                if isinstance(node.module, nn.Embedding):
                    self._embeddings.add(node.module.embedding_dim)
        layer = self._layers.get(id(owner))
        if layer not in self._found:
            self._found[layer] = self._look(self._inside[layer])
        return self._found[layer]

    def _look(self, nodes: Sequence[Node]) -> _Surroundings:
        found = _Surroundings(set(self._embeddings), set(self._embeddings), Counter(), Counter())
        for node in nodes:
            known = node.matrices.values() if is_known(node.inner) else ()
            for reads, writes in known:
                found.widths.update(reads, writes)
                found.read.update(reads)
                found.rows.update(writes)
                found.known_rows.update(writes)
            own = [param for param in node.module._parameters.values() if param is not None]
            vectors = {len(param) for param in own if param.ndim == 1}
            found.widths.update(vectors)
            if is_norm(node.module):
                found.read.update(vectors)
            if not is_known(node.inner):
                found.rows.update(len(param) for param in own if param.ndim == 2)
        return found
