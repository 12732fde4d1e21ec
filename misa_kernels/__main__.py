"""Which command does `python -m misa_kernels` run? Each is a module of `tools.commands`, imported on request."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

COMMANDS = {
    "plan": "how much memory a training will need, by method, and what fits into a card; allocates nothing",
    "bench": "MISA's step beside torch's AdamW on this machine, in less than a minute",
    "info": "what was built, for which processors, and what each device will use",
}
PROG = "python -m misa_kernels"


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help explains\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name, those of the process if None; return the exit code."""
    lines = ["commands:", *(f"  {name:<7}{what}" for name, what in COMMANDS.items()), ""]
    lines += [f"`{PROG} COMMAND --help` explains one, with examples."]
    lines += ["The demo, which trains and draws, is not installed: `make demo` in a clone of the repository."]
    parser = Parser(
        prog=PROG,
        description="The MISA optimizer: what it needs, what it does, how fast it is.",
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    given = sys.argv[1:] if argv is None else argv
    if not given:
        parser.error(f"a command is missing, one of {', '.join(COMMANDS)}")
    args = parser.parse_args(given)
    command = importlib.import_module(f"misa_kernels.tools.commands.{args.command}")
    own = Parser(
        prog=f"{PROG} {args.command}",
        description=command.__doc__,
        epilog=command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(own)
    options = own.parse_args(args.arguments)
    try:
        code = int(command.run(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever reads, such as `head`, has had enough; what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        own.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
