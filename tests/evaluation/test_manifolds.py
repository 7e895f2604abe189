import pytest
import torch

from sfumato.evaluation.manifolds import (
    authenticity,
    compare_manifolds,
    local_outlier_factors,
    neighbour_distances,
)


def line(*places):
    """Features of one dimension."""
    return torch.tensor(places, dtype=torch.float32)[:, None]


def normal(count, seed, features=8):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def test_manifolds_of_points_on_a_line_are_those_of_a_hand_calculation():
    # Real balls to the nearest neighbour: [-1, 1], [0, 2], [1, 5], [3, 7].
    # Generated ones: [0.4, 0.6], [0.5, 0.7], [0.6, 19.4].
    real, generated = line(0, 1, 3, 5), line(0.5, 0.6, 10)
    real_radii_reach = {0.5: 2, 0.6: 2, 10: 0}
    found = compare_manifolds(generated, real, k=1)
    assert (found.precision.successes, found.precision.total) == (2, 3)
    assert (found.recall.successes, found.recall.total) == (3, 4)  # 1, 3 and 5 lie in the last, 0 in none
    assert found.density.value == pytest.approx(sum(real_radii_reach.values()) / 3)
    assert (found.coverage.successes, found.coverage.total) == (2, 4)


def test_density_counts_balls_over_k():
    real, generated = line(0, 1, 2, 3), line(1.5, 50, 60)
    # To the second neighbour: [-2, 2], [0, 2], [1, 3], [1, 5]; all four hold 1.5, none holds the others.
    found = compare_manifolds(generated, real, k=2)
    assert found.density.value == pytest.approx((4 / 2 + 0 + 0) / 3)
    assert found.coverage.value == 1.0 and found.precision.value == pytest.approx(1 / 3)


def test_manifolds_of_equal_distributions_agree_and_of_distant_ones_do_not():
    same = compare_manifolds(normal(200, 0), normal(200, 1))
    assert same.density.low < 1 < same.density.high and same.coverage.value > 0.9
    apart = compare_manifolds(normal(200, 0) + 20, normal(200, 1))
    assert apart.precision.value == apart.recall.value == apart.density.value == apart.coverage.value == 0


def test_a_collapsed_model_keeps_precision_and_loses_recall_and_coverage():
    found = compare_manifolds(0.05 * normal(200, 0), normal(200, 1))
    assert found.precision.value == 1 and found.recall.value < 0.2 and found.coverage.value < 0.6


@pytest.mark.parametrize(("generated", "k"), [(line(0, 1, 2), 3), (line(0, 1, 2), 0), (line(0), 1)])
def test_too_few_samples_are_refused(generated, k):
    with pytest.raises(ValueError, match="samples"):
        compare_manifolds(generated, line(0, 1, 2, 3, 4), k=k)


def test_authenticity_of_points_on_a_line_is_that_of_a_hand_calculation():
    # Nearest to 0.1 is 0, whose neighbour is at 1: a copy. Nearest to 20 is 10, whose neighbour is 9 away: authentic.
    found = authenticity(line(0.1, 20, 3), line(0, 1, 10))  # 3 is 2 from 1, whose neighbour is at 1: authentic
    assert (found.successes, found.total) == (2, 3)


def test_copies_are_not_authentic_and_new_samples_mostly_are():
    training = normal(300, 0)
    assert authenticity(training[:100] + 1e-3, training).value == 0
    assert authenticity(normal(300, 1), training).value > 0.4


def test_neighbour_distances_of_points_on_a_line_are_those_of_a_hand_calculation():
    found = neighbour_distances(line(0, 2.5, 10), line(0, 1, 3), k=2)
    assert found.tolist() == pytest.approx([0.5, (0.5 + 1.5) / 2, (7 + 9) / 2])


def test_outlier_factors_of_points_on_a_line_are_those_of_a_hand_calculation():
    # Second neighbours: 0: 2; 1: 1; 2: 2; 4.5: 3.5. Means of the reach: 0: (1 + 2) / 2; 1: (2 + 2) / 2;
    # 2: (1 + 2) / 2; 4.5: (2.5 + 3.5) / 2. Of 7: to 4.5 max(2.5, 3.5), to 2 max(5, 2): 4.25.
    found = local_outlier_factors(line(7), line(0, 1, 2, 4.5), k=2)
    assert float(found) == pytest.approx((1 / 3.0 + 1 / 1.5) / 2 * 4.25)


def test_outlier_factors_are_one_within_and_large_without_whatever_the_scale():
    real = normal(400, 0)
    within, without = (local_outlier_factors(samples, real) for samples in (normal(50, 1), normal(50, 1) + 6))
    assert 0.95 < float(within.mean()) < 1.2 and float(without.min()) > 1.3
    assert torch.allclose(local_outlier_factors(100 * normal(50, 1), 100 * real), within)
    assert torch.isfinite(local_outlier_factors(torch.zeros(3, 2), torch.zeros(30, 2))).all()


@pytest.mark.parametrize(("function", "k"), [(neighbour_distances, 4), (neighbour_distances, 0)])
def test_too_few_neighbours_are_refused(function, k):
    with pytest.raises(ValueError, match="`k` must be"):
        function(line(0), line(0, 1, 2), k=k)


def test_outlier_factors_need_a_neighbour_more():
    with pytest.raises(ValueError, match="need more than 3"):
        local_outlier_factors(line(0), line(0, 1, 2), k=3)
