"""EfficientNet-Lite0 up to its features: Tan, Le 2019, https://arxiv.org/abs/1905.11946.

Lite0 has ReLU6 and no squeeze-and-excitation. Names that start with an underscore are those of the published weights.
"""

from torch import Tensor, nn
from torch.nn import functional as F

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
    """A block of MobileNetV2 (Sandler et al. 2018): expand the channels, convolve depthwise, project."""

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
    """EfficientNet-Lite0 up to the input of its classifier, the features averaged over all positions."""

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
        """Map RGB images [B, 3, H, W] in [-1, 1] to features [B, 1280]."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return x.mean((2, 3))
