"""EXIF data of upscaled pictures: what is changed in them, and that nothing else is."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import exif
from PIL import Image

from attnsr.pictures import metadata
from attnsr.pictures.opening import exif_orientation

ORDERS = ['<', '>']
THUMBNAIL = b'\xff\xd8thumbnail\xff\xd9'
SENSELESS = [None, b'', b'Exif\0\0', b'II*\0\x08\0\0\0\xff\xff', b'no exif data', b'MM\0*\0\0\xff\0']


def camera(
    order: str, orientation: int = 6, thumbnail: bytes = b'\xff\xd8thumbnail\xff\xd9', behind: bytes = b''
) -> bytes:
    """EXIF data as cameras write them: a maker's note, sizes, and a thumbnail in a second directory."""

    def directory(offset: int, entries: list[tuple[int, int, int, int]], following: int) -> bytes:
        body = struct.pack(f'{order}H', len(entries))
        for tag, kind, count, value in entries:
            short = kind == 3 and count == 1
            body += struct.pack(f'{order}HHI', tag, kind, count)
            body += struct.pack(f'{order}HH', value, 0) if short else struct.pack(f'{order}I', value)
        return body + struct.pack(f'{order}I', following)

    first = [(0x010F, 2, 6, 38 + 24), (0x0112, 3, 1, 6), (0x8769, 4, 1, 100)]
    head = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(f'{order}I', 8)
    data = head + directory(8, first, 200)
    data = data.ljust(62, b'\0') + b'Maker\0'
    data = data.ljust(100, b'\0') + directory(100, [(0x927C, 7, 8, 160), (0xA002, 3, 1, 640), (0xA003, 4, 1, 480)], 0)
    data = data.ljust(160, b'\0') + b'NOTE@160'
    data = data.ljust(200, b'\0') + directory(200, [(0x0201, 4, 1, 240), (0x0202, 4, 1, len(THUMBNAIL))], 0)
    return data.ljust(240, b'\0') + THUMBNAIL + behind


def tags(data: bytes) -> tuple[dict[int, object], dict[int, object]]:
    """By Pillow: of the first directory, and of that of the camera."""
    parsed = Image.Exif()
    parsed.load(data)
    return dict(parsed), dict(parsed.get_ifd(0x8769))


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('prefix', [b'', b'Exif\0\0', b'Exif\0\0Exif\0\0'])
def test_tidied(order: str, prefix: bytes) -> None:
    data = camera(order)
    assert exif_orientation(data) == 6
    tidy = metadata.tidied(prefix + data)
    assert tidy is not None
    assert exif_orientation(tidy) == 1
    assert b'thumbnail' not in tidy
    assert len(tidy) == 240
    # All else is where it was.
    first, second = tags(tidy)
    assert (first[0x010F], first[0x0112]) == ('Maker', 1)
    assert (second[0x927C], second[0xA002], second[0xA003]) == (b'NOTE@160', 640, 480)
    assert tidy[100:200] == data[100:200]
    assert metadata.tidied(tidy) == tidy


@pytest.mark.parametrize('order', ORDERS)
def test_what_lies_behind_a_thumbnail_stays(order: str) -> None:
    data = camera(order, behind=b'another note')
    tidy = metadata.tidied(data)
    assert tidy is not None
    assert tidy[240:] == data[240:]
    parsed = Image.Exif()
    parsed.load(tidy)
    assert not parsed.get_ifd(0x0201)
    assert tidy[8 + 2 + 36 : 8 + 2 + 40] == bytes(4)  # there is no second directory any more


@pytest.mark.parametrize(
    'data', [None, b'', b'Exif\0\0', b'II*\0\x08\0\0\0\xff\xff', b'no exif data', b'MM\0*\0\0\xff\0']
)
def test_what_makes_no_sense_is_left_out(data: bytes | None) -> None:
    assert metadata.tidied(data) is None
    assert metadata.exif_resolution(data) is None


@given(st.binary(max_size=80), st.sampled_from([b'', b'II*\0\x08\0\0\0', b'MM\0*\0\0\0\x08']), st.integers(0, 200))
def test_whatever_the_bytes(data: bytes, start: bytes, cut: int) -> None:
    for content in (start + data, camera('<')[:cut], camera('>')[:cut] + data):
        metadata.exif_resolution(content)
        if (tidy := metadata.tidied(content)) is not None:
            assert exif_orientation(tidy) == 1
            assert exif_orientation(metadata.resized(tidy, 10, 20)) == 1
            assert exif_orientation(metadata.with_resolution(tidy, (72, 72))) == 1


@pytest.mark.parametrize('order', ORDERS)
def test_resized(order: str) -> None:
    data = camera(order)
    result = metadata.resized(data, 48_000, 70_000)  # the one was in 16 bits
    assert len(result) == len(data)
    first, second = tags(result)
    assert (second[0xA002], second[0xA003], second[0x927C]) == (70_000, 48_000, b'NOTE@160')
    assert first == tags(data)[0]
    broken = data[:100] + b'\xff\xff' + data[102:]
    assert metadata.resized(broken, 1, 1) == broken


@pytest.mark.parametrize('order', ORDERS)
def test_resolution(order: str) -> None:
    data = camera(order)
    assert metadata.exif_resolution(data) is None
    result = metadata.with_resolution(data, (299.9994, 150))
    assert result[8 : len(data)] == data[8:]
    assert metadata.exif_resolution(result) == (299.9994, 150)
    first, second = tags(result)
    assert first == {**tags(data)[0], 0x011A: pytest.approx(299.9994), 0x011B: 150, 0x0128: 2}
    assert second == tags(data)[1]
    again = metadata.with_resolution(result, (72, 72))
    assert metadata.exif_resolution(again) == (72, 72)
    alone = metadata.with_resolution(None, (72, 96))
    assert metadata.exif_resolution(alone) == (72, 96)
    assert tags(alone) == ({0x011A: 72, 0x011B: 96, 0x0128: 2}, {})


@pytest.mark.parametrize('value', [1e-3, 1 / 3, 72, 299.9994, 11811.5, 2**31, 2**32 - 1])
def test_rational(value: float) -> None:
    over, under = metadata.rational(value)
    assert max(over, under) < 2**32
    assert over / under == pytest.approx(value, rel=1e-4)


def test_spaces_of_profiles() -> None:
    assert metadata.Metadata().colour_space is None
    assert metadata.Metadata(icc=b'short').colour_space is None
    assert metadata.Metadata(icc=bytes(16) + b'GRAY'.ljust(112)).colour_space == 'GRAY'
    assert metadata.Metadata(resolution=(1, 2), exif=exif(1).tobytes()).upright(6).resolution == (2, 1)
