import asyncio
import gc
import logging
import os
import threading
import time
import weakref
from contextlib import asynccontextmanager

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from services import encoded, figure, until

from barlow import index
from barlow.core import files
from barlow.core.errors import UserError
from barlow.encoder.registry import Registry
from barlow.serving import live
from barlow.serving.live import Live
from barlow.serving.metrics import Metrics
from barlow.settings.flags import Flags

IMAGE = np.full((4, 5, 3), (10, 20, 30), np.uint8)


@pytest.fixture
def write(mean_onnx):
    """`write(path, factor, space)` writes an encoder that returns an image's mean colour times a factor, atomically."""

    def write(path, factor=1.0, space="one", kind="", classes=()):
        with files.replacing(path) as temporary:
            model = onnx.load(mean_onnx(temporary, classes))
            means = next(node for node in model.graph.node if node.op_type == "ReduceMean")
            means.output[0] = "means"
            nodes = [helper.make_node("Mul", ["means", "factor"], ["embedding"])]
            if kind == "batch":  # an image's embedding depends on the other images of its batch
                nodes = [
                    helper.make_node("ReduceMean", ["means", "first"], ["all"], keepdims=1),
                    helper.make_node("Sub", ["means", "all"], ["embedding"]),
                ]
                model.graph.initializer.append(helper.make_tensor("first", TensorProto.INT64, [1], [0]))
            place = list(model.graph.node).index(means) + 1
            for node in reversed(nodes):
                model.graph.node.insert(place, node)
            model.graph.initializer.append(helper.make_tensor("factor", TensorProto.FLOAT, [], [factor]))
            for entry in model.metadata_props:
                if entry.key == "space":
                    entry.value = space
                if entry.key == "classes" and kind == "classes":
                    entry.value = '["one", "two"]'
            onnx.save(model, temporary)
        return path

    return write


@asynccontextmanager
async def watching(path, folder, **flags):
    metrics = Metrics()
    served = Live(path, folder, Flags(**flags), metrics)
    served.figure = lambda name, **labels: figure(metrics.text(), name, **labels)
    try:
        yield served
    finally:
        await served.close()


async def factor(served):
    """Return the factor of the served model."""
    (answer,) = (await served.current.engine.submit([IMAGE])).answers
    np.testing.assert_allclose(answer.embedding / [10, 20, 30], answer.embedding[0] / 10, rtol=1e-6)
    return answer.embedding[0] / 10


def go(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def threads():
    return sum(thread.name == "barlow" for thread in threading.enumerate())


def test_another_version_in_production_is_served(tmp_path, write, caplog):
    caplog.set_level(logging.INFO)
    registry = Registry(tmp_path / "registry")
    registry.folder.mkdir()
    versions = []
    for i in (1, 2):
        path = write(tmp_path / f"{i}.onnx", i, f"space {i}")
        versions.append(registry.add({"encoder.onnx": path}, {"sha256": files.sha256(path)}))
    registry.point(versions[0])

    async def story():
        async with watching(registry.folder / "production/encoder.onnx", tmp_path) as served:
            for i in (1, 2, 1):
                registry.point(versions[i - 1])
                await served.look()
                assert (served.current.name, served.current.space) == (f"v{i}", f"space {i}")
                assert await factor(served) == i
                assert served.figure("barlow_model_info", version=f"v{i}", space=f"space {i}") == 1
                other = {"version": f"v{3 - i}", "space": f"space {3 - i}"}
                assert served.figure("barlow_model_info", **other) == 0
            for _ in range(3):
                await served.look()
            assert served.figure("barlow_reloads_total", result="done") == 2
            assert served.figure("barlow_reloads_total", result="refused") == 0

    go(story())
    assert [record.getMessage() for record in caplog.records if "replaces" in record.getMessage()] == [
        "v2 (space space 2) replaces v1",
        "v1 (space space 1) replaces v2",
    ]


def test_another_file_of_the_same_name_is_served(tmp_path, write):
    path = write(tmp_path / "encoder.onnx")

    async def story():
        async with watching(path, tmp_path) as served:
            assert served.current.name == "encoder.onnx"
            for i in (2, 3):
                write(path, i)
                await served.look()
                assert await factor(served) == i

    go(story())


def truncated(path, write):
    write(path)
    os.truncate(path, path.stat().st_size // 2)


def registered(path, write):
    """The folder of a version whose card has a wrong SHA-256."""
    write(path.parent / "elsewhere/encoder.onnx")
    files.write_json(path.parent / "elsewhere/card.json", {"sha256": "0" * 64})
    path.symlink_to(path.parent / "elsewhere/encoder.onnx")


def circle(path, write):
    path.symlink_to(path.name + "2")
    path.with_name(path.name + "2").symlink_to(path.name)


BAD = {
    "truncated": (truncated, "not a whole ONNX file"),
    "text": (lambda path, write: path.write_text("I am a text"), "not a whole ONNX file"),
    "empty": (lambda path, write: path.write_bytes(b""), "not a whole ONNX file"),
    "NaN": (lambda path, write: write(path, float("nan")), "gives NaN or infinity"),
    "infinity": (lambda path, write: write(path, float("inf")), "gives NaN or infinity"),
    "batch": (lambda path, write: write(path, kind="batch"), "another embedding in a batch than alone"),
    "classes": (lambda path, write: write(path, kind="classes", classes=("a", "b", "c")), "cannot be run"),
    "SHA": (registered, "has another SHA-256 than its card says"),
    "missing": (lambda path, write: None, "is missing"),
    "dangling": (lambda path, write: path.symlink_to("nowhere"), "is missing"),
    "circle": (circle, "is missing"),
    "folder": (lambda path, write: path.mkdir(), "is not a whole ONNX file"),
}


@pytest.mark.parametrize(("make", "why"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_at_the_start(tmp_path, write, make, why):
    make(tmp_path / "encoder.onnx", write)
    before = threads()
    with pytest.raises(UserError, match=why):
        Live(tmp_path / "encoder.onnx", tmp_path, Flags(), Metrics())
    assert threads() == before


@pytest.mark.parametrize(("make", "why"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_once_and_the_old_model_goes_on_until_a_good_one_comes(
    tmp_path, write, caplog, make, why
):
    path = write(tmp_path / "encoder.onnx", 5)

    async def story():
        async with watching(path, tmp_path) as served:
            first, running = served.current, threads()
            path.unlink()
            make(path, write)
            for _ in range(3):
                await served.look()
                assert served.current is first
                assert await factor(served) == 5
                assert served.figure("barlow_reloads_total", result="refused") == 1
            assert threads() == running
            if path.is_dir():
                path.rmdir()
            write(path, 7)
            await served.look()
            assert await factor(served) == 7
            assert served.figure("barlow_reloads_total", result="done") == 1
            assert served.figure("barlow_reloads_total", result="refused") == 1

    with caplog.at_level(logging.ERROR):
        go(story())
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} is refused, and encoder.onnx goes on: ")
    assert why in record.getMessage()


def test_a_bad_file_that_changes_is_tried_again(tmp_path, write):
    path = write(tmp_path / "encoder.onnx")

    async def story():
        async with watching(path, tmp_path) as served:
            for i in range(1, 4):
                path.write_text("x" * i)
                await served.look()
                assert served.figure("barlow_reloads_total", result="refused") == i
            assert await factor(served) == 1

    go(story())


def test_a_request_ends_on_the_model_it_began_with(tmp_path, write):
    path = write(tmp_path / "encoder.onnx", 1)

    async def story():
        async with watching(path, tmp_path) as served:
            old, entered, released = served.current, threading.Event(), threading.Event()

            class Slow:
                form = old.encoder.form

                def run(self, *arguments):
                    entered.set()
                    assert released.wait(60)
                    return old.encoder.run(*arguments)

            old.engine.encoder = Slow()
            early = asyncio.create_task(factor(served))
            await asyncio.to_thread(entered.wait, 20)
            late = asyncio.create_task(factor(served))  # in the queue
            await asyncio.sleep(0)
            write(path, 2)
            looking = asyncio.create_task(served.look())
            await asyncio.to_thread(until, lambda: served.current is not old)
            assert await factor(served) == 2  # at once
            assert not early.done()
            assert not looking.done()
            released.set()
            assert [await early, await late] == [1, 1]
            await looking

    go(story())


def test_nothing_is_left_of_models_that_were_replaced(tmp_path, write):
    path = write(tmp_path / "encoder.onnx")

    async def story():
        before = threads()
        async with watching(path, tmp_path) as served:
            running, gone = threads(), []
            for i in range(2, 5):
                await factor(served)
                gone.append(weakref.ref(served.current.encoder))
                write(path, i)
                await served.look()
                assert threads() == running
            await asyncio.to_thread(until, lambda: gc.collect() >= 0 and not any(reference() for reference in gone))
        assert threads() == before

    go(story())


@pytest.fixture
def indexed(tmp_path, monkeypatch, capsys):
    """`indexed(path, count)` writes an index of `count` images for an encoder, and returns its folder."""

    def indexed(path, count):
        photos = tmp_path / f"{count} photos"
        photos.mkdir(exist_ok=True)
        for i in range(count):
            (photos / f"{i}.png").write_bytes(encoded(np.full((3, 3, 3), (i, 255 - i, 7), np.uint8)))
        index.run([photos], path, tmp_path / "index")

    return indexed


def test_an_index_comes_with_its_model_and_never_with_another(tmp_path, write, indexed):
    path = write(tmp_path / "encoder.onnx", 1, "one")
    indexed(write(tmp_path / "other.onnx", 2, "two"), 4)

    async def story():
        async with watching(path, tmp_path / "index") as served:
            await served.look()
            assert served.current.index is None  # the folder has an index of another space only
            assert served.figure("barlow_index_items") == 0
            write(path, 2, "two")
            await served.look()
            assert len(served.current.index) == 4
            assert served.figure("barlow_index_items") == 4
            write(path, 1, "one")
            await served.look()
            assert served.current.index is None
            assert served.figure("barlow_index_items") == 0

    go(story())


def test_an_index_that_is_written_replaced_broken_or_removed_later_is_noticed(tmp_path, write, indexed, caplog):
    path = write(tmp_path / "encoder.onnx")
    file = tmp_path / "index/one.npz"

    async def story():
        async with watching(path, tmp_path / "index") as served:
            assert served.current.index is None
            for count in (3, 5):
                indexed(path, count)
                await served.look()
                assert served.figure("barlow_index_items") == len(served.current.index) == count
            whole = file.read_bytes()
            for broken in (whole[:1000], b"", b"text"):
                file.write_bytes(broken)
                for _ in range(2):
                    await served.look()
                assert served.current.index is None
                assert served.figure("barlow_index_items") == 0
                assert await factor(served) == 1
            file.write_bytes(whole)
            await served.look()
            assert served.figure("barlow_index_items") == 5
            file.unlink()
            await served.look()
            assert served.figure("barlow_index_items") == 0
            assert served.figure("barlow_reloads_total", result="done") == 0

    go(story())
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert all(warning.startswith("no search: ") for warning in warnings)


def test_an_index_of_another_space_under_this_ones_name_is_not_used(tmp_path, write, indexed, caplog):
    indexed(write(tmp_path / "other.onnx", 2, "two"), 3)
    (tmp_path / "index/two.npz").rename(tmp_path / "index/one.npz")

    async def story():
        async with watching(write(tmp_path / "encoder.onnx"), tmp_path / "index") as served:
            assert served.current.index is None

    go(story())
    assert "is of embedding space two, not one" in caplog.text


def test_an_index_that_lacks_something_does_not_keep_a_model_from_being_served(tmp_path, write, indexed, caplog):
    path = write(tmp_path / "encoder.onnx")
    indexed(path, 3)
    file = tmp_path / "index/one.npz"
    with np.load(file) as arrays:
        kept = dict(arrays)
    about = np.frombuffer(kept["about"].tobytes().replace(b'"names"', b'"nomen"'), np.uint8)
    np.savez(file, **kept | {"about": about})

    async def story():
        async with watching(path, tmp_path / "index") as served:
            assert served.current.index is None
            assert await factor(served) == 1

    go(story())
    assert "no search" in caplog.text


def test_it_looks_again_and_again_also_after_an_error(tmp_path, write, monkeypatch, caplog):
    path = write(tmp_path / "encoder.onnx")
    monkeypatch.setattr(live, "POLL_SECONDS", 0.01)
    whole, calls = live.signature, []

    def signature(path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("stale file handle")
        return whole(path)

    async def story():
        async with watching(path, tmp_path) as served:
            monkeypatch.setattr(live, "signature", signature)
            task = asyncio.create_task(served.watch())
            await asyncio.to_thread(until, lambda: len(calls) > 4)
            write(path, 2)
            end = time.monotonic() + 60
            while await factor(served) != 2:
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    go(story())
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == "looking for a new model failed"


def test_close_answers_what_was_asked(tmp_path, write):
    async def story():
        async with watching(write(tmp_path / "encoder.onnx"), tmp_path, max_queue_delay_us=50_000) as served:
            jobs = [asyncio.create_task(factor(served)) for _ in range(3)]
            await asyncio.sleep(0)
            await served.close()
            assert [job.result() for job in jobs] == [1, 1, 1]

    before = threads()
    go(story())
    assert threads() == before
