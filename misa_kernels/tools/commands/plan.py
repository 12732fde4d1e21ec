"""How much memory will a training need? Counted from the model's sizes; nothing is allocated.

Prints weights, gradients, states, activations and peak of a training step on one GPU, in GiB, for AdamW, its relatives
of 8 and 4 bits and with pages, APOLLO, LoRA, QLoRA, BAdam, LISA, MISA and slices beside 4-bit weights, each in the
costliest step that it may take.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from misa_kernels.tools import plots
from misa_kernels.tools.planner.cards import CARDS, RESERVED_BYTES, capacity_bytes
from misa_kernels.tools.planner.draws import BESIDE, SLICES, slices_of
from misa_kernels.tools.planner.methods import METHODS, advice, fit, is_released, memory, weights_and_states
from misa_kernels.tools.planner.model import Model, load
from misa_kernels.tools.planner.shapes import PRESETS, LlamaShape
from misa_kernels.tools.planner.step import Memory
from misa_kernels.tools.planner.training import Setup

GIB = 2**30
EXAMPLES = f"""examples:
  python -m misa_kernels plan llama3-8b --gpu 24GB              a preset, and what fits into a card
  python -m misa_kernels plan path/to/model --gpu "RTX 4090" --fit    the largest delta that fits
  python -m misa_kernels plan llama3-70b --world-size 8 --gpu H100 --json
  python -m misa_kernels plan qwen2.5-7b --state-dtype int8 --param-precision split --release-gradients
  python -m misa_kernels plan llama3-8b --plot memory.png       stacked bars; needs matplotlib
  python -m misa_kernels plan --params 8e9                      weights, gradients and states alone

presets: {", ".join(PRESETS)}
cards: {", ".join(CARDS)}, or a size
"""
COLUMNS = ("weights", "gradients", "states", "activations", "peak")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, how it is trained, and what to print."""
    usual = Setup()
    parser.add_argument("config", nargs="?", help="folder or config.json of a transformers model, or a preset")
    parser.add_argument("--params", type=_count, help="number of parameters, such as 8e9, where there is no CONFIG")
    parser.add_argument("--gpu", metavar="CARD", help="a size such as 24GB, or a card's name")
    parser.add_argument("--fit", action="store_true", help="find the largest delta with which MISA fits into --gpu")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw stacked bars")
    how = parser.add_argument_group("how it is trained")
    how.add_argument("--batch", type=_positive, default=usual.batch, help="sequences on one GPU (%(default)s)")
    how.add_argument("--sequence", type=_positive, default=usual.sequence, help="tokens of each (%(default)s)")
    how.add_argument("--dtype", choices=("bfloat16", "float32"), default=usual.dtype, help="of weights (%(default)s)")
    how.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=usual.checkpointing,
        help="whether layers keep their inputs alone and compute the rest again (on)",
    )
    how.add_argument(
        "--offload-activations",
        action="store_true",
        help="what forward keeps lies in host memory until its backward, as with TRL's activation_offloading",
    )
    how.add_argument(
        "--loss-chunk",
        type=_positive,
        default=usual.loss_chunk,
        metavar="TOKENS",
        help="logits held at once, with a loss such as Liger's; transformers' own holds all, which is the default",
    )
    how.add_argument("--world-size", type=_positive, default=1, help="GPUs that FSDP2 shards over (%(default)s)")
    misa = parser.add_argument_group("MISA, LoRA")
    misa.add_argument("--delta", type=_fraction, default=usual.delta, help="fraction that is trained (%(default)s)")
    misa.add_argument("--depth-window", type=_positive, metavar="LAYERS", help="layers that a round draws from (all)")
    misa.add_argument("--state-dtype", choices=("fp32", "bf16", "int8", "fp8", "int8+int4"), default="fp32")
    misa.add_argument("--param-precision", choices=("master", "split", "stochastic"), default="master")
    misa.add_argument("--release-gradients", action="store_true", help="free each within backward; others, too")
    misa.add_argument(
        "--rule-bytes",
        type=float,
        metavar="BYTES",
        help="state that MISA(rule=...) keeps for a trained parameter, such as 4 of Muon; in place of --state-dtype",
    )
    misa.add_argument("--rank", type=_positive, default=usual.rank, help="of LoRA and QLoRA (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ValueError: For arguments that contradict each other, and what the model's file or the card's name may raise.
    """
    options = Setup(**{each.name: getattr(arguments, each.name) for each in fields(Setup)})
    if (arguments.config is None) == (arguments.params is None):
        raise ValueError("give either CONFIG or --params, one of the two")
    if options.dtype == "float32" and options.param_precision == "split":
        raise ValueError("--param-precision=split needs --dtype=bfloat16: float32 weights have no bits to split off")
    if arguments.fit and arguments.gpu is None:
        raise ValueError("--fit needs --gpu, the card that the training shall fit into")
    if options.rule_bytes is not None:
        _check_rule(options)
    cap = None if arguments.gpu is None else capacity_bytes(arguments.gpu) - RESERVED_BYTES
    if arguments.params is not None:
        if arguments.fit or arguments.plot:
            raise ValueError("--params knows no activations, so that --fit and --plot need CONFIG")
        return _print_without_shape(arguments.params, options, arguments.json)

    shape = load(arguments.config, options.dtype)
    content: dict[str, Any] = {"model": arguments.config, "parameters": shape.numel, "gpu": arguments.gpu}
    if arguments.fit:
        assert cap is not None
        largest = fit(shape, options, cap)
        content["largest_delta"] = largest
        options = options if largest is None else replace(options, delta=largest)
    plans: dict[str, Memory] = {}
    errors: dict[str, str] = {}
    for method in METHODS:
        try:
            plans[method] = memory(method, shape, options)
        except ValueError as error:
            errors[method] = str(error)
    content["slices"] = str(slices_of(shape, options.delta)[1]) if SLICES in plans else None
    if cap is not None:
        peaks = {method: plan.peak for method, plan in plans.items()}
        content |= {"cap_bytes": cap, "advice": advice(shape, options, peaks, cap)}
    sizes = shape.summary(options.delta) if isinstance(shape, Model) else asdict(shape)
    content |= {"options": asdict(options), "shape": sizes, "errors": errors}
    content["notes"] = shape.notes if isinstance(shape, Model) else []
    content["methods"] = {
        method: asdict(plan) | {"peak": plan.peak, "fits": None if cap is None else plan.peak <= cap}
        for method, plan in plans.items()
    }
    if arguments.plot:
        draw(arguments.plot, f"{arguments.config}: {_setting(options)}", content["methods"], cap)
    if arguments.json:
        print(json.dumps(content, indent=1))
    else:
        print(report(content, shape, options, colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    return 0


def _check_rule(options: Setup) -> None:
    """Refuse what MISA(rule=...) does not have."""
    if not 0 <= (options.rule_bytes or 0) < float("inf"):
        raise ValueError(f"--rule-bytes={options.rule_bytes:g} must be a number >= 0: bytes for a trained parameter")
    for flag, is_given in (
        ("--state-dtype", options.state_dtype != Setup.state_dtype),
        ("--release-gradients", options.release_gradients),
        ("--world-size", options.world_size > 1),
    ):
        if is_given:
            raise ValueError(f"{flag} with --rule-bytes is nothing that MISA(rule=...) has: leave one of them out")


def report(content: Mapping[str, Any], shape: LlamaShape | Model, options: Setup, colours: bool) -> str:
    """Return the plan as text."""
    cap = content.get("cap_bytes")
    lines = [f"{content['model']}, {shape.numel / 1e9:.2f} billion parameters: {_setting(options)}"]
    if isinstance(shape, Model):
        lines.append(
            "{class}: {sampled:,} parameters sampled in {modules} modules of {layers} layers, {frozen:,} frozen, "
            "a budget of {budget:,}".format(**content["shape"])
        )
    how = "the operators of the model" if isinstance(shape, Model) else "formulas"
    lines.append(f"GiB on one GPU, from {how}" + ("" if cap is None else _room(content["gpu"], cap)))
    lines += ["", f"{'':<14}" + "".join(f"{name:>13}" for name in COLUMNS)]
    for method in METHODS:
        plan = content["methods"].get(method)
        if plan is None:
            lines.append(f"{method:<14}  {content['errors'][method]}")
            continue
        line = f"{method:<14}" + "".join(f"{plan[name] / GIB:>13.2f}" for name in COLUMNS)
        if cap is not None:
            verdict, code = ("fits", 32) if plan["fits"] else ("too large", 31)
            line += f"  \x1b[{code}m{verdict}\x1b[0m" if colours else f"  {verdict}"
        lines.append(line)
    lines += ["", "Peaks are below the sums: gradients come while activations go. What the rows assume:"]
    own = f", {options.state_dtype} moments"
    if options.rule_bytes is not None:
        own = f", a rule of {options.rule_bytes:g} bytes"
    if options.dtype == "bfloat16":
        own += {"master": ", masters", "split": ", split weights"}.get(options.param_precision, ", stochastic rounding")
    own += ", gradients released" if options.release_gradients else ""
    beside, sliced = own, f"{own}, the whole model on each GPU" if options.world_size > 1 else own
    own += f", window of {options.depth_window} layers" if options.depth_window else ""
    if isinstance(shape, Model) and not shape.groups.order.is_known:
        own += f", some in the first layer of each of {len(shape.groups.order.first)} stacks, as any may run first"
    extra = {"MISA": f", delta {options.delta:g}{own}", "LoRA": f", rank {options.rank}"}
    extra[SLICES] = f", delta {options.delta:g}{sliced}"
    extra[BESIDE] = f", delta {options.delta:g}{beside}"
    if "AdamW paged" in content["methods"]:
        extra["AdamW paged"] = f": {content['methods']['AdamW paged']['paged'] / GIB:.2f} GiB there"
    extra["AdamW 4-bit"] = "; the update not counted"
    for method in [each for each in METHODS if is_released(each, options)]:
        extra[method] = extra.get(method, "") + ", gradients released"
    for method, what in METHODS.items():
        lines.append(f"  {method:<13}{what}{extra.get(method, '')}")
        if method == SLICES and content["slices"]:
            lines += textwrap.wrap(content["slices"], 118, initial_indent=" " * 15, subsequent_indent=" " * 15)
    lines += ["", *content["notes"]] if content["notes"] else []
    if cap is not None:
        lines += ["", content["advice"]]
    return "\n".join(lines)


def draw(path: Path, title: str, methods: Mapping[str, Mapping[str, float]], cap: float | None) -> None:
    """Draw what each method holds at its peak, as stacked bars.

    Raises:
        ValueError: If matplotlib is missing.
    """
    parts = {
        method: {
            "weights": plan["weights"],
            "states": plan["states"],
            "gradients": plan["peak_gradients"],
            "activations, loss": plan["peak_activations"],
        }
        for method, plan in methods.items()
    }
    try:
        figure = plots.memory(parts, room_bytes=cap)
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    figure.suptitle(f"{title}\none GPU at the peak of a step", fontsize="medium")
    figure.savefig(path, dpi=150)


def _print_without_shape(numel: float, options: Setup, as_json: bool) -> int:
    sizes = weights_and_states(numel, options)
    if as_json:
        names = ("weights", "gradients", "states")
        methods = {method: dict(zip(names, row, strict=True)) for method, row in sizes.items()}
        print(json.dumps({"parameters": numel, "options": asdict(options), "methods": methods}, indent=1))
        return 0
    print(f"{numel / 1e9:.2f} billion parameters in {options.dtype}: GiB on one GPU, from formulas\n")
    print(f"{'':<14}" + "".join(f"{name:>13}" for name in (*COLUMNS[:3], "together")))
    for method, row in sizes.items():
        print(f"{method:<14}" + "".join(f"{size / GIB:>13.2f}" for size in (*row, sum(row))))
    print(f"\nAdamW paged has {2 * numel / options.world_size / GIB:.2f} GiB of states in host memory, too.")
    print("Their number says nothing of activations: a peak, and APOLLO, LoRA, QLoRA, BAdam and LISA, need CONFIG.")
    return 0


def _setting(options: Setup) -> str:
    gpus = f", {options.world_size} GPUs with FSDP2" if options.world_size > 1 else ""
    loss = f"logits of {options.loss_chunk} tokens" if options.loss_chunk else "all logits"
    kept = "with checkpointing" if options.checkpointing else "without checkpointing"
    kept += ", activations offloaded" if options.offload_activations else ""
    return f"{options.batch} x {options.sequence} tokens, {options.dtype}, {kept}, {loss} at once{gpus}"


def _room(card: str, cap: float) -> str:
    return f"; {card} has room for {cap / GIB:.1f}, {RESERVED_BYTES / GIB:g} being left to CUDA and the allocator"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be in (0, 1]: the fraction of the parameters that is trained")
    return value


def _count(text: str) -> float:
    value = float(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of parameters, such as 8e9")
    return value
