"""The section ``inference``: a defense that acts when a trained ensemble is used."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eat_dist.config.base import Number, Section

InputTransforms = Literal["crop_rescale", "bit_depth", "jpeg", "total_variation"]


class InferenceConfig(Section):
    """A defense at inference, around every member (docs/defenses.md).

    An option left out takes the defense's own default; one that the defense does not have is an error.
    """

    name: str = Field("none", description="Name in INFERENCE_DEFENSES.")
    training: bool | None = Field(None, description="Members are trained through it, too, whatever the defense.")
    draws: int | None = Field(None, ge=1, description="Random views of an image, whose embeddings are averaged.")
    share: Number | None = Field(None, gt=0, le=1, description="λ: the image's own share (mixup_inference).")
    pool: int | None = Field(None, ge=1, description="Training images that it is mixed with (mixup_inference).")
    growth: Number | None = Field(None, ge=1, le=4, description="Largest size, as a multiple (randomisation).")
    groups: int | None = Field(None, ge=1, le=10, description="Transform groups that an image goes through (bart).")
    transforms: Annotated[tuple[InputTransforms, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="One after the other (input_transform)."
    )
    crop: Number | None = Field(None, gt=0, le=1, description="Side of the crop, share of the image's (crop_rescale).")
    bits: int | None = Field(None, ge=1, le=8, description="Bits a value keeps (bit_depth).")
    quality: int | None = Field(None, ge=1, le=100, description="Of the compressed image (jpeg).")
    drop: Number | None = Field(None, ge=0, lt=1, description="Share of the values dropped first (total_variation).")
    tv_weight: Number | None = Field(None, gt=0, description="λ of the total variation (total_variation).")
