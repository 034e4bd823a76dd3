"""`python -m fillm.finetune`."""

from collections.abc import Sequence

from fillm.config import leave, run_command
from fillm.finetune.config import FinetuneConfig


def _finetune(config: FinetuneConfig) -> None:
    from fillm.finetune.run import run  # torch is loaded only once the flags are known to be right
    from fillm.runs.processes import refuse_several

    refuse_several("fillm.finetune")
    result = run(config)
    measured = "" if result.eval_loss is None else f", evaluation loss {result.eval_loss:.4f}"
    print(f"loss {result.loss:.4f}{measured} after {result.steps} steps, {result.seconds:.0f} s: {result.folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(FinetuneConfig, _finetune, argv, "fillm finetune")


if __name__ == "__main__":
    leave(main())
