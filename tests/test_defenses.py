"""One step of every defense against its formula written out: same gradients, same buffers, same statistics.

The twins of a learner are copies of its model and loss made before the step. They go through the same forward passes in
the same order, since in training mode BatchNorm makes an embedding depend on its pass: clean and adversarial images
together, then each received batch by itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch

from eat_dist.attacks import ATTACKS
from eat_dist.batch import Batch
from eat_dist.config import AttackConfig, DefenseConfig, LossConfig, ModelConfig
from eat_dist.defenses import DEFENSES, Learner, StepResult, options_of
from eat_dist.errors import MemberLateError
from eat_dist.exchange import Board, LocalExchange, run_together
from eat_dist.losses import make_loss
from eat_dist.models import build_embedder
from eat_dist.robustness.statistics import EnsembleStatistics, Policy
from eat_dist.seeding import generator

CLASSES, STEPS, EPSILON, STEP_SIZE = 4, 4, 0.1, 0.04
ATTACK = ATTACKS["pgd"](AttackConfig(epsilon=EPSILON, num_steps=STEPS, step_size=STEP_SIZE, random_start=True))
# Every member has its own classes in its batch, so that mixing up labels shows.
LABELS = [
    torch.tensor(labels) for labels in ([0, 0, 1, 1, 2, 2, 3, 3], [1, 1, 1, 2, 2, 3, 3, 3], [3, 3, 0, 0, 0, 2, 2, 1])
]


def make_batch(rank: int) -> Batch:
    images = torch.rand(8, 1, 8, 8, generator=generator("images", rank), dtype=torch.float64)
    return Batch(images, LABELS[rank], torch.arange(8))


class Case:
    """Members with a batch each, their twins, and the naive form of what members do."""

    def __init__(self, members: int, **defense: object) -> None:
        self.config = DefenseConfig(**{"momentum": 0.5, "adversarial_share": 0.5, **defense})  # type: ignore[arg-type]
        rule = self.config.transfer_rule if self.config.name == "eat" else "none"
        policy = Policy(members, CLASSES, rule, self.config.peers, self.config.temperature, self.config.momentum)
        self.start = EnsembleStatistics.initial(policy)
        self.board = Board(members, timeout=20)
        self.batches = [make_batch(rank) for rank in range(members)]
        self.learners = [self._learner(rank, policy) for rank in range(members)]
        self.twins = copy.deepcopy([(learner.model, learner.loss) for learner in self.learners])
        self.attackers = [(copy.deepcopy(model).eval(), loss) for model, loss in self.twins]

    def _learner(self, rank: int, policy: Policy) -> Learner:
        config = ModelConfig(backbone="convnet", widths=(4, 6), embedding_dim=5)
        model = build_embedder(config, in_channels=1, generator=generator("weights", rank)).double().train()
        model(torch.rand(16, 1, 8, 8, generator=generator("warm-up", rank), dtype=torch.float64))
        loss = make_loss(
            LossConfig(alpha=32, margin=0.1), num_classes=CLASSES, embedding_dim=5, generator=generator("proxies", rank)
        )
        return Learner(
            rank,
            model,
            loss.double(),  # type: ignore[arg-type]
            ATTACK,
            LocalExchange(self.board, rank, policy=policy),
            self.config,
            lambda purpose: generator(purpose, rank),
            options_of(self.config),
        )

    def step(self) -> list[StepResult]:
        defense = DEFENSES[self.config.name].step

        def work(learner: Learner) -> Callable[[], StepResult]:
            return lambda: defense(learner, self.batches[learner.rank], self.start)

        return run_together([work(learner) for learner in self.learners], self.board)

    def random_start(self, rank: int) -> torch.Tensor:
        images = self.batches[rank].images
        noise = torch.rand(images.shape, generator=generator("attack", rank), dtype=torch.float64) * 2 - 1
        return (images + EPSILON * noise).clamp(0, 1)

    def attacked(
        self, attackers: list[int], victim: int, start: torch.Tensor | None = None, steps: int = STEPS
    ) -> torch.Tensor:
        """The victim's batch after signed gradient steps on the mean loss of the attackers in evaluation mode."""
        images, labels = self.batches[victim].images, self.batches[victim].labels
        current = self.random_start(victim) if start is None else start
        for _ in range(steps):
            current = current.detach().requires_grad_(True)
            mean = sum(loss(model(current), labels) for model, loss in (self.attackers[i] for i in attackers))
            mean = mean / len(attackers)
            (gradient,) = torch.autograd.grad(mean, current)
            current = current.detach() + STEP_SIZE * gradient.sign()
            current = current.clamp(images - EPSILON, images + EPSILON).clamp(0, 1)
        return current

    def own_embeddings(self, rank: int, adversarial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean and adversarial, from one training pass of the twin."""
        clean, attacked = self.twins[rank][0](torch.cat([self.batches[rank].images, adversarial])).split(8)
        return clean, attacked

    def assert_left_by_step(self, rank: int, total: torch.Tensor, *, rtol: float = 1e-8) -> None:
        """The step left the gradients of ``total`` and the buffers of the twin's passes."""
        total.backward()
        self.assert_like_twin(rank, rtol=rtol)

    def assert_like_twin(self, rank: int, *, rtol: float = 1e-8) -> None:
        """Learner and twin have the same gradients and buffers."""
        (model, loss), learner = self.twins[rank], self.learners[rank]
        expected = dict(model.named_parameters()) | {"proxies": loss.proxies}
        found = dict(learner.model.named_parameters()) | {"proxies": learner.loss.proxies}
        for name, parameter in expected.items():
            assert float(parameter.grad.abs().max()) > 0, name
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=0, atol=rtol * scale, msg=name)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(dict(learner.model.named_buffers())[name], buffer, msg=name)
        assert all(module.training for module in learner.model.modules())


def fooled_rate(loss: torch.nn.Module, embeddings: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose nearest proxy is another class's, one by one."""
    wrong = 0
    for embedding, label in zip(embeddings.detach(), labels.tolist(), strict=True):
        cosines = [torch.cosine_similarity(embedding, proxy, dim=0).item() for proxy in loss.proxies.detach()]
        wrong += cosines.index(max(cosines)) != label
    return wrong / len(labels)


def test_natural_leaves_the_gradient_of_the_clean_loss_and_measures_nothing_else() -> None:
    case = Case(2, name="natural")
    results = case.step()
    for rank, (model, loss) in enumerate(case.twins):
        total = loss(model(case.batches[rank].images), LABELS[rank])
        case.assert_left_by_step(rank, total)
        measured = results[0].ensemble.members[rank]
        assert measured.clean_loss == pytest.approx(total.item())
        assert (measured.adversarial_loss, measured.fooled_rate, measured.displacement) == (None, None, None)
        assert (measured.received, measured.batch_size, measured.gradient_norm) == ((), 8, None)
        assert results[rank].passes == 1
        assert results[rank].ensemble.iteration == 1


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_pgd_at_leaves_the_gradient_of_both_halves(beta: float) -> None:
    case = Case(2, name="pgd_at", adversarial_share=beta)
    results = case.step()
    for rank, (_, loss) in enumerate(case.twins):
        clean, attacked = case.own_embeddings(rank, case.attacked([rank], rank))
        losses = loss(clean, LABELS[rank]), loss(attacked, LABELS[rank])
        case.assert_left_by_step(rank, (1 - beta) * losses[0] + beta * losses[1])
        measured = results[1 - rank].ensemble.members[rank]  # as the other member sees it
        assert measured.clean_loss == pytest.approx(losses[0].item())
        assert measured.adversarial_loss == pytest.approx(losses[1].item())
        assert measured.fooled_rate == pytest.approx(fooled_rate(loss, attacked, LABELS[rank]))
        assert measured.displacement == pytest.approx((attacked - clean).norm(dim=1).mean().item())
        assert results[rank].passes == STEPS + 2


def test_pgd_at_on_adversarial_images_alone_never_looks_at_the_clean_ones() -> None:
    case = Case(2, name="pgd_at", adversarial_share=1.0)
    results = case.step()
    for rank, (model, loss) in enumerate(case.twins):
        total = loss(model(case.attacked([rank], rank)), LABELS[rank])
        case.assert_left_by_step(rank, total)
        measured = results[0].ensemble.members[rank]
        assert (measured.clean_loss, measured.displacement) == (None, None)
        assert measured.adversarial_loss == pytest.approx(total.item())
        assert results[rank].passes == STEPS + 1


def check_transfer(case: Case, *, rtol: float) -> None:
    """All rules with transfer: L = ½ clean + ½ adversarial + γ Σ_j w_ij transferred + λ D, in loops over members."""
    results = case.step()
    config, plan, members = case.config, case.start.plan, range(len(case.twins))
    merged = results[0].ensemble
    adversarial = [case.attacked([rank], rank) for rank in members]
    own = [case.own_embeddings(rank, adversarial[rank]) for rank in members]

    class_wrong, class_seen = torch.zeros(CLASSES), torch.zeros(CLASSES)
    for rank, (_, loss) in enumerate(case.twins):
        for row, label in enumerate(LABELS[rank].tolist()):
            class_wrong[label] += fooled_rate(loss, own[rank][1][row : row + 1], LABELS[rank][row : row + 1])
            class_seen[label] += 1
    risk = class_wrong / class_seen
    assert torch.allclose(torch.from_numpy(merged.class_risk), risk)

    totals = []
    for rank, (model, loss) in enumerate(case.twins):
        clean, attacked = own[rank]
        total = 0.5 * loss(clean, LABELS[rank]) + 0.5 * loss(attacked, LABELS[rank])
        received = {peer: model(adversarial[peer]) for peer in plan.sources[rank]}
        plain = {peer: loss(embeddings, LABELS[peer]) for peer, embeddings in received.items()}
        powers = {peer: math.exp(value.item() / config.temperature) for peer, value in plain.items()}
        measured = merged.members[rank].received
        assert [entry.sender for entry in measured] == list(plan.sources[rank])
        for peer, entry in zip(received, measured, strict=True):
            assert entry.loss == pytest.approx(plain[peer].item())
            rate = fooled_rate(loss, received[peer], LABELS[peer])
            assert entry.fooled_rate == pytest.approx(rate)
            assert merged.transfer_matrix[rank, peer] == pytest.approx(rate)
            weight = 1 / len(received)
            if config.transfer_rule == "hardest":
                weight = powers[peer] / sum(powers.values())
            counted = plain[peer]
            if config.transfer_rule == "class_risk":
                by_image = risk[LABELS[peer]].double()
                by_image = by_image.clamp_min(0.05 * by_image.mean())
                assert len(by_image.unique()) > 1
                counted = loss(received[peer], LABELS[peer], weights=by_image / by_image.mean())
            total = total + config.transfer_strength * weight * counted
            if config.diversity_weight:
                squares = []
                theirs = case.twins[peer][1].similarities(own[peer][1]).detach()
                for row, label in enumerate(LABELS[peer].tolist()):
                    wrong = [c for c in range(CLASSES) if c != label]
                    a, b = loss.similarities(received[peer])[row, wrong], theirs[row, wrong]
                    squares.append(torch.cosine_similarity(a - a.mean(), b - b.mean(), dim=0) ** 2)
                total = total + config.diversity_weight * sum(squares) / len(squares) / len(received)
        totals.append(total)
    for rank, total in enumerate(totals):
        case.assert_left_by_step(rank, total, rtol=rtol)
        assert results[rank].passes == STEPS + 2 + config.peers


def test_eat_with_uniform_transfer_adds_the_peers_loss() -> None:
    check_transfer(Case(2, transfer_rule="uniform", transfer_strength=0.5), rtol=1e-8)


def test_eat_with_the_diversity_term_adds_the_alignment_with_every_sender() -> None:
    check_transfer(Case(3, transfer_rule="uniform", peers=2, transfer_strength=0.3, diversity_weight=2.0), rtol=1e-8)


def test_eat_with_the_hardest_rule_weights_two_peers_by_a_softmax_of_their_losses() -> None:
    check_transfer(Case(3, transfer_rule="hardest", peers=2, transfer_strength=2.0, temperature=3.0), rtol=1e-5)


def test_eat_with_class_risk_weights_images_by_the_ensembles_fooled_rate_on_their_class() -> None:
    check_transfer(Case(2, transfer_rule="class_risk", transfer_strength=0.5), rtol=1e-5)


@pytest.mark.parametrize(("relay_steps", "first"), [(None, 2), (1, 1), (3, 3)])
def test_eat_with_relay_trains_on_the_peers_half_attacked_batch_finished_by_itself(
    relay_steps: int | None, first: int
) -> None:
    case = Case(3, transfer_rule="relay", relay_steps=relay_steps)
    results = case.step()
    for rank, (_, loss) in enumerate(case.twins):
        sender = (rank + 1) % 3
        begun = case.attacked([sender], sender, steps=first)
        finished = case.attacked([rank], sender, start=begun, steps=STEPS - first)
        with torch.no_grad():
            handed_over = case.attackers[rank][0](begun)
        clean, attacked = case.own_embeddings(rank, finished)
        losses = loss(clean, LABELS[rank]), loss(attacked, LABELS[sender])
        case.assert_left_by_step(rank, 0.5 * losses[0] + 0.5 * losses[1])
        measured = results[0].ensemble.members[rank]
        assert measured.clean_loss == pytest.approx(losses[0].item())
        assert measured.adversarial_loss == pytest.approx(losses[1].item())
        assert measured.fooled_rate == pytest.approx(fooled_rate(loss, attacked, LABELS[sender]))
        assert measured.displacement is None
        assert [entry.sender for entry in measured.received] == [sender]
        assert measured.received[0].loss == pytest.approx(loss(handed_over, LABELS[sender]).item())
        assert measured.received[0].fooled_rate == pytest.approx(fooled_rate(loss, handed_over, LABELS[sender]))
        assert results[rank].passes == STEPS + 2


def test_eat_with_the_joint_attack_climbs_the_mean_of_all_members_losses() -> None:
    case = Case(3, transfer_rule="joint")
    adversarial = [case.attacked([0, 1, 2], rank) for rank in range(3)]
    results = case.step()
    for rank, (_, loss) in enumerate(case.twins):
        assert not torch.equal(adversarial[rank], case.attacked([rank], rank))
        clean, attacked = case.own_embeddings(rank, adversarial[rank])
        case.assert_left_by_step(rank, 0.5 * loss(clean, LABELS[rank]) + 0.5 * loss(attacked, LABELS[rank]))
        assert results[rank].ensemble.members[rank].received == ()
        assert results[rank].passes == 3 * STEPS + 2


def gradients(case: Case) -> list[torch.Tensor]:
    case.step()
    parameters = [p for learner in case.learners for p in (*learner.model.parameters(), learner.loss.proxies)]
    assert all(parameter.grad is not None for parameter in parameters)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize(
    ("members", "rule"),
    [(3, "none"), (1, "none"), (1, "uniform"), (1, "hardest"), (1, "class_risk"), (1, "relay"), (1, "joint")],
)
def test_eat_without_anybody_to_hear_from_is_pgd_at_bit_for_bit(members: int, rule: str) -> None:
    alone = gradients(Case(members, name="pgd_at"))
    pairs = list(zip(gradients(Case(members, name="eat", transfer_rule=rule)), alone, strict=True))
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_steps_repeat_themselves_and_rules_differ() -> None:
    first = gradients(Case(3, transfer_rule="uniform", transfer_strength=0.5))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first, gradients(Case(3, transfer_rule="uniform", transfer_strength=0.5)), strict=True)
    )
    for rule in ("none", "class_risk", "relay", "joint"):
        other = gradients(Case(3, transfer_rule=rule))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("rule", ["natural", "pgd_at", "uniform", "class_risk", "relay", "joint"])
def test_the_loss_falls_when_steps_are_repeated_on_the_same_batch(rule: str) -> None:
    name = rule if rule in DEFENSES else "eat"
    case = Case(2, name=name, transfer_rule=rule if name == "eat" else "none")
    optimisers = [
        torch.optim.Adam([*learner.model.parameters(), learner.loss.proxies], lr=0.03) for learner in case.learners
    ]
    losses = []
    for _ in range(10):
        results = case.step()
        losses.append([entry.clean_loss for entry in results[0].ensemble.members])
        case.start = results[0].ensemble
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert all(last < 0.7 * first for first, last in zip(losses[0], losses[-1], strict=True))


def test_the_error_of_the_member_that_failed_is_the_one_that_is_raised() -> None:
    case = Case(3, transfer_rule="uniform", transfer_strength=0.5)
    case.batches[1] = Batch(case.batches[1].images, LABELS[1] + CLASSES, torch.arange(8))
    with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
        case.step()


def test_a_member_that_does_not_come_is_named() -> None:
    case = Case(2, transfer_rule="uniform")
    case.board.timeout = 0.2
    with pytest.raises(MemberLateError, match=r"^member 1 did not hand in 'adversarial batch' number 0 within 0\.2 s"):
        run_together([lambda: DEFENSES["eat"].step(case.learners[0], case.batches[0], case.start)], case.board)
