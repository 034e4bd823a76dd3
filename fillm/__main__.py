"""`fillm <command>`: the same as `python -m fillm.<command>`."""

import importlib
import sys
from collections.abc import Sequence

import fillm

COMMANDS = {
    "evaluate": "say what a model still knows of a forget set and what it kept, by the field's metrics",
    "finetune": "make the model that is to forget: train a new or a given causal language model",
    "rank": "rank a model's parameters by how much they hold of what is to be forgotten",
    "unlearn": "unlearn a forget set inside a mask of a model's weights, and leave every other bit as it is",
    "report": "draw what runs came to: heatmaps, agreement of methods, frontiers, tables",
}


def usage() -> str:
    """What `fillm --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fillm COMMAND ...",
            "",
            *lines,
            "",
            "fillm COMMAND --help lists a command's options, fillm --version says which this is",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the arguments to a command and returns its exit code; without one, lists them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"fillm {fillm.__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"fillm: no command is called {command!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Imported only now: listing the commands should not take the seconds that torch takes.
    return importlib.import_module(f"fillm.{command}.__main__").main(rest)


if __name__ == "__main__":
    sys.exit(main())
