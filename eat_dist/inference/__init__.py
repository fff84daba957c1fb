"""Defenses at inference, one file each: what is done to an image before a trained network sees it."""

from eat_dist.inference import bart, input_transform, mixup_inference, randomisation  # noqa: F401  (registers them)
from eat_dist.inference.defended import Defended, defenses_of, drawing
from eat_dist.inference.table import (
    INFERENCE_DEFENSES,
    ImageTransform,
    check_inference,
    needs_pool,
    options_of,
    trained_through,
)

__all__ = [
    "INFERENCE_DEFENSES",
    "Defended",
    "ImageTransform",
    "check_inference",
    "defenses_of",
    "drawing",
    "needs_pool",
    "options_of",
    "trained_through",
]
