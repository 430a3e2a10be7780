"""`barlow embed FILES|FOLDER --out vectors.parquet`: embed any number of images, in bounded memory.

Reads models/encoder.onnx. Writes a Parquet file with the columns path, embedding (a fixed-size list of float32) and, if
the encoder has a head, class and probability. The schema's metadata is that of the encoder, with its embedding space.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from barlow.core import files
from barlow.core.bands import Pixels
from barlow.core.errors import UserError
from barlow.encoder.encoder import Encoder, Vectors, top1
from barlow.encoder.reading import find, read_ahead

ROW_GROUP = 4096  # rows, at least: a large file with small row groups is slow to read


def run(paths: Sequence[Path | str], out: Path | str, model: Path | str = files.ONNX) -> None:
    """Embed image files, and all images below folders, into the Parquet file `out`, whole or not at all.

    A file that cannot be read has no row, and one line on stderr says why.

    Raises:
        UserError: the model cannot be used, `out` is a folder, or no image could be read.
    """
    if Path(out).is_dir():
        raise UserError(f"--out {out} is a folder; name a file, such as {Path(out) / 'vectors.parquet'}")
    encoder = Encoder(model)
    names: deque[str] = deque()  # of images that are decoded but not yet written
    failed = written = 0

    def decoded() -> Iterator[Pixels]:
        nonlocal failed
        for path, image in read_ahead(find(paths), threads=files.cpus(), form=encoder.form):
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
            problem = f"none of the {failed} files is an image that can be read" if failed else "there is no image"
            raise UserError(f"{problem} in {', '.join(map(str, paths))}; name image files, or a folder of them")
    print(f"{out}: {written} embeddings of {encoder.dim} values" + (f", {failed} files skipped" if failed else ""))


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
