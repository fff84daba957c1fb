"""The one batch type, and the shape legend used in names and docstrings.

Legend: B images in a batch, C classes (or channels where an image is meant: BCHW), D embedding dimension,
H and W height and width, M members, K attack steps, N images in a set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """What a training step receives.

    Attributes:
        images: [B, C, H, W] float32 in [0, 1]; nothing is normalised outside the model. Where several replicas train a
            member, its own rows of the batch alone, [B/R, C, H, W]; labels and indices are the whole batch's.
        labels: [B] int64, class indices 0 … C − 1 of the training classes.
        indices: [B] int64, positions in the training set, on the CPU.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
