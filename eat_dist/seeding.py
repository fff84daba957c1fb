"""Every random number of a run is a function of its seed and of what it is for.

Nothing draws from torch's global generator during training, so members can share a process without disturbing each
other, a resumed run needs no generator state, and adding a consumer does not shift anybody else's numbers.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Mix a run's seed with what the numbers are for (``derive_seed(seed, "attack", rank, iteration)``).

    Returns:
        An integer in [0, 2⁶³), the first bytes of a SHA-256, equal on every machine and Python version.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device`` seeded by :func:`derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
