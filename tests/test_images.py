"""Labelled image sets in memory, and what a training and a test set must have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from eat_dist.data.images import ImageSet, LabelledImages, ZeroShotData
from eat_dist.errors import DataError


def labelled(**per_class: int) -> LabelledImages:
    """So many images of each class; the first pixel of image i is i."""
    labels = [label for label, count in enumerate(per_class.values()) for _ in range(count)]
    images = torch.zeros(len(labels), 1, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    names = tuple(f"{index}.png" for index in range(len(labels)))
    return LabelledImages(images, torch.tensor(labels), tuple(per_class), names)


def with_roles(images: LabelledImages, *is_query: bool) -> LabelledImages:
    return replace(images, is_query=torch.tensor(is_query))


def data_error(train: ImageSet, test: ImageSet, *, skipped: tuple[str, ...] = ()) -> str:
    with pytest.raises(DataError) as error:
        ZeroShotData(train, test, resize=8, skipped=skipped)
    message = str(error.value)
    assert "\n" not in message
    return message


# One set


def test_a_batch_is_float_in_0_1_with_labels_and_cpu_indices() -> None:
    images = LabelledImages(
        torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1),
        torch.tensor([0, 1, 1]),
        ("a", "b"),
        ("x", "y", "z"),
    )
    batch = images.batch(np.array([2, 1, 1]), "cpu")
    assert batch.images.dtype == torch.float32
    assert batch.images.flatten().tolist() == pytest.approx([1.0, 0.2, 0.2])
    assert batch.labels.tolist() == [1, 1, 1]
    assert batch.indices.tolist() == [2, 1, 1]
    assert (len(images), images.num_classes) == (3, 2)


def test_images_in_memory_say_what_every_image_set_says() -> None:
    images: ImageSet = labelled(a=2, b=3)
    assert (len(images), images.num_classes, images.image_shape) == (5, 2, (1, 2, 3))
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.sizes.tolist() == [[2, 3]] * 5
    assert images.is_query is None
    assert images.stored(4)[0].tolist() == [[4, 0, 0], [0, 0, 0]]


def test_the_digest_is_of_pixels_labels_classes_and_roles_and_not_of_names() -> None:
    images = labelled(a=2, b=2)
    other_pixel = images.images.clone()
    other_pixel[3, 0, 1, 2] += 1
    different = [
        images,
        replace(images, images=other_pixel),
        replace(images, images=images.images.reshape(4, 1, 3, 2)),
        replace(images, labels=torch.tensor([0, 1, 0, 1])),
        replace(images, class_names=("a", "c")),
        with_roles(images, True, False, True, False),
        with_roles(images, False, True, True, False),
    ]
    assert len({one.digest() for one in different}) == len(different)
    assert images.digest() == labelled(a=2, b=2).digest() == replace(images, names=("w", "x", "y", "z")).digest()


def test_a_set_that_was_decoded_from_another_keeps_its_digest() -> None:
    assert replace(labelled(a=2, b=2), known_digest="of the shards").digest() == "of the shards"


# A training and a test set


def test_classes_must_be_two_and_unseen() -> None:
    assert "must differ; 1 class in both, e.g. 'b'" in data_error(labelled(a=2, b=2), labelled(b=2, c=2))
    assert "2 classes in both" in data_error(labelled(a=2, b=2, c=2), labelled(b=2, c=2))
    assert "the training set needs at least two classes; it has 1" in data_error(labelled(a=2), labelled(b=2, c=2))
    assert "the test set needs at least two classes; it has 1" in data_error(labelled(a=2, b=2), labelled(c=2))


def test_a_test_class_needs_two_images_and_a_training_class_one() -> None:
    ZeroShotData(labelled(a=1, b=1), labelled(c=2, d=2), resize=8)
    assert data_error(labelled(a=2, b=2), labelled(c=2, Balinese=1)) == (
        "test class 'Balinese' has one image; a class needs at least two to be retrieved. Remove it or add images."
    )
    assert data_error(labelled(a=2, b=0), labelled(c=2, d=2)) == (
        "training class 'b' has no image; there is nothing to learn. Remove it or add images."
    )


def test_the_message_says_how_many_images_were_left_out() -> None:
    message = data_error(labelled(a=2, b=2), labelled(c=2, d=1), skipped=("d/1.png",))
    assert "test class 'd' has one image (1 undecodable image left out of the sets)" in message


def test_every_query_needs_a_gallery_image_of_its_class() -> None:
    train, test = labelled(a=2, b=2), labelled(c=2, d=2)
    ZeroShotData(train, with_roles(test, True, False, False, True), resize=8)
    message = data_error(train, with_roles(test, True, True, False, True))
    assert "every query needs a gallery image of its class; 1 class of queries without one, e.g. 'c'" in message


def test_a_gallery_may_have_classes_without_a_query() -> None:
    test = with_roles(labelled(c=2, d=2), True, False, False, False)

    assert ZeroShotData(labelled(a=2, b=2), test, resize=8).test is test


@pytest.mark.parametrize("everything", [True, False])
def test_roles_without_a_query_or_without_a_gallery_are_an_error(everything: bool) -> None:
    assert "query" in data_error(labelled(a=2, b=2), with_roles(labelled(c=2, d=2), *[everything] * 4))
