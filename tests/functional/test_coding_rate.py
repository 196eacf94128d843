import math

import numpy as np
import pytest
import torch
from torch import Tensor

from spice_pl.functional.coding_rate import coding_rate, multi_patch_loss
from spice_pl.functional.neighbors import unit_rows


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return unit_rows(rows.flatten(0, -2)).view(shape)


def orthogonal(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(matrix).Q
    return rotation


@pytest.mark.parametrize("size", [3, 8, 40])  # fewer, as many and more images than dimensions
def test_rate_agrees_with_numpy_on_the_papers_side(size: int) -> None:
    rows, width, distortion = embeddings(size, 8), 8, 0.2
    columns = rows.numpy().T  # Z of the paper, (d, B)
    matrix = np.eye(width) + width / (size * distortion) * columns @ columns.T
    sign, log_det = np.linalg.slogdet(matrix)
    assert sign == 1
    assert coding_rate(rows, distortion).item() == pytest.approx(log_det / 2, abs=1e-12)


def test_rate_of_equal_embeddings_is_the_smallest_and_of_an_even_spread_the_largest() -> None:
    equal = torch.tensor([[0.6, 0.8]]).expand(6, 2)
    assert coding_rate(equal, 0.5).item() == pytest.approx(0.5 * math.log(1 + 2 / 0.5))
    even = torch.eye(2).repeat(3, 1)
    assert coding_rate(even, 0.5).item() == pytest.approx(math.log(1 + 1 / 0.5))
    between = coding_rate(embeddings(6, 2), 0.5).item()
    assert 0.5 * math.log(5) < between < math.log(3)


def test_rate_does_not_depend_on_order_or_rotation_and_comes_for_each_leading_index() -> None:
    rows = embeddings(4, 9, 6)
    rates = coding_rate(rows, 0.2)
    assert rates.shape == (4,)
    torch.testing.assert_close(coding_rate(rows.flip(1) @ orthogonal(6), 0.2), rates)
    torch.testing.assert_close(coding_rate(rows[2], 0.2), rates[2])


def test_gradient_of_the_rate_is_the_closed_one() -> None:
    """dR/dZ = a (I + a ZᵀZ)⁻¹ applied to the rows, with a = P / (B ε²)."""
    for size in (4, 12):
        rows = embeddings(size, 6).requires_grad_(True)
        (slope,) = torch.autograd.grad(coding_rate(rows, 0.2), rows)
        values = rows.detach().numpy()
        a = 6 / (size * 0.2)
        expected = a * values @ np.linalg.inv(np.eye(6) + a * values.T @ values)
        np.testing.assert_allclose(slope.numpy(), expected, atol=1e-12)


def test_gradient_of_the_loss_is_its_slope() -> None:
    rows = embeddings(5, 3, 4).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: multi_patch_loss(x, 0.1, 0.2), (rows,))


def test_autocast_does_not_lower_the_precision_of_the_rate() -> None:
    rows = embeddings(64, 32).float()
    expected = coding_rate(rows, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        found = coding_rate(rows, 0.2)
        assert (rows @ rows.T).dtype == torch.bfloat16  # autocast is on
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    half = coding_rate(rows.bfloat16(), 0.2)  # rounded before, computed in float32
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=1e-2, atol=0)


def test_loss_agrees_with_the_formula_written_out() -> None:
    patches, weight, distortion = embeddings(5, 3, 4), 0.3, 0.2
    cosines, rates = [], []
    for image in patches.numpy():
        mean = image.mean(axis=0)
        cosines += [z @ mean / np.linalg.norm(mean) for z in image]
    for i in range(3):
        z = patches[:, i].numpy()
        rates.append(0.5 * np.linalg.slogdet(np.eye(4) + 4 / (5 * distortion) * z.T @ z)[1])
    expected = -np.mean(cosines) - weight * np.mean(rates)
    loss = multi_patch_loss(patches, weight, distortion)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_order_of_images_and_of_patches_does_not_matter() -> None:
    patches = embeddings(6, 4, 5)
    loss = multi_patch_loss(patches, 0.1, 0.2)
    torch.testing.assert_close(multi_patch_loss(patches.flip(0), 0.1, 0.2), loss)
    torch.testing.assert_close(multi_patch_loss(patches.flip(1), 0.1, 0.2), loss)


def test_collapsed_embeddings_have_the_largest_cosine_and_the_smallest_rate() -> None:
    equal = embeddings(1, 1, 4).expand(6, 3, 4)
    smallest = 0.5 * math.log(1 + 4 / 0.2)
    assert multi_patch_loss(equal, 0.1, 0.2).item() == pytest.approx(-1 - 0.1 * smallest)
    apart = torch.eye(4, dtype=torch.float64)[:, None].expand(4, 3, 4)
    assert multi_patch_loss(apart, 0.1, 0.2) < multi_patch_loss(equal, 0.1, 0.2)


def test_inputs_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="distortion 0 is not positive"):
        coding_rate(torch.eye(2), 0)
    with pytest.raises(ValueError, match=r"\(0, 2\) are not \(\.\.\., B, P\)"):
        coding_rate(torch.empty(0, 2), 0.2)
    with pytest.raises(ValueError, match=r"\(2, 2\) are not \(B, n, P\)"):
        multi_patch_loss(torch.eye(2), 0.1, 0.2)
