"""What is said about a file whose format cannot be decoded."""

import io

import pytest
from PIL import UnidentifiedImageError

from spice_pl.data import formats
from spice_pl.data.formats import open_image

AVIF = b"\0\0\0\x1cftypavif" + b"\0" * 100
HEIC = b"\0\0\0\x18ftypheic" + b"\0" * 100


@pytest.mark.parametrize(
    ("head", "known", "said"),
    [
        (AVIF, ("PNG", "AVIF"), "damaged AVIF"),
        (AVIF, ("PNG",), "AVIF needs Pillow 11.3 or newer"),
        (AVIF, ("PNG", "HEIF"), "AVIF needs Pillow 11.3 or newer"),
        (HEIC, ("PNG", "AVIF"), "HEIC needs one more package; pip install 'spice-pl[heic]'"),
        (HEIC, ("PNG", "AVIF", "HEIF"), "cannot identify image file"),
    ],
)
def test_the_missing_decoder_is_the_one_of_the_file(
    monkeypatch: pytest.MonkeyPatch, head: bytes, known: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(formats, "_formats", lambda: known)
    monkeypatch.setattr("PIL.Image.OPEN", dict.fromkeys(known, (None, lambda head: False)))
    with pytest.raises(UnidentifiedImageError) as raised:
        open_image(io.BytesIO(head))
    assert str(raised.value) == said
