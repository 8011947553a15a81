"""Keyed noise: the same for a key whatever stands beside it, and statistically what its name says."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.uniform_noise import draw
from robustbench_cure.threat import ThreatModel

IDS = [f"digits/{i:04d}" for i in range(300)]
KINDS = ("uniform", "normal", "signs")


def take(noise: Noise, kind: str, shape=(3, 5), stream=0) -> torch.Tensor:
    return getattr(noise, kind)(shape, stream)


# --- keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_the_key_alone(kind):
    whole = take(Noise.for_samples(3, "pgd", IDS), kind)
    again = take(Noise.for_samples(3, "pgd", IDS), kind)
    assert torch.equal(whole, again)
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))
    shuffled = take(Noise.for_samples(3, "pgd", [IDS[i] for i in order]), kind)
    assert torch.equal(shuffled, whole[order])
    alone = take(Noise.for_samples(3, "pgd", IDS[41:42]), kind)
    assert torch.equal(alone[0], whole[41])
    rows = torch.tensor([7, 3, 7])
    assert torch.equal(take(Noise.for_samples(3, "pgd", IDS)[rows], kind), whole[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_one_stream_for_all_rows_or_one_each(kind):
    noise = Noise.for_samples(0, "pgd", IDS[:4])
    each = take(noise, kind, stream=torch.tensor([0, 5, 0, 9]))
    for row, stream in enumerate([0, 5, 0, 9]):
        assert torch.equal(each[row], take(noise, kind, stream=stream)[row])


@pytest.mark.parametrize("kind", ["uniform", "signs"])
def test_a_longer_draw_begins_with_the_shorter_one(kind):
    noise = Noise.for_rows(3)
    assert torch.equal(take(noise, kind, (128,))[:, :64], take(noise, kind, (64,)))


def test_seed_purpose_sample_and_stream_all_matter():
    base = take(Noise.for_samples(0, "pgd", IDS[:1]), "uniform", (64,))
    others = [
        take(Noise.for_samples(1, "pgd", IDS[:1]), "uniform", (64,)),
        take(Noise.for_samples(0, "spsa", IDS[:1]), "uniform", (64,)),
        take(Noise.for_samples(0, "pgd", IDS[1:2]), "uniform", (64,)),
        take(Noise.for_samples(0, "pgd", IDS[:1]), "uniform", (64,), 1),
    ]
    for other in others:
        assert (base != other).all()


def test_draws_are_frozen():
    """Published numbers depend on these bits: changing the generator changes every record."""
    noise = Noise.for_samples(0, "pgd", ["digits/0000"])
    assert noise.keys.tolist() == [-6800387173620039192]
    assert noise.bits(2, 0).tolist() == [[-3629374249007398466, 8941995995487996655]]


def splitmix64(seed: int, count: int) -> list[int]:
    """Steele, Lea & Flood's generator in Python's own integers, as published: state, then mixed output."""
    words = []
    for _ in range(count):
        seed = z = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        words.append(z ^ (z >> 31))
    return words


def test_the_reference_has_the_published_values():
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("stream", [0, 1, 4711, 2**40])
@pytest.mark.parametrize("key", [0, 1234567, -1, -6800387173620039192, 2**63 - 1])
def test_every_draw_is_splitmix64(key, stream):
    """A stream is the generator seeded with output number ``stream`` of the one that the key seeds."""
    noise = Noise(torch.tensor([key]))
    seed = splitmix64((key + stream * 0x9E3779B97F4A7C15) % 2**64, 1)[0]
    words = splitmix64(seed, 20)
    assert [word % 2**64 for word in noise.bits(20, stream)[0].tolist()] == words
    shares = [half / 2**24 for word in words for half in (word % 2**24, word >> 40)]
    assert noise.uniform((13, 3), stream)[0].flatten().tolist() == shares[:39]
    signs = [(word >> bit) % 2 * 2 - 1 for word in words for bit in range(64)]
    assert noise.signs((150,), stream)[0].tolist() == signs[:150]
    normal = [
        math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)
        for u, v in zip(shares[:19], shares[19:38], strict=True)
    ]
    assert noise.normal((19,), stream)[0].tolist() == pytest.approx(normal, abs=1e-5)


def test_keys_are_the_digest_of_seed_purpose_and_sample():
    told = [hashlib.blake2b(text, digest_size=8).digest() for text in (b"7/spsa/a/1", b"7/spsa/b")]
    expected = [int.from_bytes(digest, "little", signed=True) for digest in told]
    assert Noise.for_samples(7, "spsa", ["a/1", "b"]).keys.tolist() == expected
    assert torch.equal(Noise.for_rows(2, seed=7).keys, Noise.for_samples(7, "rows", ["0", "1"]).keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 8, 8), (65,), (2, 64)])
def test_shapes_and_types(kind, shape):
    drawn = take(Noise.for_rows(5), kind, shape)
    assert drawn.shape == (5, *shape)
    assert drawn.dtype == torch.float32


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = take(Noise.for_rows(5), "normal")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(take(Noise.for_rows(5), "normal"), one)


# --- distributions -----------------------------------------------------------------------------------


def test_uniform_is_uniform():
    drawn = take(Noise.for_samples(0, "pgd", IDS), "uniform", (400,)).numpy().astype(np.float64)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    assert abs(drawn.mean() - 0.5) < 4 * np.sqrt(1 / 12 / drawn.size)
    assert abs(drawn.var() - 1 / 12) < 1e-3
    # Every coordinate by itself too: mean over samples.
    assert np.abs(drawn.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / len(IDS))


def test_normal_is_normal():
    drawn = take(Noise.for_samples(0, "pgd", IDS), "normal", (401,)).numpy().astype(np.float64)
    assert np.isfinite(drawn).all()
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 1e-3
    assert abs(drawn.mean()) < 4 / np.sqrt(drawn.size)
    assert abs(drawn.var() - 1) < 0.02
    assert abs(stats.kurtosis(drawn.ravel())) < 0.06


def test_signs_are_balanced_and_pairwise_uncorrelated():
    signs = take(Noise.for_rows(1), "signs", (2000, 70)).numpy()[0].astype(np.float64)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / np.sqrt(signs.size)
    products = signs.T @ signs / len(signs)
    off = products[~np.eye(70, dtype=bool)]
    assert np.abs(off).max() < 5.5 / np.sqrt(len(signs))
    assert abs(off.std() * np.sqrt(len(signs)) - 1) < 0.05  # neither correlated nor too regular
    assert np.abs(np.linalg.eigvalsh(products) - 1).max() < 0.5  # directions span the space evenly


@pytest.mark.parametrize("kind", KINDS)
def test_neighbouring_streams_rows_and_seeds_are_uncorrelated(kind):
    rows = take(Noise.for_rows(20), kind, (1000,))
    streams = torch.cat([take(Noise.for_rows(1), kind, (1000,), stream) for stream in range(1, 20)])
    seeds = torch.cat([take(Noise.for_rows(1, seed), kind, (1000,)) for seed in range(1, 20)])
    table = torch.cat((rows, streams, seeds)).double().numpy()
    correlation = np.corrcoef(table)[~np.eye(len(table), dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(1000)


def test_neighbouring_streams_share_no_words():
    noise = Noise.for_rows(40)
    words = torch.cat([noise.bits(200, stream) for stream in range(25)])
    assert len(torch.unique(words)) == words.numel()


def test_bits_of_a_word_are_balanced():
    words = Noise.for_rows(50).bits(200, 0).numpy().view(np.uint8)
    ones = np.unpackbits(words.reshape(-1, 8), axis=1).mean(0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(10_000)


# --- random starts -----------------------------------------------------------------------------------


def test_linf_start_is_uniform_in_every_pixel():
    x = torch.full((2000, 1, 2, 2), 0.5)
    threat = ThreatModel.parse("linf", "1/10")
    delta = (draw(x, threat, Noise.for_rows(2000), 0) - x).flatten(1).numpy() / 0.1
    for pixel in delta.T:
        assert stats.kstest(pixel, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(delta.T)[~np.eye(4, dtype=bool)]).max() < 5 / np.sqrt(2000)


def test_l2_start_is_uniform_in_the_ball():
    x = torch.full((3000, 1, 1, 3), 0.5)
    threat = ThreatModel.parse("l2", "1/10")
    delta = (draw(x, threat, Noise.for_rows(3000), 0) - x).flatten(1).double().numpy() / 0.1
    radius = np.linalg.norm(delta, axis=1)
    assert stats.kstest(radius**3, "uniform").pvalue > 1e-3  # volume fraction
    cosines = delta / radius[:, None]
    assert stats.kstest(cosines[:, 0], stats.uniform(-1, 2).cdf).pvalue > 1e-3  # Archimedes, in 3-d
    assert np.abs(delta.mean(0)).max() < 5 * np.sqrt(1 / 5 / 3000)
    for cosine in cosines.T:  # length and direction are independent
        assert abs(np.corrcoef(radius, cosine)[0, 1]) < 5 / np.sqrt(3000)
        assert abs(np.corrcoef(radius, cosine**2)[0, 1]) < 5 / np.sqrt(3000)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_of_other_restarts_and_seeds_differ(norm):
    x, threat = torch.full((4, 1, 3, 3), 0.5), ThreatModel.parse(norm, "1/10")
    one = draw(x, threat, Noise.for_rows(4), 0)
    assert (one != draw(x, threat, Noise.for_rows(4), 1)).flatten(1).any(1).all()
    assert (one != draw(x, threat, Noise.for_rows(4, seed=1), 0)).flatten(1).any(1).all()
    assert torch.equal(one, draw(x, threat, Noise.for_rows(4), torch.zeros(4, dtype=torch.int64)))
