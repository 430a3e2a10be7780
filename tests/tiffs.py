"""TIFF files written by hand, from the specification (TIFF 6.0), as an oracle for `barlow.core.tiff`."""

import struct
import zlib

import numpy as np


def tiff(pixels, order="<", separate=False, deflate=False, differences=False, rows=7, paged=False, **tags):
    """Return pixels (height, width, channels), uint8 or uint16, as a TIFF file.

    Args:
        separate: each channel by itself, else the channels of a pixel side by side.
        differences: between neighbours of a row (predictor 2).
        rows: per strip.
        paged: one page per channel.
        tags: other values of tags, by number: t259=7.
    """
    height, width, channels = pixels.shape
    file = bytearray({"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HL", 42, 8))
    pages = [pixels[:, :, i : i + 1] for i in range(channels)] if paged else [pixels]
    for number, page in enumerate(pages):
        planes = [page[:, :, i : i + 1] for i in range(page.shape[2])] if separate else [page]
        strips = []
        for plane in planes:
            for start in range(0, height, rows):
                part = plane[start : start + rows]
                if differences:
                    part = np.concatenate([part[:, :1], part[:, 1:] - part[:, :-1]], axis=1)
                data = part.astype(part.dtype.newbyteorder(order)).tobytes()
                strips.append(zlib.compress(data) if deflate else data)
        n, bits = page.shape[2], 8 * page.dtype.itemsize
        entries = {
            256: [width], 257: [height], 258: [bits] * n, 259: [8 if deflate else 1], 262: [1], 273: [0] * len(strips),
            277: [n], 278: [rows], 279: [len(strip) for strip in strips], 284: [2 if separate else 1],
        }  # fmt: skip
        entries |= {317: [2]} if differences else {}
        entries |= {int(name[1:]): [value] for name, value in tags.items()}
        start = len(file) + 2 + 12 * len(entries) + 4
        place = start + sum(4 * len(values) for values in entries.values() if len(values) > 1)
        after = place + sum(map(len, strips))
        entries[273] = [place + sum(map(len, strips[:i])) for i in range(len(strips))]
        head, beyond = struct.pack(f"{order}H", len(entries)), b""
        for tag, values in sorted(entries.items()):
            packed = struct.pack(f"{order}{len(values)}L", *values)
            if len(values) > 1:
                beyond, packed = beyond + packed, struct.pack(f"{order}L", start + len(beyond))
            head += struct.pack(f"{order}HHL", tag, 4, len(values)) + packed
        head += struct.pack(f"{order}L", after if number < len(pages) - 1 else 0)
        file += head + beyond + b"".join(strips)
    return bytes(file)
