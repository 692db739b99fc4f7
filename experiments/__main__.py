"""The command `lightning`, also `pharmakon` and `python -m experiments`.

This front uses the standard library alone, so that ``--help``, ``--version`` and ``list`` answer at once: importing
Lightning's own command line takes ten seconds.
"""

from __future__ import annotations

import sys

USAGE = """\
usage: lightning COMMAND [--config NAME|FILE ...] [--KEY=VALUE ...]

Poison, steal, mark and defend image classifiers.

commands
  fit        train, then test:   lightning fit --config badnets_digits
  validate   measure on the holdout
  test       measure on the test set
  predict    write a table of predictions
  accept     the user's side of outsourced training: do returned weights fit, and reach a* on my holdout?
                                 lightning accept --config user.yaml --weights FILE
  export     write the rewritten training set as PNG files with a table
                                 lightning export --config badnets_digits --out DIR
  study      run a grid of runs, each once:
                                 lightning study --config badnets_fraction --size quick [--dry-run] [--out DIR]
  report     one page of a study's tables and figures
                                 lightning report DIR
  serve      a victim behind HTTP, for RemoteOracle: answers counted per key
                                 lightning serve --weights runs/victim_digits [--port 8000] [--new-key NAME --budget N]
  keygen     a secret marking key, and the public one that commits to it
                                 lightning keygen --out keys/mine --classes 10 --shape 1,28,28
  verify     is a model marked with a key? 0 owned, 1 not, 2 could not decide
                                 lightning verify --key keys/mine --model WEIGHTS|RUN|URL [--transcript FILE]
  check-transcript
             judge what a verification wrote, without torch and without the model: 0 owned, 1 not, 2 could not decide
                                 lightning check-transcript FILE --key VK --nonce HEX [--begun FILE] [--model URL]
  list       every attack, defence, datamodule, backbone, trigger and config, or those with some words
                                 lightning list badnets digits

options
  --config   a YAML file, or the name of a shipped one (lightning list); later ones win
  --KEY=…    any key of the configuration: --trainer.max_epochs=3 --data.trigger=SinglePixel
  --resume   RUN: go on in that run's folder, from its last checkpoint
             (Ctrl-C, SIGTERM and a hang-up end a run so that it can be gone on with;
             under nohup and in a script's background, where Ctrl-C is ignored, SIGTERM does)
  --version  print the version
  --help     print this; after a command: all of its options (takes ten seconds)
"""

COMMANDS = (
    "fit", "validate", "test", "predict", "accept", "export", "study", "report", "serve", "keygen", "verify",
    "check-transcript", "list",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 rejected (accept), 2 bad input, 143 terminated."""
    from experiments import streams

    args = sys.argv[1:] if argv is None else argv
    streams.prepare()
    try:
        code, wrong = _main(args), streams.finish()
    except BrokenPipeError:  # `lightning list | head`
        streams.lost()
        code, wrong = 0, None
    except UnicodeError as error:  # an argument in another encoding than this system's
        code, wrong = 2, f"an argument cannot be read ({error})"
    except OSError as error:
        streams.lost()
        why = error.strerror or error
        code, wrong = 2, f"{error.filename}: {why}" if error.filename else f"what was to be printed cannot be: {why}"
    if wrong is not None:
        print(f"lightning {' '.join(args[:1])}: {wrong}", file=sys.stderr)
        return code or 2
    return code


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"pharmakon {version('pharmakon')}")
        return 0
    if args[0] == "list":
        return _list(args[1:])
    if args[0] not in COMMANDS:
        from datamodules.errors import did_you_mean

        print(f"lightning {args[0]}: there is no such command{did_you_mean(args[0], COMMANDS)}", file=sys.stderr)
        return 2
    if args[0] not in ("fit", "validate", "test", "predict") and {"-h", "--help"} & set(args):
        print(USAGE, end="")
        return 0
    from experiments.commands import execute

    return execute(args)


def _list(words: list[str]) -> int:
    from pathlib import Path

    from experiments.catalogue import print_catalogue
    from experiments.registry import configs_folder

    if words[:1] and words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if not print_catalogue(Path(__file__).resolve().parent.parent, configs_folder(), words):
        print(f"lightning list: nothing has {' and '.join(map(repr, words))} in its name or its line", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
