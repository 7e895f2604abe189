import torch

from sfumato.attacks.simplex import drawn_tokens, project_to_simplex


def bisected(point):
    """The projection as the released program finds it: the shift is bisected."""
    low, high = point.min() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (point - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (point - low).clamp(min=0)


def test_projection_agrees_with_bisection():
    points = 3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = project_to_simplex(points)
    expected = torch.stack([bisected(point) for point in points])
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(found.sum(-1), torch.ones(50, dtype=torch.float64)) and (found >= 0).all()


def test_points_of_the_simplex_stay_and_corners_are_reached():
    inside = torch.rand(4, 2, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.allclose(project_to_simplex(inside), inside, atol=1e-6)
    assert torch.equal(project_to_simplex(torch.tensor([5.0, 0.0, -1.0])), torch.tensor([1.0, 0.0, 0.0]))


def test_tokens_are_drawn_by_their_weights():
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    rows = drawn_tokens(weights.expand(10_000, 4), uniform)
    assert torch.allclose(rows.mean(0), weights, atol=1e-3) and (rows.sum(-1) == 1).all()
    assert drawn_tokens(weights[None], torch.tensor([0.99999999]))[0].argmax() == 3


def test_gradient_passes_straight_through_and_is_clamped():
    weights = torch.full((2, 3), 1 / 3, requires_grad=True)
    factors = torch.tensor([[0.5, -7.0, 1.0], [2.0, 0.0, -0.25]])
    (drawn_tokens(weights, torch.tensor([0.1, 0.9])) * factors).sum().backward()
    assert torch.equal(weights.grad, factors.clamp(-1, 1))
