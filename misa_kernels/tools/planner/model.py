"""Which tensors does the model of a configuration have, and what does a step of it hold? Built without their bytes.

transformers is imported on request.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from misa_kernels.draw.groups import param_groups
from misa_kernels.tools.planner.dry import META, Counted, Held, counted
from misa_kernels.tools.planner.shapes import PRESETS, LlamaShape, config_file, read

# Where a configuration names no class: the first of these that is made for its type.
AUTO = ("Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText", "MaskedLM", "CausalLM", "ImageClassification", "CTC")


class Model:
    """A model on the meta device, and the inputs that it takes.

    Args:
        module: A model of transformers.

    Attributes:
        module: The model.
        dtype: That it was built in, such as "bfloat16".
        groups: What `param_groups` makes of it.
        matrices: Its sampled parameters, by name.
        layers: Names of the matrices of each layer.
        numel: All parameters, each once.
        modules: How many modules they make.
        largest: Parameters of the largest module.
        notes: What a plan says beside its figures, one sentence each.
        held: What steps were found to hold, by what tells them apart.
        longest: Tokens of the longest sequence that it has positions for.
        is_whole: Whether its step has few enough operators to be run with sequences of their own length.
    """

    def __init__(self, module: Any) -> None:
        self.module = module.train()
        self.dtype = str(module.config.dtype).rpartition(".")[2]
        self.groups = param_groups(module)
        self.numel = sum(param.numel() for param in module.parameters())
        self.matrices: dict[str, nn.Parameter] = {}
        self.layers: dict[str, list[str]] = {}
        sizes: Counter[str] = Counter()
        for group in self.groups:
            if group["role"] != "sampled":
                continue
            self.matrices |= dict(group["params"])
            for (name, param), own, layer in zip(group["params"], group["modules"], group["layers"], strict=True):
                self.layers.setdefault(layer, []).append(name)
                for each in [own] if isinstance(own, str) else own:
                    sizes[each] += param.numel() // (1 if isinstance(own, str) else len(own))
        self.largest = max(sizes.values(), default=0)
        self.modules = len(sizes)
        self.notes: list[str] = []
        self.held: dict[Any, Held] = {}
        self.is_whole = True
        self.longest = self._positions()
        # An example of what its loss is taken of.
        self._labels: Tensor | None = None
        # What fails here fails in a step, too, where it is said.
        with suppress(Exception):
            self._labels = self._labels_of_one()

    def linears(self) -> Iterator[tuple[nn.Module, int, int]]:
        """Yield the modules that multiply by one matrix of a layer, with its output and input features."""
        from transformers.pytorch_utils import Conv1D

        for name, param in self.matrices.items():
            owner = self.module.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, (nn.Linear, Conv1D)):
                yield (owner, *(param.shape if isinstance(owner, nn.Linear) else param.shape[::-1]))

    def embeddings(self) -> dict[str, nn.Parameter]:
        """Return the weights of embedding and head, where it has some."""
        found: set[int] = set()
        for get in (self.module.get_input_embeddings, self.module.get_output_embeddings):
            try:
                found |= {id(param) for param in get().parameters()}
            except (AttributeError, NotImplementedError):
                continue
        return {name: param for name, param in self.module.named_parameters() if id(param) in found}

    def inputs(self, batch: int, sequence: int) -> dict[str, Tensor]:
        """Return what its forward pass takes: ids for text, else what the configuration says of images and sound."""
        config, name = self.module.config, self.module.main_input_name
        dtype = next(self.module.parameters()).dtype
        if name == "pixel_values":
            size = getattr(config, "image_size", 224)
            size = (size, size) if isinstance(size, int) else tuple(size)
            shape: tuple[int, ...] = (batch, getattr(config, "num_channels", 3), *size)
        elif name == "input_features":
            shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        elif name == "input_values":
            shape = (batch, sequence * math.prod(config.conv_stride) + 400)
        else:
            name, shape, dtype = "input_ids", (batch, sequence), torch.int64
        given = {name: torch.zeros(shape, dtype=dtype, device=META)}
        if config.is_encoder_decoder:
            given["decoder_input_ids"] = torch.zeros((batch, sequence), dtype=torch.int64, device=META)
        return given

    def loss(self, batch: int, sequence: int, chunk: int = 0) -> Tensor:
        """Return its loss, or without one the sum of what it returns; to be called within `counted`.

        Args:
            batch: Sequences.
            sequence: Tokens of each.
            chunk: Tokens whose logits are held at once; 0 for all, as where there is no head over a vocabulary.
        """
        given = self.inputs(batch, sequence)
        head = self.module.get_output_embeddings() if chunk else None
        if head is not None:
            hidden = self.module.base_model(**given)[0].flatten(0, 1)
            return torch.stack(
                [checkpoint(_of_chunk, head, each, use_reentrant=False) for each in hidden.split(chunk)]
            ).sum()
        if self._labels is not None:
            shape = (batch, sequence)[: self._labels.ndim]
            loss: Tensor = self.module(**given, labels=self._labels.new_zeros(shape)).loss
            return loss
        return _logits(self.module(**given)).float().sum()

    def summary(self, delta: float) -> dict[str, Any]:
        """Return what it is made of: class, layers, modules, parameters by role, and the budget that δ sets."""
        roles = {group["role"]: sum(param.numel() for _, param in group["params"]) for group in self.groups}
        sizes = {role: roles.get(role, 0) for role in ("sampled", "dense", "frozen")}
        counts = {"layers": len(self.layers), "modules": self.modules, "budget": math.floor(delta * self.numel)}
        return {"class": type(self.module).__name__, **counts, **sizes}

    def note(self, sentence: str) -> None:
        """Say something beside the figures, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _positions(self) -> int:
        """Return how many positions have an embedding; without any, no limit."""
        names = ("max_position_embeddings", "n_positions", "max_target_positions")
        said = [size for name in names if (size := getattr(self.module.config, name, None))]
        rows = [part.num_embeddings for part in self.module.modules() if isinstance(part, nn.Embedding)]
        # Some have two more, for padding.
        return min((size for size in said if any(0 <= number - size <= 2 for number in rows)), default=sys.maxsize)

    def _labels_of_one(self) -> Tensor | None:
        """Return labels for one short sequence, or None if it takes none that fit to its logits."""
        length = 8
        with torch.no_grad(), counted():
            given = self.inputs(1, length)
            logits = _logits(self.module(**given))
            if "labels" not in inspect.signature(self.module.forward).parameters or logits.ndim > 3:
                return None
            # One number is a regression's.
            dtype = logits.dtype if logits.shape[-1] == 1 else torch.int64
            labels = torch.zeros((1, length)[: logits.ndim - 1], dtype=dtype)
            return labels if isinstance(self.module(**given, labels=labels).loss, Tensor) else None


def load(source: str, dtype: str = "bfloat16") -> Model | LlamaShape:
    """Return the model of a configuration, or the sizes alone of a preset or where transformers is missing.

    Args:
        source: A preset, or a config.json of transformers or a folder with one.
        dtype: Of the weights.

    Raises:
        ValueError: If there is no such file, or transformers cannot build what it describes.
    """
    if source in PRESETS or importlib.util.find_spec("transformers") is None:
        return read(source)
    path = config_file(source)
    from transformers import AutoConfig

    try:
        return build(AutoConfig.from_pretrained(path, trust_remote_code=False), dtype)
    except Exception as error:
        reason = reason_of(error)
        raise ValueError(
            f"{path} must describe a model that transformers builds, which says {reason}: install the version that "
            "knows it, or give --params with the number of parameters"
        ) from error


def build(config: Any, dtype: str = "bfloat16") -> Model:
    """Return the model of a configuration of transformers: of the class that it names, else of one for its type.

    Args:
        config: Changed: no cache of keys and values, no layers dropped at random, weights in `dtype`.
        dtype: Of the weights.
    """
    import transformers

    for part in (config, *vars(config).values()):
        if isinstance(part, transformers.PretrainedConfig):
            part.dtype, part.use_cache = getattr(torch, dtype), False
            for name in [name for name in vars(part) if name.endswith("layerdrop")]:
                setattr(part, name, 0.0)
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    autos = (getattr(transformers, f"AutoModel{name}") for name in (*(f"For{each}" for each in AUTO), ""))
    kind = next((each for each in named if each is not None), None)
    with torch.device("meta"), Counted():
        if kind is None:
            auto = next((each for each in autos if type(config) in each._model_mapping), None)
            if auto is None:
                raise ValueError(
                    f"architectures={config.architectures!r} must name a class, since none is usual for its type"
                )
            module = auto.from_config(config, dtype=config.dtype)
        else:
            module = kind._from_config(config, dtype=config.dtype)
    return Model(module)


def reason_of(error: Exception) -> str:
    """Return kind and beginning of an error of others."""
    return shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")


def _of_chunk(head: nn.Module, hidden: Tensor) -> Tensor:
    logits = head(hidden).float()
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def _logits(out: Any) -> Tensor:
    """Return the logits of an output, or else its first tensor of floating point."""
    found = out["logits"] if "logits" in out else None
    return next(each for each in (found, *out.to_tuple()) if isinstance(each, Tensor) and each.is_floating_point())
