import numpy as np
import pytest
import stages
import torch
from sklearn.manifold import TSNE, trustworthiness
from threadpoolctl import threadpool_info, threadpool_limits

from barlow.core import images, webdataset
from barlow.core.errors import UserError
from barlow.evaluation import features
from barlow.evaluation.neighbours import most_similar
from barlow.reporting import gallery


@pytest.fixture(scope="module", autouse=True)
def inside(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("gallery"))
        stages.data(["a", "b", "c"], 60)
        yield


def split(n, classes=3, labelled=True, scale=3.0):
    labels = torch.arange(n) % classes
    rng = np.random.default_rng(0)
    vectors = torch.tensor(rng.normal(size=(n, 16))).float() + scale * torch.eye(16)[labels]
    return features.Split(
        vectors, labels if labelled else torch.full_like(labels, -1), [f"test{i:020x}" for i in range(n)]
    )


def test_images_are_found_by_key():
    samples = {sample.key: sample.data for sample in webdataset.read(webdataset.tars("test"))}
    keys = [list(samples)[i] for i in (41, 3, 3)]
    found = gallery.load("test", keys)
    assert set(found) == set(keys)
    for key, pixels in found.items():
        assert (pixels == images.decode(samples[key])).all()
    with pytest.raises(UserError, match=r"lacks nothing, which .* run `barlow extract` again"):
        gallery.load("test", ["nothing"])


def test_neighbours_on_the_map_are_neighbours():
    vectors = split(60).features
    places = gallery.plane(vectors)
    unit = torch.nn.functional.normalize(vectors).numpy()
    assert trustworthiness(unit, places, n_neighbors=5) > 0.85
    assert places.min() == pytest.approx(3)
    assert places.max() == pytest.approx(97)
    assert (gallery.plane(vectors) == places).all()


def test_the_map_is_made_on_one_thread(monkeypatch):
    used = set()

    class Seen(TSNE):
        def fit_transform(self, vectors):
            used.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp")
            return np.random.default_rng(0).normal(size=(len(vectors), 2))

    monkeypatch.setattr(gallery, "TSNE", Seen)
    with threadpool_limits(2):
        gallery.plane(split(9).features)
    assert used == {1}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [4, 5, 30])
def test_collapsed_features_have_a_map(n):
    places = gallery.plane(torch.ones(n, 16))
    assert np.isfinite(places).all()
    assert ((places >= 0) & (places <= 100)).all()


def test_the_map_has_every_image_once_by_class():
    test = split(60)
    laid = gallery.embedding_map(test, ["a", "b", "c"])
    assert sorted(i for _, _, i, _ in laid["points"]) == list(range(60))
    assert all(label == i % 3 for _, _, i, label in laid["points"])
    order = [(label, x) for x, _, _, label in laid["points"]]
    assert order == sorted(order)
    assert laid["labels"] == [(0, "a"), (1, "b"), (2, "c")]
    assert gallery.embedding_map(split(60, labelled=False), [])["labels"] == [(-1, None)]
    assert gallery.embedding_map(split(3), ["a", "b", "c"]) is None


def test_a_large_test_split_is_mapped_in_part(monkeypatch):
    monkeypatch.setattr(gallery, "MAPPED", 20)
    assert len(gallery.embedding_map(split(60), ["a", "b", "c"])["points"]) == 20


def test_the_best_and_the_worst_by_their_neighbours_classes():
    test = split(90, scale=1.5)
    test.labels[7] = 0  # was 1: its neighbours are of another class
    _, nearest = most_similar(test.features, gallery.NEIGHBOURS, 1000)
    same = (test.labels[nearest] == test.labels[:, None]).sum(1)
    found = gallery.neighbours(test, 6)
    for kind, extreme in (("best", same.max()), ("worst", same.min())):
        rows = found[kind]
        assert len(rows) == 3
        assert rows[0]["same"] == extreme
        assert {int(test.labels[row["images"][0]]) for row in rows} == {0, 1, 2}
        for row in rows:
            query, *others = row["images"]
            assert others == nearest[query].tolist()
            assert row["same"] == same[query]


def test_without_labels_similarity_decides():
    test = split(40, labelled=False)
    alike = most_similar(test.features, gallery.NEIGHBOURS, 1000)[0].mean(1)
    found = gallery.neighbours(test, 4)
    assert [row["images"][0] for row in found["best"]] == alike.argsort(descending=True)[:2].tolist()
    assert [row["images"][0] for row in found["worst"]] == alike.argsort()[:2].tolist()
    assert found["best"][0]["same"] is None
    assert found["worst"][0]["similarity"] == pytest.approx(float(alike.min()))


def test_hardly_any_images_have_no_neighbours():
    assert gallery.neighbours(split(1), 8) == {}
    found = gallery.neighbours(split(2), 8)
    assert [row["images"] for row in found["best"]] in ([[0, 1], [1, 0]], [[1, 0], [0, 1]])
    assert found["worst"] == []


def test_classes_take_turns():
    assert list(gallery.in_turn([0, 1, 2, 3, 4], [0, 0, 1, 1, 2])) == [0, 2, 4, 1, 3]


def test_examples_are_of_classes_spread_over_all():
    train = split(10)
    train = train._replace(keys=[sample.key for sample in webdataset.read(webdataset.tars("train"))])
    found = gallery.examples(train, ["a", "b", "c"])
    assert [kind["name"] for kind in found] == ["a", "b", "c"]
    assert [len(kind["keys"]) for kind in found] == [4, 3, 3]
    assert all(train.labels[train.keys.index(key)] == i for i, kind in enumerate(found) for key in kind["keys"])
    nothing = features.Split(torch.zeros(0, 16), torch.zeros(0, dtype=torch.long), [])
    [unnamed] = gallery.examples(nothing, [])
    assert unnamed["name"] is None
    assert len(unnamed["keys"]) == 18
