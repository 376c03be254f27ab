"""Products of float64 coefficients on the host with tensors of any dtype and device, without waiting for it."""

import numpy as np
import torch
from torch import Tensor

Coefficient = np.ndarray  # on the host in float64: a scalar, or [B]


def upcast(x: Tensor) -> Tensor:
    """Convert 16-bit floats to float32; float32 and float64 stay as they are. ValueError for other dtypes."""
    if not x.is_floating_point():
        raise ValueError(f"A tensor of dtype {x.dtype} is not allowed: pass floats (scale images to [-1, 1] first).")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def broadcast(value: Coefficient, x: Tensor) -> float | Tensor:
    """Bring a host coefficient into a form that multiplies x: a float, or [B, 1, ...] in x's dtype on its device."""
    if np.ndim(value) == 0:
        return float(value)
    if len(value) != x.shape[0]:
        raise ValueError(f"{len(value)} timesteps for a batch of {x.shape[0]}: pass one, or one per sample.")
    tensor = torch.as_tensor(value, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    return tensor.to(x.device, non_blocking=True)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a GPU copies it from pinned memory while the host goes on."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def plus(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """Compute x + factor * y, in one pass over memory if the factor is a number."""
    return x + factor * y if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def as_tensor(value: Coefficient | Tensor, x: Tensor) -> Tensor:
    """Turn a coefficient or tensor into a tensor that broadcasts over x. A scalar stays on the host, at no cost."""
    return value if isinstance(value, Tensor) else torch.as_tensor(broadcast(value, x), dtype=x.dtype)


def check_shapes(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise ValueError unless tensor has the shape of x: broadcasting would share one noise among samples."""
    if tensor.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have that of the samples, {tuple(x.shape)}.")


def is_entry(scalar: Tensor, vector: Tensor) -> bool:
    """Whether scalar is a view of an entry of vector, as one gets by iterating over it: they share their storage."""
    same = scalar.dtype == vector.dtype and scalar.numel() == 1
    return same and scalar.untyped_storage() is vector.untyped_storage()


def mean_of_sample(x: Tensor) -> Tensor:
    """The mean over all dimensions but the first: [B, ...] -> [B]."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def split_channels(model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a network's output into the prediction, shaped like x, and the second half of its channels or None; upcast.

    Raises:
        ValueError: for a shape that is neither x's nor has twice its channels.
    """
    if model_output.shape == x.shape:
        return upcast(model_output), None
    if x.ndim > 1 and model_output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        prediction, second = upcast(model_output).split(x.shape[1], dim=1)
        return prediction, second
    raise ValueError(
        f"model_output has shape {tuple(model_output.shape)}; a sample of shape {tuple(x.shape)} needs the same "
        "shape, or twice its channels for a learned variance."
    )
