"""The cryptographic generator. False-alarm probabilities stand beside each bound."""

import multiprocessing
import threading

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from fedmed.privacy.chacha import ChaChaStream
from fedmed.privacy.noise import SecureGenerator

ALARM = 1e-9  # per test


def test_normal_passes_kolmogorov_smirnov_and_moments():
    std = 3.0
    x = SecureGenerator().normal(200_000, std, dtype=torch.float64).numpy()
    assert stats.kstest(x / std, "norm").pvalue > ALARM
    # The sample variance is within 1 % of σ² · χ²: 6.1 standard errors of 0.32 % for the std is
    # 0.97 %.
    assert abs(x.std() / std - 1) < 6.1 / np.sqrt(2 * len(x))
    assert abs(x.mean()) < 6.1 * std / np.sqrt(len(x))
    assert abs(stats.kurtosis(x)) < 6.5 * np.sqrt(24 / len(x))


def test_consecutive_values_and_halves_of_a_pair_are_uncorrelated():
    # Cosine and sine of one Box-Muller pair land in the two halves of a chunk.
    x = SecureGenerator().normal(1 << 15, dtype=torch.float64).numpy()
    half = len(x) // 2
    for a, b in ((x[:half], x[half:]), (x[:-1], x[1:]), (x[:half] ** 2, x[half:] ** 2)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 6.2 / np.sqrt(len(a))


@pytest.mark.parametrize("shape", [0, 1, 7, (), (3, 0), (2, 3, 5), 40_000, (1 << 15) + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_shape_dtype_device(shape, dtype):
    x = SecureGenerator().normal(shape, 2.0, dtype=dtype, device="cpu")
    assert x.shape == torch.Size([shape] if isinstance(shape, int) else shape)
    assert x.dtype == dtype
    assert torch.isfinite(x).all()


def test_zero_std_is_zero_and_bad_std_is_refused():
    assert not SecureGenerator().normal(5, 0.0).any()
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std"):
            SecureGenerator().normal(5, std)


def test_no_seed_replays_it():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global seed is what must not matter
        generator = SecureGenerator()
        draws.append((generator.normal(16), generator.permutation(50)))
    assert not torch.equal(draws[0][0], draws[1][0])
    assert not np.array_equal(draws[0][1], draws[1][1])


def test_it_leaves_the_seeded_generators_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    SecureGenerator().normal(100)
    assert torch.equal(torch.rand(4), expected)


def test_bernoulli_rate():
    n, q = 400_000, 0.037
    chosen = SecureGenerator().bernoulli(n, q)
    assert stats.binomtest(len(chosen), n, q).pvalue > ALARM
    assert np.all(np.diff(chosen) > 0)
    assert chosen[-1] < n
    # Every position alike: the selected positions are uniform.
    assert stats.kstest(chosen / n, "uniform").pvalue > ALARM


@pytest.mark.parametrize(("n", "q", "expected"), [(0, 0.5, 0), (9, 0.0, 0), (9, 1.0, 9)])
def test_bernoulli_ends(n, q, expected):
    assert len(SecureGenerator().bernoulli(n, q)) == expected


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_bernoulli_refuses_other_rates(q):
    with pytest.raises(ValueError, match="q="):
        SecureGenerator().bernoulli(3, q)


def test_permutation_is_one_and_uniform():
    generator = SecureGenerator()
    assert sorted(generator.permutation(100)) == list(range(100))
    counts = np.zeros((4, 4))
    for _ in range(4000):
        counts[np.arange(4), generator.permutation(4)] += 1
    assert stats.chisquare(counts.ravel(), ddof=6).pvalue > ALARM


def test_integers_are_uniform_and_in_range():
    x = SecureGenerator().integers(7, 70_000)
    assert set(x) == set(range(7))
    assert stats.chisquare(np.bincount(x)).pvalue > ALARM
    with pytest.raises(ValueError, match="high"):
        SecureGenerator().integers(0, 1)


def test_a_fork_takes_a_new_key():
    generator = SecureGenerator()
    generator.normal(4)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(generator.permutation(1000).tolist()))
    child.start()
    theirs = queue.get()
    child.join()
    assert generator.permutation(1000).tolist() != theirs


def test_threads_take_streams_of_their_own():
    generator = SecureGenerator()
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(tuple(generator.permutation(50))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 4


def test_chacha_gives_the_known_stream_and_no_block_twice():
    key, nonce = bytes(range(32)), b"\1\2\3\4\5\6\7\x80"
    stream = ChaChaStream(torch.device("cpu"), key, nonce)
    ours = torch.cat([stream.words(3), stream.words(5)], dim=1).t().contiguous().numpy().tobytes()
    cipher = Cipher(algorithms.ChaCha20(key, bytes(8) + nonce), None).encryptor()
    assert ours == cipher.update(bytes(64 * 8))


def test_two_chacha_streams_differ_and_their_bits_are_fair():
    one, other = (ChaChaStream(torch.device("cpu")).integers(20_000) for _ in range(2))
    assert not torch.isin(one, other).any()
    uniform = (one & ((1 << 53) - 1)).double().numpy() * 2.0**-53
    assert stats.kstest(uniform, "uniform").pvalue > ALARM


def test_noise_of_an_accelerator_is_normal(monkeypatch):
    """The path of other devices, taken on the CPU."""
    generator = SecureGenerator()

    def from_chacha(pairs, device):
        raw = generator._device_stream(device).integers(2 * pairs)
        return raw.bitwise_and_((1 << 53) - 1).to(torch.float64).view(2, pairs)

    monkeypatch.setattr(generator, "_uniforms", from_chacha)
    x = generator.normal(100_001, 2.0, dtype=torch.float64).numpy()
    assert stats.kstest(x / 2.0, "norm").pvalue > ALARM
