"""The ensemble at inference: members' embeddings fused into one, and its folder on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from eat_dist.config import InferenceConfig, ModelConfig
from eat_dist.errors import StorageError
from eat_dist.inference import Defended, defenses_of, needs_pool
from eat_dist.inference.table import NONE
from eat_dist.models.disagreement import TEMPERATURE, disagreement
from eat_dist.models.embedder import Embedder
from eat_dist.storage import Folder

SCHEMA = 3
# Schema 2 knew no defense at inference.
_READABLE = (2, 3)
_POOL = "pool.safetensors"


class EmbeddingEnsemble(nn.Module):
    """M embedders behind one forward pass; fusion ``concat``.

    The fused embedding is the members' unit embeddings side by side, divided by √M: it has length 1, and the cosine
    of two fused embeddings is the mean of the members' cosines, so no alignment of their spaces is needed.

    Args:
        members: Modules mapping images in [0, 1] to [B, D] of length 1.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one member; got none")
        self.members = nn.ModuleList(members)

    def member_embeddings(self, images: torch.Tensor) -> list[torch.Tensor]:
        """M embeddings [B, D], each of length 1."""
        return [member(images) for member in self.members]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in [0, 1] → [B, M·D] of length 1."""
        return fuse(self.member_embeddings(images))

    def disagreement(
        self,
        images: torch.Tensor,
        references: Sequence[torch.Tensor] | None = None,
        *,
        temperature: float = TEMPERATURE,
    ) -> torch.Tensor:
        """How much the members disagree about each image's neighbours: a score of attacked inputs, weak in places.

        See :func:`eat_dist.models.disagreement.disagreement`; docs/metrics.md says how well it detects. Differentiable.

        Args:
            images: [B, C, H, W] in [0, 1].
            references: M tensors [N, D], each member's own embeddings of a reference set (:meth:`member_embeddings`)
                that holds none of the images. None: the batch itself, two images or more, each without itself.
            temperature: τ, in units of cosine.

        Returns:
            [B] in [0, 1].

        Raises:
            ValueError: There is one member only, or ``references`` are not one of each member.
        """
        members = self.member_embeddings(images)
        own = torch.eye(len(images), dtype=torch.bool, device=images.device) if references is None else None
        return disagreement(members, members if references is None else references, own=own, temperature=temperature)


def fuse(embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate M unit embeddings [B, D] and scale to length 1, [B, M·D]."""
    return torch.cat(list(embeddings), dim=1) / math.sqrt(len(embeddings))


def defend(model: nn.Module, config: InferenceConfig, *, pool: torch.Tensor | None = None) -> nn.Module:
    """A model behind a defense at inference: an ensemble's members each behind their own, in evaluation mode.

    Args:
        model: Undefended; its networks are shared, not copied.
        config: ``none`` gives the model itself.
        pool: uint8 [P, C, H, W] clean images, where the defense mixes with them.
    """
    if config.name == NONE:
        return model
    if isinstance(model, EmbeddingEnsemble):
        return EmbeddingEnsemble([Defended(member, config, pool=pool) for member in model.members]).eval()
    return Defended(model, config, pool=pool).eval()


def undefended(model: nn.Module) -> nn.Module:
    """The inverse of :func:`defend`; a model that is not defended is returned as it is."""
    if isinstance(model, Defended):
        return model.model
    if isinstance(model, EmbeddingEnsemble) and defenses_of([model]):
        return EmbeddingEnsemble([undefended(member) for member in model.members]).eval()
    return model


@dataclass(frozen=True)
class EnsembleSpec:
    """What ``ensemble.json`` says beside the weights: enough to build the networks and to feed them.

    Attributes:
        model: The members' network.
        image_shape: (C, H, W) of an input.
        members: M.
        inverted: Whether it was trained on images with black and white exchanged (strokes as 1, paper as 0).
        resize: Pixels of the shorter side before the centre crop to ``image_shape``; None becomes the height.
        inference: The defense that the ensemble is used behind.
    """

    model: ModelConfig
    image_shape: tuple[int, int, int]
    members: int
    inverted: bool = False
    resize: int | None = None
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        if self.resize is None:
            object.__setattr__(self, "resize", self.image_shape[1])
        numbers = (*self.image_shape, self.members, self.resize)
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError(f"image_shape, members and resize must be positive whole numbers; got {numbers}")

    def build(self) -> EmbeddingEnsemble:
        """An undefended ensemble with arbitrary weights; ``model.weights`` is neither read nor downloaded."""
        return EmbeddingEnsemble([Embedder(self.model, self.image_shape[0]) for _ in range(self.members)])


def save_spec(folder: Folder | str | os.PathLike[str], spec: EnsembleSpec, *, pool: torch.Tensor | None = None) -> None:
    """Write ``ensemble.json``; the members write their weights themselves (:func:`save_member`).

    Args:
        folder: Of the ensemble.
        spec: What to write.
        pool: uint8 [P, C, H, W], written beside it where the defense at inference mixes with these images.
    """
    if needs_pool(spec.inference):
        assert pool is not None
        _folder(folder).write(_POOL, save_safetensors({"pool": pool.cpu().contiguous()}))
    content = {
        "schema": SCHEMA,
        "fusion": "concat",
        "members": spec.members,
        "image_shape": list(spec.image_shape),
        "inverted": spec.inverted,
        "resize": spec.resize,
        "inference": spec.inference.model_dump(mode="json", exclude_none=True),
        "model": spec.model.model_dump(mode="json"),
    }
    _folder(folder).write_json("ensemble.json", content)


def save_member(folder: Folder | str | os.PathLike[str], rank: int, member: nn.Module) -> None:
    """Write one member's weights as safetensors; those of a defended one are its network's."""
    _folder(folder).write(member_file(rank), save_safetensors(cpu_state(undefended(member))))


def save_ensemble(folder: Folder | str | os.PathLike[str], ensemble: EmbeddingEnsemble, *, spec: EnsembleSpec) -> None:
    """Write a whole ensemble: every member's weights, then ``ensemble.json``; its defense is to be the spec's."""
    for rank, member in enumerate(ensemble.members):
        save_member(folder, rank, member)
    pools = [defense.pool for defense in defenses_of([ensemble])]
    save_spec(folder, spec, pool=pools[0] if pools else None)


def load_spec(folder: Folder | str | os.PathLike[str]) -> EnsembleSpec:
    """Read ``ensemble.json``.

    Raises:
        StorageError: It is missing, damaged or of another schema version.
    """
    opened = _folder(folder)
    content = opened.read_json("ensemble.json")
    try:
        if content["schema"] not in _READABLE:
            raise StorageError(f"'{opened}/ensemble.json' has schema {content['schema']}; this version reads {SCHEMA}")
        channels, height, width = content["image_shape"]
        model = ModelConfig.model_validate_json(json.dumps(content["model"]))
        shape = (channels, height, width)
        inference = InferenceConfig.model_validate_json(json.dumps(content.get("inference", {})))
        return EnsembleSpec(model, shape, content["members"], content["inverted"] is True, content["resize"], inference)
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"'{opened}/ensemble.json' is damaged: {' '.join(str(error).split())}") from error


def load_ensemble(folder: Folder | str | os.PathLike[str]) -> EmbeddingEnsemble:
    """Build the saved ensemble, behind its defense if it has one, in evaluation mode, on the CPU.

    Raises:
        StorageError: A file is missing, damaged, or does not fit the architecture.
    """
    opened = _folder(folder)
    spec = load_spec(opened)
    ensemble = spec.build()
    for rank, member in enumerate(ensemble.members):
        try:
            member.load_state_dict(load_safetensors(opened.read(member_file(rank))))
        except StorageError:
            raise
        except Exception as error:  # safetensors and torch raise their own types for a damaged or foreign file
            raise StorageError(
                f"'{opened}/{member_file(rank)}' does not fit: {' '.join(str(error).split())}"
            ) from error
    pool = _read_pool(opened, spec.image_shape) if needs_pool(spec.inference) else None
    defended = defend(ensemble.eval(), spec.inference, pool=pool)
    assert isinstance(defended, EmbeddingEnsemble)
    return defended


def weights_digest(states: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 over all members' weights, in rank order: two runs are the same if and only if it is the same."""
    digest = hashlib.sha256()
    for state in states:
        for name in sorted(state):
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cpu_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state as contiguous CPU tensors."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def member_file(rank: int) -> str:
    """Name of a member's weights."""
    return f"member_{rank}.safetensors"


def _read_pool(folder: Folder, image_shape: tuple[int, int, int]) -> torch.Tensor:
    try:
        pool: torch.Tensor = load_safetensors(folder.read(_POOL))["pool"]
    except StorageError:
        raise
    except Exception as error:  # safetensors raises its own types for a damaged or foreign file
        raise StorageError(f"'{folder}/{_POOL}' is damaged: {' '.join(str(error).split())}") from error
    if pool.dtype != torch.uint8 or pool.shape[1:] != image_shape or not len(pool):
        raise StorageError(
            f"'{folder}/{_POOL}' does not fit: expected uint8 images {list(image_shape)}; got {pool.dtype} "
            f"{list(pool.shape)}"
        )
    return pool


def _folder(folder: Folder | str | os.PathLike[str]) -> Folder:
    return folder if isinstance(folder, Folder) else Folder.at(folder)
