"""Class labels of a class-conditional network, and classifier-free guidance towards them.

References: Ho, Salimans 2022, "Classifier-Free Diffusion Guidance" (https://arxiv.org/abs/2207.12598); Lin et al. 2023,
"Common Diffusion Noise Schedules and Sample Steps are Flawed" (https://arxiv.org/abs/2305.08891) for rescaling;
Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval" (https://arxiv.org/abs/2404.07724).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import check_choice, check_range, check_whole, is_whole


class Guidance(NamedTuple):
    """Strength of classifier-free guidance, and the part of the chain in which it acts."""

    scale: float = 1.0  # 1: the conditional prediction as it is
    rescale: float = 0.0  # share of the rescaled prediction, 0 to 1
    interval: tuple[float, float] = (0.0, 1.0)  # of t / T, in which guidance acts

    def check(self) -> None:
        """Raise ValueError for a value that is not allowed."""
        check_range("guidance_scale", self.scale, 0, float("inf"))
        check_range("guidance_rescale", self.rescale, 0, 1)
        interval = self.interval
        if not isinstance(interval, Sequence) or len(interval) != 2:
            raise ValueError(f"guidance_interval={interval!r} must be two numbers, 0 <= start <= stop <= 1.")
        check_range("guidance_interval", interval[0], 0, 1)
        check_range("guidance_interval", interval[1], interval[0], 1)

    def acts(self, time: float) -> bool:
        """Whether guidance changes the prediction at t / T = time."""
        return self.scale != 1 and self.interval[0] <= time <= self.interval[1]


class Condition(NamedTuple):
    """Labels of a batch and their guidance; labels_and_null serves one call of the network with and without labels."""

    labels: Tensor  # [B]
    labels_and_null: Tensor  # [2 B]
    guidance: Guidance


def guide(conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
    """Extrapolate from the unconditional to the conditional prediction. All are [B, C, H, W].

    Ho & Salimans eq. 6 with scale = 1 + w. The result is then mixed, with weight `rescale`, with itself rescaled to the
    standard deviation of the conditional prediction (Lin et al. eqs. 15-16). Epsilon, x_0 and v are linear in one
    another, so guidance may act on any of them.
    """
    guided = unconditional + guidance.scale * (conditional - unconditional)
    if guidance.rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guidance.rescale * ratio * guided + (1 - guidance.rescale) * guided


def null_label(num_class_embeds: int | None, id2label: Mapping[Any, str] | None = None) -> int | None:
    """The label that stands for no class: the last one, unless it has a name. None if the network has no such label."""
    if num_class_embeds is None or num_class_embeds - 1 in map(int, id2label or {}):  # JSON's keys are text
        return None
    return num_class_embeds - 1


def label_numbers(class_labels: Any, classes: int, id2label: Mapping[int, str] | None) -> Tensor:  # noqa: ANN401
    """Convert labels, given as numbers, names or a mixture of both, to a LongTensor [B].

    Raises:
        ValueError: a number outside 0..classes-1, an unknown name, or not a list.
    """
    labels = class_labels.tolist() if isinstance(class_labels, Tensor | np.ndarray) else class_labels
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels:
        raise ValueError(f"class_labels={class_labels!r} must be a list of whole numbers or names, one for each image.")
    numbers_of = {name: number for number, name in (id2label or {}).items()}
    for label in labels:
        if isinstance(label, str):
            if not numbers_of:
                raise ValueError(f"class_labels: {label!r} is a name, and this model has no names: pass numbers.")
            check_choice("class_labels", label, numbers_of)
        elif not (is_whole(label) and 0 <= label < classes):
            raise ValueError(
                f"class_labels={class_labels!r} must be a list of whole numbers from 0 to {classes - 1}, or names."
            )
    return torch.tensor([numbers_of[label] if isinstance(label, str) else int(label) for label in labels])


def condition_of(
    config: Mapping[str, Any],
    id2label: Mapping[int, str] | None,
    class_labels: Any,  # noqa: ANN401
    batch_size: int | None,
    guidance: Guidance,
    device: torch.device,
) -> tuple[Condition | None, int]:
    """What a call of a pipeline asks for, and how many images.

    Args:
        config: of the network.
        id2label: names of its classes.
        class_labels: for each image, as `label_numbers` takes them; None for the null label.
        batch_size: number of images; None for one for each label, or 1.
        guidance: towards the labels.
        device: of the labels.

    Returns:
        The condition, None if the network has no classes, and the batch size.

    Raises:
        ValueError: the network cannot do what is asked for.
    """
    guidance.check()
    classes, scale = config.get("num_class_embeds"), guidance.scale
    if (kind := config.get("class_embed_type")) is not None:
        raise ValueError(f"class_embed_type={kind!r} has no numbered classes: call the network itself.")
    if classes is None:
        if class_labels is not None:
            raise ValueError("class_labels was passed, but this network is not class-conditional.")
        if scale != 1:
            raise ValueError(f"guidance_scale={scale!r} needs a class-conditional network.")
        return None, 1 if batch_size is None else batch_size
    null = null_label(classes, id2label)
    if class_labels is None:
        if null is None:
            raise ValueError("class_labels is missing: each label of this network is a class, and none is null.")
        if scale != 1:
            raise ValueError(f"guidance_scale={scale!r} needs class_labels to follow.")
        count = 1 if batch_size is None else batch_size
        check_whole("batch_size", count)
        labels = torch.full((int(count),), null)
    else:
        labels = label_numbers(class_labels, classes, id2label)
    if scale != 1 and null is None:
        raise ValueError(f"guidance_scale={scale!r} needs a null label, and each label of this network is a class.")
    if batch_size not in (None, len(labels)):
        raise ValueError(f"batch_size={batch_size!r} differs from the number of class_labels, {len(labels)}.")
    labels = labels.to(device)
    none = labels if null is None else torch.full_like(labels, null)
    return Condition(labels, torch.cat([labels, none]), guidance), len(labels)
