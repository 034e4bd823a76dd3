"""`python -m fillm.evaluate`."""

from collections.abc import Sequence

from fillm.config import leave, run_command
from fillm.evaluate.config import EvaluateConfig


def _evaluate(config: EvaluateConfig) -> None:
    from fillm.evaluate.command import run  # torch is loaded only once the flags are known to be right

    run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(EvaluateConfig, _evaluate, argv, "fillm evaluate")


if __name__ == "__main__":
    leave(main())
