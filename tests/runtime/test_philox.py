"""Counter-based random numbers against known answers, another implementation, and the normal distribution."""

import numpy as np
import pytest
import torch

from ddpm_from_scratch.runtime import philox, random_streams
from ddpm_from_scratch.runtime.philox import LABEL, NOISE, PLACEMENT, WORD, standard_normal, tables, words

CPU = torch.device("cpu")

# From `kat_vectors` of Random123: counter, key, words of philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def by_integers(counter, key):
    """Philox-4x32-10 in Python's own integers, one counter at a time, as the paper's figure has it."""
    left_0, right_0, left_1, right_1 = counter
    for round_number in range(10):
        k_0 = (key[0] + round_number * 0x9E3779B9) % 2**32
        k_1 = (key[1] + round_number * 0xBB67AE85) % 2**32
        high_0, low_0 = divmod(0xD2511F53 * left_0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * left_1, 2**32)
        left_0, right_0, left_1, right_1 = high_1 ^ right_0 ^ k_0, low_1, high_0 ^ right_1 ^ k_1, low_0
    return left_0, right_0, left_1, right_1


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert by_integers(counter, key) == expected
    assert tuple(int(word) for word in philox.philox([torch.tensor(word) for word in counter], key)) == expected


def test_words_are_those_of_their_counters():
    seed, positions = 2**63 + 12345, torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 7])
    got = words(seed, NOISE, positions, torch.arange(3))
    for row, position in zip(got.tolist(), positions.tolist(), strict=True):
        blocks = [
            by_integers((block, NOISE, position % 2**32, position // 2**32), (seed % 2**32, seed // 2**32))
            for block in range(3)
        ]
        assert row == [word for block in blocks for word in block]


@pytest.mark.parametrize("split", [1, 3, 4])
def test_a_word_depends_on_nothing_but_seed_purpose_and_place(split):
    positions = torch.arange(100, 112)
    blocks = torch.arange(3)
    whole = words(5, NOISE, positions, blocks)
    assert torch.equal(torch.cat([words(5, NOISE, part, blocks) for part in positions.split(split)]), whole)
    assert torch.equal(words(5, NOISE, positions, blocks[:1]), whole[:, :4])
    others = [
        words(5, LABEL, positions, blocks),
        words(5, PLACEMENT, positions, blocks),
        words(6, NOISE, positions, blocks),
    ]
    for other in others:
        assert (other == whole).sum() == 0


def test_words_are_made_where_the_positions_are():
    meta = torch.arange(3, device="meta")
    look_up = tables(torch.device("meta"), 16)
    assert words(0, NOISE, meta, look_up.blocks).device.type == "meta"
    noise = standard_normal(0, meta, (1, 4, 4), look_up)
    assert noise.shape == (3, 1, 4, 4) and noise.device.type == "meta"


def test_quantiles_are_those_of_half_the_variance():
    table = tables(CPU, 1).quantiles
    assert table.dtype == torch.float32 and table.shape == (2**16,)
    assert torch.equal(table, -table.flip(0)) and bool((table.diff() > 0).all())
    assert abs(float(table.double().square().mean()) - 0.5) < 1e-8


def many_normals(count, row=1000):
    """So many draws, float64, sorted by nothing: rows of 1,000 from positions that follow each other."""
    rows = torch.arange(count // row).split(1000)
    return torch.cat([standard_normal(11, part, (row,), tables(CPU, row)) for part in rows]).double()


@pytest.mark.full
def test_ten_million_draws_are_normal():
    drawn = many_normals(10_000_000)
    flat = drawn.flatten()
    count = len(flat)
    # Moments, with the standard errors that those of a normal distribution have.
    assert abs(flat.mean()) < 4 * count**-0.5
    assert abs(flat.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs(flat.pow(3).mean()) < 4 * (15 / count) ** 0.5
    assert abs(flat.pow(4).mean() - 3) < 4 * (96 / count) ** 0.5
    # Tails.
    for limit in (2.0, 3.0, 4.0, 5.0):
        share = 2 * float(torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64)))
        assert abs(int((flat.abs() > limit).sum()) - share * count) < 4 * (share * count) ** 0.5, limit
    assert flat.abs().max() < 6.13
    # Neighbours within an image, and the same place in neighbouring images.
    for lag in (1, 2, 3, 4, 5, 28, 784):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 4 * count**-0.5, lag
    for lag in (1, 2, 256):
        assert abs((drawn[lag:] * drawn[:-lag]).mean()) < 4 * count**-0.5, lag
    # Kolmogorov and Smirnov: sqrt(n) D exceeds 1.63 in one of 100 cases.
    uniform = torch.special.ndtr(flat.sort().values).numpy()
    grid = np.arange(count + 1) / count
    distance = max(np.abs(uniform - grid[1:]).max(), np.abs(uniform - grid[:-1]).max())
    assert count**0.5 * distance < 1.63


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # Inductor's own
def test_compiled_code_draws_the_same_bits():
    positions, table = torch.arange(2**32 - 3, 2**32 + 3), tables(CPU, 192)
    compiled = torch.compile(standard_normal, dynamic=False)
    assert torch.equal(compiled(3, positions, (3, 8, 8), table), standard_normal(3, positions, (3, 8, 8), table))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_bits():
    positions, device = torch.arange(2**32 - 3, 2**32 + 3), torch.device("cuda")
    expected = standard_normal(3, positions, (3, 8, 8), tables(CPU, 192))
    assert torch.equal(standard_normal(3, positions.to(device), (3, 8, 8), tables(device, 192)).cpu(), expected)


@pytest.mark.parametrize("kind", random_streams.DRAWS)
def test_both_kinds_draw_placement_labels_and_noise_by_position(kind):
    draws, positions = random_streams.DRAWS[kind], torch.arange(4000)
    placed, label = draws.placement(0, positions), draws.label(0, positions)
    assert placed.shape == (4000, 3) and label.shape == (4000,)
    for drawn in (*placed.T, label):
        assert int(drawn.min()) >= 0 and int(drawn.max()) <= WORD
        assert abs(float(drawn.double().mean()) / 2**32 - 0.5) < 4 * (12 * 4000) ** -0.5
    noise = draws.noise(0, positions[:100], (1, 8, 8))
    assert noise.dtype == torch.float32 and noise.shape == (100, 1, 8, 8)
    assert abs(float(noise.mean())) < 4 / 80 and abs(float(noise.std()) - 1) < 4 * (2 * 6400) ** -0.5
    assert torch.equal(draws.noise(0, positions[7:9], (1, 8, 8)), noise[7:9])
    assert not torch.equal(draws.noise(1, positions[:100], (1, 8, 8)), noise)
