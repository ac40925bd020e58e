"""The command line: ``python -m thor_fx COMMAND``."""

import argparse
import sys
from collections.abc import Sequence

from . import __doc__ as description
from . import demo
from .commands import bench, blocks, explain

COMMANDS = {
    "explain": explain,
    "bench": bench,
    "blocks": blocks,
    "demo": demo,
}  # modules with a docstring, add_arguments(parser) and run(parser, arguments) -> exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad arguments leave with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m thor_fx", description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, details = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(name, help=summary, description=f"{summary}\n{details}")
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
        command.set_defaults(run=lambda args, m=module, p=command: m.run(p, args))
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
