"""What is typed after `lightning`: configs by their names, and the run to go on with.

Nothing heavy is imported here, so that a config that is not there is told at once.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from datamodules.errors import InputError, bad, did_you_mean
from datamodules.files import at_home
from experiments.registry import configs_folder, find_config, shipped
from experiments.runlock import check_free

COMMANDS = ("fit", "validate", "test", "predict")
"""Those of Lightning's own command line."""


class Arguments(NamedTuple):
    """A command line as the parser wants it.

    Attributes:
        args: The command and its options, with paths in the place of names.
        name: Of the run: of the last config that is a whole experiment.
        folder: Of the run to go on with; None: a fresh one.
    """

    args: list[str]
    name: str
    folder: Path | None


def prepare(args: list[str]) -> Arguments:
    """Find configs by name, take ``--resume`` apart, and name the run.

    Args:
        args: The command and its options, as typed.

    Raises:
        InputError: If a config or a run is not there, or a config is no YAML.
    """
    prepared, name, resume = [args[0]], args[0], ""
    rest = iter(made_whole(args[1:]))
    before = ""
    for arg in rest:
        key, equals, value = arg.partition("=")
        if not arg.startswith("-") and (not before.startswith("--") or "=" in before):
            raise _stray(arg)
        before = arg if key not in ("--config", "-c", "--resume") else ""
        if key in ("--config", "-c"):
            found = find_config(value if equals else value_of(rest, key))
            prepared += ["--config", found]
            name = _name(found) or name
        elif key == "--resume":
            resume = value if equals else value_of(rest, key)
        elif re.search(r"\$\{[A-Za-z][\w.]*\}", value):
            raise bad(key.lstrip("-"), value, "keys are looked up in YAML only; write it in a file, or give the value")
        else:
            prepared.append(f"{key}={shipped(value)}" if equals else shipped(arg))
    if resume and any(arg.split("=")[0] == "--ckpt_path" for arg in prepared):
        raise bad("ckpt_path", resume, "--resume goes on from that run's last checkpoint; leave one of the two out")
    if not resume:
        return Arguments(prepared, name, None)
    folder = _run(resume)
    config = folder / "config.yaml"
    if not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        check_free(folder, "resume")  # at once; it is taken when all is parsed
    prepared = [args[0], "--config", str(config), *prepared[1:], f"--ckpt_path={last_checkpoint(folder)}"]
    return Arguments(prepared, folder.resolve().parent.name, folder)


def _stray(word: str) -> InputError:
    """The error for a word that is no option and no option's value."""
    short = word.removeprefix("configs/").removesuffix(".yaml")
    if (configs_folder() / f"{short}.yaml").is_file() or Path(word).is_file():
        return InputError(f"{word}: a config is named by an option: --config {word}")
    if "=" in word:
        return InputError(f"{word}: an option begins with two dashes: --{word}")
    known = [str(path.relative_to(configs_folder()).with_suffix("")) for path in configs_folder().rglob("*.yaml")]
    hint = did_you_mean(word, known)
    return InputError(f"{word}: there is no such option; write --KEY=VALUE, and name a config by --config NAME{hint}")


def _run(resume: str) -> Path:
    """The folder of a run; of all runs of a config, the newest.

    Raises:
        InputError: If it is neither.
    """
    folder = Path(resume)
    for found in (folder, *sorted(folder.glob("*/"), reverse=True)):  # runs are named by their time
        if (found / "config.yaml").is_file():
            return found
    raise bad("resume", resume, "there is no config.yaml in it; give the folder of a run")


def made_whole(args: Sequence[str]) -> list[str]:
    """Arguments in which paths that begin with the home folder are whole: the shell leaves ``--out=~/x`` as it is."""
    split = (arg.partition("=") if arg.startswith("-") else ("", "", arg) for arg in args)
    return [f"{key}{equals}{at_home(value)}" for key, equals, value in split]


def value_of(rest: Iterator[str], key: str) -> str:
    """The next argument: the value of the option `key`.

    Raises:
        InputError: If there is none.
    """
    value = next(rest, None)
    if value is None:
        raise InputError(f"{key}: a value is missing")
    return value


def options(
    args: list[str], names: Sequence[str], flags: Sequence[str] = (), word: str = "", many: Mapping[str, list[str]] = {}
) -> dict[str, str]:
    """Options of a command of ours.

    Args:
        args: As typed, after the command.
        names: Those with a value, such as ``--out``.
        flags: Those without.
        word: What the one word that is no option is called; empty: there is none.
        many: Options that may be given more than once; their values are appended here.

    Returns:
        By name, without the dashes; of a flag, an empty text.

    Raises:
        InputError: If there is no such option, or a value is missing.
    """
    found: dict[str, str] = {}
    rest = iter(args)
    for arg in rest:
        key, equals, value = arg.partition("=")
        if key in flags and not equals:
            found[key[2:]] = ""
        elif key in names:
            found[key[2:]] = value if equals else value_of(rest, key)
        elif key in many:
            many[key].append(value if equals else value_of(rest, key))
        elif word and word not in found and not arg.startswith("--"):
            found[word] = arg
        else:
            raise InputError(f"{key}: there is no such option{did_you_mean(key, [*names, *flags, *many])}")
    return found


def whole(given: dict[str, str], name: str) -> int | None:
    """A whole number among `options`; None where it is not given.

    Raises:
        InputError: If it is something else.
    """
    if name not in given:
        return None
    if not given[name].isdecimal():
        raise bad(name, given[name], "a whole number, 0 or more, is expected")
    return int(given[name])


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint in a run's folder that training can go on from, wherever in it and whoever asked for it.

    Raises:
        InputError: If there is none.
    """
    found = sorted(run.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found:
        if not _weights_alone(path):
            return path
    if found:
        remedy = f"{found[0].name} holds the weights alone; start from them: --config {run}/config.yaml --model.weights"
        raise bad("resume", str(run), f"{remedy} {found[0]}")
    if (run / "weights.safetensors").is_file():
        remedy = f"it kept no checkpoint; start from its weights: --config {run}/config.yaml --model.weights {run}"
        raise bad("resume", str(run), remedy)
    raise bad("resume", str(run), "no checkpoint is in its folder: it did not get that far; start anew")


def _weights_alone(path: Path) -> bool:
    """Whether a checkpoint has no optimizer's state; of a damaged one, no: who reads it says what is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            (index,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            return b"optimizer_states" not in archive.read(index)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _name(config: str) -> str | None:
    """What a run of this config is called; None for a part, such as ``trainer/cpu``, and for a dictionary."""
    if config.startswith("{"):
        return None
    path = Path(config).resolve()
    if path.parent.parent == configs_folder().resolve():
        return None
    if path.stem == "config" and (path.parent / "status.json").is_file():  # what a run left behind
        return path.parent.parent.name
    return path.stem
