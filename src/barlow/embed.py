"""`barlow embed FILES|FOLDER --out vectors.parquet`: embed any number of images, in bounded memory.

Reads models/encoder.onnx. Writes a Parquet file with the columns path, embedding (a fixed-size list of float32) and,
where a head was fitted, class and probability; the model's metadata, with its embedding space, is in the file's schema.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from barlow.core import files
from barlow.core.errors import UserError
from barlow.core.images import decode
from barlow.encoder.encoder import MAX_PIXELS, Encoder, Pixels, Vectors, top1

ROW_GROUP = 4096  # rows held before they are written; small row groups make a large file slow to read


def embed_files(paths: Sequence[Path | str], out: Path | str, model: Path | str = files.ONNX) -> None:
    """Embed files, and folders with every image below them, into the Parquet file `out`, whole or not at all.

    A file that cannot be read costs one line on stderr and its row.

    Raises:
        UserError: the model cannot be used, `out` is a folder, or not one image could be read.
    """
    if Path(out).is_dir():
        raise UserError(f"--out {out} is a folder; name a file, such as {Path(out) / 'vectors.parquet'}")
    encoder = Encoder(model)
    names: deque[str] = deque()  # of the images that are decoded and not yet written
    failed = written = 0

    def decoded() -> Iterator[Pixels]:
        nonlocal failed
        for path, image in read_ahead(find(paths), threads=files.cpus()):
            if isinstance(image, str):
                failed += 1
                print(f"barlow embed: {path}: {image}", file=sys.stderr)
            else:
                names.append(os.fsencode(path).decode(errors="backslashreplace"))
                yield image

    with files.replacing(out) as temporary:
        with parquet.ParquetWriter(temporary, _schema(encoder)) as writer:
            held: list[pa.Table] = []
            for embeddings, logits in encoder.run(decoded()):
                held.append(_table(encoder, [names.popleft() for _ in embeddings], embeddings, logits))
                written += len(embeddings)
                if sum(map(len, held)) >= ROW_GROUP:
                    writer.write_table(pa.concat_tables(held))
                    held.clear()
            if held:
                writer.write_table(pa.concat_tables(held))
        if not written:
            found = f"none of the {failed} files is an image that can be read" if failed else "there is no image"
            raise UserError(f"{found} in {', '.join(map(str, paths))}; name image files, or a folder of them")
    print(f"{out}: {written} embeddings of {encoder.dim} values" + (f", {failed} files skipped" if failed else ""))


def find(paths: Iterable[Path | str]) -> Iterator[str]:
    """Yield files as they are named and, of a folder, in order, what has an image's suffix."""
    suffixes = Image.registered_extensions()
    for path in paths:
        if not Path(path).is_dir():
            yield os.fspath(path)
        for folder, folders, names in os.walk(path):  # links to folders are not followed: they may loop
            folders.sort()
            yield from (f"{folder}/{name}" for name in sorted(names) if Path(name).suffix.lower() in suffixes)


def read_ahead(paths: Iterable[str], threads: int) -> Iterator[tuple[str, Pixels | str]]:
    """Yield (path, pixels, or why there are none) in order, decoded by threads a few files ahead of the caller."""
    pending: deque[tuple[str, Future[Pixels | str]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for path in paths:
            pending.append((path, pool.submit(_read, path)))
            if len(pending) > 2 * threads:
                done, future = pending.popleft()
                yield done, future.result()
        for path, future in pending:
            yield path, future.result()


def _read(path: str) -> Pixels | str:
    try:
        return decode(Path(path).read_bytes(), MAX_PIXELS)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)


def _schema(encoder: Encoder) -> pa.Schema:
    fields = [("path", pa.string()), ("embedding", pa.list_(pa.float32(), encoder.dim))]
    if encoder.classes is not None:
        fields += [("class", pa.string()), ("probability", pa.float32())]
    return pa.schema(fields, metadata=encoder.metadata)


def _table(encoder: Encoder, names: list[str], embeddings: Vectors, logits: Vectors | None) -> pa.Table:
    columns = [pa.array(names), pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), encoder.dim)]
    if logits is not None and encoder.classes is not None:
        columns += map(pa.array, top1(logits, encoder.classes))
    return pa.Table.from_arrays(columns, schema=_schema(encoder))
