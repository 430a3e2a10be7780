import contextlib
import io
import os
import signal
import struct

import numpy as np
import pytest
from PIL import Image

from barlow.core import dali, images


def png(seed, width=20, height=10):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue(), dali.Decoded(height, width, images.digest(pixels))


@pytest.fixture(scope="module")
def decoder():
    with dali.Decoder() as decoder:
        yield decoder


def test_shape_and_pixels_are_told(decoder):
    contents, expected = zip(png(0), png(1, 7, 30), strict=True)
    assert decoder.decode(contents) == [*expected]
    assert decoder.decode([]) == []


def test_an_image_that_fails_is_found_in_its_batch_and_harms_no_other(decoder):
    contents, expected = map(list, zip(*(png(i) for i in range(9)), strict=True))
    for i in (2, 3, 8):
        contents[i], expected[i] = contents[i][:-12], None
    assert decoder.decode(contents) == expected
    assert decoder.decode(contents[:2]) == expected[:2]


def serve_and_die(*pipe):
    """Serve, but end the process at an image of 8 x 8, as DALI may do at any."""
    receive = np.frombuffer

    def frombuffer(data, dtype):
        if data[16:24] == struct.pack(">II", 8, 8):
            os.kill(os.getpid(), signal.SIGKILL)
        return receive(data, dtype)

    np.frombuffer = frombuffer
    serve(*pipe)


serve = dali._serve


def test_an_image_that_kills_the_process_is_found(monkeypatch):
    contents, expected = map(list, zip(png(0), png(1, 8, 8), png(2), strict=True))
    monkeypatch.setattr(dali, "_serve", serve_and_die)
    with dali.Decoder() as decoder:
        assert decoder.decode(contents) == [expected[0], None, expected[2]]


def test_a_process_that_does_not_start_is_no_bad_image(monkeypatch):
    monkeypatch.setattr(dali, "_serve", os._exit)
    with dali.Decoder() as decoder, pytest.raises(RuntimeError, match="DALI does not start; try"):
        decoder.decode([png(0)[0]])


@pytest.mark.parametrize(("processes", "count"), [(1, 4), (2, 5), (3, 2), (2, 0)])
def test_batches_are_shared_out_and_come_back_in_order(processes, count):
    contents, expected = zip(*(png(i) for i in range(10)), strict=True)
    contents = [*contents[:3], contents[3][:-12], *contents[4:]]
    expected = [*expected[:3], None, *expected[4:]]
    parts = [slice(2 * i, 2 * i + 2) for i in range(count)]
    decoders = [dali.Decoder() for _ in range(processes)]
    with contextlib.ExitStack() as stack:
        for decoder in decoders:
            stack.enter_context(decoder)
        answers = list(dali.in_turn(decoders, ((part.start, contents[part]) for part in parts)))
    assert answers == [(part.start, expected[part]) for part in parts]


def test_no_batch_is_larger_than_the_limits(monkeypatch):
    monkeypatch.setattr(dali, "BATCH", 3)
    monkeypatch.setattr(dali, "BATCH_BYTES", 10)
    costs = [1, 1, 1, 1, 9, 2, 30, 1, 9]
    assert list(dali.batches(costs, int)) == [[1, 1, 1], [1, 9], [2], [30], [1, 9]]
