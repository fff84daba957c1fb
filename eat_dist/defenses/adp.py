"""Adaptive diversity promoting training (Pang et al., ICML 2019, section 3), adapted to metric learning."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from eat_dist.batch import Batch
from eat_dist.defenses.table import (
    Learner,
    Measured,
    StepResult,
    Waits,
    await_batches,
    await_merged,
    register,
    statistics_of,
)
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.robustness.transfer import TransferPlan

DET_OFFSET = 1e-6  # on the Gram matrix's diagonal, of the official code


@register("adp", entropy_weight=2.0, log_det_weight=0.5, softmax_scale=32.0)
def adp(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """L = Σ_i PAL(f_i(x), y) − α·H(mean_i p_i) − β·log det G, the ensemble's; each member takes its own part.

    p_i = softmax(σ·similarities of member i): proxies lie in each member's own space, but all members have their
    classes in the same order. G_ij is the cosine between p_i and p_j without the true class; H and log det are means
    over the images. α is ``entropy_weight``, β ``log_det_weight``, σ ``softmax_scale`` (32, Proxy Anchor's default α).

    The regulariser needs all members' predictions on the same images. At iteration t these are the batch of member
    t mod M, which it sends to all others; so every member trains on one batch an iteration, the same for all, as in the
    paper. (With everybody's batch in everybody's regulariser, an iteration would be M passes of a member, and a batch
    of its own beside a common one 2.) Then the similarities go from everybody to everybody. A member's loss is
    PAL − α·H − β·log det with the peers' similarities as they came, without gradient. All that depends on member i in
    the ensemble's loss is its own PAL and the regulariser through its own similarities, so this has the gradient of the
    ensemble's loss with respect to member i, exactly.

    Deviations: PAL instead of the cross-entropy, proxies instead of a classifier. The directions in G are computed from
    the softmax over the wrong classes alone, which is the same direction and does not underflow. As in the paper, no
    adversarial image is seen. With more members than wrong classes G is singular, and only the offset of 1e-6 on its
    diagonal, the official code's, keeps log det finite.

    One pass.
    """
    waits, members = Waits(), learner.exchange.size
    plan = TransferPlan.from_one(ensemble.iteration % members, members)
    own = {"images": batch.images, "labels": batch.labels}
    arrived = await_batches(learner.exchange.send(plan, own), waits)
    common = arrived[0][1] if arrived else own
    labels = common["labels"]
    embeddings = learner.model(common["images"])
    learner.loss.observe(embeddings.detach(), labels)
    loss = learner.loss(embeddings, labels)
    similarities = learner.loss.similarities(embeddings)
    under_way = learner.exchange.send(TransferPlan.from_all(members), {"similarities": similarities})
    statistics = statistics_of(learner, batch, ensemble, Measured(clean_loss=loss), [])
    pending = learner.exchange.submit(statistics, ensemble)
    everybody = {sender: tensors["similarities"] for sender, tensors in await_batches(under_way, waits)}
    everybody[learner.rank] = similarities
    logits = learner.options["softmax_scale"] * torch.stack([everybody[rank] for rank in range(members)])
    diversity = learner.options["entropy_weight"] * ensemble_entropy(logits)
    diversity = diversity + learner.options["log_det_weight"] * log_determinant(logits, labels)
    (loss - diversity.mean()).backward()
    return StepResult(await_merged(pending, waits), passes=1, waits=waits)


def ensemble_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the members' mean prediction, in nats: logits [M, B, C] → [B]. The paper's H(F)."""
    mean = functional.log_softmax(logits, dim=2).logsumexp(dim=0) - math.log(len(logits))
    return -(mean.exp() * mean).sum(dim=1)


def log_determinant(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log det of the cosines between the members' predictions of the wrong classes. The paper's log ED.

    Args:
        logits: [M, B, C].
        labels: [B].

    Returns:
        [B], at most log (1 + 1e-6)^M: the members' wrong classes are orthogonal.
    """
    keep = torch.ones_like(logits[0], dtype=torch.bool).scatter(1, labels[:, None], False)
    wrong = logits[:, keep].view(len(logits), len(labels), -1)
    directions = functional.normalize(wrong.softmax(dim=2), dim=2).transpose(0, 1)
    gram = directions @ directions.mT
    log_det: torch.Tensor = torch.linalg.slogdet(gram + DET_OFFSET * torch.eye(len(logits)).to(gram)).logabsdet
    return log_det
