"""`python -m fillm.unlearn`."""

from collections.abc import Sequence

from fillm.config import leave, run_command
from fillm.unlearn.config import UnlearnConfig


def _unlearn(config: UnlearnConfig) -> None:
    from fillm.unlearn.command import run  # torch is loaded only once the flags are known to be right

    run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(UnlearnConfig, _unlearn, argv, "fillm unlearn")


if __name__ == "__main__":
    leave(main())
