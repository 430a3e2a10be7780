"""Whether pretraining paid, in plain sentences; and if it did not, what to try."""

from __future__ import annotations

from typing import NamedTuple

from barlow.evaluation.figures import Evaluation, Gain
from barlow.evaluation.tables import titles
from barlow.training import health

MEASURES = {"linear": "linear probe", "knn": "kNN"}
FEW_VAL = 50  # labelled images of val, below which chance chooses the probe's l2
TRIES = (  # in this order
    "`barlow recommend`, if the settings are still those of the drawn data set. It derives settings from your images.",
    "More steps: raise `pretrain.epochs`. An encoder usually needs thousands of steps.",
    "Lower learning rates: `pretrain.lr_weights` and `pretrain.lr_biases`. `barlow tune` tries several.",
    "A larger `views.size`, if details of the images matter.",
    "More images. They need no labels.",
)


TITLES = {"pretrained": "the encoder", "random": "the same network untrained", "pixels": "pixels"}


class Verdict(NamedTuple):
    """What the gains over the other encoders say."""

    paid: bool
    headline: str
    gains: list[str]  # one sentence per other encoder and measure
    tries: tuple[str, ...]  # what to try; empty if pretraining paid


def verdict(evaluation: Evaluation) -> Verdict | None:
    """Compare the pretrained encoder with each other one, by paired 95 % intervals; None if nothing was compared."""
    named = titles(evaluation, TITLES)
    compared = [
        (f"{word(gain)} {named[name]} by {MEASURES[kind]}", gain)
        for name in named
        for kind, gain in sorted(evaluation.gains.get(name, {}).items(), reverse=True)  # linear before kNN
    ]
    if not compared:
        return None
    not_better = [text for text, gain in compared if word(gain) != "better than"]
    sentences = [f"{text[0].upper()}{text[1:]}: {gain}" for text, gain in compared]
    if not_better:
        start = "Pretraining did not pay" if len(not_better) == len(compared) else "Pretraining did not pay everywhere"
        return Verdict(False, f"{start}: on these images the encoder is {listed(not_better)}.", sentences, TRIES)
    others = listed([title for name, title in named.items() if evaluation.gains.get(name)])
    return Verdict(True, f"Pretraining paid: on these images the encoder is better than {others}.", sentences, ())


def word(gain: Gain) -> str:
    """Say on which side of 0 the interval of a difference lies; if it holds 0, the encoder is no better."""
    return "better than" if gain.low > 0 else "worse than" if gain.high < 0 else "no better than"


def listed(texts: list[str]) -> str:
    """Join texts with commas and, before the last, `and`."""
    return " and ".join([part for part in (", ".join(texts[:-1]), texts[-1]) if part])


def notes(evaluation: Evaluation, pretraining: dict[str, float]) -> list[str]:
    """Return what makes the figures doubtful: few steps (of reports/pretrain.json), few labelled images in val."""
    found = []
    if "steps" in pretraining and (few := health.few_steps(int(pretraining["steps"]), int(pretraining["epochs"]))):
        found.append(f"{few}.")
    if 0 < evaluation.images.val < FEW_VAL and evaluation.encoders["pretrained"].linear:
        images = "1 labelled image" if evaluation.images.val == 1 else f"{evaluation.images.val} labelled images"
        text = f"With fewer than {FEW_VAL}, the choice is mostly chance. Label more images of val."
        found.append(f"The linear probe's l2 was chosen on {images} of val. {text}")
    return found


def lines(evaluation: Evaluation, pretraining: dict[str, float] | None = None) -> list[str]:
    """Return the verdict and the notes as lines for a terminal."""
    found, written = verdict(evaluation), []
    if found:
        written += ["", found.headline, *(f"  {gain}" for gain in found.gains if not found.paid)]
        if found.tries:
            written += ["What to try, in this order:", *(f"  {i}. {text}" for i, text in enumerate(found.tries, 1))]
    return written + [f"note: {text}" for text in notes(evaluation, pretraining or {})]
