"""Small pictures, and files of them: by Pillow and, where it does not write such files, made by hand."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# Odd sizes; smooth with some noise, so that lossy formats and palettes have something to do.
HEIGHT, WIDTH = 41, 58
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
NOISE = np.random.default_rng(0).integers(0, 24, (HEIGHT, WIDTH, 3))
PIXELS = (np.stack([4 * COLUMNS, 5 * ROWS, 200 - 2 * ROWS - COLUMNS], axis=2) + NOISE).clip(0, 255).astype(np.uint8)
COLOUR = Image.fromarray(PIXELS)
GREY = COLOUR.convert('L')
DARK = Image.fromarray(np.asarray(GREY) // 2)


def encoded(image: Image.Image, kind: str = 'PNG', **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(image: Image.Image, alpha: int | Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha)
    return image


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = 8
    while start < len(png):
        length, kind = struct.unpack('>I4s', png[start : start + 8])
        yield kind, png[start + 8 : start + 8 + length]
        start += 12 + length


def png(
    *body: bytes, bits: int = 8, colour: int = 2, interlace: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> bytes:
    """A PNG file of any chunks, with right checksums."""
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', *size, bits, colour, 0, 0, interlace))
    return b''.join([b'\x89PNG\r\n\x1a\n', header, *body, chunk(b'IEND', b'')])


PNG = encoded(COLOUR)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
HALF_CLEAR = with_alpha(COLOUR, Image.fromarray(np.where(COLUMNS < 57, 255, 254).astype(np.uint8)))


def with_chunk(kind: bytes, body: bytes, file: bytes = PNG) -> bytes:
    return file[:33] + chunk(kind, body) + file[33:]


def packed_grey(bits: int) -> bytes:
    """Grey levels of fewer than 8 bits, which Pillow does not write."""
    rows = []
    for row in np.asarray(GREY) >> (8 - bits):
        digits = ''.join(f'{level:0{bits}b}' for level in row)
        digits += '0' * (-len(digits) % 8)
        rows.append(b'\0' + int(digits, 2).to_bytes(len(digits) // 8, 'big'))
    return chunk(b'IDAT', zlib.compress(b''.join(rows)))


def damaged(file: bytes, position: int) -> bytes:
    return file[:position] + bytes([file[position] ^ 0x10]) + file[position + 1 :]
