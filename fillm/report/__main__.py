"""`python -m fillm.report`."""

from collections.abc import Sequence

from fillm.config import leave, run_command
from fillm.report.config import ReportConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Reports; returns the exit code."""

    def start(config: ReportConfig) -> None:
        from fillm.report.command import run  # torch is loaded only once the flags are known to be right
        from fillm.runs.processes import refuse_several

        refuse_several("fillm.report")
        run(config)

    return run_command(ReportConfig, start, argv, "fillm report")


if __name__ == "__main__":
    leave(main())
