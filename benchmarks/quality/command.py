"""The command line: `python -m benchmarks.quality run`, or `table`, with `--model`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.quality import forward_passes, four_bits, pretrained, regime, update_rules

MODELS = {
    "small": regime,
    "smollm2": pretrained,
    "smollm2-4bit": four_bits,
    "small-rules": update_rules,
    "small-forward": forward_passes,
}


def main(arguments: list[str] | None = None) -> None:
    """Run or tabulate with the command-line arguments given, those of the process if None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Train what is missing for a table of quality, or make it."
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="small",
        help="a LLaMA of our own, pretrained weights, these in 4 bits, the first under other rules, or without a "
        "backward pass (%(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (%(default)s)")
    options = parser.parse_args(arguments)
    chosen = MODELS[options.model]
    if options.command == "table":
        chosen.write_tables()
    elif failed := chosen.run_missing(options.workers):
        sys.exit(f"{len(failed)} runs failed")
