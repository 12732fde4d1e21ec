"""What sizes has a decoder? Read from a preset or from the fields of a transformers configuration."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa_kernels.gradients.axes import Slice

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a LLaMA, or of a decoder that differs from it in what the later fields say.

    Args:
        vocab: Tokens in the vocabulary.
        hidden: Width between the layers.
        intermediate: Width of the gated MLP.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        tied: Whether the embedding is the output head, too.
        head_size: Width of a head; hidden / heads if 0.
        biased: Linears of `LINEARS` that have a bias.
        norms: Norms of width `hidden` in a layer: 2, or 4 where attention and MLP end in one, too.
        qk_norm: Whether every head of queries and keys has a norm.
        float32_norms: Whether norms multiply by their weight in float32, as Gemma's and torch's on CPUs do.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    head_size: int = 0
    biased: tuple[str, ...] = ()
    norms: int = 2
    qk_norm: bool = False
    float32_norms: bool = False

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_size or self.hidden // self.heads

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(output, input) features of the seven matrices of a layer, by the names of `LINEARS`."""
        h, f, q, k = self.hidden, self.intermediate, self.heads * self.head_width, self.kv_heads * self.head_width
        return dict(zip(LINEARS, ((q, h), (k, h), (k, h), (h, q), (f, h), (f, h), (h, f)), strict=True))

    @property
    def matrix_numel(self) -> dict[str, int]:
        """Parameters of each of them."""
        return {name: rows * columns for name, (rows, columns) in self.matrices.items()}

    def slice_numel(self, name: str, piece: Slice) -> int:
        """Return the parameters of a slice of one of them."""
        return (piece.last - piece.first) * self.matrices[name][1 - piece.axis]

    @property
    def vector_numel(self) -> int:
        """Parameters of a layer that are no matrices: norms and biases."""
        biases = sum(self.matrices[name][0] for name in self.biased)
        return self.norms * self.hidden + 2 * self.head_width * self.qk_norm + biases

    @property
    def layer_numel(self) -> int:
        """Parameters of a layer."""
        return sum(self.matrix_numel.values()) + self.vector_numel

    @property
    def outside_numel(self) -> int:
        """Parameters outside the layers: embedding, head and last norm."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def numel(self) -> int:
        """All parameters, N."""
        return self.layers * self.layer_numel + self.outside_numel

    @property
    def largest(self) -> int:
        """Parameters of the largest matrix."""
        return max(self.matrix_numel.values())

    @property
    def tensors(self) -> Counter[tuple[tuple[int, ...], bool]]:
        """How many tensors have each size, apart those that are a layer's matrices and those that are not."""
        vectors = [self.hidden] * self.norms + [self.head_width] * 2 * self.qk_norm
        vectors += [self.matrices[name][0] for name in self.biased]
        found: Counter[tuple[tuple[int, ...], bool]] = Counter()
        for size in self.matrices.values():
            found[size, True] += self.layers
        for width in vectors:
            found[(width,), False] += self.layers
        found[(self.vocab, self.hidden), False] += 1 if self.tied else 2
        found[(self.hidden,), False] += 1
        return found

    def lora_numel(self, rank: int) -> int:
        """Return the parameters of LoRA adapters on all matrices of all layers."""
        return self.layers * rank * sum(map(sum, self.matrices.values()))


_QKV = LINEARS[:3]
# Sizes as in the models' own config.json.
PRESETS = {
    "llama3-8b": LlamaShape(128_256, 4096, 14_336, layers=32, heads=32, kv_heads=8),
    "llama3-70b": LlamaShape(128_256, 8192, 28_672, layers=80, heads=64, kv_heads=8),
    "llama3-405b": LlamaShape(128_256, 16_384, 53_248, layers=126, heads=128, kv_heads=8),
    "llama3.2-1b": LlamaShape(128_256, 2048, 8192, layers=16, heads=32, kv_heads=8, tied=True),
    "llama3.2-3b": LlamaShape(128_256, 3072, 8192, layers=28, heads=24, kv_heads=8, tied=True),
    "mistral-7b": LlamaShape(32_768, 4096, 14_336, layers=32, heads=32, kv_heads=8),
    "qwen2.5-7b": LlamaShape(152_064, 3584, 18_944, layers=28, heads=28, kv_heads=4, biased=_QKV),
    "qwen3-8b": LlamaShape(151_936, 4096, 12_288, layers=36, heads=32, kv_heads=8, head_size=128, qk_norm=True),
    "qwen3-14b": LlamaShape(151_936, 5120, 17_408, layers=40, heads=40, kv_heads=8, head_size=128, qk_norm=True),
    "qwen3-32b": LlamaShape(151_936, 5120, 25_600, layers=64, heads=64, kv_heads=8, head_size=128, qk_norm=True),
}

# What sets each type apart from a LLaMA, and what its class assumes where the file has no such field.
_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"biased": _QKV},
    "qwen3": {"head_size": 128, "qk_norm": True},
    "smollm3": {"tied": True},
    "gemma": {"tied": True, "head_size": 256, "float32_norms": True},
    "gemma3_text": {"tied": True, "head_size": 256, "float32_norms": True, "norms": 4, "qk_norm": True},
}
_FIELDS = {
    "vocab_size": "vocab",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}


def read(source: str) -> LlamaShape:
    """Return the sizes of a preset, or of the model whose configuration is this file or lies in this folder.

    Raises:
        ValueError: If there is neither, or the configuration is of another kind.
    """
    if source in PRESETS:
        return PRESETS[source]
    path = config_file(source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, but cannot be read: {error}") from error
    return from_config(config if isinstance(config, dict) else {})


def config_file(source: str) -> Path:
    """Return the path of a configuration, given that or its folder.

    Raises:
        ValueError: If there is none.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{source!r} must be a config.json of transformers, a folder with one, or one of {', '.join(PRESETS)}: "
            "give one of these, or --params with the number of parameters"
        )
    return path


def from_config(config: Mapping[str, Any]) -> LlamaShape:
    """Return the sizes that a configuration of transformers gives.

    Args:
        config: The contents of its config.json.

    Raises:
        ValueError: For a model type that is not known, or a field that is missing or no whole number above 0.
    """
    kind = config.get("model_type")
    if kind not in _TYPES:
        raise ValueError(
            f"model_type={kind!r} must be one of {', '.join(_TYPES)}, whose sizes are known: for others install "
            "transformers, which builds them, or give --params with the number of parameters, which plans weights, "
            "gradients and states alone"
        )
    sizes: dict[str, Any] = {ours: _whole(config, theirs) for theirs, ours in _FIELDS.items()}
    own = dict(_TYPES[kind])
    # Files from before grouped queries do not name the heads of keys and values.
    for theirs, ours, otherwise in (("num_key_value_heads", "kv_heads", sizes["heads"]), ("head_dim", "head_size", 0)):
        if config.get(theirs) is not None:
            own[ours] = _whole(config, theirs)
        elif theirs in config or ours not in own:
            own[ours] = otherwise
    own["tied"] = bool(config.get("tie_word_embeddings", own.get("tied", False)))
    if "biased" not in own:
        biased = {"attention_bias": LINEARS[:4], "mlp_bias": LINEARS[4:]}
        own["biased"] = tuple(name for field, names in biased.items() if config.get(field) for name in names)
    return LlamaShape(**sizes, **own)


def _whole(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} in the configuration must be a whole number above 0")
    return value
