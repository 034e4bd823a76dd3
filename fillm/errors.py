"""Named errors. Each carries the exit code its command ends with.

Exit codes: 0 done, 1 a fault of ours (any other exception), 2 wrong use or bad input, 3 interrupted and resumable.
A message is one line: what is wrong, where (file, row, field, tensor), what to do about it.
"""


class FillmError(Exception):
    """A mistake that the person at the keyboard can mend."""

    exit_code = 2


class UsageError(FillmError):
    """An option, or a combination of options, that cannot be honoured."""


class DataError(FillmError):
    """A data file, row or field that cannot be used."""


class ModelError(FillmError):
    """A model, adapter or tokenizer that cannot be loaded or does not fit the task."""


class NumericsError(FillmError):
    """A loss or a gradient that is not finite; the message names sample and tensor."""


class OutOfMemoryError(FillmError):
    """Not even one sample fits; the message says what would."""


class RunFolderError(FillmError):
    """A run folder that exists, is damaged, or was made from something else."""


class StoreError(FillmError):
    """A sketch store that is damaged, in use, or was made from something else."""


class MaskError(FillmError):
    """A mask file that is damaged, or not what a mask file is."""


class InterruptedRun(FillmError):
    """Stopped by a signal at a point from which `--resume` continues."""

    exit_code = 3


class EndedByAnother(FillmError):
    """Another process of the run ends it and tells why; this one leaves without a word.

    Args:
        exit_code: that of the other process.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of the run has ended it")
        self.exit_code = exit_code
