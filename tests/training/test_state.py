import math

import numpy as np
import pytest
import torch

from barlow import pretrain
from barlow.core import files, webdataset
from barlow.core.errors import UserError
from barlow.core.weights import load_weights
from barlow.training import checkpoint, loss, model, state
from barlow.training.loss import BarlowTwinsLoss, barlow_twins_loss
from barlow.training.optim import warmup_cosine
from barlow.training.state import Training
from barlow.training.views import TwinViews

CPU = torch.device("cpu")
HEALTHY = {"loss": 9.0, "invariance": 0.2, "redundancy": 0.01, "lr": 0.1, "std": 0.9}


pytestmark = pytest.mark.usefixtures("one_thread")


def test_learning_rates_follow_the_schedule(project, smoke, change):
    params = change(smoke, "pretrain", epochs=5, warmup_epochs=2, lr_weights=0.6, lr_biases=0.02, final_lr=0.1)
    run = Training(params, CPU)
    assert (run.epoch_steps, run.total_steps) == (3, 15)
    weights, biases = 0.15, 0.005  # a quarter, as the batch is a quarter of 256
    assert run.rates(0) == (0, 0)
    assert run.rates(3) == pytest.approx((weights / 2, biases / 2))
    assert run.rates(6) == pytest.approx((weights, biases))
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi * 4 / 9)) / 2
    assert run.rates(10) == pytest.approx((weights * middle, biases * middle))
    assert run.rates(15) == pytest.approx((weights / 10, biases / 10))
    for step in range(15):
        expected = [warmup_cosine(step, 15, 6, peak, peak / 10) for peak in (weights, biases)]
        assert run.rates(step) == pytest.approx(expected)


def test_a_step_takes_the_rates_of_weights_and_of_biases(project, smoke):
    run = Training(smoke, CPU)
    run.step = 2
    run.network.zero_grad()
    before = [w.detach().clone() for w in run.biases]
    loss = sum(w.sum() for w in run.weights + run.biases)  # a gradient of one everywhere
    run.update(BarlowTwinsLoss(loss, loss, loss))
    assert [group["lr"] for group in run.optimizer.param_groups] == list(run.rates(2))
    for w, old in zip(run.biases, before, strict=True):
        torch.testing.assert_close(w.detach(), old - run.rates(2)[1])
    assert all(w.ndim > 1 for w in run.weights)
    assert all(w.grad is None for w in run.network.parameters())


@pytest.mark.parametrize("clip", [False, True])
def test_the_optimizer_has_the_params_settings(project, smoke, change, clip):
    settings = {"momentum": 0.7, "weight_decay": 0.3, "trust_coefficient": 0.04}
    run = Training(change(smoke, "pretrain", optimizer="larc" if clip else "lars", **settings), CPU)
    settings["clip"] = clip
    weights, biases = ({name: group[name] for name in settings} for group in run.optimizer.param_groups)
    assert weights == settings
    assert biases == settings | {"weight_decay": 0.0}


def test_an_epochs_row_holds_the_means(project, smoke):
    run = Training(smoke, CPU)
    assert (run.epoch_steps, run.network.dim) == (3, 64)
    generator = torch.Generator().manual_seed(0)
    views = [[torch.randn(64, 64, generator=generator) for _ in range(2)] for _ in range(4)]
    for terms, pair in zip([(10.0, 4.0, 90.0), (20.0, 5.0, 60.0), (60.0, 3.0, 30.0)], views, strict=False):
        run.record(BarlowTwinsLoss(*map(torch.tensor, terms)), *pair)
    run.optimizer.param_groups[0]["lr"] = 0.25
    row = run.end_epoch(views[2][0], {"seconds": 2.0})
    unit = views[2][0].numpy() / np.linalg.norm(views[2][0], axis=1, keepdims=True)
    assert row == pytest.approx(
        {
            "loss": 30.0,
            "invariance": 4.0 / 64,
            "redundancy": 60.0 / (64 * 63),
            "lr": 0.25,
            "std": unit.std(0).mean() * 8,
            "weight_norm": math.sqrt(sum(w.double().square().sum().item() for w in run.network.parameters())),
            "gradient_norm": 0.0,  # no step was taken
            "seconds": 2.0,
        }
    )
    assert run.history == [row]
    run.record(BarlowTwinsLoss(*map(torch.tensor, (7.0, 1.0, 2.0))), *views[3])
    assert run.figures(run.sums)["loss"] == 7.0  # the next epoch begins at nothing
    np.testing.assert_allclose(
        run.correlation["before"], np.corrcoef(*(view.T for view in views[0]))[:64, 64:], atol=1e-4
    )
    np.testing.assert_allclose(
        run.correlation["during"], np.corrcoef(*(view.T for view in views[3]))[:64, 64:], atol=1e-4
    )
    assert "after" not in run.correlation


def test_the_gradients_norm_is_that_of_the_epochs_last_step(project, smoke):
    run = Training(smoke, CPU)
    for factor in (1.0, 2.0, 3e30):  # the square of the last is no float32
        loss = factor * sum(w.sum() for w in run.weights + run.biases)
        run.update(BarlowTwinsLoss(loss, loss, loss))
        run.step += 1
        entries = sum(w.numel() for w in run.network.parameters())
        assert float(run.gradient_norm) == pytest.approx(factor * math.sqrt(entries) if run.step == 3 else 0.0)


@pytest.mark.parametrize("batch_size", [200, 100])
def test_a_run_of_one_or_two_steps_keeps_all_three_matrices(project, smoke, change, batch_size):
    run = Training(change(smoke, "pretrain", epochs=1, batch_size=batch_size), CPU)
    assert run.total_steps == 200 // batch_size
    generator = torch.Generator().manual_seed(0)
    for _ in range(run.total_steps):
        pair = [torch.randn(8, 64, generator=generator) for _ in range(2)]
        run.record(BarlowTwinsLoss(*torch.ones(3)), *pair)
    assert list(run.correlation) == ["before", "during", "after"]
    assert torch.equal(run.correlation["during"], run.correlation["after"])


def test_collapse_is_told_with_figure_and_bound():
    assert state.collapse(HEALTHY, min_std=0.1, max_correlation=0.5) == {}
    found = state.collapse(HEALTHY | {"std": 0.0321}, min_std=0.1, max_correlation=0.5)
    assert list(found) == ["min_std"]
    assert "their standard deviation is 0.032 of an even spread's, below pretrain.min_std=0.1." in found["min_std"]
    found = state.collapse(HEALTHY | {"redundancy": 0.49}, min_std=0.1, max_correlation=0.5)
    assert list(found) == ["max_correlation"]
    assert "correlation 0.700, above pretrain.max_correlation=0.5." in found["max_correlation"]


def test_a_run_warns_of_collapse_after_the_warmup(project, smoke, change, capsys):
    params = change(smoke, "pretrain", epochs=3, warmup_epochs=1, min_std=1.0, max_correlation=0.0)
    pretrain.run(params)  # no embeddings are as even as that
    err = capsys.readouterr().err
    assert err.count("warning: the embeddings are collapsing") == 1  # once, and not in the first epoch
    assert err.count("warning: the embedding's dimensions repeat each other") == 1
    pretrain.run(change(params, "pretrain", min_std=0.0, max_correlation=1.0))
    err = capsys.readouterr().err
    assert "collapsing" not in err
    assert "repeat each other" not in err


def spoil(monkeypatch, step, how):
    """Let the loss of one step go through `how(loss, z_a)`."""
    steps = iter(range(1000))

    def spoiled(z_a, z_b, lambd, whole=loss.barlow_twins_loss):
        return how(whole(z_a, z_b, lambd), z_a) if next(steps) == step else whole(z_a, z_b, lambd)

    monkeypatch.setattr(loss, "barlow_twins_loss", spoiled)


def infinite(loss, _):
    return loss._replace(total=loss.total + torch.inf)


def nan_behind(loss, z_a):
    """The loss is finite and its gradient is not."""
    z_a.register_hook(lambda gradient: gradient * torch.nan)
    return loss


def keys(params, step):
    return TwinViews(webdataset.tars("pretrain"), params.views, params.pretrain.batch_size, params.pretrain.seed).keys(
        step
    )


@pytest.mark.parametrize(("how", "what"), [(infinite, "the loss is"), (nan_behind, "the weights are")])
def test_what_is_not_finite_is_not_saved_and_said_with_all_that_helps(project, smoke, change, monkeypatch, how, what):
    params = change(smoke, "pretrain", checkpoint_steps=1)
    spoil(monkeypatch, 4, how)  # in the second epoch
    with pytest.raises(UserError) as error:
        pretrain.run(params)
    weights = 0.15 * (0.001 + 0.999 * (1 + math.cos(math.pi / 3)) / 2)  # a third of the way down from 0.6 * 64 / 256
    assert str(error.value) == (
        f"{what} not finite at step 4, with learning rates {weights:.3g} (weights) and {0.024 * weights:.3g} (biases): "
        f"lower pretrain.lr_weights=0.6, pretrain.lr_biases=0.0144 or pretrain.trust_coefficient=0.02, or raise "
        f"pretrain.warmup_epochs=1.0; the batch was {', '.join(keys(params, 4)[:8])} and 56 more; "
        f"the last good checkpoint is {state.Training(params, CPU).folder}/step-000000004.safetensors"
    )
    paths = sorted(checkpoint.FOLDER.glob("*/*"))
    assert [path.name for path in paths] == ["step-000000003.safetensors", "step-000000004.safetensors"]
    for path in paths:
        tensors, metadata = load_weights(path)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        assert all(math.isfinite(value) for row in metadata["history"] for value in row.values())


def test_a_loss_that_is_not_finite_is_found_by_the_end_of_the_epoch(project, smoke, monkeypatch):
    """Nothing is saved before, so that nothing looks at the loss; the step is the first that was not finite."""
    spoil(monkeypatch, 1, infinite)
    with pytest.raises(UserError, match=r"the loss is not finite at step 1, .* the last good checkpoint is none yet$"):
        pretrain.run(smoke)
    assert not list(checkpoint.FOLDER.glob("*"))


def test_it_is_found_after_a_resume_too(project, smoke, change, monkeypatch):
    params = change(smoke, "pretrain", checkpoint_steps=1)
    with monkeypatch.context() as patch:
        spoil(patch, 1, infinite)
        with pytest.raises(UserError, match="not finite at step 1,"):
            pretrain.run(params)
    spoil(monkeypatch, 2, infinite)  # the third from step 1 on
    with pytest.raises(UserError, match=r"not finite at step 3, .*step-000000003.safetensors$"):
        pretrain.run(params)


def test_settings_that_the_optimizer_does_not_have_are_no_remedy(project, smoke, change):
    params = change(smoke, "pretrain", optimizer="adamw", lr_weights=1e30, lr_biases=1e30, warmup_epochs=0)
    with pytest.raises(UserError, match=r"lower pretrain.lr_weights=1e\+30 or pretrain.lr_biases=1e\+30, or raise"):
        pretrain.run(params)


def test_a_small_batch_is_named_whole(project, smoke, change, monkeypatch):
    params = change(smoke, "pretrain", batch_size=4)
    spoil(monkeypatch, 0, infinite)
    monkeypatch.setattr(pretrain.Progress, "due", lambda self: True)
    with pytest.raises(UserError, match=f"the batch was {', '.join(keys(params, 0))}; the last good"):
        pretrain.run(params)


def test_nothing_random_is_drawn_in_the_loop(project, smoke, monkeypatch):
    """Torch's random state is in no checkpoint, since it is never used."""
    states = []

    def recorded(self, *arguments, record=Training.record):
        record(self, *arguments)
        states.append(torch.get_rng_state())

    monkeypatch.setattr(Training, "record", recorded)
    pretrain.run(smoke)
    assert len(states) == 6
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("optimizer", ["lars", "larc", "sgd", "adamw"])
def test_a_checkpoint_holds_all_that_there_is(project, smoke, change, optimizer):
    """What is resumed is what was saved, and the views go on after the last batch."""
    params = change(smoke, "pretrain", optimizer=optimizer)
    run = Training(params, CPU)
    views = iter(run.views)
    for _ in range(2):
        pair = next(views)
        z_a, z_b = run.twins(*pair)
        loss = barlow_twins_loss(z_a, z_b, 0.1)
        run.update(loss)
        run.record(loss, z_a, z_b)
    run.save()
    run.writer.wait()
    again = Training(params, CPU)
    assert again.resume() == "going on from step 2 of 6"
    assert (again.step, again.history) == (2, [])
    torch.testing.assert_close(again.network.state_dict(), run.network.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.sums, run.sums, rtol=0, atol=0)
    torch.testing.assert_close(again.correlation, run.correlation, rtol=0, atol=0)
    for ours, theirs in zip(again.weights + again.biases, run.weights + run.biases, strict=True):
        assert again.optimizer.state[ours].keys() == run.optimizer.state[theirs].keys()
        for name, value in again.optimizer.state[ours].items():
            assert torch.equal(value, run.optimizer.state[theirs][name])
            assert value.any()
            # channels_last as the weight is, or each step of LARS would convert one of them
            assert name == "step" or value.stride() == ours.stride()
    for ours, theirs in zip(next(iter(again.views)), next(views), strict=True):
        assert torch.equal(ours, theirs)


def test_where_and_how_often_a_run_is_saved_does_not_make_it_another(project, smoke, change):
    folder = Training(smoke, CPU).folder
    elsewhere = {"checkpoint_seconds": 5.0, "checkpoint_steps": 7, "processes": 1, "device": "cpu", "knn_epochs": 1}
    elsewhere |= {"min_std": 0.2, "max_correlation": 0.7}
    assert Training(change(smoke, "pretrain", **elsewhere), CPU).folder == folder
    for section, values in {
        "pretrain": {"optimizer": "larc"},
        "views": {"flip": 0.1},
        "model": {"projector": (64, 32)},
    }.items():
        assert Training(change(smoke, section, **values), CPU).folder != folder
    for values in ({"ablate": "invariance"}, {"microbatch": 16}):
        assert Training(change(smoke, "pretrain", **values), CPU).folder != folder


def test_a_run_starts_from_given_weights_and_their_projector(project, smoke, change):
    torch.manual_seed(5)
    given = model.BarlowTwins(smoke.model, smoke.views.size)
    torch.save(given.state_dict(), "a.pth")
    params = change(smoke, "model", weights="a.pth")
    run = Training(params, CPU)
    found, wanted = run.network.state_dict(), given.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert run.started.text.endswith("100.0 % of the backbone's parameters matched, the projector too")
    assert run.identity["weights"] == {"name": "a.pth", "sha256": files.sha256("a.pth")}
    given.projector[0].weight.data += 1
    torch.save(given.state_dict(), "a.pth")
    assert Training(params, CPU).folder != run.folder  # another run, whose checkpoints are not this one's


def test_a_run_from_random_weights_has_no_weights_in_its_identity(project, smoke):
    run = Training(smoke, CPU)
    assert run.started is None
    assert "weights" not in run.identity
