"""What an attacker maximises, as functions of the embeddings alone (docs/evaluation.md names their use).

All but :func:`batch_loss` give one value an image from that image's embedding and fixed references, so a result does
not depend on how images are batched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from eat_dist.attacks.surface import Objective

# Gallery samples compared at once: 4 MB of similarities for a batch of 256.
_BLOCK = 4096


def batch_loss(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], labels: torch.Tensor) -> Objective:
    """The training loss itself: ``loss(embeddings [B, D], labels [B]) → scalar``, as adversarial training maximises it.

    Proxy Anchor's log-sum-exp couples the images of a batch, so this objective (alone here) depends on the batch.
    """
    return lambda embeddings: loss(embeddings, labels)


def displacement(clean: torch.Tensor) -> Objective:
    """Squared distance ‖f(x̃) − f(x)‖² from the clean embeddings [B, D].

    The distance itself has the same maximisers and, in L∞, the same steps; the square has a gradient everywhere.
    At the image itself that gradient is zero, so this objective needs a random start.
    """
    clean = clean.detach()
    return lambda embeddings: (embeddings - clean).square().sum(dim=1)


def nearest_wrong_centroid(centroids: torch.Tensor, labels: torch.Tensor) -> Objective:
    """cos to the nearest wrong centroid minus cos to the own one.

    Args:
        centroids: [C, D], of length 1 (:func:`class_centroids`).
        labels: [B] int64, the true classes.
    """
    centroids = centroids.detach()

    def objective(embeddings: torch.Tensor) -> torch.Tensor:
        similarities = functional.normalize(embeddings, dim=1) @ centroids.T
        own = similarities.gather(1, labels[:, None]).squeeze(1)
        wrong = similarities.scatter(1, labels[:, None], float("-inf")).amax(dim=1)
        return wrong - own

    return objective


def random_wrong_centroid(centroids: torch.Tensor, targets: torch.Tensor) -> Objective:
    """cos to a wrong centroid drawn for each image (:func:`draw_wrong_classes`).

    It scatters a class over many places. An attack that sends a whole class to the same wrong place leaves the
    clusters whole under other names, and NMI does not notice.
    """
    aims = centroids.detach()[targets]
    return lambda embeddings: (functional.normalize(embeddings, dim=1) * aims).sum(dim=1)


def nearest_negative(
    gallery: torch.Tensor, gallery_labels: torch.Tensor, *, labels: torch.Tensor, own: torch.Tensor
) -> Objective:
    """cos to the nearest negative minus cos to the nearest positive: R@1 is lost where it is positive (or zero).

    An image without a positive in the gallery is only drawn to its nearest negative. The gallery is searched in blocks
    and without gradients, which go through the two neighbours found alone: memory does not grow with B · G.

    Args:
        gallery: [G, D] clean embeddings of any length, on the images' device; of two classes at least.
        gallery_labels: [G] int64.
        labels: [B] int64, the attacked images' classes.
        own: [B] int64, the gallery sample that is neither (the image's own clean copy); −1 for none.
    """
    directions = functional.normalize(gallery.detach(), dim=1)

    def objective(embeddings: torch.Tensor) -> torch.Tensor:
        unit = functional.normalize(embeddings, dim=1)
        negative, positive = _nearest_of_both(unit.detach(), directions, gallery_labels, labels=labels, own=own)
        away, home = ((unit * directions[place.clamp_min(0)]).sum(dim=1) for place in (negative, positive))
        return away - home.masked_fill(positive < 0, 0.0)

    return objective


def _nearest_of_both(
    unit: torch.Tensor, directions: torch.Tensor, classes: torch.Tensor, *, labels: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] int64 each: where in the gallery the nearest negative and the nearest positive are; −1 for none."""
    found = [(torch.full_like(unit[:, 0], float("-inf")), torch.full_like(labels, -1)) for _ in range(2)]
    for start in range(0, len(directions), _BLOCK):
        block = slice(start, start + _BLOCK)
        similarities = unit @ directions[block].T
        same = classes[block] == labels[:, None]
        itself = torch.arange(start, start + same.shape[1], device=own.device) == own[:, None]
        for kind, excluded in enumerate((same | itself, ~same | itself)):
            value, place = similarities.masked_fill(excluded, float("-inf")).max(dim=1)
            best, at = found[kind]
            found[kind] = torch.maximum(best, value), torch.where(value > best, place + start, at)
    return found[0][1], found[1][1]


def proxy_anchor(
    centroids: torch.Tensor, labels: torch.Tensor, *, alpha: float = 32.0, margin: float = 0.1
) -> Objective:
    """Proxy Anchor (Kim et al. 2020, equation (4)) of each image as a batch of one, class centroids as proxies.

    log(1 + e^(−α(s_y − δ))) + 1/C · Σ_{c≠y} log(1 + e^(α(s_c + δ))) with s the cosines. In a batch of several the
    loss couples the images through its log-sum-exp; of each by itself it does not depend on the batch.

    Args:
        centroids: [C, D], of length 1.
        labels: [B] int64.
        alpha: α, the loss's default.
        margin: δ, the loss's default.
    """
    centroids = centroids.detach()

    def objective(embeddings: torch.Tensor) -> torch.Tensor:
        similarities = functional.normalize(embeddings, dim=1) @ centroids.T
        own = similarities.gather(1, labels[:, None]).squeeze(1)
        others = functional.softplus(alpha * (similarities + margin)).scatter(1, labels[:, None], 0.0)
        return functional.softplus(-alpha * (own - margin)) + others.sum(dim=1) / len(centroids)

    return objective


def class_centroids(embeddings: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """[C, D] mean embedding of each class, scaled to length 1; every class must occur."""
    sums = torch.zeros(num_classes, embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)
    return functional.normalize(sums.index_add_(0, labels, embeddings), dim=1)


def draw_wrong_classes(labels: torch.Tensor, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """[B] int64: for each label another class, uniformly; the generator and the result are on the CPU's side.

    Raises:
        ValueError: There is only one class.
    """
    if num_classes < 2:
        raise ValueError(f"a wrong class needs at least two classes; got {num_classes}")
    shift = torch.randint(1, num_classes, labels.shape, generator=generator)
    return (labels.cpu() + shift).remainder(num_classes).to(labels.device)
