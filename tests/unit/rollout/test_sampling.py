"""Counter-based sampling: the hash, the distribution and the inverse CDF."""

import pytest
import torch

from rltrain.rollout.sampling import distribution, inverse_cdf, row_key, sample, uniforms

MASK = (1 << 64) - 1


def splitmix64(key: int, position: int) -> int:
    """The reference in unbounded integers (Steele, Lea, Flood 2014)."""
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64():
    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF  # the published first output of seed 0
    keys = [0, 1, -1, row_key(0, 0, "a", 0), row_key(7, 3, "b", 5), (1 << 63) - 1]
    positions = [0, 1, 2, 1000, 99_999, 0]
    expected = [(splitmix64(k & MASK, p) >> 11) / 2**53 for k, p in zip(keys, positions, strict=True)]
    assert uniforms(torch.tensor(keys), torch.tensor(positions)).tolist() == expected


def test_uniforms_are_uniform_over_rows_and_positions():
    keys = torch.tensor([row_key(1, step, f"problem-{p}", g) for step in range(4) for p in range(25) for g in range(4)])
    values = uniforms(keys[:, None], torch.arange(250)[None])
    counts = torch.histc(values.float(), bins=100, min=0, max=1)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 148  # 99.9 % quantile of chi-square with 99 degrees of freedom
    for pair in (values[:, 1:] * values[:, :-1], values[1:] * values[:-1]):
        assert abs(pair.mean() - 0.25) < 4 * (7 / 144 / pair.numel()) ** 0.5  # variance of a product of two uniforms


def test_row_key_is_stable_and_separates_its_arguments():
    assert row_key(1, 2, "problem", 3) == -918358443318172569
    arguments = [(s, t, p, g) for s in (0, 1) for t in (0, 1, 10) for p in ("1", "11", "a") for g in (0, 1, 11)]
    keys = {row_key(*each) for each in arguments}
    assert len(keys) == len(arguments)
    repeats = {row_key(*each, occurrence) for each in arguments for occurrence in (1, 2, 11)}
    assert len(repeats) == 3 * len(arguments) and not repeats & keys


def test_the_first_occurrence_has_the_key_of_a_problem_that_occurs_once():
    assert row_key(1, 2, "problem", 3, 0) == row_key(1, 2, "problem", 3)
    assert row_key(1, 2, "problem", 3, 1) != row_key(1, 2, "1/problem", 3)


@pytest.mark.parametrize("size", [5, 1024, 1025, 1300, 3000])
def test_inverse_cdf_is_the_plain_search(size):
    generator = torch.Generator().manual_seed(size)
    weights_BV = torch.rand(400, size, generator=generator) ** 8
    weights_BV[torch.rand(400, size, generator=generator) < 0.4] = 0
    weights_BV[:, -2] = 0.5
    weights_BV[:, -1] = 0
    uniforms_B = torch.rand(400, dtype=torch.float64, generator=generator)
    uniforms_B[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    chosen_B = inverse_cdf(weights_BV, uniforms_B)
    running_BV = weights_BV.double().cumsum(-1)
    target_B1 = (uniforms_B * running_BV[:, -1])[:, None]
    assert (weights_BV.gather(-1, chosen_B[:, None]) > 0).all()
    # The running sum passes the target at the chosen index, up to the fp32 rounding of a block's sum.
    slack_B1 = 1e-6 * running_BV[:, -1:]
    upper_B1 = running_BV.gather(-1, chosen_B[:, None])
    lower_B1 = upper_B1 - weights_BV.gather(-1, chosen_B[:, None])
    assert (lower_B1 <= target_B1 + slack_B1).all() and (target_B1 < upper_B1 + slack_B1).all()
    expected_B = torch.searchsorted(running_BV, target_B1, right=True)[:, 0]
    assert (chosen_B == expected_B).float().mean() > 0.99


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8}]
)
def test_sampled_frequencies_follow_the_distribution(options):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    logits_V = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.9, -1.5, 0.0, 1.4])
    draws = 40_000
    uniforms_B = uniforms(torch.tensor(row_key(0, 0, "chi", 0)), torch.arange(draws))
    tokens_B, logprobs_B = sample(logits_V.expand(draws, -1), uniforms_B, **options)
    expected_V = distribution(logits_V[None], **options)[0].double()
    torch.testing.assert_close(logprobs_B, expected_V.float().log()[tokens_B], atol=1e-6, rtol=0)
    counts_V = torch.bincount(tokens_B, minlength=8).double()
    support_V = expected_V > 0
    assert counts_V[~support_V].sum() == 0
    chi_square = ((counts_V - draws * expected_V)[support_V] ** 2 / (draws * expected_V[support_V])).sum()
    assert chi_square < {2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 7: 24.3}.get(int(support_V.sum()) - 1, 13.8)  # 99.9 %


def test_distribution_by_hand():
    logits_BV = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def close(options, expected):
        torch.testing.assert_close(distribution(logits_BV, **(whole | options)), torch.tensor([expected]))

    close({}, [0.4, 0.3, 0.2, 0.1])
    close({"temperature": 0.5}, [0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3, 0.01 / 0.3])
    close({"top_k": 2}, [4 / 7, 3 / 7, 0, 0])
    close({"top_k": 9}, [0.4, 0.3, 0.2, 0.1])
    close({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0])  # 0.4 is not enough, 0.7 is
    close({"top_p": 0.01}, [1.0, 0, 0, 0])
    close({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0])  # mass is counted after top-k: 4/9, then 7/9


def test_greedy_is_a_point_mass():
    logits_BV = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    tokens_B, logprobs_B = sample(logits_BV, torch.tensor([0.99, 0.99]), temperature=0.0, top_k=0, top_p=1.0)
    assert tokens_B.tolist() == [1, 0] and logprobs_B.tolist() == [0.0, 0.0]


def test_a_row_does_not_depend_on_its_neighbours():
    logits_BV = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    uniforms_B = uniforms(torch.arange(64), torch.zeros(64, dtype=torch.int64))
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    whole = sample(logits_BV, uniforms_B, **options)
    order = torch.arange(63, -1, -1)
    for tokens, reordered in zip(whole, sample(logits_BV[order], uniforms_B[order], **options), strict=True):
        assert torch.equal(tokens, reordered[order])
