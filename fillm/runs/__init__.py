"""What every run has, whatever the command: a folder that appears whole, states to resume from, a record, signals."""

from fillm.runs.folder import RunFolder
from fillm.runs.inputs import check_inputs_outside
from fillm.runs.interruption import signals_noted
from fillm.runs.record import RUN_RECORD, check_recorded, checksums, read_record, run_identity, run_record, write_record

__all__ = [
    "RUN_RECORD",
    "RunFolder",
    "check_inputs_outside",
    "check_recorded",
    "checksums",
    "read_record",
    "run_identity",
    "run_record",
    "signals_noted",
    "write_record",
]
