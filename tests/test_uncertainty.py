"""What is said of several samples holds: errors, intervals and p-values mean what statistics says they do."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

from blip_trace import uncertainty
from blip_trace.uncertainty import bootstrap_interval, paired_test, standard_error


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_standard_error_is_the_spread_of_samples_over_the_root_of_their_number() -> None:
    samples = normal(5, 2, 3)
    error = standard_error(samples)
    assert error.shape == (2, 3)
    for row, column in itertools.product(range(2), range(3)):
        own = statistics.stdev(samples[:, row, column].tolist()) / math.sqrt(5)
        assert error[row, column] == pytest.approx(own, rel=1e-6)
    assert standard_error(samples[:1]).isnan().all()


class TestInterval:
    def test_it_is_reproducible_and_holds_the_mean(self) -> None:
        samples = normal(10, 2, 3)
        lower, upper = bootstrap_interval(samples, seed=3)
        assert lower.shape == upper.shape == (2, 3)
        assert lower.dtype == samples.dtype
        assert (lower < samples.mean(0)).all()
        assert (samples.mean(0) < upper).all()
        again, other = (bootstrap_interval(samples, seed=seed) for seed in (3, 4))
        assert torch.equal(torch.stack(again), torch.stack((lower, upper)))
        assert not torch.equal(torch.stack(other), torch.stack((lower, upper)))

    def test_samples_of_one_number(self) -> None:
        lower, upper = bootstrap_interval(normal(10))
        assert lower.shape == upper.shape == ()
        assert lower < upper

    def test_its_width_shrinks_with_the_root_of_the_samples(self) -> None:
        def width(count: int) -> float:
            lower, upper = bootstrap_interval(normal(count, 200))
            return float((upper - lower).mean())

        assert width(25) / width(100) == pytest.approx(2, rel=0.1)

    def test_a_higher_level_gives_a_wider_one(self) -> None:
        samples = normal(20, 30)
        (low80, high80), (low95, high95) = (bootstrap_interval(samples, level) for level in (0.8, 0.95))
        assert (low95 < low80).all()
        assert (high80 < high95).all()

    @pytest.mark.parametrize(("count", "least", "most"), [(30, 0.88, 0.99), (10, 0.85, 0.94)])
    def test_it_holds_the_truth_as_often_as_it_says(self, count: int, least: float, most: float) -> None:
        """Of ten samples in about 90 % of cases only, as its description warns."""
        held = 0
        for repetition in range(300):
            lower, upper = bootstrap_interval(normal(count, 1, seed=repetition), draws=500, seed=repetition)
            held += bool(lower <= 0 <= upper)
        assert least <= held / 300 <= most

    def test_whole_samples_are_drawn(self) -> None:
        samples = normal(10, 4)
        ends = bootstrap_interval(torch.stack((samples, 2 * samples, -samples), dim=1))
        lower, upper = torch.stack(ends)[:, 0]
        torch.testing.assert_close(torch.stack(ends)[:, 1], torch.stack((2 * lower, 2 * upper)))
        torch.testing.assert_close(torch.stack(ends)[:, 2], torch.stack((-upper, -lower)))
        copies = bootstrap_interval(samples[:, :1].expand(-1, 2))
        assert all(torch.equal(end[:1], end[1:]) for end in copies)

    def test_equal_samples_have_an_interval_of_no_width(self) -> None:
        lower, upper = bootstrap_interval(torch.full((5, 2), 0.3))
        assert torch.equal(lower, upper)
        torch.testing.assert_close(lower, torch.full((2,), 0.3))

    @pytest.mark.parametrize(
        ("samples", "given", "match"),
        [
            (1, {}, "a single sample has no interval"),
            (3, {"level": 0.0}, "lies between 0 and 1, not at 0.0"),
            (3, {"level": 1}, "lies between 0 and 1, not at 1"),
            (3, {"level": 95}, "lies between 0 and 1, not at 95"),
            (3, {"level": math.nan}, "lies between 0 and 1, not at nan"),
            (3, {"draws": 0}, "draws must be a whole number of at least 1, not 0"),
            (3, {"draws": True}, "draws must be a whole number"),
            (3, {"draws": 10.0}, "draws must be a whole number"),
        ],
    )
    def test_what_it_refuses(self, samples: int, given: dict[str, float], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            bootstrap_interval(normal(samples, 2), **given)


def p_values(one: Tensor, two: Tensor) -> tuple[list[float], list[float]]:
    """Of each cell, and of the map's largest |t|: every flip of signs, in plain Python."""
    cells = [(a - b).tolist() for a, b in zip(one.double().T, two.double().T, strict=True)]
    flips = list(itertools.product((1, -1), repeat=len(one)))

    def t(values: list[float], signs: tuple[int, ...]) -> float:
        flipped = [sign * value for sign, value in zip(signs, values, strict=True)]
        return abs(statistics.mean(flipped)) / (statistics.stdev(flipped) / math.sqrt(len(flipped)))

    every = [[t(values, signs) for values in cells] for signs in flips]
    observed = [value * (1 - 1e-9) for value in every[0]]
    own = [sum(row[i] >= least for row in every) / len(flips) for i, least in enumerate(observed)]
    family = [sum(max(row) >= least for row in every) / len(flips) for least in observed]
    return own, family


class TestPairedTest:
    def test_p_values_are_those_of_all_flips_of_signs(self) -> None:
        one, two = normal(6, 5), normal(6, 5, seed=1)
        one += torch.tensor([0.0, 0.3, 1.0, 3.0, -2.0])
        found = paired_test(one, two)
        own, family = p_values(one, two)
        assert found.exact
        assert found.p_value.tolist() == pytest.approx(own)
        assert found.family_p_value.tolist() == pytest.approx(family)
        assert len(set(own)) > 2
        assert own != family
        torch.testing.assert_close(found.difference, (one - two).mean(0))
        torch.testing.assert_close(found.standard_error, standard_error(one - two))

    def test_maps_keep_their_shape(self) -> None:
        found = paired_test(normal(4, 2, 3), normal(4, 2, 3, seed=1))
        shown = (found.difference, found.standard_error, found.p_value, found.family_p_value)
        assert all(part.shape == (2, 3) and part.dtype == torch.float32 for part in shown)
        assert paired_test(normal(4), normal(4, seed=1)).p_value.shape == ()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 8, 9, 12, 14])
    def test_a_constant_difference_has_the_smallest_p_value_there_is(
        self, count: int, dtype: torch.dtype
    ) -> None:
        """However its mean is rounded: it has no spread that could be divided by."""
        for difference, cells in itertools.product((0.1, -0.3, 1 / 3, 0.7, 1e-3, 1e-20), (1, 7, 40)):
            nothing = torch.zeros(count, cells, dtype=dtype)
            found = paired_test(nothing + difference, nothing)
            smallest = torch.full((cells,), 2 / 2**count, dtype=dtype)
            assert torch.equal(found.p_value, smallest)
            assert torch.equal(found.family_p_value, smallest)
            torch.testing.assert_close(found.difference, torch.full_like(smallest, difference))

    def test_identical_maps_do_not_differ(self) -> None:
        samples = normal(5, 2, 3)
        found = paired_test(samples, samples.clone())
        assert (found.difference == 0).all()
        assert (found.p_value == 1).all()
        assert (found.family_p_value == 1).all()

    def test_cells_that_are_equal_do_not_disturb_the_others(self) -> None:
        one, two = normal(6, 3), normal(6, 3, seed=1)
        one[:, 1] = two[:, 1]
        found, alone = paired_test(one, two), paired_test(one[:, [0, 2]], two[:, [0, 2]])
        assert found.p_value[1] == found.family_p_value[1] == 1
        assert torch.equal(found.p_value[[0, 2]], alone.p_value)
        assert torch.equal(found.family_p_value[[0, 2]], alone.family_p_value)

    def test_a_number_that_is_none_is_no_evidence(self) -> None:
        one = normal(6, 2) + 9
        one[0, 0] = math.nan
        found = paired_test(one, normal(6, 2, seed=1))
        assert found.p_value.tolist() == [1, 2 / 64]
        assert found.family_p_value.tolist() == [1, 1]

    def test_p_values_are_uniform_where_nothing_differs(self) -> None:
        found = paired_test(normal(8, 4000), normal(8, 4000, seed=1))
        for steps in (1, 6, 13, 32, 64, 115):
            level = steps * 2 / 2**8
            assert float((found.p_value <= level).double().mean()) == pytest.approx(level, abs=0.02)
        assert (found.family_p_value >= found.p_value).all()

    def test_a_map_is_seldom_said_to_differ_where_nothing_does(self) -> None:
        """Single p-values of twenty cells would say so most of the time."""
        maps, single = 0, 0
        for seed in range(200):
            common = normal(8, 1, seed=1000 + seed)  # cells of a map are not independent
            found = paired_test(normal(8, 20, seed=seed) + common, torch.zeros(8, 20))
            assert (found.family_p_value >= found.p_value).all()
            maps += bool((found.family_p_value <= 0.05).any())
            single += bool((found.p_value <= 0.05).any())
        assert 0.01 <= maps / 200 <= 0.1
        assert single / 200 > 0.25

    def test_many_samples_are_flipped_at_random(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one, two = normal(14, 12) + torch.linspace(0, 1, 12), normal(14, 12, seed=1)
        exact = paired_test(one, two)
        monkeypatch.setattr(uncertainty, "EXACT_SAMPLES", 13)
        drawn = paired_test(one, two)
        assert (exact.exact, drawn.exact) == (True, False)
        assert (exact.p_value < 0.05).any()
        assert (exact.p_value > 0.5).any()
        assert (drawn.p_value - exact.p_value).abs().max() <= 0.015  # four standard errors of 20,000 draws
        assert (drawn.family_p_value - exact.family_p_value).abs().max() <= 0.015
        assert not torch.equal(paired_test(one, two, seed=1).p_value, drawn.p_value)
        assert torch.equal(paired_test(one, two).p_value, drawn.p_value)

    def test_random_flips_never_give_a_p_value_of_nothing(self) -> None:
        found = paired_test(normal(40, 3) + 9, normal(40, 3, seed=1))
        assert not found.exact
        assert (found.p_value == 1 / uncertainty.RANDOM_FLIPS).all()

    @pytest.mark.parametrize(
        ("one", "two", "match"),
        [
            ((3, 2), (3, 4), r"cannot be compared: \[3, 2\] and \[3, 4\]"),
            ((3, 2), (4, 2), r"cannot be compared: \[3, 2\] and \[4, 2\]"),
            ((1, 2), (1, 2), "a single sample cannot be tested"),
        ],
    )
    def test_what_it_refuses(self, one: tuple[int, ...], two: tuple[int, ...], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            paired_test(normal(*one), normal(*two))
