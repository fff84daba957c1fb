"""The whole training state of all members ↔ a folder: safetensors and JSON, never pickle.

``checkpoints/00000120/`` holds ``member_{i}.safetensors`` and ``member_{i}.json`` of every member at the same
iteration, and ``checkpoint.json``, written last, with the SHA-256 of each. A folder without it, or with a file that
does not match, is no checkpoint: a run that was killed while saving, or a truncated upload, falls back to the one
before. That works the same on a disk and in a bucket, where folders cannot be renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from eat_dist.config import InferenceConfig, RunConfig
from eat_dist.errors import CheckpointError, StorageError
from eat_dist.inference import trained_through
from eat_dist.storage import Folder

SCHEMA = 2
MANIFEST = "checkpoint.json"
_PLACES = ("root", "test_root", "shards", "workers")


@dataclass(frozen=True)
class MemberState:
    """Everything one member needs to go on as if nothing had happened.

    Attributes:
        tensors: Weights, buffers, proxies and the optimiser's moments, by name.
        scalars: JSON-ready rest: iteration, sampler position, optimiser settings, merged statistics.
    """

    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A good checkpoint, and what was passed over to find it.

    Attributes:
        name: Its folder's name.
        iteration: Iterations done when it was saved.
        mlflow_run_id: The run that tracks it, if any.
        passed_over: One line for each newer folder that is not usable.
    """

    name: str
    iteration: int
    mlflow_run_id: str | None
    passed_over: tuple[str, ...]


_NOT_DECIDING = ("tracking", "evaluation", "checkpoint", "cluster")  # where and how often, not what


def deciding(config: RunConfig) -> RunConfig:
    """What of a config decides the weights; the rest at its defaults."""
    return config.model_copy(
        update={name: type(getattr(config, name))() for name in _NOT_DECIDING}
        # A defense at inference, unless members are trained through it.
        | ({} if trained_through(config.inference) else {"inference": InferenceConfig()})
        # Where the data lies and how it is read does not matter; runs.py holds that it is the same data.
        | {"name": "run", "data": config.data.model_copy(update=dict.fromkeys(_PLACES) | {"cache": "auto"})}
    )


def fingerprint(config: RunConfig) -> str:
    """Two runs may share checkpoints if and only if it is the same.

    What does not decide the weights is left out, defaults and all: else a version with another default there could read
    no checkpoint of the one before.
    """
    left_out = _NOT_DECIDING if trained_through(config.inference) else (*_NOT_DECIDING, "inference")
    decides = deciding(config).model_dump(mode="json", exclude=set(left_out))
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: The run's ``checkpoints`` folder.
        config: Decides which checkpoints are this run's own, and how many stay.
    """

    def __init__(self, folder: Folder, config: RunConfig) -> None:
        self.folder = folder
        self.members = config.ensemble.members
        self.keep = config.checkpoint.keep
        self.fingerprint = fingerprint(config)

    def write_member(self, iteration: int, rank: int, state: MemberState, *, write: bool = True) -> dict[str, str]:
        """Write one member's part.

        Args:
            iteration: Iterations done.
            rank: The member.
            state: What to write.
            write: Otherwise only say what the sums would be, as those replicas of a member do that do not write.

        Returns:
            File name → SHA-256, for the manifest.

        Raises:
            StorageError: No permission or no space left.
        """
        here = self.folder.child(_name(iteration))
        contents = {
            f"member_{rank}.safetensors": save_safetensors(state.tensors),
            f"member_{rank}.json": json.dumps(state.scalars, allow_nan=False).encode(),
        }
        for name, content in contents.items() if write else ():
            here.write(name, content)
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}

    def commit(self, iteration: int, digests: Sequence[dict[str, str]], *, mlflow_run_id: str | None = None) -> None:
        """Make a checkpoint of what all members wrote, then delete all but it and the ``keep`` - 1 before it.

        What lies further on is deleted, too: training has come here again, so it is of an attempt that was given up (a
        kill while saving, damage), and counted as newer it would cost this checkpoint.

        Args:
            iteration: Iterations done.
            digests: What :meth:`write_member` returned, of every member.
            mlflow_run_id: Kept so that a resumed run continues the same MLflow run.
        """
        manifest = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "iteration": iteration,
            "members": self.members,
            "mlflow_run_id": mlflow_run_id,
            "sha256": {name: digest for part in digests for name, digest in part.items()},
        }
        self.folder.child(_name(iteration)).write_json(MANIFEST, manifest)
        names = self._names()
        kept = [name for name in names if int(name) <= iteration][-self.keep :]
        for name in names:
            if name not in kept:
                self.folder.delete(name)

    def newest(self) -> Found | None:
        """The newest good checkpoint of this run; None where none was ever completed.

        Raises:
            CheckpointError: Some were completed, but none is a good checkpoint of this run.
        """
        passed_over: list[str] = []
        if not any(self.folder.child(name).exists(MANIFEST) for name in self._names()):
            return None  # a death while the first was being written: the run begins again
        for name in reversed(self._names()):
            fault = self._fault(name)
            if fault is None:
                manifest = self.folder.child(name).read_json(MANIFEST)
                return Found(name, manifest["iteration"], manifest["mlflow_run_id"], tuple(passed_over))
            passed_over.append(f"checkpoint {name} is passed over: {fault}")
        if passed_over:
            raise CheckpointError(f"no usable checkpoint in '{self.folder}': " + "; ".join(passed_over))
        return None

    def newest_name(self) -> str | None:
        """Where the newest committed checkpoint lies, for a message; None where there is none."""
        committed = [name for name in self._names() if self.folder.child(name).exists(MANIFEST)]
        return str(self.folder.child(committed[-1])) if committed else None

    def read_member(self, found: Found, rank: int) -> MemberState:
        """One member's part of a checkpoint that :meth:`newest` found."""
        here = self.folder.child(found.name)
        return MemberState(
            load_safetensors(here.read(f"member_{rank}.safetensors")), here.read_json(f"member_{rank}.json")
        )

    def _names(self) -> list[str]:
        return [name for name in self.folder.names() if name.isdigit()]

    def _fault(self, name: str) -> str | None:
        """Why a folder is not a good checkpoint of this run; None if it is."""
        here = self.folder.child(name)
        if not here.exists(MANIFEST):
            return f"it has no {MANIFEST}, so saving it was interrupted"
        try:
            manifest = here.read_json(MANIFEST)
            if manifest["schema"] != SCHEMA:
                return f"it has schema {manifest['schema']}; this version reads {SCHEMA}"
            if manifest["fingerprint"] != self.fingerprint:
                return "it belongs to a run with another configuration"
            for file, digest in manifest["sha256"].items():
                if hashlib.sha256(here.read(file)).hexdigest() != digest:
                    return f"{file} is damaged (its SHA-256 differs from the manifest's)"
        except (StorageError, KeyError, TypeError, AttributeError) as error:
            return f"it is damaged: {error}"
        return None


def _name(iteration: int) -> str:
    return f"{iteration:08d}"


def optimiser_state(optimiser: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Split an optimiser's state into named tensors and JSON-ready settings of its parameter groups."""
    state = optimiser.state_dict()
    tensors = {
        f"optimiser.{index}.{key}": value.detach().cpu().contiguous()
        for index, entries in state["state"].items()
        for key, value in entries.items()
    }
    return tensors, state["param_groups"]


def restore_optimiser(
    optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    """The inverse of :func:`optimiser_state`."""
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            entries.setdefault(int(index), {})[key] = value
    # JSON turned the betas into a list; torch compares and unpacks them as a tuple.
    restored = [{key: tuple(value) if key == "betas" else value for key, value in group.items()} for group in groups]
    optimiser.load_state_dict({"state": entries, "param_groups": restored})
