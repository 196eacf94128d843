import torch

from spice_pl.functional.attention import cosine_attention, stretched


def test_attention_by_hand() -> None:
    # Features along the centre, against it, at a right angle to it, and zero.
    east, north = [[3.0, -1.0], [2.0, 0.0]], [[3.0, -1.0], [-2.0, 0.0]]
    places = torch.tensor([[east, north]])  # (1, 2, 2, 2)
    attention = cosine_attention(places, torch.tensor([[5.0, 5.0]]))
    torch.testing.assert_close(attention, torch.tensor([[[1.0, -1.0], [0.0, 0.0]]]))
    torch.testing.assert_close(stretched(attention), torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]))
    assert not cosine_attention(places, torch.zeros(1, 2)).any()


def test_a_uniform_map_is_1_everywhere_and_noise_is_not_stretched() -> None:
    even = torch.full((1, 3, 3), 0.7)
    assert (stretched(even) == 1).all()
    noise = even + 1e-3 * torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert stretched(noise).min() > 0.97
