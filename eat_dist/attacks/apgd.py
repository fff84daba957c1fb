"""Auto-PGD (Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eat_dist.attacks.ball import Ball
from eat_dist.attacks.iterative import Best, ascend
from eat_dist.attacks.randomness import Generators
from eat_dist.attacks.surface import Reading, Surface
from eat_dist.attacks.table import ATTACKS, check_norm
from eat_dist.config import AttackConfig


@dataclass(frozen=True)
class AutoPgd:
    """Projected ascent with momentum whose step size halves, image by image, where progress stalls.

    Attributes:
        ball: Norm and radius; the first step is 2ε long.
        num_steps: Gradient steps, N_iter.
        random_start: Start at a uniform point of the ball instead of at the image.
        momentum: α, the weight of the new step; the step before has 1 − α.
        rho: ρ, the share of a window's steps that must raise the value.
    """

    ball: Ball
    num_steps: int
    random_start: bool
    momentum: float = 0.75
    rho: float = 0.75

    @property
    def passes(self) -> float:
        """See :class:`~eat_dist.attacks.table.Attack`."""
        return self.num_steps + 1 / 3

    def __call__(self, surface: Surface, images: torch.Tensor, *, generators: Generators) -> torch.Tensor:
        """See :class:`~eat_dist.attacks.table.Attack`."""
        images = images.detach()
        best = Best.on(surface)
        with surface.held():
            last = ascend(
                surface,
                images,
                start=self.ball.random_point(images, generators) if self.random_start else images,
                step=AutoStep(self, images, best),
                ball=self.ball,
                num_steps=self.num_steps,
            ).images
            best.see(last, surface.values(last))
            return best.settled(surface)


@ATTACKS.register("apgd")
def apgd(config: AttackConfig) -> AutoPgd:
    """Algorithm 1 with the paper's constants; ``step_size`` has no meaning here. Each image's best iterate is kept.

    Where the paper and the authors' code (AutoAttack) differ:

    - An image that returns to its best point at a checkpoint steps on from there at once, with the gradient it had
      there (the code), instead of spending a step first whose end is thrown away (the algorithm as printed). The next
      value is compared with that of the point it left, as in the code.
    - Checkpoints are ⌈p_j·N⌉, condition 1 is "fewer than ρ", and condition 2 holds at the first checkpoint, too (the
      paper). The code counts windows of ⌊0.22·N⌋ steps and so on (equal for N = 100), says "not more than ρ", and
      leaves condition 2 out at the first one.

    Two departures from both: the random start is uniform in the ball, not on its surface, and the ``num_steps``
    gradients include that of the start; the last iterate has a forward pass alone.
    """
    check_norm(config, "linf", "l2")
    return AutoPgd(Ball(config.norm, config.epsilon), num_steps=config.num_steps, random_start=config.random_start)


def checkpoints(num_steps: int) -> list[int]:
    """w_1, w_2, … < N of section 3.1: ⌈p_j·N⌉, p_1 = 0.22 and p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06).

    Counted in whole hundredths, since 0.22 + 0.19 is not 0.41 in floating point; where a short attack makes two of
    them one, it is there once.
    """
    found: list[int] = []
    reached, window = 22, 22
    while (at := -(-reached * num_steps // 100)) < num_steps:
        if at not in found:
            found.append(at)
        window = max(window - 3, 6)
        reached += window
    return found


class AutoStep:
    """One step of algorithm 1 after another: a :data:`~eat_dist.attacks.iterative.Step` that remembers.

    Args:
        attack: Its constants.
        images: [B, C, H, W] in [0, 1], the centres of the balls.
        best: Sees every iterate that is read; not the last, which nobody steps on from.
    """

    _before: torch.Tensor  # x of the step before
    _values: torch.Tensor  # and its values
    _best_gradient: torch.Tensor

    def __init__(self, attack: AutoPgd, images: torch.Tensor, best: Best) -> None:
        self._attack = attack
        self._images = images
        self._best = best
        self._checkpoints = set(checkpoints(attack.num_steps))
        self._k = 0
        self._sizes = images.new_full((len(images), 1, 1, 1), 2 * attack.ball.epsilon)

    def __call__(self, current: torch.Tensor, reading: Reading) -> torch.Tensor:
        """From iterate k (counted here, from 0), [B, C, H, W], to the next one."""
        gradient = reading.gradient
        better = self._best.see(current, reading.values)
        if self._k == 0:
            self._best_gradient = gradient
            self._halved = torch.zeros_like(better)
            self._open_window()
        else:
            self._best_gradient = torch.where(better.view(-1, 1, 1, 1), gradient, self._best_gradient)
            self._rises += reading.values > self._values
        if self._k in self._checkpoints:
            current, gradient = self._check(current, gradient)
        ball = self._attack.ball
        proposal = torch.addcmul(current, self._sizes, ball.steepest(gradient))
        proposal = ball.project(proposal, self._images)
        if self._k > 0:  # α·(z − x) + (1 − α)·(x − x_before); the first step is a plain one
            momentum = self._attack.momentum
            proposal.lerp_(current, 1 - momentum).add_(current, alpha=1 - momentum)
            proposal.sub_(self._before, alpha=1 - momentum)
        self._before, self._values = current, reading.values
        self._k += 1
        return proposal

    def _check(self, current: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Halve the steps of the images that stalled, and move them back to their best points."""
        few_rises = self._rises < self._attack.rho * (self._k - self._opened)
        no_better = ~self._halved & (self._best.values == self._best_before)
        self._halved = few_rises | no_better
        stalled = self._halved.view(-1, 1, 1, 1)
        self._sizes = torch.where(stalled, self._sizes / 2, self._sizes)
        self._open_window()
        return torch.where(stalled, self._best.images, current), torch.where(stalled, self._best_gradient, gradient)

    def _open_window(self) -> None:
        self._opened = self._k
        self._rises = torch.zeros_like(self._best.values)
        self._best_before = self._best.values
