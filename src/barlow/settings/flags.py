"""The flags of `barlow serve`, in a module that imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from barlow.core.errors import UserError


def _setting(default: int, text: str) -> int:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Flags:
    """The flags of `barlow serve`, all of them whole numbers of at least 1 but for the delay."""

    max_batch_size: int = _setting(32, "images that go through the network together")
    max_queue_delay_us: int = _setting(
        0, "microseconds that an image waits for others; 0: a batch is what waits anyway"
    )
    max_queue: int = _setting(1024, "images that wait; more are refused (503)")
    max_concurrent: int = _setting(256, "requests at a time; more are refused (429)")
    max_images: int = _setting(64, "images in a request")
    max_body_bytes: int = _setting(32 * 2**20, "bytes of a request")
    max_pixels: int = _setting(25_000_000, "pixels of an image, looked up before it is decoded")
    timeout_ms: int = _setting(10_000, "milliseconds until a request is given up (503)")
    threads: int = _setting(1, "processors that one batch is computed on; as many batches at a time as fill them all")

    def check(self) -> None:
        """Raise UserError where a value is impossible."""
        for name, value in vars(self).items():
            least = 0 if name == "max_queue_delay_us" else 1
            if value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is not allowed; it must be at least {least}")
