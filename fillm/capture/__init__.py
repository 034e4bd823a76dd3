"""What backpropagation sees at each tensor: one rule per kind of operation, one exact fallback."""

from fillm.capture.engine import Capture, batch_one_gradients, frozen
from fillm.capture.gradients import PerSampleGradients, norms_and_dots
from fillm.capture.losses import LossReduction, sample_losses
from fillm.capture.sharded import ShardedCapture
from fillm.capture.sharded_gradients import ShardedGradients, is_shared
from fillm.capture.sharded_verification import verify_sharded
from fillm.capture.sketching import ONE_SIDED, SketchMap, check_sketch
from fillm.capture.verification import Verification, verify

__all__ = [
    "ONE_SIDED",
    "Capture",
    "LossReduction",
    "PerSampleGradients",
    "ShardedCapture",
    "ShardedGradients",
    "SketchMap",
    "Verification",
    "batch_one_gradients",
    "check_sketch",
    "frozen",
    "is_shared",
    "norms_and_dots",
    "sample_losses",
    "verify",
    "verify_sharded",
]
