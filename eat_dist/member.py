"""The training loop of one member. It knows an exchange, not who is behind it."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from eat_dist.attacks import Generators, training_attack
from eat_dist.checkpoint import Checkpoints, Found, MemberState, optimiser_state, restore_optimiser
from eat_dist.config import RunConfig
from eat_dist.data.images import ImageSet
from eat_dist.data.loader import Loader, make_loader
from eat_dist.data.splits import Splits
from eat_dist.defenses import DEFENSES, Learner, options_of
from eat_dist.errors import CheckpointError, NonFiniteLossError
from eat_dist.exchange import Exchange
from eat_dist.history import HistoryWriter, rows
from eat_dist.inference import Defended, trained_through
from eat_dist.losses import make_loss
from eat_dist.models import build_embedder
from eat_dist.models.ensemble import cpu_state, save_member
from eat_dist.models.execution import apply_execution
from eat_dist.optimisation import gradient_norm, make_optimiser, optimised
from eat_dist.replicas import ALONE, Replicas
from eat_dist.robustness.statistics import EnsembleStatistics, Policy
from eat_dist.schedule import Schedule
from eat_dist.seeding import generator
from eat_dist.storage import Folder

OnIteration = Callable[[EnsembleStatistics], None]


@dataclass(frozen=True)
class MemberResult:
    """What a finished member reports.

    Attributes:
        passes: Forward-backward passes over a batch, the whole run, resumed parts included; a forward pass is a third.
        iterations: Of the whole run.
        resumed_from: Iterations that a checkpoint had already done.
        passed_over: Newer checkpoints that were not usable, one line each.
        peak_memory: Bytes: of the GPU where there is one, else of the process (which in-process members share).
        loading: Where its images came from, in words.
        nodes: How many nodes its replicas were on.
    """

    passes: float
    iterations: int
    resumed_from: int
    passed_over: tuple[str, ...]
    peak_memory: int
    loading: str
    nodes: int = 1


class Member:
    """One member: network, proxies, optimiser, sampler, and the loop.

    Args:
        config: The run.
        train: The whole training set; the member draws from its own split of it.
        splits: What every member sees.
        exchange: The way to the others; says which member this is.
        replicas: The other processes that train the same member, if any; the first of them writes for all.
        run_folder: Where checkpoints, history and final weights go.
        device: Where it computes.
        cpus: CPUs it has to itself, for decoding images.
        members_here: Members that share the device's memory: one GPU's, or on CPUs the machine's.
        mlflow_run_id: Kept in checkpoints.
        on_iteration: Called with the merged statistics after every iteration (by every member).
    """

    def __init__(
        self,
        config: RunConfig,
        train: ImageSet,
        *,
        splits: Splits,
        exchange: Exchange,
        run_folder: Folder,
        device: torch.device,
        cpus: int = 1,
        members_here: int = 1,
        mlflow_run_id: str | None = None,
        on_iteration: OnIteration | None = None,
        replicas: Replicas = ALONE,
    ) -> None:
        self.config = config
        self.exchange = exchange
        self.replicas = replicas
        self.rank = exchange.rank
        self.device = device
        self.cpus = cpus
        self.members_here = members_here
        self.train = train
        self.run_folder = run_folder
        self.mlflow_run_id = mlflow_run_id
        self.on_iteration = on_iteration
        self.schedule = Schedule.of(config, splits)
        self.policy = Policy.of(config, train.num_classes)
        self.checkpoints = Checkpoints(run_folder.child("checkpoints"), config)
        self.split = splits.indices[self.rank]
        seed, rank = config.seed, self.rank
        self.model = build_embedder(
            config.model, in_channels=train.image_shape[0], generator=generator(seed, "weights", rank)
        ).to(device)
        apply_execution(self.model, config.train, device)
        self.loss = make_loss(
            config.loss,
            num_classes=train.num_classes,
            embedding_dim=config.model.embedding_dim,
            generator=generator(seed, "proxies", rank),
        ).to(device)
        self.optimiser = make_optimiser(config.optimiser, self.model, self.loss)
        self.base_rates = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.ensemble = EnsembleStatistics.initial(self.policy)
        self.passes: float = 0
        self.until_epoch = self.schedule.epochs
        self._drawn: tuple[int, Generators] | None = None
        self.learner = Learner(
            rank=rank,
            model=self._as_trained(replicas.wrap(self.model)),
            loss=self.loss,  # type: ignore[arg-type]  # a registered loss is a MetricLoss and a Module
            attack=training_attack(config.attack),
            exchange=exchange,
            config=config.defense,
            generator=self._generator,
            options=options_of(config.defense),
            replicas=replicas,
        )

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.ensemble.iteration

    def run(self, until_epoch: int | None = None) -> MemberResult:
        """Train, from the newest good checkpoint if there is one, and save the weights.

        Args:
            until_epoch: Stop at the end of that epoch, with a checkpoint, to be continued by another call: the weights
                are in the end those of an undisturbed run. Default: the last.

        Raises:
            NonFiniteLossError: A member's loss is NaN or infinite; no member has used it.
            CheckpointError: There are checkpoints, but none is usable, or training is further than ``until_epoch``.
        """
        self.until_epoch = self.schedule.epochs if until_epoch is None else until_epoch
        end = self.schedule.iterations_per_epoch * self.until_epoch
        found = self._resume()
        resumed_from = self.iteration
        if resumed_from > end:
            raise CheckpointError(
                f"'{self.run_folder}' is trained to iteration {resumed_from} already, so not to epoch {until_epoch} "
                f"(iteration {end})"
            )
        history = HistoryWriter(self.run_folder.child("statistics"), self.iteration) if self._speaks else None
        self.model.train()
        with self._loader() as loader:
            while self.iteration < end:
                self._step(loader, history)
                if self._checkpoint_is_due():
                    self._save(history)
            loading = loader.description
        if self.replicas.index == 0:
            save_member(self.run_folder.child("model"), self.rank, self.model)
        passed_over = found.passed_over if found else ()
        return MemberResult(self.passes, self.iteration, resumed_from, passed_over, peak_memory(self.device), loading)

    def _loader(self) -> Loader:
        return make_loader(
            self.config.data,
            self.train,
            split=self.split,
            seed=self.config.seed,
            rank=self.rank,
            device=self.device,
            members_here=self.members_here,
            cpus=self.cpus,
            rows=self.replicas.rows,
        )

    def _step(self, loader: Loader, history: HistoryWriter | None) -> None:
        begin, iteration = time.perf_counter(), self.iteration
        factor = self.schedule.learning_rate_factor(self.config.optimiser, iteration)
        for group, base in zip(self.optimiser.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        self.model.train_head_only(self.schedule.epoch(iteration) < self.config.train.warmup_epochs)
        self.optimiser.zero_grad(set_to_none=True)
        batch = loader.batch(iteration)
        data_wait = time.perf_counter() - begin
        result = DEFENSES[self.config.defense.name].step(self.learner, batch, self.ensemble)
        self._refuse_non_finite(result.ensemble)
        self.replicas.sum_gradients(self.model, self.loss)
        norm = gradient_norm(self.optimiser)
        if not math.isfinite(norm):
            raise self._not_finite(self.rank, iteration, f"gradient norm is {norm}")
        self.learner.last_gradient_norm = norm
        self.learner.last_waits = result.waits
        self.learner.last_waits.data = data_wait
        if self.config.optimiser.clip_value is not None:
            torch.nn.utils.clip_grad_value_(optimised(self.optimiser), self.config.optimiser.clip_value)
        self.optimiser.step()
        self.ensemble = result.ensemble
        self.passes += result.passes
        if history is not None:
            epoch, rate = self.schedule.epoch(iteration), self.base_rates[0] * factor
            history.add(rows(result.ensemble, epoch=epoch, learning_rate=rate))
        if self.on_iteration is not None:
            self.on_iteration(result.ensemble)
        self.learner.last_time = time.perf_counter() - begin

    def _as_trained(self, model: torch.nn.Module) -> torch.nn.Module:
        """The network as a training step calls it: behind the defense at inference, if it is trained through that."""
        if not trained_through(self.config.inference):
            return model
        one_view = self.config.inference.model_copy(update={"draws": 1})
        return Defended(model, one_view, generators=self._drawn_by_the_defense)

    def _drawn_by_the_defense(self) -> Generators:
        """One after the other, all passes of an iteration draw from the same generator."""
        if self._drawn is None or self._drawn[0] != self.iteration:
            self._drawn = self.iteration, self._generator("inference")
        return self._drawn[1]

    def _generator(self, purpose: str) -> Generators:
        whole = generator(self.config.seed, purpose, self.rank, self.iteration, device=self.device)
        return self.replicas.generators(whole)

    @property
    def _speaks(self) -> bool:
        """Whether this process writes and looks up for the whole ensemble: member 0, or the first of its replicas."""
        return self.rank == 0 and self.replicas.index == 0

    def _refuse_non_finite(self, merged: EnsembleStatistics) -> None:
        """Every member sees everybody's losses, so all of them stop at the same iteration, before the update."""
        for entry in merged.members:
            for name, value in entry.losses().items():
                if not math.isfinite(value):
                    raise self._not_finite(entry.member, entry.iteration, f"{name} loss is {value}")

    def _not_finite(self, member: int, iteration: int, what: str) -> NonFiniteLossError:
        kept = self.checkpoints.newest_name()
        return NonFiniteLossError(
            f"member {member}: the {what} in epoch {self.schedule.epoch(iteration) + 1}, iteration {iteration}; lower "
            f"optimiser.learning_rate. "
            + (f"The last good checkpoint is '{kept}'." if kept else "There is no checkpoint yet.")
        )

    def _checkpoint_is_due(self) -> bool:
        if self.iteration % self.schedule.iterations_per_epoch:
            return False
        epochs_done = self.schedule.epoch(self.iteration)
        return epochs_done % self.config.checkpoint.every == 0 or epochs_done == self.until_epoch

    def _save(self, history: HistoryWriter | None) -> None:
        if history is not None:
            history.flush()
        writes = self.replicas.index == 0
        digests = self.checkpoints.write_member(self.iteration, self.rank, self.state(), write=writes)
        self.replicas.require_equal(digests)
        everybody = self.exchange.agree("checkpoint", digests)
        if self._speaks:
            self.checkpoints.commit(self.iteration, everybody, mlflow_run_id=self.mlflow_run_id)

    def _resume(self) -> Found | None:
        """All members continue from the checkpoint that member 0 finds."""
        found = self.checkpoints.newest() if self._speaks else None
        chosen = self.exchange.agree("resume", _as_json(found))[0]
        if chosen is None:
            return None
        found = Found(chosen["name"], chosen["iteration"], chosen["mlflow_run_id"], tuple(chosen["passed_over"]))
        self.restore(self.checkpoints.read_member(found, self.rank))
        return found

    def state(self) -> MemberState:
        """The whole state. Random numbers need none: they are functions of seed, member and iteration."""
        tensors, groups = optimiser_state(self.optimiser)
        tensors |= {f"model.{name}": value for name, value in cpu_state(self.model).items()}
        tensors |= {f"loss.{name}": value for name, value in cpu_state(self.loss).items()}
        scalars = {
            "member": self.rank,
            "seed": self.config.seed,
            "iteration": self.iteration,
            "sampler_position": self.iteration,
            "passes": self.passes,
            "last_gradient_norm": self.learner.last_gradient_norm,
            "statistics": self.ensemble.to_json(),
            "defense": self.learner.memory,
            "optimiser_groups": groups,
            "mlflow_run_id": self.mlflow_run_id,
        }
        return MemberState(tensors, scalars)

    def restore(self, state: MemberState) -> None:
        """The inverse of :meth:`state`."""
        _load(self.model, "model.", state.tensors)
        _load(self.loss, "loss.", state.tensors)
        restore_optimiser(self.optimiser, state.tensors, state.scalars["optimiser_groups"])
        self.ensemble = EnsembleStatistics.from_json(state.scalars["statistics"])
        self.passes = state.scalars["passes"]
        self.learner.memory = dict(state.scalars["defense"])
        self.learner.last_gradient_norm = state.scalars["last_gradient_norm"]


def peak_memory(device: torch.device) -> int:
    """The most memory held so far, in bytes: on a GPU by torch's tensors, on the CPU by the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _load(module: torch.nn.Module, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    module.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})


def _as_json(found: Found | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "name": found.name,
        "iteration": found.iteration,
        "mlflow_run_id": found.mlflow_run_id,
        "passed_over": list(found.passed_over),
    }
