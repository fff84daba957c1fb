"""Keeping members from being wrong in the same direction."""

from __future__ import annotations

import torch
from torch.nn import functional


def wrong_class_alignment(own: torch.Tensor, senders: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """D_i: mean squared cosine between two members' centred similarities to the wrong classes' proxies.

    Class order is shared, so no alignment of embedding spaces is needed. 0: wrong in orthogonal directions; 1: wrong
    in the same (or the exactly opposite) direction. Ours; in the spirit of ADP's diversity of non-maximal predictions
    (Pang et al. 2019, equation 4), on proxy similarities and pairwise.

    Args:
        own: [B, C] cosine similarities of this member, with gradient.
        senders: [B, C] the sender's on the same images; detached.
        labels: [B] true classes, left out.

    Returns:
        Scalar in [0, 1]. With fewer than four classes it is 0: of two wrong ones, centred, a direction is a sign, and
        every square of a cosine 1. Of unrelated members it is about 1 / (C − 2).
    """
    if own.shape[1] < 4:
        return own.sum() * 0
    keep = ~functional.one_hot(labels, own.shape[1]).bool()
    return functional.cosine_similarity(_centred(own, keep), _centred(senders.detach(), keep), dim=1).square().mean()


def _centred(similarities: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    wrong = similarities[keep].view(len(similarities), -1)
    return wrong - wrong.mean(dim=1, keepdim=True)
