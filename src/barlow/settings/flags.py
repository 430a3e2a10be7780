"""The flags of `barlow serve`, in a module that imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from barlow.core.errors import UserError


def _flag(default: int, text: str) -> int:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Flags:
    """The flags of `barlow serve`: whole numbers of at least 1; the delay may be 0."""

    max_batch_size: int = _flag(32, "most images that go through the network together")
    max_queue_delay_us: int = _flag(
        0, "microseconds that an image waits for others; 0: a batch has the images that wait already"
    )
    max_queue: int = _flag(1024, "most images that wait; more are refused (503)")
    max_concurrent: int = _flag(256, "most requests at a time; more are refused (429)")
    max_images: int = _flag(64, "most images per request")
    max_body_bytes: int = _flag(32 * 2**20, "most bytes per request")
    max_pixels: int = _flag(25_000_000, "most pixels per image, checked before it is decoded")
    timeout_ms: int = _flag(10_000, "milliseconds until a request times out (503)")
    threads: int = _flag(1, "processors per batch; there are as many batches at a time as fill all processors")

    def check(self) -> None:
        """Raise UserError if a value is too small."""
        for name, value in vars(self).items():
            least = 0 if name == "max_queue_delay_us" else 1
            if value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is not allowed; it must be at least {least}")
