import pytest
import torch

from sfumato.unlearning.gradient_surgery import official, projection


def gradients(conflict=True, norm=1.0):
    """Two gradients over three tensors, the first clipped to a norm."""
    generator = torch.Generator().manual_seed(4)
    first, second = ([torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 2))] for _ in range(2))
    if (dot(first, second) < 0) != conflict:
        second = [-part for part in second]
    length = torch.nn.utils.get_total_norm(first)
    return [norm * part / length for part in first], second


def dot(first, second):
    return sum((a * b).sum() for a, b in zip(first, second, strict=True)).item()


def test_projection_leaves_nothing_that_works_against_the_preserved_loss():
    gradient, preserved = gradients()
    assert dot(gradient, preserved) < -0.1
    assert dot(projection(gradient, preserved, 1.0), preserved) == pytest.approx(0, abs=1e-6)


def test_projection_by_hand():
    after = projection([torch.tensor([1.0]), torch.tensor([2.0])], [torch.tensor([1.0]), torch.tensor([-1.0])], 1.0)
    assert [part.item() for part in after] == [1.5, 1.5]  # (1, 2) - (-1 / 2) (1, -1)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 2.0])
def test_projection_takes_out_the_share_that_it_is_told(weight):
    gradient, preserved = gradients()
    before = dot(gradient, preserved)
    assert dot(projection(gradient, preserved, weight), preserved) == pytest.approx((1 - weight) * before, abs=1e-6)


def test_projection_is_over_all_tensors_at_once():
    """One tensor conflicts and the other agrees more strongly: there is no conflict."""
    gradient, preserved = [torch.tensor([1.0]), torch.tensor([3.0])], [torch.tensor([-1.0]), torch.tensor([1.0])]
    assert [part.item() for part in projection(gradient, preserved)] == [1, 3]
    assert official(gradient, preserved)[0].item() != 1


@pytest.mark.parametrize("surgery", [projection, official])
def test_gradients_that_agree_in_every_tensor_are_left_alone(surgery):
    gradient, _ = gradients()
    preserved = [2 * part for part in gradient]
    assert all(torch.equal(a, b) for a, b in zip(surgery(gradient, preserved), gradient, strict=True))


def test_projection_does_not_depend_on_the_length_of_what_is_preserved_and_official_does_not_either():
    gradient, preserved = gradients()
    longer = [7 * part for part in preserved]
    for surgery in (projection, official):
        for a, b in zip(surgery(gradient, preserved), surgery(gradient, longer), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_official_is_the_released_formula_tensor_by_tensor():
    gradient, preserved = gradients()
    for g, r, after in zip(gradient, preserved, official(gradient, preserved, 0.7), strict=True):
        cosine = (g / g.norm() * (r / r.norm())).sum()
        expected = g - 0.7 * cosine * r / r.norm() if cosine < 0 else g
        assert torch.allclose(after, expected, atol=1e-6)


def test_official_turns_the_sign_of_a_conflict_where_projection_ends_it():
    gradient, preserved = gradients(norm=1.0)
    conflicts = 0
    for g, r, after in zip(gradient, preserved, official(gradient, preserved, 1.0), strict=True):
        before, left = ((part * r).sum() / r.norm() for part in (g, after))
        if before < 0:
            conflicts += 1
            cosine = before / g.norm()
            assert g.norm() < 1  # part of a gradient that was clipped to 1
            assert left.item() == pytest.approx((cosine * (g.norm() - 1)).item(), abs=1e-6)
            assert left > 0.02
    assert conflicts >= 2


@pytest.mark.parametrize("surgery", [projection, official])
def test_tensor_without_gradient_stays_so(surgery):
    zero = torch.zeros(3)
    after = surgery([zero, torch.ones(2)], [torch.ones(3), -torch.ones(2)])
    assert all(part.isfinite().all() for part in after)
    after = surgery([torch.ones(3), torch.ones(2)], [zero, torch.zeros(2)])
    assert all(torch.equal(part, torch.ones_like(part)) for part in after)
