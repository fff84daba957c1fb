"""Square Attack: black-box random search over the corners of the L∞ ball (Andriushchenko et al. 2020)."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch

from eat_dist.attacks.ball import Ball
from eat_dist.attacks.iterative import Best
from eat_dist.attacks.randomness import Generators, uniform
from eat_dist.attacks.surface import Surface
from eat_dist.attacks.table import ATTACKS, check_norm
from eat_dist.config import AttackConfig

# "Size of squares": after these of 10,000 iterations p is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@ATTACKS.register("square")
def square(config: AttackConfig) -> Square:
    """``num_steps`` is the number of queries; ``step_size`` and ``random_start`` have no meaning here."""
    check_norm(config, "linf")
    return Square(Ball("linf", config.epsilon), num_queries=config.num_steps)


@dataclass(frozen=True)
class Square:
    """Algorithm 1 with the L∞ proposals of Algorithm 2; it asks for values alone, never for a gradient.

    The first query is vertical stripes of ±ε, a sign for each column and channel. Every other one proposes ±ε, a sign
    for each channel, in a square that may lie anywhere within the image with equal chance, and is taken where it
    raises the value. So every pixel always is at +ε or −ε, cut at the pixel range: there the projection takes the
    paper's steps of ±2ε, too.

    Deviations:

    - No image stops when it is fooled, for a surface does not say where that is; all queries go into raising the value.
    - A square that would change nothing has all its signs turned, which wastes no query. The paper's Algorithm 2
      proposes it as it is; the public code draws again until something changes (the same, for one channel).
    - The public code never places a square on the last row or column; Algorithm 2 does, and so does this.

    Attributes:
        ball: L∞.
        num_queries: Of the model, the first included; at least 1.
        initial_share: p_init, the share of the pixels in the first squares. 0.8 is what AutoAttack (Croce & Hein 2020)
            takes for every dataset; the authors' own commands have 0.8 or 0.3 for small images and 0.05 for ImageNet.
            Large squares are soon over: after 2 % of the queries p is an eighth.
    """

    ball: Ball
    num_queries: int
    initial_share: float = 0.8

    @property
    def passes(self) -> float:
        """See :class:`Attack`; forward passes alone."""
        return self.num_queries / 3

    def __call__(self, surface: Surface, images: torch.Tensor, *, generators: Generators) -> torch.Tensor:
        """See :class:`Attack`.

        All random numbers are drawn first: (channels + 2) · 4 bytes a query and image, 100 kB for 5,000 in colour.
        """
        images = images.detach()
        low, high = (self.ball.project(images + sign * self.ball.epsilon, images) for sign in (-1, 1))
        raised = _stripes(images, generators)
        squares = _Squares.draw(images, self.sides(*images.shape[2:]), generators)
        best = Best.on(surface)
        with surface.held():
            best.see(torch.where(raised, high, low), surface.values(torch.where(raised, high, low)))
            for index in range(self.num_queries - 1):
                proposal = squares.painted(index, raised)
                perturbed = torch.where(proposal, high, low)
                taken = best.see(perturbed, surface.values(perturbed))
                raised = torch.where(taken.view(-1, 1, 1, 1), proposal, raised)
            return best.settled(surface)

    def sides(self, height: int, width: int) -> list[int]:
        """Of the squares of all queries but the first: round(√(p·height·width)), at least 1, within the image."""
        shares = (
            pixel_share(iteration, num_queries=self.num_queries, initial=self.initial_share)
            for iteration in range(self.num_queries - 1)
        )
        return [min(max(round(math.sqrt(share * height * width)), 1), height, width) for share in shares]


def pixel_share(iteration: int, *, num_queries: int, initial: float) -> float:
    """p, the share of the pixels in a square: ``initial``, halved after iterations 10, 50, …, 8,000 of 10,000.

    Args:
        iteration: From 0, the first after the stripes, as the public code counts.
        num_queries: The schedule is stretched to it, as the paper says.
        initial: p_init.
    """
    return initial * 0.5 ** bisect_left(_HALVINGS, iteration * 10_000 // num_queries)


@dataclass(frozen=True)
class _Squares:
    """What the queries after the first propose.

    Attributes:
        sides: [Q] pixels.
        tops: [B, Q] int64, first row.
        lefts: [B, Q] int64, first column.
        raised: [B, Q, C] bool, the channel's sign.
    """

    sides: list[int]
    tops: torch.Tensor
    lefts: torch.Tensor
    raised: torch.Tensor

    @classmethod
    def draw(cls, images: torch.Tensor, sides: list[int], generators: Generators) -> _Squares:
        count, channels, height, width = images.shape
        drawn = uniform(_float32(images, count, len(sides), channels + 2), generators)
        side = torch.tensor(sides, dtype=torch.int64, device=images.device)
        return cls(
            sides,
            tops=(drawn[..., 0] * (height - side + 1)).long(),
            lefts=(drawn[..., 1] * (width - side + 1)).long(),
            raised=drawn[..., 2:] < 0.5,
        )

    def painted(self, index: int, raised: torch.Tensor) -> torch.Tensor:
        """The signs [B, C, H, W] with the square of query ``index``, turned where it would not show."""
        height, width = raised.shape[2:]
        rows = _within(self.tops[:, index], self.sides[index], height)
        columns = _within(self.lefts[:, index], self.sides[index], width)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        signs = self.raised[:, index, :, None, None]
        unseen = ~(inside & (raised != signs)).flatten(1).any(dim=1)
        return torch.where(inside, signs ^ unseen.view(-1, 1, 1, 1), raised)


def _stripes(images: torch.Tensor, generators: Generators) -> torch.Tensor:
    """[B, C, H, W] bool: one sign for each column and channel, the paper's initialisation."""
    count, channels, _, width = images.shape
    return (uniform(_float32(images, count, channels, 1, width), generators) < 0.5).expand_as(images)


def _within(first: torch.Tensor, side: int, length: int) -> torch.Tensor:
    """[B, length] bool: the places ``first`` [B], …, ``first`` + ``side`` − 1."""
    places = torch.arange(length, device=first.device)
    return (places >= first[:, None]) & (places < first[:, None] + side)


def _float32(images: torch.Tensor, *shape: int) -> torch.Tensor:
    """What to draw, on the images' device: the same numbers whatever the images' dtype is."""
    return torch.empty(shape, device=images.device)
