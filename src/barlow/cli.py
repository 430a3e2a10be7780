"""The `barlow` command. Each stage is imported only when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import sys

from barlow.errors import DataError, Interrupted, UserError

STAGES = {
    "ingest": "find and decode every image of data.source: data/manifest.parquet",
    "validate": "check the manifest with Great Expectations: data/accepted.parquet, data/quarantine.csv",
    "shard": "pack the accepted images, shuffled: data/shards/",
    "pretrain": "learn an encoder from unlabelled images: models/encoder.safetensors",
    "evaluate": "linear probe, kNN and health of the frozen encoder: reports/evaluate.json",
    "export": "write models/encoder.onnx and prove that it agrees with torch",
    "report": "write reports/index.html",
}


def parser() -> argparse.ArgumentParser:
    """Build the parser; imports nothing heavy."""
    main = argparse.ArgumentParser(prog="barlow", description="Barlow Twins: unlabelled images to a served encoder.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage, text in STAGES.items():
        commands.add_parser(stage, help=text, description=f"Stage `{stage}`: {text}. Settings: params.yaml.")
    return main


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command in STAGES:
            from barlow import params

            importlib.import_module(f"barlow.{arguments.command}").run(params.load())
    except (UserError, DataError, Interrupted) as error:
        print(f"barlow {arguments.command}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
