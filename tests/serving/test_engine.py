import asyncio
import gc
import random
import threading
import time
import weakref
from contextlib import asynccontextmanager

import numpy as np
import pytest
from services import encoded, figure, png, until

from barlow.core import files
from barlow.encoder import encoder as encoder_module
from barlow.encoder.encoder import Encoder
from barlow.serving.engine import Answer, Engine, Failure
from barlow.serving.limits import RequestError
from barlow.serving.metrics import Metrics
from barlow.settings.flags import Flags

POISON = 13  # an image that begins with it makes `Watched` fail


class Watched:
    """An encoder that notes its batches and, on request, waits for `go` before it computes."""

    def __init__(self, encoder, wait=False):
        self.encoder, self.form, self.batches = encoder, encoder.form, []
        self.entered, self.go = threading.Semaphore(0), threading.Event()
        if not wait:
            self.go.set()

    def run(self, pixels, size):
        batch = []
        self.batches.append(batch)
        for embeddings in self.encoder.run(self._each(pixels, batch), size):
            self.entered.release()
            assert self.go.wait(60)
            yield embeddings

    def _each(self, pixels, batch):
        for image in pixels:
            if image[0, 0, 0] == POISON:
                raise RuntimeError("poison")
            batch.append(tuple(image[0, 0].tolist()))
            yield image

    async def busy(self, times=1):
        """Wait until that many more batches are being computed."""
        for _ in range(times):
            assert await asyncio.to_thread(self.entered.acquire, timeout=60), "no worker took it"

    @property
    def sizes(self):
        return [len(batch) for batch in self.batches if batch]


@pytest.fixture
def watched(tmp_path, mean_onnx):
    return lambda wait=False: Watched(Encoder(mean_onnx(tmp_path / "encoder.onnx", ["r", "g", "b"]), threads=1), wait)


@asynccontextmanager
async def running(encoder, workers=1, **flags):
    """An engine with that many workers, all of which wait for images; it is closed at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "cpus", lambda: workers)
        metrics = Metrics()
        engine = Engine(encoder, Flags(**flags), metrics)
    engine.figure = lambda name: figure(metrics.text(), name)
    try:
        await asyncio.to_thread(until, lambda: engine._idle == workers)
        yield engine
    finally:
        encoder.go.set()
        await engine.close()


def go(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def picture(*colour, size=(3, 2)):
    return np.full((size[1], size[0], 3), colour, np.uint8)


def embeddings(job):
    return np.stack([answer.embedding for answer in job.answers])


@pytest.mark.parametrize("flags", [{}, {"max_batch_size": 5}, {"max_batch_size": 3, "max_queue_delay_us": 2000}])
def test_answers_are_the_encoders_own_however_requests_interleave(watched, flags):
    rng, encoder = np.random.default_rng(0), watched()
    sides = rng.integers(1, 9, (4, 2))
    requests = []
    for count in rng.integers(1, 8, 80):
        shapes = sides[rng.integers(0, 4, count)]
        requests.append([rng.integers(20, 256, (*shape, 3), dtype=np.uint8) for shape in shapes])

    async def one(engine, images, i):
        await asyncio.sleep(0.001 * (i * 7 % 11))
        return await engine.submit([encoded(image) for image in images] if i % 2 else images)

    async def story():
        async with running(encoder, workers=3, **flags) as engine:
            return await asyncio.gather(*(one(engine, images, i) for i, images in enumerate(requests)))

    for job, images in zip(go(story()), requests, strict=True):
        means = [image.mean((0, 1)) for image in images]
        np.testing.assert_allclose(embeddings(job), means, rtol=1e-5)
        np.testing.assert_allclose([answer.logits for answer in job.answers], 2 * np.array(means), rtol=1e-5)
        np.testing.assert_allclose(embeddings(job), encoder.encoder.embed(images), rtol=1e-6)
    assert sum(encoder.sizes) == sum(map(len, requests))
    assert 1 < max(encoder.sizes) <= flags.get("max_batch_size", 32)


def test_what_waits_goes_together_up_to_the_largest_batch(watched):
    async def story():
        encoder = watched(wait=True)
        async with running(encoder, max_batch_size=8) as engine:
            jobs = [asyncio.create_task(engine.submit([picture(100, 0, 0)]))]
            await encoder.busy()
            jobs += [asyncio.create_task(engine.submit([picture(i, j, 0) for j in range(5)])) for i in range(20, 24)]
            await asyncio.to_thread(until, lambda: engine.figure("barlow_queue") == 20)
            encoder.go.set()
            for i, job in enumerate(await asyncio.gather(*jobs)):
                assert embeddings(job).tolist() == ([[19 + i, j, 0] for j in range(5)] if i else [[100, 0, 0]])
        assert encoder.sizes == [1, 8, 8, 4]
        assert engine.figure("barlow_batch_size_sum") == 21
        assert engine.figure("barlow_queue_seconds_count") == 21
        assert engine.figure("barlow_queue") == 0

    go(story())


def test_with_a_delay_later_images_join_a_batch_which_goes_as_soon_as_it_is_full(watched):
    async def story():
        encoder = watched()
        begun = time.monotonic()
        async with running(encoder, max_batch_size=4, max_queue_delay_us=8_000_000) as engine:
            jobs = []
            for count in (1, 2, 1):
                jobs.append(asyncio.create_task(engine.submit([picture(50, 0, 0)] * count)))
                await asyncio.sleep(0.01)
            await asyncio.gather(*jobs)
        assert encoder.sizes == [4]
        assert time.monotonic() - begun < 7

    go(story())


def test_a_delay_ends(watched):
    async def story():
        encoder = watched()
        async with running(encoder, max_queue_delay_us=60_000) as engine:
            begun = time.monotonic()
            first, _ = await asyncio.gather(engine.submit([picture(50, 0, 0)]), engine.submit([picture(60, 0, 0)]))
            assert time.monotonic() - begun >= 0.06
            assert first.queue >= 0.059
        assert encoder.sizes == [2]

    go(story())


def test_without_a_delay_a_single_image_waits_for_nobody(watched):
    async def story():
        encoder = watched(wait=True)
        async with running(encoder, workers=2) as engine:
            jobs = [asyncio.create_task(engine.submit([picture(50, 0, 0)]))]
            await encoder.busy()  # before there is another
            jobs.append(asyncio.create_task(engine.submit([picture(60, 0, 0)])))
            await encoder.busy()
            encoder.go.set()
            await asyncio.gather(*jobs)
        assert encoder.sizes == [1, 1]

    go(story())


@pytest.mark.parametrize(("workers", "images"), [(2, 2), (2, 3), (3, 12), (4, 3), (4, 7)])
def test_no_worker_stays_idle_while_another_has_a_larger_share(watched, workers, images):
    async def story():
        encoder = watched(wait=True)
        async with running(encoder, workers=workers) as engine:
            job = asyncio.create_task(engine.submit([picture(50 + i, 0, 0) for i in range(images)]))
            await encoder.busy(min(workers, images))  # all of them at a time
            encoder.go.set()
            assert embeddings(await job)[:, 0].tolist() == [50 + i for i in range(images)]
        assert max(encoder.sizes) - min(encoder.sizes) <= 1
        assert len(encoder.sizes) == min(workers, images)

    go(story())


def test_a_full_queue_refuses_the_whole_request_and_keeps_nothing_of_it(watched):
    async def story():
        encoder = watched(wait=True)
        async with running(encoder, max_queue=4) as engine:
            jobs = [asyncio.create_task(engine.submit([picture(50, 0, 0)]))]
            await encoder.busy()
            jobs.append(asyncio.create_task(engine.submit([picture(60, 0, 0)] * 3)))
            await asyncio.sleep(0)
            refused = picture(200, 0, 0)
            with pytest.raises(RequestError, match="3 images are waiting") as refusal:
                await engine.submit([refused, refused])
            assert (refusal.value.status, refusal.value.reason) == (503, "queue")
            assert engine.figure("barlow_queue") == 3
            jobs.append(asyncio.create_task(engine.submit([picture(70, 0, 0)])))  # for which there is room
            await asyncio.sleep(0)
            encoder.go.set()
            await asyncio.gather(*jobs)
        colours = [colour for batch in encoder.batches for colour, _, _ in batch]
        assert colours == [50, 60, 60, 60, 70]
        assert engine.figure("barlow_queue") == 0

    go(story())


def test_an_image_past_its_deadline_is_given_up_and_not_computed(watched):
    async def story():
        encoder = watched(wait=True)
        async with running(encoder, timeout_ms=100) as engine:
            begun = time.monotonic()
            jobs = [asyncio.create_task(engine.submit([picture(50, 0, 0)]))]
            await encoder.busy()
            jobs.append(asyncio.create_task(engine.submit([png(60, 0, 0)])))
            for job in jobs:
                with pytest.raises(RequestError, match="no answer within 100 ms") as refusal:
                    await job
                assert (refusal.value.status, refusal.value.reason) == (503, "deadline")
            assert 0.1 <= time.monotonic() - begun < 5
            encoder.go.set()
            await engine.submit([picture(70, 0, 0)])
        assert [batch for batch in encoder.batches if batch] == [[(50, 0, 0)], [(70, 0, 0)]]

    go(story())


@pytest.mark.parametrize(
    ("bad", "status", "why"),
    [
        (b"", 415, "not an image"),
        (b"I am a text", 415, "not an image"),
        (encoded(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8), "JPEG")[:-40], 422, "trunc"),
        (png(1, 2, 3, size=(11, 10)), 413, "11 x 10 pixels, more than the 100 allowed"),
    ],
    ids=["empty", "text", "truncated", "pixels"],
)
def test_one_bad_image_fails_only_itself(watched, bad, status, why):
    async def story():
        encoder = watched()
        async with running(encoder, max_pixels=100) as engine:
            return await engine.submit([png(50, 0, 0), bad, png(60, 0, 0, size=(10, 10)), bad, png(70, 0, 0)])

    answers = go(story()).answers
    assert [answers[i].embedding[0] for i in (0, 2, 4)] == [50, 60, 70]
    for answer in (answers[1], answers[3]):
        assert isinstance(answer, Failure)
        assert answer.status == status
        assert why in answer.message


def test_a_failure_of_the_model_fails_its_own_image_and_the_worker_lives_on(watched, caplog):
    async def story():
        encoder = watched(wait=True)
        async with running(encoder, max_batch_size=2) as engine:
            jobs = [asyncio.create_task(engine.submit([picture(50, 0, 0)]))]
            await encoder.busy()
            for colours in ([60, POISON], [70, 71], [POISON, POISON], [80]):
                jobs.append(asyncio.create_task(engine.submit([picture(colour, 0, 0) for colour in colours])))
                await asyncio.sleep(0)
            encoder.go.set()
            first, poisoned, fine, worse, last = await asyncio.gather(*jobs)
        for job, colours in ((first, [50]), (fine, [70, 71]), (last, [80])):
            assert embeddings(job)[:, 0].tolist() == colours
        assert poisoned.answers[0].embedding[0] == 60
        for answer in (poisoned.answers[1], *worse.answers):
            assert (answer.status, answer.reason) == (500, "model")

    go(story())
    records = [record for record in caplog.records if record.getMessage() == "the model failed"]
    assert len(records) == 3
    assert all("poison" in str(record.exc_info[1]) for record in records)


def test_what_was_computed_before_the_model_failed_is_not_computed_again(watched, monkeypatch):
    monkeypatch.setattr(encoder_module, "BATCH_PIXELS", 6)  # each image of 3 x 2 goes through the network alone
    encoder = watched()

    async def story():
        async with running(encoder) as engine:
            return await engine.submit([picture(colour, 0, 0) for colour in (50, 60, 70, POISON, 80)])

    assert [type(answer) for answer in go(story()).answers] == [Answer, Answer, Answer, Failure, Answer]
    # The third is held when the fourth is asked for, to see whether it would fit beside it.
    assert [[colour for colour, *_ in batch] for batch in encoder.batches] == [[50, 60, 70], [70], [], [80]]


def test_an_image_with_a_side_that_the_network_cannot_take_is_refused(watched):
    async def story():
        async with running(watched()) as engine:
            return await engine.submit([np.zeros((1, 70_000, 3), np.uint8), picture(50, 0, 0)])

    answers = go(story()).answers
    assert answers[0][::2] == (413, "70000 x 1 pixels, a side longer than the 65536 allowed")
    assert answers[1].embedding[0] == 50


def test_close_answers_what_was_asked_and_ends_the_threads(watched):
    async def story():
        encoder = watched(wait=True)
        before = set(threading.enumerate())
        async with running(encoder, workers=2, max_batch_size=1) as engine:
            threads = {thread for thread in set(threading.enumerate()) - before if thread.name == "barlow"}
            assert len(threads) == 2
            jobs = [asyncio.create_task(engine.submit([picture(50, 0, 0)] * 3)) for _ in range(3)]
            await encoder.busy(2)
            closing = asyncio.create_task(engine.close())
            await asyncio.sleep(0.05)
            assert not closing.done()
            assert all(thread.is_alive() for thread in threads)
            encoder.go.set()
            await closing
            assert all(job.done() and len(embeddings(job.result())) == 3 for job in jobs)
            assert not any(thread.is_alive() for thread in threads)

    go(story())


def test_a_cancelled_request_leaves_nothing_behind(watched):
    async def story():
        encoder = watched(wait=True)
        async with running(encoder, max_batch_size=2) as engine:
            first = asyncio.create_task(engine.submit([picture(50, 0, 0)]))
            await encoder.busy()
            image = picture(60, 0, 0)
            gone = weakref.ref(image)
            second = asyncio.create_task(engine.submit([image] * 5))
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            del image, second
            encoder.go.set()
            await first
            await engine.submit([picture(70, 0, 0)])  # behind the five
            assert engine.figure("barlow_queue") == 0
            await asyncio.to_thread(until, lambda: gc.collect() >= 0 and gone() is None)
        assert [batch for batch in encoder.batches if batch] == [[(50, 0, 0)], [(70, 0, 0)]]

    go(story())


def test_an_idle_worker_holds_no_images(watched):
    async def story():
        async with running(watched()) as engine:
            image = picture(60, 0, 0)
            gone = weakref.ref(image)
            await engine.submit([image])
            del image
            await asyncio.to_thread(until, lambda: gc.collect() >= 0 and gone() is None)

    go(story())


def test_times_tell_the_queue_from_the_network(watched):
    async def story():
        encoder = watched(wait=True)
        async with running(encoder) as engine:
            first = asyncio.create_task(engine.submit([png(50, 0, 0)]))
            await encoder.busy()
            second = asyncio.create_task(engine.submit([png(60, 0, 0)]))
            await asyncio.sleep(0.05)
            encoder.go.set()
            return await first, await second

    first, second = go(story())
    assert first.infer >= 0.05 > first.queue
    assert second.queue >= 0.045
    assert first.decode > 0
    assert second.decode > 0


def test_a_storm_of_cancelled_refused_and_broken_requests_ends_in_calm(watched):
    async def story():
        chance, encoder = random.Random(0), watched()

        async def one(engine, i):
            images = [picture(20 + (i + j) % 200, 0, 0) for j in range(chance.randrange(1, 9))]
            colours = [image[0, 0, 0] for image in images]
            if i % 5 == 0:
                images[0] = b"broken"
            if i % 17 == 0:
                images[-1] = picture(POISON, 0, 0)
            await asyncio.sleep(chance.random() / 20)
            try:
                job = await asyncio.wait_for(engine.submit(images), chance.choice([0.0005, 0.002, 9]))
            except (asyncio.TimeoutError, RequestError):
                return 0
            for answer, colour in zip(job.answers, colours, strict=True):
                assert isinstance(answer, Failure) or answer.embedding[0] == colour
            return 1

        async with running(encoder, workers=2, max_batch_size=4, max_queue=40) as engine:
            answered = sum(await asyncio.gather(*(one(engine, i) for i in range(300))))
            assert answered > 0
            await asyncio.to_thread(until, lambda: engine.figure("barlow_queue") == 0)
            job = await engine.submit([picture(100, 0, 0)] * 40)  # the whole queue is free
            assert (embeddings(job) == [100, 0, 0]).all()

    go(story())


def test_an_image_whose_time_is_over_is_let_go_at_once(watched):
    """Without the garbage collector, which `barlow serve` runs rarely."""

    async def story():
        encoder = watched(wait=True)
        async with running(encoder, timeout_ms=50) as engine:
            images = [picture(50, 0, 0), picture(60, 0, 0)]
            gone = [weakref.ref(image) for image in images]
            gc.collect()
            gc.disable()
            for image in images:
                with pytest.raises(RequestError, match="no answer within 50 ms"):
                    await engine.submit([image])
            encoder.go.set()
            image = images.clear()
            await asyncio.to_thread(until, lambda: not any(each() is not None for each in gone), 10, "it is held")

    try:
        go(story())
    finally:
        gc.enable()
