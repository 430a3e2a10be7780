"""`barlow COMMAND`: calls `run` of the module of that name, which is imported only then; so `--help` is quick."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from dataclasses import fields

from barlow import __version__
from barlow.core import files
from barlow.core.errors import DataError, GateError, Interrupted, UserError
from barlow.settings.flags import Flags

STAGES = {
    "ingest": "find and decode every image of ingest.source: data/manifest.parquet",
    "validate": "check the manifest with Great Expectations: data/accepted.parquet, data/quarantine.csv",
    "shard": "pack the accepted images, shuffled: data/shards/",
    "pretrain": "learn an encoder from unlabelled images: models/encoder.safetensors",
    "extract": "features of the encoder, of a random one and of pixels, computed once: data/features/",
    "evaluate": "linear probe, kNN, few-label probes and health of these features: reports/evaluate.json",
    "finetune": "train the whole network on labels, from pretrained and random weights: reports/finetune.json",
    "export": "write models/encoder.onnx and prove that it agrees with torch",
    "report": "write reports/index.html",
}


# commands whose `run` begins with `params`
READS_PARAMS = {*STAGES, "scan", "recommend", "tune", "promote", "rollback", "drift", "claims"}


def parser() -> argparse.ArgumentParser:
    """Build the parser; imports nothing heavy."""
    main = argparse.ArgumentParser(prog="barlow", description="Barlow Twins: unlabelled images to a served encoder.")
    main.add_argument("--version", action="version", version=f"barlow {__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, description: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=description or text)

    for stage, text in STAGES.items():
        added = command(stage, text, f"Stage `{stage}`: {text}. Its settings are in params.yaml.")
        if stage == "pretrain":
            added.add_argument("--dry-run", action="store_true", help="print what would run, with its memory and time")
        if stage == "finetune":
            text = f"write {files.CLASSIFIER}, trained on all labels of train, instead of the study"
            added.add_argument("--all-labels", action="store_true", help=text)
    command("scan", "note in data/source.json which files ingest.source has, so that DVC sees added images")
    command("summary", "print the headline figures of the last run")
    compare = command("compare", "put this run beside that of a git revision or DVC experiment: reports/compare.html")
    compare.add_argument("revision", metavar="REV", help="a commit, branch or tag, or an experiment's name")
    preset = command("preset", "merge presets/NAME.yaml into params.yaml and print what changed")
    preset.add_argument("name", metavar="NAME")
    recommend = command("recommend", "choose settings that suit the images and this machine; write them to params.yaml")
    recommend.add_argument(
        "--minutes", type=float, metavar="M", help="of pretraining (default: as last time, else 6, or 30 on a GPU)"
    )
    recommend.add_argument("--auto", action="store_true", help="only if the settings are still those for other images")
    tune = command("tune", "try other learning rates, crops and lambdas in short runs, and say which are better")
    tune.add_argument("--minutes", type=float, metavar="M", help="of pretraining, in all (default 12, or 30 on a GPU)")
    tune.add_argument("--apply", action="store_true", help="write the best settings to params.yaml")
    promote = command(
        "promote", "put models/encoder.onnx, or the classifier, into production, if it is not worse than what is there"
    )
    promote.add_argument("--check", action="store_true", help="only look whether a promotion could work")
    rollback = command("rollback", "put an earlier version back into production")
    rollback.add_argument("version", nargs="?", metavar="VERSION", help="default: the one before")
    for mover in (promote, rollback):
        text = "default %(default)s; each kind has versions of its own"
        mover.add_argument("--kind", choices=[*files.KINDS], default="encoder", help=text)
    drift = command("drift", "compare recent images with those that the encoder in production was trained on")
    drift.add_argument("recent", nargs="?", metavar="FOLDER|PARQUET", help="default: drift.recent of params.yaml")
    claims = command("claims", "test the paper's claims by DVC experiments: reports/claims.json, one table per claim")
    claims.add_argument("names", nargs="*", metavar="NAME", help="of the preset's claims; default: all")
    claims.add_argument("--preset", default="cpu", help="presets/claims/PRESET.yaml (default %(default)s)")
    claims.add_argument("--jobs", type=int, default=1, metavar="N", help="experiments at a time (default %(default)s)")
    weights = command("weights", "write the trained backbone for another framework: torchvision, timm or any other")
    weights.add_argument("--format", choices=["torchvision", "timm", "safetensors"], required=True)
    weights.add_argument("--out", metavar="PATH", help="a file, or a folder for timm (default: in models/weights)")
    embed = command("embed", "embed images with an exported encoder")
    embed.add_argument("paths", nargs="+", metavar="FILE|FOLDER")
    embed.add_argument("--out", required=True, metavar="PARQUET", help="written: path, embedding, and class if known")
    index = command("index", "embed the training images, or others, for `barlow serve` to search in")
    index.add_argument("paths", nargs="*", metavar="FILE|FOLDER", help="default: the training images of data/shards")
    index.add_argument("--keep", action="store_true", help="do nothing if there is an index of this encoder")
    index.add_argument("--out", default=str(files.INDEX), metavar="FOLDER", help="default %(default)s")
    serve = command("serve", "serve an exported encoder over HTTP")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    serve.add_argument(
        "--index", default=str(files.INDEX), metavar="FOLDER", help="of `barlow index` (default %(default)s)"
    )
    for field in fields(Flags):
        flag, text = f"--{field.name.replace('_', '-')}", f"{field.metadata['help']} (default %(default)s)"
        serve.add_argument(flag, type=int, default=field.default, metavar="N", help=text)
    for reader in (embed, index, serve):
        reader.add_argument("--model", default=str(files.ONNX), metavar="ONNX", help="default %(default)s")
    return main


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = vars(parser().parse_args(argv))
    command = arguments.pop("command")
    # Threads that wait for others sleep and do not spin. Spinning gains little on an idle machine and costs most of the
    # speed on a busy one. OpenMP reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if command in READS_PARAMS:
            from barlow.settings import loading  # here, since the serving image has no YAML reader

            arguments["params"] = loading.load()
        importlib.import_module(f"barlow.{command}").run(**arguments)
    except (UserError, DataError, Interrupted, GateError) as error:
        print(f"barlow {command}: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "barlow").partition(".")[0] == "barlow":
            raise
        extra = command if command in ("embed", "serve") else "train"
        print(f"barlow {command}: {error.name} is not installed; pip install 'barlow[{extra}]'", file=sys.stderr)
        return UserError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
