"""Configurations with one value that nobody would write: each runs, or ends in one line.

``python -m tests.fuzz [CONFIG …]`` tries every key of model and data with every value (an hour); a test tries a few.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import Namespace

from datamodules.errors import InputError
from experiments.cli import start

CONFIGS = ("badnets_digits", "victim_digits", "unlearnable_digits")

VALUES = (
    "x", "-1", "0", "1", "1.5", "-0.5", "1e400", ".nan", "true", "null", "[]", "{}", "[1,2,3]", "{a: 1}", "''",
    "'\\0'", "é\u2028", "1" + 26 * "0", "9223372036854775807", "os.system", "missing.file", "folder", "binary.bin",
    "binary.yaml", "link", "/dev/full",
)  # fmt: skip
"""Of wrong types, out of every range, and files that are not there, not to be read, or not what they seem."""

SLOW = ("compile", "num_workers", "widths", "width", "depth", "hidden", "epochs", "steps", "resident")
"""Keys whose large values do what they say, for hours."""

SMOKE = (
    "--config=debug/smoke", "--trainer.logger=false", "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Make the files that values name."""
    (folder / "folder").mkdir()
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 50)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "link").symlink_to("link")


def keys_of(config: str) -> list[str]:
    """Every key of a config's model and data."""

    def walk(value: object, where: str) -> Iterator[str]:
        if not isinstance(value, Namespace):
            yield where
            return
        for name, part in vars(value).items():
            if not name.startswith("__"):
                yield from walk(part, where if name == "init_args" else f"{where}.{name}")

    line = start(["fit", f"--config={config}", *SMOKE], act=False, keep=False, show=False)
    known = line.config["fit"]
    found = [*walk(known["model"], "model"), *walk(known["data"], "data"), "seed_everything"]
    return [key for key in dict.fromkeys(found) if not key.endswith(SLOW)]


def outcome(config: str, key: str, value: str) -> str | None:
    """What is wrong with how a run with that value ends; None if it runs, or is refused in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            start(["fit", f"--config={config}", *SMOKE, f"--{key}={value}"], show=False)
    except InputError as error:
        text = str(error)
        if "\n" in text or len(text) > 500:
            return f"{len(text.splitlines())} lines: {text[:300]}"
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
    return None


def main(configs: list[str]) -> int:
    """Try all; how many end otherwise."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["PHARMAKON_CACHE"] = str(Path(folder) / "cache")
        prepare(Path(folder))
        for config in configs or CONFIGS:
            for key in keys_of(config):
                for value in VALUES:
                    found = outcome(config, key, value)
                    if found is not None:
                        wrong += 1
                        print(f"{config} --{key}={value!r}: {found}", flush=True)
    print(f"{wrong} end otherwise than in one line")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
