import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import stages
import torch

from barlow import promote, rollback
from barlow.core import files, images, webdataset
from barlow.core.errors import GateError, Interrupted, UserError
from barlow.encoder.encoder import Encoder
from barlow.encoder.registry import Registry
from barlow.evaluation import classifier, features, figures, onnx_file, probe
from barlow.evaluation.figures import Images, Parity, Speed

CLASSES = ["a", "b", "c", "d"]


@pytest.fixture
def held():
    return Registry("models/registry")


def production(held):
    return held.production().name


def decision():
    return files.read_json(files.DECISION)


def test_the_first_version_is_promoted_whole(encoders, held, capsys):
    sha256 = encoders("edges")
    promote.run(encoders.params)
    assert "promoted: the first version, and healthy; in production is v1" in capsys.readouterr().out
    version = held.production()
    assert files.sha256(version.onnx) == version.card["sha256"] == sha256
    assert version.card["space"] == "space of edges"
    assert version.card["classes"] == CLASSES
    assert version.card["replaces"] is None
    assert version.card["metrics"]["evaluate"] == files.read_json("reports/evaluate.json")
    assert version.card["settings"]["promote"]["margin"] == 10.0
    assert files.read_json(version.path / "decision.json")["decision"] == "promoted"
    card = (version.path / "README.md").read_text()
    for text in ("space of edges", sha256, "290 images, 200", "| linear probe |", "health: effective rank"):
        assert text in card
    vectors = np.load(version.reference)
    assert vectors.shape == (200, 12)  # all there are
    pictures = [images.decode(sample.data) for sample in webdataset.read(webdataset.tars("pretrain"))]
    np.testing.assert_allclose(vectors, Encoder(version.onnx).embed(pictures), rtol=1e-5)


def test_lower_precisions_of_this_very_encoder_go_with_it(encoders, held):
    encoders("edges")
    files.REDUCED.mkdir()
    for name, space in {"int8": "space of edges-int8", "fp16": "space of another-fp16"}.items():
        proto = onnx.load(files.ONNX)
        onnx.helper.set_model_props(proto, {"space": space, "classes": json.dumps(CLASSES), "dim": "12"})
        onnx.save(proto, files.REDUCED / f"{name}.onnx")
    promote.run(encoders.params)
    version = held.production()
    assert version.card["reduced"] == {"int8.onnx": files.sha256(files.REDUCED / "int8.onnx")}
    assert sorted(path.name for path in version.path.glob("*.onnx")) == ["encoder.onnx", "int8.onnx"]
    assert version.damage() is None
    (version.path / "int8.onnx").chmod(0o644)
    (version.path / "int8.onnx").write_bytes(b"")
    assert "int8.onnx has another SHA-256" in version.damage()


def test_the_weights_of_this_very_encoder_go_with_it(encoders, held, monkeypatch):
    encoders("edges")
    files.ENCODER.write_bytes(b"weights")
    monkeypatch.setattr(onnx_file, "is_of_weights", lambda exported: exported.metadata["space"] == "space of edges")
    promote.run(encoders.params)
    version = held.production()
    assert (version.path / "encoder.safetensors").read_bytes() == b"weights"
    assert version.damage() is None
    (version.path / "encoder.safetensors").chmod(0o644)
    (version.path / "encoder.safetensors").write_bytes(b"")
    assert "encoder.safetensors has another SHA-256" in version.damage()
    (version.path / "encoder.safetensors").write_bytes(b"weights")
    encoders("other")
    promote.run(encoders.params)
    assert not (held.production().path / "encoder.safetensors").exists()


def test_the_same_again_is_unchanged(encoders, held, capsys):
    encoders("edges")
    promote.run(encoders.params)
    promote.run(encoders.params)
    assert "unchanged: this very encoder is v1" in capsys.readouterr().out
    assert [version.name for version in held.versions()] == ["v1"]
    assert decision()["decision"] == "unchanged"


def test_a_tie_is_promoted(encoders, held):
    """Twice the embedding has the same neighbours and the same probe: no image is told apart by one of them alone."""
    encoders("edges")
    promote.run(encoders.params)
    encoders("other")
    promote.run(encoders.params)
    assert production(held) == "v2"
    checks = decision()["checks"]
    assert checks["knn: difference to production"]["text"].startswith(
        "+0.0 points (-4.5 to +4.5)"
    )  # no discordant image of 60
    assert held.production().card["replaces"] == "v1"
    assert held.production().card["space"] != held.versions()[0].card["space"]


def test_a_worse_one_is_refused(encoders, held):
    encoders("edges")
    promote.run(encoders.params)
    encoders("noise")
    with pytest.raises(GateError, match=r"knn: difference to production: -\d+\.\d points .*; in production is v1"):
        promote.run(encoders.params)
    assert production(held) == "v1"
    assert decision()["decision"] == "refused"
    assert decision()["checks"]["health: standard deviation"]["passed"]  # healthy, and worth nothing
    figures = decision()["figures"]
    assert figures["challenger"]["knn"]["top1"] < figures["v1"]["knn"]["top1"]


def test_a_wide_margin_lets_it_through(encoders, held, change):
    encoders("edges")
    promote.run(encoders.params)
    encoders("noise")
    promote.run(change(encoders.params, "promote", margin=100.0))
    assert production(held) == "v2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_effective_rank": 12.5}, r"health: effective rank: \S+, at least promote\.min_effective_rank=12\.5"),
        ({"min_std": 0.99}, r"health: standard deviation: \S+, at least promote\.min_std=0\.99"),
        ({"max_bytes": 100}, r"size: [\d,]+ bytes, at most promote\.max_bytes=100"),
        ({"max_latency_ms": 1e-9}, r"latency: \S+ ms, at most promote\.max_latency_ms=1e-09"),
    ],
)
def test_a_first_version_out_of_bounds_is_refused(encoders, held, change, settings, message):
    encoders("edges")
    with pytest.raises(GateError, match=message):
        promote.run(change(encoders.params, "promote", **settings))
    assert held.production() is None
    assert held.versions() == []


def test_one_that_is_much_slower_is_refused(encoders, held, change):
    encoders("edges")
    promote.run(encoders.params)
    encoders("other")
    with pytest.raises(GateError, match=r"latency: ratio: \S+ times production's \S+ ms, at most 1e-06"):
        promote.run(change(encoders.params, "promote", max_latency_ratio=1e-6))


def test_a_collapsed_one_is_refused(encoders, held):
    encoders("constant")
    with pytest.raises(GateError, match="health: effective rank"):
        promote.run(encoders.params)


def test_one_that_gives_nan_is_refused(encoders, held):
    encoders("edges")
    promote.run(encoders.params)
    encoders("nan")
    with pytest.raises(
        GateError, match="the embedding of image train0000 has a NaN or an infinity; in production is v1"
    ):
        promote.run(encoders.params)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.unlink(), r"No such file.*reports/evaluate\.json"),
        (lambda path: path.write_text('{"knn": {"top1": NaN}}'), r"knn\.top1 in reports/evaluate\.json is nan"),
        (lambda path: path.write_text('{"classes": 4}'), r"reports/evaluate\.json: images is missing"),
        (
            lambda path: path.write_text('{"classes": '),
            r"reports/evaluate\.json is not whole JSON .*run `barlow evaluate`",
        ),
        (
            lambda path: files.write_json(path, files.read_json(path) | {"encoders": {}}),
            r"reports/evaluate\.json has no encoders\.pretrained; run `dvc repro`",
        ),
    ],
)
def test_a_missing_metric_or_one_that_is_no_number(encoders, held, write, message):
    encoders("edges")
    write(files.REPORTS / "evaluate.json")
    with pytest.raises(GateError, match=message):
        promote.run(encoders.params)
    assert held.versions() == []


def test_features_of_another_encoder_fail_the_parity(encoders, held):
    encoders("noise")
    kept = features.load("pretrained", "test")
    encoders("edges")
    features.save("pretrained", {"test": kept})
    with pytest.raises(GateError, match=r"parity: smallest cosine to torch: \S+, at least export\.min_cosine=0\.9999"):
        promote.run(encoders.params)


def test_a_damaged_champion_stops_the_comparison(encoders, held):
    encoders("edges")
    promote.run(encoders.params)
    onnx = held.production().onnx
    onnx.chmod(0o644)
    onnx.write_bytes(onnx.read_bytes()[:-1])
    encoders("other")
    with pytest.raises(GateError, match=r"v1, in production, is damaged: .* another SHA-256.*`barlow rollback` first"):
        promote.run(encoders.params)


def test_another_list_of_classes_is_for_people_to_allow(encoders, held, change):
    encoders("edges")
    promote.run(encoders.params)
    encoders("other", classes=("a", "b", "c"))
    with pytest.raises(GateError, match=r"classes: a, b, c, d became a, b, c; promote\.allow_other_classes=false"):
        promote.run(encoders.params)
    promote.run(change(encoders.params, "promote", allow_other_classes=True))
    assert production(held) == "v2"


def test_without_labels_accuracy_is_not_compared(encoders, held, tmp_path, small_shards):
    folder = files.SHARDS
    folder.unlink()
    for split in ("pretrain", "train", "val", "test"):
        samples = webdataset.read(webdataset.tars(split, small_shards))
        webdataset.write(folder / f"{split}-000000.tar", (sample._replace(label=-1) for sample in samples))
    files.write_json(folder / webdataset.CLASSES_FILE, [])
    for name in ("edges", "other"):
        encoders(name, classes=())
        keys = [sample.key for sample in webdataset.read(webdataset.tars("test"))]
        vectors = Encoder().embed(images.decode(s.data) for s in webdataset.read(webdataset.tars("test")))
        unlabelled = torch.full((len(keys),), -1)
        features.save("pretrained", {"test": features.Split(torch.from_numpy(vectors), unlabelled, keys)})
        promote.run(encoders.params)
    assert production(held) == "v2"
    assert decision()["reason"].endswith("(no labels: accuracy was not compared)")
    assert not any("difference" in name for name in decision()["checks"])


def test_what_was_rolled_back_is_not_promoted_again(encoders, held):
    encoders("edges")
    promote.run(encoders.params)
    encoders("other")
    promote.run(encoders.params)
    rollback.run(encoders.params)
    with pytest.raises(GateError, match=r"this is v2, which was rolled back on 2.*`barlow rollback v2` puts it back"):
        promote.run(encoders.params)
    assert production(held) == "v1"
    rollback.run(encoders.params, "v2")
    promote.run(encoders.params)
    assert decision()["decision"] == "unchanged"


def test_a_version_that_a_killed_promotion_left_is_used(encoders, held, monkeypatch):
    encoders("edges")
    with monkeypatch.context() as killed:
        killed.setattr(Registry, "point", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            promote.run(encoders.params)
    assert held.production() is None
    promote.run(encoders.params)
    assert [version.name for version in held.versions()] == ["v1"]
    assert production(held) == "v1"


def test_two_at_once(encoders, held):
    encoders("edges")
    with held.locked(), pytest.raises(Interrupted, match="another process is promoting"):
        promote.run(encoders.params)


def test_there_is_no_encoder(project, smoke):
    with pytest.raises(UserError, match=r"models/encoder\.onnx is missing; run `barlow export`"):
        promote.run(smoke)


def test_check_looks_and_changes_nothing(encoders, held, capsys):
    promote.run(encoders.params, check=True)
    assert "nothing is in production" in capsys.readouterr().out
    assert not files.DECISION.exists()


def test_a_dirty_tree_is_refused_before_anything_else(encoders, held):
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    Path("params.yaml").write_text("a: 1\n")
    for command in (["init", "--quiet"], ["add", "params.yaml"], ["commit", "--quiet", "--message", "a"]):
        subprocess.run([*git, *command], check=True)
    encoders("edges")
    Path("params.yaml").write_text("a: 2\n")
    for check in (True, False):
        with pytest.raises(UserError, match=r"params\.yaml not committed, so nothing may be promoted"):
            promote.run(encoders.params, check=check)
    assert not held.folder.exists()


def test_the_log_has_each_decision(encoders, held):
    encoders("edges")
    promote.run(encoders.params)
    encoders("noise")
    with pytest.raises(GateError):
        promote.run(encoders.params)
    entries = [json.loads(path.read_text()) for path in sorted(held.folder.glob("log/*.json"))]
    assert [entry["decision"] for entry in entries] == ["promoted", "refused"]
    assert [entry["production"] for entry in entries] == ["v1", "v1"]


@pytest.fixture
def classifiers(encoders):
    """`classifiers(name)` writes models/classifier.onnx: "good" has a linear probe as its head, "better" the same times
    two, "bad" the same for other classes; its embedding is that of `encoders`' "edges"."""

    def write(name):
        classes = webdataset.classes()
        encoders("edges", classes)
        proto = onnx.load(files.ONNX)
        train = features.Split(*(Encoder().embed(pictures("train")), labels("train"), []))
        [(weight, bias)] = probe.fit_linear(
            torch.from_numpy(train.features), train.labels, len(classes), [1e-3]
        ).values()
        weight, bias = {"good": (weight, bias), "better": (2 * weight, 2 * bias), "bad": (weight[[1, 2, 3, 0]], bias)}[
            name
        ]
        head = proto.graph.node[-1]
        assert head.op_type == "Slice"
        proto.graph.node.remove(head)
        proto.graph.node.append(onnx.helper.make_node("Gemm", ["embedding", "w", "b"], ["logits"], transB=1))
        proto.graph.initializer.extend(
            onnx.numpy_helper.from_array(v.numpy(), k) for k, v in {"w": weight, "b": bias}.items()
        )
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        onnx.helper.set_model_props(proto, metadata | {"kind": "classifier", "space": f"space of {name}"})
        onnx.save(proto, files.CLASSIFIER)
        report()

    def report(**values):
        top1 = classifier.Accuracies(stages.accuracy(90.0), stages.accuracy(88.0))
        difference = figures.Gain(3.0, 1.0, 5.0)
        fields = {
            "sha256": files.sha256(files.CLASSIFIER), "images": Images(60, 30, 60), "classes": 4, "steps": 7, "lr": 0.1,
            "refitted": True, "classifier": top1, "linear": top1, "difference": difference,
            "parity": Parity(1.0, 1e-6, 64, True), "speed": Speed(1.5, 100.0),
        }  # fmt: skip
        figures.write(files.CLASSIFYING, classifier.Classifying(**fields | values))

    write.report, write.params = report, encoders.params
    return write


def pictures(split):
    return [images.decode(sample.data) for sample in webdataset.read(webdataset.tars(split))]


def labels(split):
    return torch.tensor([sample.label for sample in webdataset.read(webdataset.tars(split))])


@pytest.fixture
def line():
    """The registry of the classifiers."""
    return Registry("models/registry", "classifier")


def test_a_classifier_has_versions_of_its_own(encoders, classifiers, held, line, capsys):
    """Its promotion and its rollback leave the encoder in production, and the other way round."""
    classifiers("good")
    encoders("other")
    promote.run(encoders.params)
    encoder = held.production().onnx.read_bytes()
    for name in ("good", "better"):
        classifiers(name)
        promote.run(encoders.params, kind="classifier")
    capsys.readouterr()
    assert (production(held), [version.name for version in held.versions()]) == ("v1", ["v1"])
    assert held.production().onnx.read_bytes() == encoder
    assert (production(line), line.folder) == ("v2", Path("models/registry/classifier"))
    version = line.production()
    assert (version.kind, version.damage()) == ("classifier", None)
    assert files.sha256(Path("models/registry/classifier/production/classifier.onnx")) == version.card["sha256"]
    assert (version.card["kind"], version.card["space"]) == ("classifier", "space of better")
    card = (version.path / "README.md").read_text()
    wanted = (
        "# An image classifier",
        "+3.0 points (+1.0 to +5.0)",
        "| classifier |",
        "rollback --kind classifier",
        "1.5 ms",
    )
    for text in wanted:
        assert text in card
    rollback.run(encoders.params, kind="classifier")
    assert "rolled back: v1 is in production, v2 is withdrawn" in capsys.readouterr().out
    assert (production(line), production(held)) == ("v1", "v1")
    with pytest.raises(GateError, match="`barlow rollback v2 --kind classifier` puts it back"):
        promote.run(encoders.params, kind="classifier")
    encoders("edges")
    promote.run(encoders.params)
    assert (production(line), production(held)) == ("v1", "v2")


def test_a_classifier_is_judged_by_its_own_logits(classifiers, line):
    """The embeddings, and so probe and kNN, are those of the classifier in production; only the head is worse."""
    classifiers("good")
    promote.run(classifiers.params, kind="classifier")
    right = Encoder(files.CLASSIFIER).classify(pictures("test")).argmax(1) == labels("test").numpy()
    assert decision()["figures"]["challenger"]["logits"]["top1"] == pytest.approx(100 * right.mean())
    classifiers("bad")
    with pytest.raises(
        GateError, match=r"refused: logits: difference to production: -\d+\.\d points [^;]*; in production is v1"
    ):
        promote.run(classifiers.params, kind="classifier")
    assert production(line) == "v1"
    assert decision()["checks"]["linear: difference to production"]["passed"]


def test_one_kind_is_not_promoted_as_the_other(classifiers, held, line):
    classifiers("good")
    files.CLASSIFIER.replace(files.ONNX)
    with pytest.raises(
        UserError, match=r"models/encoder\.onnx holds a model of kind classifier; write the encoder there"
    ):
        promote.run(classifiers.params)
    with pytest.raises(UserError, match=r"models/classifier\.onnx is missing; run `barlow finetune --all-labels`"):
        promote.run(classifiers.params, kind="classifier")
    assert held.production() is line.production() is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sha256": "0"}, r"reports/classifier\.json is of another file than models/classifier\.onnx; run `barlow fin"),
        (
            {"parity": Parity(0.9, 0.1, 64, True)},
            r"parity: smallest cosine to torch, 64 images: 0\.9, at least export\.",
        ),
    ],
)
def test_what_was_measured_when_a_classifier_was_written_counts(classifiers, line, values, message):
    classifiers("good")
    classifiers.report(**values)
    with pytest.raises(GateError, match=message):
        promote.run(classifiers.params, kind="classifier")
    assert line.production() is None


def test_a_classifier_is_not_judged_without_labels(classifiers, small_shards):
    classifiers("good")
    files.SHARDS.unlink()
    for split in ("pretrain", "train", "val", "test"):
        samples = webdataset.read(webdataset.tars(split, small_shards))
        webdataset.write(files.SHARDS / f"{split}-000000.tar", (sample._replace(label=-1) for sample in samples))
    files.write_json(files.SHARDS / webdataset.CLASSES_FILE, [])
    with pytest.raises(GateError, match="a classifier is judged on labels"):
        promote.run(classifiers.params, kind="classifier")
