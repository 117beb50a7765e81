"""Files: downloads that are checked, checkpoints that are never half written, and the lines of metrics.jsonl.

No reader of the method needs this file: it only finds, fetches and keeps what the stages exchange.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
import types
from pathlib import Path

import torch

from support.errors import UserError, explained
from support.processes import on_main, say


def fetch(source: str, key: str, sha256: str = "") -> Path:
    """A local path of the file at `source`, which is a path or a URL (downloaded once, by one rank, and checked).

    key      the config key that can name a local file instead, for the error message
    sha256   the sum's hex digits, or their beginning, if known
    """
    if "://" not in source:
        if not Path(source).is_file():
            raise UserError(f"{key} names '{source}', and there is no such file")
        return Path(source)
    if not sha256 and (found := re.search(r"-([0-9a-f]{8,})\.[^/]*$", source)):
        sha256 = found[1]  # NAME-SUM.pth is torch.hub's custom, and that of the published tokenizers
    # A folder for each URL: many checkpoints are called last.pt.
    folder = hashlib.sha256(source.encode()).hexdigest()[:8]
    target = Path(torch.hub.get_dir()) / "checkpoints" / folder / source.rsplit("/", 1)[-1].split("?")[0]

    def download() -> None:
        if not target.is_file() or not file_sha256(target).startswith(sha256):
            target.parent.mkdir(parents=True, exist_ok=True)
            with explained(f"cannot download {source}", f"download it where there is a network and set {key}=PATH",
                           OSError, RuntimeError):
                torch.hub.download_url_to_file(source, str(target), sha256 or None, progress=sys.stderr.isatty())

    on_main(download)
    return target


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_checkpoint(config: types.SimpleNamespace, stage: str, given: str, key: str, name: str = "last.pt") -> Path:
    """Where an earlier stage's checkpoint lies: the one that `key` gives (path or URL), or OUTPUT_DIR/STAGE/NAME."""
    if given:
        return fetch(given, key)
    path = Path(config.output_dir) / stage / name
    if not path.is_file():
        script, scratch, _ = stage.partition("_scratch")
        # The command repeats the changes from our command line, without those of this script's own section.
        own = Path(sys.argv[0]).stem
        changes = [shlex.quote(change) for change in sys.argv[2:] if not change.startswith(f"{own}.")]
        changes += [f"{script}.weights=none"] if scratch else []
        command = " ".join(["torchrun", f"{script}.py", shlex.quote(config.file), *changes])
        raise UserError(f"there is no '{path}' yet: make it with `{command}`{key and f', or set {key}=PATH_OR_URL'}")
    return path


def say_if_unfinished(content: dict, path: Path) -> None:
    """Say so when a checkpoint of an earlier stage comes from a run that has not ended."""
    progress = [content.get(key) for key in ("step", "epochs_done", "epochs", "steps_per_epoch")]
    if all(isinstance(number, int) for number in progress):  # else another program's file
        step, done, epochs, steps_per_epoch = progress
        if done < epochs:
            say(f"note: '{path}' is unfinished, at step {step} of {epochs * steps_per_epoch}")


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint beside `path` and rename it when it is whole, so that no reader ever sees half of one."""
    part = path.with_suffix(".part")
    # torch reports a full disk as RuntimeError.
    with explained(f"cannot write the checkpoint '{path}'", "free some space, then give the same command to go on from "
                   "the checkpoint before", OSError, RuntimeError):
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def read_lines(path: Path, errors: str = "replace") -> list[dict]:
    """The lines of a metrics.jsonl, without a last one that was cut short or is only half written yet."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors=errors).splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def keep_lines(path: Path, step: int, epochs_done: int) -> None:
    """Drop what an interrupted run measured after its last checkpoint: it is about to be measured again.

    A file that is no text was not written by a run: it is moved aside, not changed.
    """
    if not path.is_file():
        return
    try:
        lines = read_lines(path, errors="strict")
    except UnicodeDecodeError:
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        say(f"note: '{path}' is no text file any more: it is now '{aside.name}', and a new one begins")
        return
    part = path.with_suffix(".part")
    kept = [line for line in lines if line["step"] <= step and (line["epoch"] < epochs_done or "val" not in line)]
    part.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    os.replace(part, path)
