"""Turning the parser's pages of trouble into one line that names the field, the value and the remedy.

The parser reports a tree: keys, the classes that were tried, and for each alternative of a type what is wrong with it.
The deepest branch is about what the person meant; the line is made from its leaves.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches

from datamodules.errors import InputError, did_you_mean
from experiments.registry import configs_folder

_KEY = re.compile(r"Parser key ['\"]([\w.\[\]]+)['\"]")
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)'")
_CALLABLE = re.compile(r"Type collections\.abc\.Callable\[.*?\] expects a function or a callable class: ")
_GIVEN = re.compile(r"Given value: (?:NestedArg\(key='([^']*)', val=(.*)\)|(.*))$")
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
    "dict": "a mapping",
}

_ELSEWHERE = {
    "optimizer": "model.optimizer",
    "lr_scheduler": "model.schedule",
    "scheduler": "model.schedule",
    "lr": "model.optimizer.lr",
    "learning_rate": "model.optimizer.lr",
    "weight_decay": "model.optimizer.weight_decay",
    "batch_size": "data.batch_size",
    "seed": "seed_everything",
}
"""Words of Lightning's users, and where these things are set here."""


def input_error(error: BaseException | None) -> InputError | None:
    """The InputError in the chain of causes, if there is one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def one_line(error: BaseException, known: Iterable[str]) -> str:  # noqa: PLR0911 – a list of cases
    """What a person needs to know of an error from parsing a configuration.

    Args:
        error: As raised.
        known: All keys and option names at the top, for suggestions.
    """
    text = str(error)
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        word = found[1].split("=")[0]
        return (
            f"{word}: there is no such option{_pointer(word.lstrip('-'), known) or _suggest(word.lstrip('-'), known)}"
        )
    if found := re.search(r"(?:Subcommand|Group) '[\w.]+' does not accept option '([^']+)'", text):
        return f"{found[1]}: there is no such key{_suggest(found[1], known)}"
    if found := re.match(r"the following arguments are required: (.+)", text):
        keys = ", ".join(key.strip().partition(".")[2] for key in found[1].split(","))
        return f"{keys}: nothing is given; name a config, such as --config badnets_digits (see lightning list)"
    if found := re.search(r"argument (\S+): expected one argument", text):
        return f"{found[1]}: a value is missing"
    if found := re.search(r"Environment variable '([^']*)' not found", text):
        where = str(getattr(error, "full_key", "")).partition(".")[2] or "config"
        return f"{where}: ${{oc.env:{found[1]}}}: there is no such variable in the environment; set it"
    if found := re.search(r"Interpolation key '[^']*' not found \(resolved to '\w+\.([^']*)'\)", text):
        where = str(getattr(error, "full_key", "")).partition(".")[2] or "config"
        return f"{where}: there is no ${{{found[1]}}}; name a key of the configuration, from the top"
    if found := re.search(r"Unable to load config '([^']*)'", text):
        return f"trainer = {found[1]!r}: there is no such file; an overlay is given by --config, such as trainer/cpu"
    if "Parser key" not in text:
        return " ".join(text.split())
    branch = _deepest(text)
    return _explain(branch, ".".join(branch.keys), known)


@dataclass
class _Branch:
    """A key or a class that was tried, with what was wrong with it."""

    keys: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    leaves: list[str] = field(default_factory=list)
    value: str | None = None
    key: str = ""

    def grow(self, line: str) -> _Branch:
        keys, classes = _KEY.findall(line), _CLASS.findall(line)
        return _Branch((*self.keys, *keys), (*self.classes, *classes))


def _deepest(text: str) -> _Branch:
    """The first of the branches with the most keys and classes on the way to it."""
    branches = [_Branch()]
    stack = [(-1, branches[0])]
    for raw in text.splitlines():
        line = _CALLABLE.sub("", raw.strip().removeprefix("- "))
        indent = len(raw) - len(raw.lstrip())
        if not line or line.startswith(("Does not validate", "Subtypes:", "Errors:", "Given value type")):
            continue
        while indent <= stack[-1][0]:
            stack.pop()
        branch = stack[-1][1]
        if given := _GIVEN.match(line):
            branch.key = f".{given[1]}" if given[1] else ""
            branch.value = _first_value(given[2] or given[3])
        elif _KEY.match(line) or _CLASS.match(line):
            branches.append(branch.grow(line))
            stack.append((indent, branches[-1]))
        else:
            branch.leaves.append(line)
    return max(branches, key=lambda branch: (bool(branch.leaves), len(branch.keys) + len(branch.classes)))


def _first_value(text: str) -> str:
    """A value as it was typed: what follows a nested report, and the quotes, are left out."""
    return text.partition(". Got value:")[0].strip("'\"")


def _explain(branch: _Branch, where: str, known: Iterable[str]) -> str:  # noqa: PLR0911 – a list of cases
    leaves = [leaf for leaf in branch.leaves if "'NoneType'" not in leaf]
    text = "\n".join(leaves)
    classes = re.findall(r"Got value: Namespace\(.*?class_path='([\w.]+)'", text) or branch.classes[-1:]
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        word = found[1].split(".")[0]
        if not classes:
            return f"{where}.{word}: there is no such key{_suggest(word, known)}"
        if where == "model" and word in _ELSEWHERE:
            return f"{where}.{word}: {classes[-1].rsplit('.', 1)[-1]} has no such argument; write --{_ELSEWHERE[word]}"
        if others := _schedules_with(word) if where == "model.schedule" else []:
            name = classes[-1].rsplit(".", 1)[-1]
            example = f"--model.schedule={others[0]} --model.schedule.{word}=…"
            return f"{where}.{word}: {name} has no such argument; name one that has it first: {example}"
        hint = did_you_mean(word, [*_arguments(classes[-1]), "class_path", "init_args"])
        return f"{where}.{word}: {classes[-1].rsplit('.', 1)[-1]} has no such argument{hint}"
    if found := re.search(r"Multiple subclasses with name (\w+)\. .*?: (.+?)\.?$", text):
        paths = sorted(found[2].split(", "), key=lambda path: path.startswith(("torch", "lightning")))
        return f"{where} = {found[1]!r}: several classes have that name; write {' or '.join(paths)}"
    if found := re.search(r"arguments are required: ([\w, ]+)", text):
        return f"{where}: {classes[-1] if classes else 'it'} needs {found[1]}"
    if found := re.search(r"No module named '?([\w.]+)'?", text):
        return f"{where}: there is no module {found[1]}; is its folder on PYTHONPATH?"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        hint = did_you_mean(found[2], dir(sys.modules.get(found[1], object)))
        return f"{where} = '{found[1]}.{found[2]}': there is no such class{hint}"
    if re.search(r"is abstract$", text, re.M):
        return f"{where}{branch.key}: which one? give the list in a YAML, or name a class first: --{where}=CLASS"
    return _wrong_value(branch, leaves, where)


def _wrong_value(branch: _Branch, leaves: list[str], where: str) -> str:
    """A value of the wrong type, or the name of no class."""
    text = "\n".join(leaves)
    got = re.search(r"Got value: (.+?)(?:\. Got value: .*)?$", text, re.M)
    path = re.search(r"Expected a path but (.+) either not accessible", text)
    name = re.search(r"(?:Expected a dot import path string:|Import path|Unexpected import path format:) (\S+)", text)
    value = (path or got or name or [None, branch.value])[1]
    value = None if value is None else value.strip("'\"")
    field = where if value is None or len(value) > 60 or value.startswith("{") else f"{where} = {value!r}"
    if value is not None and re.search(r"\.(ya?ml|json)$", value):
        known = [str(path.relative_to(configs_folder())) for path in configs_folder().rglob("*.yaml")]
        hint = did_you_mean(value.removeprefix("configs/"), known)
        return f"{field}: there is no such file, beside the YAML that names it, here, or among the shipped ones{hint}"
    expected = list(dict.fromkeys(_expected(text)))
    classes = re.findall(
        r"(?:subclass of|function that returns) (?:<class ')?(?:\w+\.)*(\w+)|Type \S+ expects a (\w+)", text
    )
    kinds = list(dict.fromkeys(first or second for first, second in classes))
    if not expected and kinds:
        return f"{field}: is no {' or '.join(kinds)}{_hint(value, _class_names(kinds))}"
    if not expected and name:
        return f"{field}: there is no such class{_hint(value, _class_names([]))}"
    if expected:
        choices = re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[(.*?)\]", text)))
        wanted = [*(f"a {kind}" for kind in kinds), *expected]
        return f"{field}: expected {' or '.join(wanted)}{_hint(value, choices)}"
    return f"{where}: {'; '.join(dict.fromkeys(leaves))}"


def _expected(text: str) -> Iterator[str]:
    """What each alternative asks for, in words."""
    for kind, choices in re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\])", text):
        yield (
            _TYPES.get(kind, f"a {kind}") if kind else " or ".join(choice.strip("'") for choice in choices.split(", "))
        )


def _hint(value: str | None, known: Iterable[str]) -> str:
    return did_you_mean(value.rpartition(".")[2], known) if value else ""


def _suggest(word: str, known: Iterable[str]) -> str:
    """A suggestion for a dotted key: its first part among those at the top, or its second among that one's."""
    known = set(known)
    top, dot, rest = word.partition(".")
    tops = {key.partition(".")[0] for key in known}
    if top not in tops:
        close = get_close_matches(top, tops, n=1, cutoff=0.6)
        return f" – did you mean '{close[0]}{dot}{rest}'?" if close else ""
    inner = {key.partition(".")[2] for key in known if key.startswith(f"{top}.")}
    close = get_close_matches(rest, inner, n=1, cutoff=0.6)
    return f" – did you mean '{top}.{close[0]}'?" if close else ""


def _pointer(word: str, known: Iterable[str]) -> str:
    """Where an option without its part is set: `max_epochs` of the trainer, `optimizer.lr` of the model."""
    first, dot, rest = word.partition(".")
    for place in (_ELSEWHERE.get(first), f"trainer.{first}" if f"trainer.{first}" in set(known) else None):
        if place is not None:
            return f"; write --{place}{dot}{rest}"
    return ""


def _schedules_with(argument: str) -> list[str]:
    """Torch's schedules that have an argument of that name."""
    from torch.optim import lr_scheduler

    names = ("StepLR", "MultiStepLR", *lr_scheduler.__all__)
    return [name for name in names if argument in _arguments(f"torch.optim.lr_scheduler.{name}")[1:]]


def _arguments(class_path: str) -> list[str]:
    """The names of a class's constructor arguments."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _class_names(kinds: list[str]) -> set[str]:
    """The classes of some kinds that YAML may name without a path; of all kinds if none is given."""
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from classifiers.backbones import Backbone
    from classifiers.classifier import ImageClassifier
    from datamodules.augment import Augmentation
    from datamodules.datamodule import ImageDataModule
    from datamodules.triggers import Trigger

    bases: dict[str, type] = {"Module": Backbone}
    for base in (ImageDataModule, ImageClassifier, Augmentation, Trigger, Optimizer, LRScheduler, Callback, Logger):
        bases[base.__name__] = base
    chosen = [bases[kind] for kind in kinds if kind in bases] if kinds else bases.values()
    return {kind.__name__ for base in chosen for kind in _descendants(base) if not kind.__name__.startswith("_")}


def _descendants(kind: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(kind)
    for child in children:
        yield child
        yield from _descendants(child)
