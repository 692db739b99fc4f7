"""`lightning accept`: the user's side of outsourced training.

The user sent an architecture and data away, and got parameters back. They are accepted if they fit the architecture
that was sent – no layer more, none less, none of another shape – and reach a* on a holdout that the trainer never saw.
"""

from __future__ import annotations

import sys

from classifiers.classifier import MisfitError
from datamodules.errors import InputError
from datamodules.measures import NoAnswerError
from experiments.arguments import value_of
from experiments.cli import start


def accept(args: list[str]) -> int:
    """Judge returned weights.

    Args:
        args: ``accept --config user.yaml --weights FILE [--honest FILE] [--KEY=VALUE …]``; the config names the data,
            the architecture, and a* as ``model.acceptance``.

    Returns:
        0 accepted, 1 rejected.

    Raises:
        InputError: If that cannot be decided: a file is missing, or there is no gate.
    """
    passed, given = ["validate"], {"--weights": "", "--honest": ""}
    rest = iter(args[1:])
    for arg in rest:
        key, equals, value = arg.partition("=")
        if key in given:
            given[key] = value if equals else value_of(rest, key)
        else:
            passed.append(arg)
    if not given["--weights"]:
        raise InputError("weights: name the file that came back: lightning accept --config user.yaml --weights FILE")
    passed += [f"--model.{key[2:]}={value}" for key, value in given.items() if value]
    try:
        line = start(passed, act=False)
        if getattr(line.model, "acceptance", None) is None:
            raise InputError("model.acceptance = None: set a*, the accuracy on the holdout that you ask for")
    except MisfitError as error:
        print(f"rejected: {error}", file=sys.stderr)
        return 1
    try:
        line.execute()
    except NoAnswerError as error:
        print(f"rejected: {error}", file=sys.stderr)
        return 1
    if line.record.accepted is None:
        raise InputError("model.acceptance: the gate needs a holdout; set val_fraction above 0")
    return 0 if line.record.accepted else 1
