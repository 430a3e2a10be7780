import dataclasses
import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from scipy.stats import chisquare

from barlow.core import files, webdataset
from barlow.core.errors import UserError
from barlow.training import views

# --- the order

SETS = [
    (1, 1),
    (1, 100),
    (2, 1),
    (7, 3),
    (53, 8),
    (53, 53),
    (100, 64),
    (100, 65),
    (777, 100),
    (1000, 999),
    (1000, 1000),
]
SETS += [(1000, 5000), (1000, 64), (10_000, 1000), (10_001, 1000), (10_000, 9999)]


@pytest.mark.parametrize(("n", "fill"), SETS)
def test_an_order_is_a_permutation_and_each_differs(n, fill):
    rng = np.random.default_rng(0)
    orders = [views.epoch_order(n, fill, rng) for _ in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(n))
    assert n < 50 or len({tuple(order.tolist()) for order in orders}) == 3
    assert np.array_equal(views.epoch_order(n, fill, np.random.default_rng(0)), orders[0])


@pytest.mark.parametrize(("n", "fill"), [(1000, 130), (777, 100), (10_000, 1000), (10_001, 1000), (10_000, 2500)])
def test_an_order_of_many_files_reads_in_long_runs_and_mixes_them(n, fill):
    block = -(-fill // views.BLOCKS)
    order = views.epoch_order(n, fill, np.random.default_rng(0))
    runs = [set((order[start : start + fill] // block).tolist()) for start in range(0, n, fill)]
    # One run may begin and one end outside of what is mixed, and the last of the set is shorter.
    assert max(map(len, runs)) <= views.BLOCKS + 2
    assert max(sum(run in some for some in runs) for run in range(-(-n // block))) <= 2
    assert np.mean(np.diff(order) == 1) < 0.05
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.3


@pytest.mark.parametrize("fill", [4, 5, 1000])
def test_a_small_set_comes_in_every_order_as_often(fill):
    rng = np.random.default_rng(0)
    _, counts = np.unique([views.epoch_order(4, fill, rng) for _ in range(2400)], axis=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 0.01


# --- the reader

COUNT = 53  # no multiple of anything below


def numbered(i):
    """An 8 px image whose colour tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (i, 255 - i, 0)).save(buffer, "PNG")
    return webdataset.Sample(f"{i:024x}", buffer.getvalue(), "png", -1, 8, 8)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """53 numbered images in five tars."""
    folder = tmp_path_factory.mktemp("shards")
    for n in range(5):
        webdataset.write(folder / f"pretrain-{n:06d}.tar", map(numbered, range(11 * n, min(11 * n + 11, COUNT))))
    return webdataset.tars("pretrain", folder)


@pytest.fixture(params=[1, 5])
def one_or_more_tars(request, tars, tmp_path):
    """The same images in one tar, or in five."""
    if request.param > 1:
        return tars
    webdataset.write(tmp_path / "pretrain-000000.tar", map(numbered, range(COUNT)))
    return webdataset.tars("pretrain", tmp_path)


def epoch(twin_views):
    """The numbers of the images of an epoch, batch by batch."""
    batches = []
    for view_a, view_b in twin_views:
        assert torch.equal(view_a, view_b)  # the same images in both
        batches.append((view_a[:, 0, 4, 4] * 255).round().int().tolist())
    return batches


def flat(batches):
    return [number for batch in batches for number in batch]


@pytest.fixture
def few_held(monkeypatch):
    """Let an epoch mix within 8 images or so, and ask for files ahead, as where a set is larger than memory."""
    monkeypatch.setattr(views, "SHUFFLE_BYTES", 8 * len(numbered(0).data))
    monkeypatch.setattr(views, "BLOCKS", 4)
    monkeypatch.setattr(views, "AHEAD", 2)


def test_an_epoch_has_every_image_at_most_once_and_each_has_a_new_order(one_or_more_tars, plain, few_held):
    twin_views = views.TwinViews(one_or_more_tars, plain(), 5, seed=0)
    epochs = [flat(epoch(twin_views)) for _ in range(3)]
    for numbers in epochs:
        assert len(numbers) == len(set(numbers)) == 50 == 5 * len(twin_views)
    assert len({frozenset(numbers) for numbers in epochs}) > 1  # the images left out differ
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_small_set_is_shuffled_as_a_whole(tars, plain):
    numbers = flat(epoch(views.TwinViews(tars, plain(), COUNT, seed=0)))
    assert sorted(numbers) == list(range(COUNT))
    assert abs(np.corrcoef(numbers, range(COUNT))[0, 1]) < 0.3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_epoch_out_between_them(one_or_more_tars, plain, few_held, world_size):
    n = 3 * world_size
    ranks = [views.TwinViews(one_or_more_tars, plain(), n, 0, rank, world_size) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {COUNT // n}
    seen = [set() for _ in ranks]
    for _ in range(3):
        numbers = [flat(epoch(rank)) for rank in ranks]
        assert len(flat(numbers)) == len(set(flat(numbers))) == n * len(ranks[0])
        for rank, ours in zip(seen, numbers, strict=True):
            rank |= set(ours)
    assert all(len(rank) > 1.2 * COUNT / world_size for rank in seen)  # not the same part in each epoch


def test_ranks_distort_differently(tmp_path, plain):
    webdataset.write(tmp_path / "pretrain-000000.tar", (numbered(100)._replace(key=f"{i:024x}") for i in range(40)))
    settings = plain(jitter=1.0, brightness=0.4)
    brightness = set()
    for rank in (0, 1):
        ((view_a, view_b),) = views.TwinViews(webdataset.tars("pretrain", tmp_path), settings, 40, 0, rank, 2)
        brightness |= {round(float(image.mean()), 4) for view in (view_a, view_b) for image in view}
    assert len(brightness) > 60  # of 80


def test_a_whole_number_of_batches_leaves_nothing_out(tars, plain):
    twin_views = views.TwinViews(tars[:2], plain(), 11, seed=0)
    for _ in range(3):
        assert sorted(flat(epoch(twin_views))) == list(range(22))


def test_batches_are_normalised_float32_channels_first(tars, smoke):
    view_a, view_b = next(iter(views.TwinViews(tars, smoke.views, 7, seed=0)))
    assert view_a.shape == view_b.shape == (7, 3, smoke.views.size, smoke.views.size)
    assert view_a.dtype == view_b.dtype == torch.float32
    assert view_a.device.type == "cpu"
    assert view_a.is_contiguous()
    assert not torch.equal(view_a, view_b)


def batches(twin_views, n):
    """The next `n` batches, over as many epochs as that takes."""
    endless = itertools.chain.from_iterable(itertools.repeat(twin_views))
    return [torch.stack(pair) for pair in itertools.islice(endless, n)]


def test_the_seed_fixes_everything_and_the_number_of_threads_nothing(tars, smoke):
    def first(**options):
        return batches(views.TwinViews(tars, smoke.views, **{"batch_size": 5, "seed": 1} | options), 12)

    reference = first(threads=1)
    assert all(map(torch.equal, reference, first(threads=3)))
    assert not any(map(torch.equal, reference, first(seed=2)))


@pytest.fixture
def small_tars(small_shards):
    """200 JPEGs with something to see in them."""
    return webdataset.tars("pretrain", small_shards)


def global_batches(tars, params, world_size, n, state=None):
    """The next `n` batches of all ranks together, (2, batch, 3, size, size)."""
    ranks = [views.TwinViews(tars, params.views, 60, 0, rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        if state:
            rank.load_state_dict(state)
    return [torch.cat(parts, 1) for parts in zip(*(batches(rank, n) for rank in ranks), strict=True)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_global_batch_is_the_same_at_any_number_of_ranks(small_tars, smoke, world_size):
    alone, shared = (global_batches(small_tars, smoke, world, 7) for world in (1, world_size))  # 3 make an epoch
    assert all(map(torch.equal, alone, shared))
    assert len({float(image.sum()) for batch in alone for view in batch for image in view}) == 7 * 2 * 60


def test_windows_are_those_for_each_images_own_sides(tmp_path, plain):
    """The middle of every image, a square of 8 px, tells its number; left and right or above and below it is white."""

    def barred(i):
        height, width = (8, 8 + 2 * i) if i % 2 else (8 + 2 * i, 8)
        pixels = np.full((height, width, 3), 255, np.uint8)
        top, left = (height - 8) // 2, (width - 8) // 2
        pixels[top : top + 8, left : left + 8] = i
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return webdataset.Sample(f"{i:024x}", buffer.getvalue(), "png", -1, height, width)

    webdataset.write(tmp_path / "pretrain-000000.tar", map(barred, range(40)))
    for rank in (0, 1):
        twin_views = views.TwinViews(webdataset.tars("pretrain", tmp_path), plain(), 10, 0, rank, 2)
        for pair in batches(twin_views, 8):
            numbers = (pair[0, :, 0, 4, 4] * 255).round()
            torch.testing.assert_close(pair, (numbers / 255)[None, :, None, None, None].expand_as(pair))
            assert len(set(numbers.tolist())) == 5


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_a_restored_run_goes_on_as_the_undisturbed_one(one_or_more_tars, smoke, few_held, rank, world_size):
    arguments = (one_or_more_tars, smoke.views, 6, 0, rank, world_size)
    undisturbed = views.TwinViews(*arguments)
    assert len(undisturbed) == 8
    expected, states = [], [undisturbed.state_dict()]
    for _ in range(3):
        for pair in undisturbed:
            expected.append(torch.stack(pair))
            states.append(undisturbed.state_dict())
    restored = views.TwinViews(*arguments)
    for done in (3, 0, 7, 8, 9, 16, 19):  # of the three epochs of 8; what was done before is forgotten
        restored.load_state_dict(states[done])
        assert all(map(torch.equal, batches(restored, 24 - done), expected[done:]))
        restored.load_state_dict(states[done])
        assert sum(1 for _ in restored) == 8 - done % 8  # the rest of its epoch


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_state_taken_at_one_number_of_ranks_goes_on_at_another(small_tars, smoke, world_size):
    ranks = [views.TwinViews(small_tars, smoke.views, 60, 0, rank, world_size) for rank in range(world_size)]
    expected, states = [], [ranks[0].state_dict()]
    for _ in range(2):
        for pairs in zip(*ranks, strict=True):
            expected.append(torch.cat([torch.stack(pair) for pair in pairs], 1))
            (state,) = {json.dumps(rank.state_dict()) for rank in ranks}  # the same on all of them
            states.append(json.loads(state))
    for done, other in itertools.product((0, 2, 3, 5), (1, 2, 4)):
        assert all(map(torch.equal, global_batches(small_tars, smoke, other, 6 - done, states[done]), expected[done:]))


def test_a_state_is_a_few_numbers(tars, smoke):
    twin_views = views.TwinViews(tars, smoke.views, 5, seed=0)
    for step in (0, 3, 12):
        batches(twin_views, step - twin_views.state_dict()["step"])
        state = twin_views.state_dict()
        assert json.loads(json.dumps(state)) == state
        assert len(json.dumps(state)) < 1000
        assert set(state) == {"shards", "views", "batch_size", "seed", "step"}
        assert state["step"] == step


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("batch_size", {"batch_size": 4}),
        ("seed", {"seed": 1}),
        ("shards", {"part": slice(4)}),
        ("views", {"flip": 0.25}),
    ],
)
def test_a_state_of_another_run_is_refused(tars, smoke, name, other):
    def build(part=slice(None), flip=0.5, **options):
        arguments = {"batch_size": 6, "seed": 0, "rank": 1, "world_size": 2} | options
        return views.TwinViews(tars[part], dataclasses.replace(smoke.views, flip=flip), **arguments)

    build().load_state_dict(build().state_dict())
    with pytest.raises(ValueError, match=f"the saved state has another {name}: "):
        build().load_state_dict(build(**other).state_dict())


def test_a_batch_that_the_ranks_cannot_share_evenly(tars, smoke):
    with pytest.raises(UserError, match=r"pretrain.batch_size=8 is not divisible by 3 processes; use a multiple"):
        views.TwinViews(tars, smoke.views, 8, 0, rank=0, world_size=3)


def test_fewer_images_than_a_batch(tars, smoke):
    with pytest.raises(UserError, match=r"pretrain.batch_size=54 is more than the 53 images"):
        views.TwinViews(tars, smoke.views, 54, 0, rank=0, world_size=2)
    with pytest.raises(UserError, match=r"pretrain.batch_size=8 is more than the 0 images"):
        views.TwinViews([], smoke.views, 8, 0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_files_are_prefetched_before_they_are_read_and_that_changes_nothing(
    tars, smoke, few_held, monkeypatch, world_size
):
    calls, prefetch, read = [], webdataset.Samples.prefetch, webdataset.Samples.read

    def record(what, how):
        def method(self, numbers):
            calls.append((what, numbers.tolist()))
            return how(self, numbers)

        return method

    monkeypatch.setattr(webdataset.Samples, "prefetch", record("prefetch", prefetch))
    monkeypatch.setattr(webdataset.Samples, "read", record("read", read))
    arguments = (tars, smoke.views, 4, 0, world_size - 1, world_size)
    expected = batches(views.TwinViews(*arguments), 12)  # of 13 in an epoch
    numbers = {what: [n for kind, n in calls if kind == what] for what in ("prefetch", "read")}
    assert numbers["prefetch"][:10] == numbers["read"][2:12]
    assert calls.index(("prefetch", numbers["read"][2])) < calls.index(("read", numbers["read"][0]))
    monkeypatch.setattr(views, "AHEAD", 99)
    calls.clear()
    assert all(map(torch.equal, batches(views.TwinViews(*arguments), 12), expected))
    assert {kind for kind, _ in calls} == {"read"}


def test_no_two_draws_share_a_stream(tars, plain, monkeypatch):
    build, streams = np.random.default_rng, []

    def record(seed):
        rng = build(seed)
        streams.append(str(rng.bit_generator.state))
        return rng

    monkeypatch.setattr(np.random, "default_rng", record)
    batches(views.TwinViews(tars, plain(), 25, seed=0), 6)
    assert len(streams) == len(set(streams)) >= 3 + 6  # the order of three epochs, the distortions of six batches


def test_a_tar_that_was_cut_off_is_named(tars, smoke, tmp_path):
    tar = tmp_path / tars[0].name
    for path in (tars[0], webdataset.index(tars[0]), tars[0].with_suffix(".npy")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    twin_views = views.TwinViews([tar], smoke.views, 5, 0)
    tar.write_bytes(tar.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"pretrain-000000.tar is shorter than .* says; run `barlow shard` again"):
        next(iter(twin_views))


@pytest.mark.parametrize("listed", [True, False])
def test_images_that_do_not_decode_are_named_by_their_source_files(tmp_path, smoke, monkeypatch, listed):
    monkeypatch.chdir(tmp_path)
    samples = [numbered(i) for i in range(30)]
    for i in (3, 20):
        samples[i] = samples[i]._replace(data=samples[i].data[:60])
    webdataset.write(tmp_path / "pretrain-000000.tar", samples[:2])
    webdataset.write(tmp_path / "pretrain-000001.tar", samples[2:])
    if listed:
        rows = {"path": [f"photos/{i}.png" for i in range(30)], "sha256": [s.key + 40 * "0" for s in samples]}
        files.ACCEPTED.parent.mkdir()
        parquet.write_table(pa.table(rows), files.ACCEPTED)
    twin_views = views.TwinViews(webdataset.tars("pretrain", tmp_path), smoke.views, 30, 0)
    bad = [rf"photos/{i}\.png" if listed else rf"{samples[i].key}\.png" for i in (3, 20)]
    with pytest.raises(UserError, match=rf"pretrain-000001\.tar: {', '.join(bad)} cannot be decoded; replace"):
        next(iter(twin_views))


def test_the_search_for_a_bad_image_leaves_this_process_alone(tmp_path, monkeypatch):
    """DALI may crash after a failure, so here it is not even asked."""
    sample = numbered(0)
    webdataset.write(tmp_path / "pretrain-000000.tar", [sample._replace(data=sample.data[:-12])])
    monkeypatch.setattr(views.fn.decoders, "image", None)
    assert "pretrain-000000.tar: 000000000000000000000000.png" in views._undecodable(
        webdataset.tars("pretrain", tmp_path)
    )


def test_pairs_are_the_first_images_as_the_network_sees_them(tars, plain):
    settings = plain(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), solarize=(0.0, 1.0))
    view_a, view_b = views.pairs(tars, settings, 13, seed=0)
    assert view_a.shape == view_b.shape == (13, 8, 8, 3)
    assert view_a.dtype == view_b.dtype == np.uint8
    assert view_a[:, 0, 0].tolist() == [[i, 255 - i, 0] for i in range(13)]
    assert view_b[:, 0, 0].tolist() == [[i, i, 0] for i in range(13)]
    assert len(views.pairs(tars, settings, 99, seed=0)[0]) == COUNT


@pytest.mark.parametrize("some", [[3], [0, 5, 9, 40, 52], list(range(COUNT))])
def test_single_views_are_of_the_images_asked_for_each_as_often(tars, plain, some):
    samples = webdataset.Samples(tars)
    found = list(views.single_views(samples, np.array(some), plain(), 4, 26, seed=0))
    numbers = np.concatenate([batch for _, batch in found])
    for view, batch in found:
        assert (view[:, 0, 4, 4] * 255).round().int().tolist() == batch.tolist()
    counts = np.unique(numbers, return_counts=True)
    assert counts[0].tolist() == some
    assert np.ptp(counts[1]) <= 1
    again = views.single_views(samples, np.array(some), plain(), 4, 26, seed=0)
    assert np.array_equal(np.concatenate([batch for _, batch in again]), numbers)
    other = views.single_views(samples, np.array(some), plain(), 4, 26, seed=1)
    assert len(some) == 1 or not np.array_equal(np.concatenate([batch for _, batch in other]), numbers)


def test_single_views_are_distorted_as_view_b_is_and_each_differently(tars, plain):
    samples = webdataset.Samples(tars)
    (view, _), *_ = views.single_views(samples, np.array([7]), plain(solarize=(0.0, 1.0)), 2, 1, seed=0)
    assert (view[:, :2, 4, 4] * 255).round().int().tolist() == [[7, 255 - 248]] * 2
    cropped = plain(crop_area=(0.3, 1.0), brightness=0.4, jitter=1.0)
    (view, _), *_ = views.single_views(samples, np.array([7]), cropped, 2, 1, seed=0)
    assert not torch.equal(view[0], view[1])


@pytest.mark.parametrize("count", [1, 2])
def test_the_pipeline_can_be_put_together_for_a_gpu(smoke, count):
    """No driver is needed for that: a graph with a node of the GPU where one of the CPU must be is refused here."""
    options = {"batch_size": 4, "num_threads": 1, "device_id": 0}
    pipeline = views.view_pipeline(lambda: None, smoke.views, count, **options)
    assert pipeline.device_id == 0
    assert pipeline.exec_dynamic  # without which a batch could be written over while a step reads it


@pytest.mark.parametrize(("device_id", "decoder"), [(None, "cpu"), (0, "mixed")])
def test_jpegs_are_decoded_alike_on_both_devices(smoke, monkeypatch, device_id, decoder):
    options, decode = [], views.fn.decoders.image
    monkeypatch.setattr(
        views.fn.decoders, "image", lambda *nodes, **given: options.append(given) or decode(*nodes, **given)
    )
    views.view_pipeline(lambda: None, smoke.views, 1, batch_size=4, num_threads=1, device_id=device_id)
    assert [(given["device"], given["jpeg_fancy_upsampling"]) for given in options] == [(decoder, True)]


def test_chroma_is_interpolated_as_pillow_does(tmp_path, plain):
    """Of a JPEG with a quarter of the chroma; to repeat it instead would be several levels off."""
    rows, columns = np.mgrid[:32, :32]
    wave = np.stack((np.sin(rows / 2), np.cos(columns / 2), np.sin((rows + columns) / 3)), -1)
    buffer = io.BytesIO()
    Image.fromarray((128 + 127 * wave).astype(np.uint8)).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    webdataset.write(
        tmp_path / "pretrain-000000.tar", [webdataset.Sample("0" * 24, buffer.getvalue(), "jpg", -1, 32, 32)]
    )
    view, _ = views.pairs(webdataset.tars("pretrain", tmp_path), plain(size=32), 1, seed=0)
    assert np.array_equal(view[0], np.asarray(Image.open(buffer)))


def test_batches_stay_as_they_were_handed_over(tars, smoke):
    """They are no copies, and the pipeline goes on; with `exec_dynamic=False` it writes over them."""
    endless = itertools.chain.from_iterable(itertools.repeat(views.TwinViews(tars, smoke.views, 5, seed=0)))
    held = [(pair, torch.stack(pair)) for pair in itertools.islice(endless, 30)]
    assert all(torch.equal(torch.stack(pair), copy) for pair, copy in held)
    samples = webdataset.Samples(tars)
    held = [
        (view, view.clone()) for view, _ in views.single_views(samples, np.arange(COUNT), smoke.views, 5, 30, seed=0)
    ]
    assert all(torch.equal(view, copy) for view, copy in held)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the GPU path is not tested here")
def test_gpu_gives_what_cpu_gives(tars, plain):
    settings = plain(size=16, jitter=1.0, brightness=0.4, contrast=0.4, solarize=(0.0, 1.0), blur=(1.0, 0.0))
    cpu, gpu = (batches(views.TwinViews(tars, settings, 7, 0, device_id=device), 8) for device in (None, 0))
    assert all(batch.device.type == "cuda" for batch in gpu)
    assert all((a - b.cpu()).abs().max() < 3 / 255 for a, b in zip(cpu, gpu, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the GPU path is not tested here")
def test_gpu_decodes_jpegs_as_the_cpu_does(small_tars, plain):
    cpu, gpu = (
        batches(views.TwinViews(small_tars, plain(size=28), 50, 0, device_id=device), 4) for device in (None, 0)
    )
    assert all((a - b.cpu()).abs().max() < 3 / 255 for a, b in zip(cpu, gpu, strict=True))
