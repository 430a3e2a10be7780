import dataclasses
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors import torch as save
from sklearn.neighbors import KNeighborsClassifier

from barlow import pretrain
from barlow.core import files, images, webdataset
from barlow.core.errors import Interrupted, UserError
from barlow.core.weights import load_weights, save_weights
from barlow.evaluation import features
from barlow.training import checkpoint, distributed, model, progress

pytestmark = pytest.mark.usefixtures("one_thread")
NORMS = "weight_norm", "gradient_norm"


def run(params):
    pretrain.run(params)
    return files.ENCODER.read_bytes(), files.read_json("reports/pretrain.json")


def alone(tmp_path_factory, small_shards, params):
    """Run in a project of its own; return what `run` does and the loss of each epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("alone"))
        Path("data").mkdir()
        Path("data/shards").symlink_to(small_shards)
        return *run(params), curve("loss")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_shards, smoke):
    """The encoder's bytes, the report and the losses of the smoke preset."""
    return alone(tmp_path_factory, small_shards, smoke)


def stop_after(monkeypatch, steps, kind=signal.SIGTERM):
    """Send this process a signal in the middle of step number `steps`."""
    record = pretrain.Training.record

    def recorded(self, *arguments):
        record(self, *arguments)
        if self.step == steps:
            os.kill(os.getpid(), kind)

    monkeypatch.setattr(pretrain.Training, "record", recorded)


def curve(name):
    """Return a metric's values, one an epoch."""
    lines = Path(f"reports/pretrain/plots/metrics/{name}.tsv").read_text().splitlines()
    return [float(line.split("\t")[1]) for line in lines[1:]]


def test_it_learns_and_writes_what_later_stages_read(project, smoke, change):
    _, report = run(change(smoke, "pretrain", epochs=3))
    assert report["epochs"] == 3
    assert report["seconds"] == pytest.approx(sum(curve("seconds")))
    losses = curve("loss")
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(report["loss"])
    assert 0.5 < report["std"] == pytest.approx(curve("std")[-1])
    loaded, metadata = model.load_encoder()
    assert metadata["steps"] == 9
    assert metadata["data"] == webdataset.digest(webdataset.tars("pretrain"))
    assert loaded(torch.zeros(1, 28, 28, 3, dtype=torch.uint8)).shape == (1, 512)
    corners, _ = load_weights(files.CORRELATION)
    assert {name: corner.shape for name, corner in corners.items()} == dict.fromkeys(
        ["after", "before", "during"], (64, 64)
    )
    diagonals = [corners[name].diagonal().mean() for name in ("before", "during", "after")]
    assert diagonals == sorted(diagonals)
    for name in NORMS:
        assert len(set(curve(name))) == 3
        assert 0 < curve(name)[-1] == pytest.approx(report[name])
    assert list(checkpoint.FOLDER.glob("*")) == []


def test_a_run_goes_on_from_the_encoder_and_the_projector_of_another(project, smoke, change, capsys):
    params = change(smoke, "pretrain", epochs=1)
    pretrain.run(params)
    before, _ = load_weights(files.ENCODER)
    files.ENCODER.rename("start.safetensors")
    still = change(params, "pretrain", lr_weights=0.0, lr_biases=0.0)
    pretrain.run(change(still, "model", weights="start.safetensors"))
    assert "% of the backbone's parameters matched, the projector too; left out: whitening" in capsys.readouterr().out
    after, metadata = load_weights(files.ENCODER)
    trained = [name for name in before if name.endswith("weight") and not name.startswith("whitening.")]
    assert any(name.startswith("projector.") for name in trained)
    assert all(torch.equal(after[name], before[name]) for name in trained)
    assert metadata["weights"] == {"name": "start.safetensors", "sha256": files.sha256("start.safetensors")}
    assert not any(name.startswith("projector") for name in model.load_encoder()[0].state_dict())


def test_progress_is_told_between_epochs(project, smoke, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0)
    pretrain.run(smoke)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines if line.startswith("epoch") and "left" in line] == [
        [f"epoch {1 + step // 3}/2", f"step {step + 1}/6"] for step in range(6)
    ]


def test_same_seed_same_weights(project, smoke, change):
    params = change(smoke, "pretrain", epochs=1)
    first, _ = run(params)
    second, _ = run(params)
    third, _ = run(change(params, "pretrain", seed=1))
    assert first == second
    assert first != third


@pytest.mark.parametrize("steps", [1, 3, 4, 6])  # in the first epoch, at its end, in the second, when all is done
def test_stopped_and_run_again_equals_an_undisturbed_run(project, smoke, undisturbed, monkeypatch, capsys, steps):
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Interrupted, match=f"stopped at step {steps} of 6"):
            pretrain.run(smoke)
    encoder, report = run(smoke)
    assert f"going on from step {steps} of 6\n" in capsys.readouterr().out
    expected, expected_report, losses = undisturbed
    assert encoder == expected
    assert report["loss"] == expected_report["loss"]
    assert curve("loss") == losses
    assert [report[name] for name in NORMS] == [expected_report[name] for name in NORMS]


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "larc"},
        {"optimizer": "sgd", "microbatch": 16},
        {"optimizer": "adamw", "lr_weights": 1e-3, "lr_biases": 1e-3},
    ],
)
def test_each_optimizer_goes_on_with_the_same_weights(project, smoke, change, undisturbed, monkeypatch, settings):
    params = change(smoke, "pretrain", **settings)
    expected, _ = run(params)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Interrupted):
            pretrain.run(params)
    assert run(params)[0] == expected != undisturbed[0]


def test_a_microbatch_of_the_whole_batch_changes_no_weight(project, smoke, change, undisturbed):
    pretrain.run(change(smoke, "pretrain", microbatch=64))
    whole = save.load(undisturbed[0])
    for name, value in load_weights(files.ENCODER)[0].items():
        assert torch.equal(value, whole[name])


TOGETHER = """
import sys
from dataclasses import replace
import torch
from barlow import pretrain
from barlow.core import files
from barlow.core.errors import Interrupted
from barlow.settings import loading
from barlow.training import distributed, state

torch.set_num_threads(1)
params, device = loading.load(), distributed.start("cpu")
record = state.Training.record
for settings in ({"optimizer": "larc"}, {"optimizer": "sgd"}, {"optimizer": "adamw", "microbatch": 8}):
    settings |= {"processes": 2, "lr_weights": 0.01, "lr_biases": 0.001}
    chosen, weights = replace(params, pretrain=replace(params.pretrain, **settings)), []
    for stopped in (False, True):
        if stopped:
            def recorded(self, *arguments):
                record(self, *arguments)
                if self.step == 3:
                    self.writer.wait()
                    raise Interrupted("after the checkpoint of step 2")
            state.Training.record = recorded
            try:
                pretrain.train(chosen, device)
            except Interrupted:
                state.Training.record = record
        pretrain.train(chosen, device)
        if distributed.rank() == 0:
            weights.append(files.ENCODER.read_bytes())
    assert len(set(weights)) <= 1, settings
distributed.stop()
"""


@pytest.mark.slow
def test_each_optimizer_goes_on_with_the_same_weights_in_two_processes(project, smoke, change):
    params = change(smoke, "pretrain", checkpoint_steps=2)
    Path("params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(params)))))
    Path("together.py").write_text(TOGETHER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "together.py"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("going on from step 2 of 6") == 3
    assert "8 images at a time" in done.stdout


@pytest.mark.parametrize("ablate", ["normalisation", "invariance", "stop-gradient"])
def test_an_ablation_makes_another_run(project, smoke, change, undisturbed, ablate):
    encoder, _ = run(change(smoke, "pretrain", ablate=ablate))
    assert encoder != undisturbed[0]
    assert model.load_encoder()[1]["pretrain"]["ablate"] == ablate


def test_a_usr1_signal_stops_as_well(project, smoke, monkeypatch):
    """What SLURM sends before a job's time is over."""
    stop_after(monkeypatch, 2, signal.SIGUSR1)
    with pytest.raises(Interrupted, match="stopped at step 2 of 6; run again to go on from there"):
        pretrain.run(smoke)
    assert [path.name for path in checkpoint.FOLDER.glob("*/*")] == ["step-000000002.safetensors"]


def test_a_checkpoint_every_so_many_steps(project, smoke, change, monkeypatch):
    saved = []

    def spy(self, step, *arguments, save=checkpoint.Writer.save):
        saved.append(step)
        save(self, step, *arguments)

    monkeypatch.setattr(checkpoint.Writer, "save", spy)
    pretrain.run(change(smoke, "pretrain", checkpoint_steps=2))
    assert saved == [2, 4, 6]
    pretrain.run(smoke)
    assert saved == [2, 4, 6]  # 60 s are not over
    pretrain.run(change(smoke, "pretrain", checkpoint_seconds=0, epochs=1))
    assert saved[3:] == [1, 2, 3]


def test_a_full_disk_ends_the_run_at_once_and_it_goes_on_when_there_is_room(
    project, smoke, change, undisturbed, monkeypatch, capsys
):
    params = change(smoke, "pretrain", checkpoint_steps=2)
    steps = []

    def full(path, *arguments, save=save_weights):
        if path.name == "step-000000004.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, *arguments)

    def recorded(self, *arguments, record=pretrain.Training.record):
        record(self, *arguments)
        steps.append(self.step)
        if self.writer._last:
            futures.wait([self.writer._last], 60)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", full)
        patch.setattr(pretrain.Training, "record", recorded)
        with pytest.raises(UserError, match=r"000004.safetensors cannot be written \(No space left .*step-000000002"):
            pretrain.run(params)
    assert steps == [1, 2, 3, 4, 5]
    encoder, _ = run(params)
    assert "going on from step 2 of 6" in capsys.readouterr().out
    assert encoder == undisturbed[0]


def test_knn_while_it_trains(project, smoke, change, undisturbed, capsys):
    encoder, report = run(change(smoke, "pretrain", knn_epochs=1))
    assert encoder == undisturbed[0]  # to look at the network does not change it
    accuracies = curve("knn_val_top1")
    assert len(accuracies) == 2
    assert report["knn_val_top1"] == accuracies[-1]
    assert f"kNN on val {accuracies[-1]:.1f} %" in capsys.readouterr().out

    frozen, _ = model.load_encoder()
    splits = [list(webdataset.read(webdataset.tars(split))) for split in ("train", "val")]

    def represent(sample):  # while it trains, nothing is whitened
        return frozen.backbone(frozen.preprocess(torch.tensor(images.decode(sample.data))[None]))

    features = [torch.cat([represent(sample) for sample in split]) for split in splits]
    labels = [[s.label for s in split] for split in splits]
    knn = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1))
    expected = 100 * knn.fit(features[0], labels[0]).score(features[1], labels[1])
    assert report["knn_val_top1"] == pytest.approx(expected)


def test_every_process_takes_part_in_knn(smoke, change, monkeypatch):
    """Those that do not would wait in the next step's collective, which gives up after a while."""
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(features, "knn_on_val", lambda encoder, device: {"knn_val_top1": 50.0})
    network = model.BarlowTwins(smoke.model, smoke.views.size)
    run = SimpleNamespace(step=3, epoch_steps=3, network=network, device=torch.device("cpu"))
    assert pretrain.online_knn(run, change(smoke, "pretrain", knn_epochs=1)) == {"knn_val_top1": 50.0}


def test_knn_every_other_epoch(project, smoke, change):
    _, report = run(change(smoke, "pretrain", knn_epochs=2, epochs=3))
    assert len(curve("knn_val_top1")) == 1
    assert "knn_val_top1" not in report


def test_a_checkpoint_of_other_params_is_not_resumed(project, smoke, change, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            pretrain.run(smoke)
    (other,) = checkpoint.FOLDER.glob("*/*")
    pretrain.run(change(smoke, "pretrain", epochs=1, lambd=0.1))
    captured = capsys.readouterr()
    assert f"{other.parent} has checkpoints of another run (pretrain.epochs=2, pretrain.lambd=0.002); " in captured.err
    assert "going on" not in captured.out
    assert list(checkpoint.FOLDER.glob("*/*")) == [other]  # and it can still be gone on with
    pretrain.run(smoke)
    assert "going on from step 2 of 6\n" in capsys.readouterr().out
    assert list(checkpoint.FOLDER.glob("*")) == []


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(project, smoke, change):
    with pytest.raises(UserError, match=r"the loss is not finite at step 1, .* lower pretrain.lr_weights=1e\+30"):
        pretrain.run(change(smoke, "pretrain", lr_weights=1e30, lr_biases=1e30, warmup_epochs=0))
    assert not list(checkpoint.FOLDER.glob("*/*"))
    assert not files.ENCODER.exists()


def test_fewer_images_than_a_batch(project, smoke, change):
    with pytest.raises(UserError, match=r"pretrain.batch_size=500 is more than the 200 images"):
        pretrain.run(change(smoke, "pretrain", batch_size=500))


def test_no_gpu_is_said(project, smoke, change):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"pretrain.device=cuda"):
        pretrain.run(change(smoke, "pretrain", device="cuda"))


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pretrain.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture(scope="module")
def gentle(smoke):
    """24 steps with a small learning rate: with a large one rounding alone changes the curve by percents."""
    settings = {"epochs": 4, "batch_size": 32, "lr_weights": 0.02, "lr_biases": 0.0005, "precision": "fp32"}
    return dataclasses.replace(smoke, pretrain=dataclasses.replace(smoke.pretrain, **settings))


@pytest.fixture(scope="module")
def gentle_alone(tmp_path_factory, small_shards, gentle):
    """The report and the losses of one process."""
    return alone(tmp_path_factory, small_shards, gentle)[1:]


@pytest.fixture(scope="module")
def gentle_losses(gentle_alone):
    return gentle_alone[1]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def started(params, *launcher):
    """Yield `barlow pretrain` at work, under python's arguments of a launcher; its stderr goes into a file."""
    Path("params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(params)))))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, *launcher, "-m", "barlow.cli", "pretrain"]
    with (
        Path("stderr").open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as process,
    ):
        limit = threading.Timer(300, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            with suppress(FileNotFoundError, ProcessLookupError):
                for pid in [*children(process.pid), process.pid]:
                    os.kill(pid, signal.SIGKILL)


def read_to(process, start):
    """Read what a process says up to a line that starts so."""
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"it ended before {start!r}: {Path('stderr').read_text()[-3000:]}")


def assert_close(losses, expected):
    """The same but for rounding, which grows: 9e-7 in the first epoch and up to 4e-4 later were measured."""
    assert len(losses) == len(expected) == 4
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses == pytest.approx(expected, rel=5e-3)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
def test_two_processes_are_stopped_and_one_goes_on_along_the_same_curve(project, gentle, gentle_losses, change, capsys):
    with started(change(gentle, "pretrain", processes=2)) as process:
        read_to(
            process, "200 images, 6 batches of 32 per epoch, 4 epochs, 24 steps on cpu, 2 process(es), fp32, dual loss"
        )
        read_to(process, "epoch 1/4  loss")
        ranks = children(process.pid)
        assert len(ranks) == 2
        process.terminate()
        process.communicate(timeout=300)
    error = Path("stderr").read_text()
    assert process.returncode == 75, error
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    stopped = re.search(r"barlow pretrain: stopped at step (\d+) of 24; run again to go on from there\n", error)
    step = int(stopped[1])
    assert 6 <= step < 24
    assert max(path.name for path in checkpoint.FOLDER.glob("*/*")) == f"step-{step:09d}.safetensors"

    pretrain.run(gentle)
    wanted = f"going on from step {step} of 24; now 1 process(es), before 2: the same batches of 32, but other rounding"
    assert wanted in capsys.readouterr().out
    assert_close(curve("loss"), gentle_losses)


@pytest.mark.slow
def test_torchrun_starts_the_processes_again_and_they_end_as_one_does(
    project, gentle, gentle_alone, change, monkeypatch
):
    params = change(gentle, "pretrain", checkpoint_steps=2)
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with started(params, *torchrun) as process:
        read_to(process, "epoch 1/4  loss")
        os.kill(children(process.pid)[1], signal.SIGKILL)
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, Path("stderr").read_text()[-3000:]
    assert re.search(r"^going on from step \d+ of 24$", said, re.MULTILINE)
    assert said.count("epoch 4/4  loss") == 1  # one of them tells
    report, losses = gentle_alone
    assert_close(curve("loss"), losses)
    # One thread and two differ by 2e-9 in the norm of the weights and by 4e-3 in that of the last step's gradient.
    assert curve("weight_norm")[-1] == pytest.approx(report["weight_norm"], rel=1e-6)
    assert curve("gradient_norm")[-1] == pytest.approx(report["gradient_norm"], rel=2e-2)
    for name in ("invariance", "redundancy", "std", "lr"):  # of the global batch, whoever tells
        assert curve(name)[-1] == pytest.approx(report[name], rel=5e-3), name
    assert files.ENCODER.exists()


def ranks(params, folders):
    """Run `barlow pretrain` in each folder, together, as machines with disks of their own; return what they print."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    processes = []
    for rank, folder in enumerate(folders):
        (folder / "params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(params)))))
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(len(folders)), "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "barlow.cli", "pretrain"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(folders), said
    return said


@pytest.mark.soak
@pytest.mark.parametrize("holder", [0, 1])
def test_all_processes_go_on_from_what_the_first_found(
    project, gentle, gentle_losses, tmp_path, small_shards, monkeypatch, holder
):
    """With a checkpoint on one machine's disk only; each once went on from what it had itself."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        (folder / "data").mkdir(parents=True)
        (folder / "data/shards").symlink_to(small_shards)
    monkeypatch.chdir(folders[holder])
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted):
            pretrain.run(gentle)
    monkeypatch.chdir(folders[0])
    said = ranks(gentle, folders)
    assert ("going on from step 7 of 24; now 2 process(es), before 1" if holder == 0 else "from the start") in said[0]
    assert_close(curve("loss"), gentle_losses)


@pytest.mark.soak
def test_killed_at_random_points_it_ends_with_the_same_weights(project, smoke, change):
    params = change(smoke, "pretrain", epochs=4, checkpoint_steps=2)
    Path("params.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(params)))))
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run([sys.executable, script, "2"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "2 kills in " in done.stdout
