"""The distortions of an image (paper, section 2.1 and appendix A): drawn here, applied by DALI on CPU or GPU.

The transform is the official one, with three differences. Flipping comes last, fused into the normalisation, since it
commutes with all operations before it. Colour jitter has one order: brightness and contrast, then saturation and hue.
Hue turns in YIQ space, not in HSV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn, math, types

from barlow.core.bands import RGB, PixelFormat
from barlow.settings import params

COLOURS = ("saturation", "hue", "grayscale")  # what `Distortion` draws for three channels
ATTEMPTS = 10  # windows drawn for each crop


class Distortion(NamedTuple):
    """The draws for one view: arrays over n images; inside a DALI pipeline, the nodes that hold them."""

    start: Any  # (n, 2) of the window, y and x in pixels
    end: Any
    mirror: Any  # (n,) here and below; 0 or 1
    jitter: Any  # bool, as are the other names of an operation
    brightness: Any
    contrast: Any
    saturation: Any
    hue: Any  # degrees
    grayscale: Any
    blur: Any
    sigma: Any  # px
    solarize: Any


def draw(views: params.Views, view: int, sides: Any, rng: np.random.Generator) -> Distortion:
    """Draw the distortions of images with `sides` (n, 2), heights and widths; `view` is 0 for A, 1 for B."""
    n = len(sides)

    def uniform(low: float, high: float) -> Any:
        return rng.uniform(low, high, n).astype(np.float32)

    def happens(probability: float) -> Any:
        return rng.random(n) < probability

    return Distortion(
        *crop_windows(sides, views.crop_area, views.crop_ratio, rng),
        happens(views.flip).astype(np.int32),
        happens(views.jitter),
        uniform(1 - views.brightness, 1 + views.brightness),
        uniform(1 - views.contrast, 1 + views.contrast),
        uniform(1 - views.saturation, 1 + views.saturation),
        uniform(-360 * views.hue, 360 * views.hue),
        happens(views.grayscale),
        happens(views.blur[view]),
        uniform(*views.blur_sigma),
        happens(views.solarize[view]),
    )


def used(form: PixelFormat) -> list[str]:
    """Return the names of the draws that `augment` uses: those of colours for three channels only."""
    return [name for name in Distortion._fields if form.channels == 3 or name not in COLOURS]


def passed(drawn: Distortion, form: PixelFormat) -> list[Any]:
    """Return the draws that go into a pipeline, which wants no node that it does not use."""
    return [getattr(drawn, name) for name in used(form)]


def received(nodes: Sequence[Any], form: PixelFormat) -> Distortion:
    """Return the draws that `passed` let through."""
    names = used(form)
    return Distortion(*[nodes[names.index(name)] if name in names else None for name in Distortion._fields])


def crop_windows(
    sides: Any, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[Any, Any]:
    """Draw a window for each image, as torchvision's RandomResizedCrop does; return starts and ends, float32 (n, 2).

    Ten sizes are drawn: the share of the area uniformly, width / height uniformly in its logarithm. The first size that
    fits is placed anywhere, uniformly. If none fits, the window is the largest of an allowed ratio, in the middle.
    """
    n, sides = len(sides), sides.astype(np.float64)
    shares = rng.uniform(*area, (n, ATTEMPTS)) * sides.prod(1, keepdims=True)
    ratios = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]), (n, ATTEMPTS)))
    drawn = np.rint(np.sqrt(np.stack((shares / ratios, shares * ratios), -1)))  # (n, ATTEMPTS, 2)
    fits = ((drawn >= 1) & (drawn <= sides[:, None])).all(-1)
    room = rng.random((n, 2))
    height, width = sides.T
    largest = np.stack((np.minimum(height, width / ratio[0]), np.minimum(width, height * ratio[1])), -1)
    size = np.where(fits.any(1)[:, None], drawn[np.arange(n), fits.argmax(1)], np.rint(largest).clip(1))
    start = np.floor(np.where(fits.any(1)[:, None], room * (sides - size + 1), (sides - size) / 2))
    return start.astype(np.float32), (start + size).astype(np.float32)


def resized_crop(pixels: Any, start: Any, end: Any, size: int) -> Any:
    """Cut out a window and resize it to a square, cubic and antialiased."""
    # A start outside the image kills the process. That happens where odd EXIF makes DALI turn an image, not Pillow.
    start = math.min(start, pixels.shape()[:2] - 1)
    return fn.resize(pixels, roi_start=start, roi_end=end, size=(size, size), interp_type=types.INTERP_CUBIC)


def color_jitter(
    pixels: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any, form: PixelFormat = RGB
) -> Any:
    """Scale brightness, contrast (about the image's mean gray) and saturation; turn the hue, in degrees."""
    if form == RGB:
        center = fn.reductions.mean(fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY))
    else:
        center = fn.reductions.mean(grayscale(pixels, form))
    # Arithmetic, since fn.brightness_contrast takes no `contrast_center` that lies on a GPU.
    pixels = brightness * (center + contrast * (pixels - center))
    return _hsv(math.clamp(pixels, 0.0, float(form.white)), form, saturation=saturation, hue=hue)


def brightness_contrast(pixels: Any, brightness: Any, contrast: Any, form: PixelFormat) -> Any:
    """Scale brightness and contrast (about the image's mean) of any number of channels."""
    center = fn.reductions.mean(pixels)
    pixels = brightness * (center + contrast * (pixels - center))
    return fn.cast(math.clamp(pixels, 0.0, float(form.white)), dtype=_type(form))


def grayscale(pixels: Any, form: PixelFormat = RGB) -> Any:
    """Remove all colour, keep three channels."""
    if form.bits == 16:  # which the conversion below does not take
        return _hsv(fn.cast(pixels, dtype=types.FLOAT), form, saturation=0.0)
    gray = fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY)
    return fn.color_space_conversion(gray, image_type=types.GRAY, output_type=types.RGB)


def blur(pixels: Any, sigma: Any) -> Any:
    """Gaussian blur, with a window of three sigma on each side."""
    return fn.gaussian_blur(pixels, sigma=sigma)


def solarize(pixels: Any, form: PixelFormat = RGB) -> Any:
    """Invert values in the upper half: of 8 bits, 128 and above."""
    return math.min(pixels, pixels ^ types.Constant(form.white, dtype=_type(form)))


def _hsv(pixels: Any, form: PixelFormat, **how: Any) -> Any:
    """Change saturation and hue. DALI's operator gives no 16 bits, so these come from floats."""
    if form.bits == 8:
        return fn.hsv(pixels, dtype=types.UINT8, **how)
    return fn.cast(fn.hsv(pixels, dtype=types.FLOAT, **how), dtype=types.UINT16)


def _type(form: PixelFormat) -> Any:
    return types.UINT8 if form.bits == 8 else types.UINT16


def normalize(
    pixels: Any, mirror: Any, mean: tuple[float, ...], std: tuple[float, ...], form: PixelFormat = RGB
) -> Any:
    """Flip where `mirror` is 1, and turn 0 to white into float32 (channels, height, width), normalised."""
    means, stds = [form.white * m for m in mean], [form.white * s for s in std]
    return fn.crop_mirror_normalize(pixels, mirror=mirror, output_layout="CHW", mean=means, std=stds)


def augment(pixels: Any, drawn: Distortion, views: params.Views, form: PixelFormat = RGB) -> Any:
    """Distort decoded images."""
    out = resized_crop(pixels, drawn.start, drawn.end, views.size)
    if form.channels == 3:
        if drawn.jitter:
            out = color_jitter(out, drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue, form)
        if drawn.grayscale:
            out = grayscale(out, form)
    else:
        if drawn.jitter:
            out = brightness_contrast(out, drawn.brightness, drawn.contrast, form)
    if drawn.blur:
        out = blur(out, drawn.sigma)
    if drawn.solarize:
        out = solarize(out, form)
    return normalize(out, drawn.mirror, views.mean, views.std, form)
