"""The command, whose second process a signal stops at the third step: `-m tests.unlearn.stopped_command FLAGS`."""

import os
import signal
import sys

from fillm.unlearn.__main__ import main
from fillm.unlearn.masked_optimizer import MaskedOptimizer

if __name__ == "__main__":
    real, steps = MaskedOptimizer.step, []

    def step(optimizer: MaskedOptimizer) -> object:
        """Counts."""
        steps.append(None)
        if len(steps) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(optimizer)

    MaskedOptimizer.step = step
    sys.exit(main(sys.argv[1:]))
