"""The command ``graphcap``: each subcommand is a module with ``main(argv) -> exit status``, imported when asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from graphcap import __version__
from graphcap.errors import GraphcapError

#: Subcommand -> (the module that runs it, what it does).
COMMANDS = {
    "demo": ("graphcap.demo", "run a real decoder eager and through graphcap, compare, and show the report"),
    "doctor": ("graphcap.doctor", "look at versions, compiler, cache directory and GPU; exit 1 if something is wrong"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``graphcap <command> ...``.

    Args:
        argv: the arguments after the program's name; those of the process when not given.

    Returns:
        The exit status of the command, 0 when all is well; 2 for a mistake in the call, which is one line on stderr.
    """
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    module, _ = COMMANDS[arguments.command]
    try:
        status: int = import_module(module).main(arguments.rest)
    except GraphcapError as error:
        print(f"graphcap {arguments.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<8} {purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="graphcap",
        description="A torch.compile backend for inference.",
        epilog=f"commands:\n{listing}\n\n'graphcap <command> --help' lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"graphcap {__version__}")
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
