"""`python -m fillm.rank`."""

from collections.abc import Sequence

from fillm.config import leave, run_command
from fillm.rank.config import RankConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Ranks; returns the exit code."""

    def start(config: RankConfig) -> None:
        from fillm.rank.command import run  # torch is loaded only once the flags are known to be right

        run(config)

    return run_command(RankConfig, start, argv, "fillm rank")


if __name__ == "__main__":
    leave(main())
