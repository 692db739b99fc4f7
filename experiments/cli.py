"""The command line: Lightning's own, with OmegaConf, links, a fresh folder for each run, and one-line complaints."""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from classifiers.classifier import ImageClassifier
from datamodules.datamodule import Facts, ImageDataModule
from datamodules.errors import InputError, bad
from datamodules.measures import Interval
from experiments import aftermath, environment, ranks, rundir
from experiments.arguments import last_checkpoint, prepare
from experiments.checkpoints import check_checkpoint, check_word
from experiments.complaints import input_error, one_line
from experiments.documents import check_yaml, read_yaml
from experiments.foreign import blamed, check_nulls, out_of_memory
from experiments.memory import keep_freed_memory
from experiments.parts import callbacks_in, callbacks_of, is_default_logger, make_plain, plugins_of
from experiments.record import Record, print_table
from experiments.refusals import refusal_of
from experiments.registry import configs_folder, import_all, shipped
from experiments.runlock import RunLock
from experiments.seeds import chosen_seed
from experiments.signals import hangup_as_termination
from experiments.wandb_logger import Wandb, current_run, finish_foreign

MODE = "omegaconf+"
"""How the parser reads YAML: OmegaConf's interpolations, over all configs together."""


def _find_shipped(value: Any) -> Any:
    """Content of a YAML, in which files that are not beside it but among the shipped ones have their whole path."""
    if isinstance(value, dict):
        return {key: _find_shipped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_find_shipped(part) for part in value]
    if not isinstance(value, str):
        return value
    found = shipped(value)
    if found.endswith(".yaml") and Path(found).is_file():  # a part, named here with its path
        read_yaml(Path(found), Path(found).stem)
    return found


def _read_yaml_our_way() -> None:
    """Let a YAML in any folder name shipped parts: ``base: data/digits.yaml``."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    environment.watch()
    environment.begin()
    first = ArgumentParser(parser_mode=MODE)
    first.add_argument("--key")
    first.parse_string("key: value")  # the mode's own loader is there after its first use
    load = get_loader(MODE)

    def read(text: str) -> Any:
        check_yaml(text)
        return _find_shipped(load(text))

    set_loader(MODE, read, (yaml.YAMLError,))


_read_yaml_our_way()

KEPT = ("seed_everything", "trainer", "model", "data")
"""What of a command's configuration goes into config.yaml: what each command has, so that any of them can take it."""

LEAST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0}
"""Of the trainer's numbers that Lightning takes without a look, to divide by or to ignore: the least with a meaning."""

REFUSALS = ("`val_check_interval`", "Early stopping conditioned on metric")
"""In what words Lightning refuses a configuration by errors that a bug might raise too."""

LINKED = ("num_classes", "image_shape", "mean", "std")
"""What the data says and the model is told: never typed twice."""


class Parser(LightningArgumentParser):
    """Lightning's parser, with the settings that every one of ours has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"exit_on_error": False, "allow_abbrev": False, "parser_mode": MODE}
        super().__init__(*args, **kwargs)

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """A configuration as text, with what it takes from the environment as it was written."""
        text = self.resolved(*args, **kwargs)
        content = yaml.safe_load(text)
        kept = environment.keep(content)
        return text if kept == content else yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)

    def resolved(self, *args: Any, **kwargs: Any) -> str:
        """A configuration as text, as it is used."""
        with warnings.catch_warnings():  # of text where a function may stand, too: it is kept behind a remark
            warnings.filterwarnings("ignore", r"\s*Unable to serialize instance")
            text: str = super().dump(*args, **kwargs)
        return text.replace("Unable to serialize instance ", "")


class CommandLine(LightningCLI):
    """Parses a command, makes its objects and runs it.

    Args:
        args: The command and its options.
        name: Of the run: its folder is ``<default_root_dir>/<name>/<date_time>``.
        folder: Of the run that is resumed; None: a fresh one.
        act: Whether to run the command, or only to make its objects.
        keep: Whether the run has a folder.
        show: Whether it draws pictures and prints its table; False where it is one of many.
    """

    def __init__(
        self,
        args: ArgsType,
        name: str,
        folder: Path | None = None,
        act: bool = True,
        keep: bool = True,
        show: bool = True,
    ) -> None:
        self.started = time.perf_counter()
        self.show = show
        self.name = name
        self.folder = folder
        self.resumed = folder is not None
        self.act = act
        self.keep = keep
        self.lock = RunLock()
        self.command = args[0] if isinstance(args, list) and args else None
        defaults = str(configs_folder() / "defaults.yaml")
        environment.begin()
        super().__init__(
            ImageClassifier,
            ImageDataModule,
            save_config_callback=None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=Parser,
            parser_kwargs={command: {"default_config_files": [defaults]} for command in self.subcommands()},
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # theirs is static
        """The command that is given alone: a parser takes a tenth of a second to make, and each command has one."""
        known = LightningCLI.subcommands()
        return {self.command: known[self.command]} if self.command in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the model must agree on with the data is linked."""
        for name in LINKED:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without a look at `sys.argv`, which belongs to whoever called."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Refuse a bad checkpoint before anything else; what hyper-parameters it holds change nothing."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is not None and not self.resumed:  # see `_hold`
            check_checkpoint(str(path), self.config.subcommand)

    def _set_seed(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        config.seed_everything = chosen_seed(config.seed_everything)  # config.yaml has the number
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Make the run's folder, and fill it in where the config asks for it."""
        config = self.config[self.subcommand]
        if not isinstance(config.trainer, Namespace):
            raise bad("trainer", config.trainer, "keys are expected, such as max_epochs")
        for key, least in LEAST.items():
            value = config.trainer.get(key)
            if value is not None and not value >= least:
                raise bad(f"trainer.{key}", value, f"it must be {least} or more")
        check_classes(config, ())
        check_nulls(config.model, "model", LINKED)
        check_nulls(config.data, "data")
        make_plain(config)
        dump = self.parser_of(self.subcommand).resolved(config, skip_unset=False, skip_link_targets=True)
        content = yaml.safe_load(dump)
        self.resolved = {key: content[key] for key in KEPT}
        self.text = yaml.safe_dump(environment.keep(self.resolved), sort_keys=False, allow_unicode=True)
        root = config.trainer.default_root_dir or "runs"
        if self.folder is None:
            self.folder = Path(root) / self.name
            if self.keep and not getattr(rank_zero_only, "rank", 0):
                aftermath.settle_all(self.folder)
                self.folder = rundir.fresh(root, self.name)
        config.trainer.default_root_dir = str(self.folder)
        if not self.keep or (config.trainer.barebones and is_default_logger(config.trainer.logger)):
            config.trainer.logger = False
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        for logger in loggers:
            if isinstance(logger, Namespace) and "Wandb" in logger.class_path:
                _complete(logger.init_args, config, self.folder, self.resumed)
        for key, value in config.trainer.items(branches=False):
            config.trainer[key] = _fill(value, self.folder)
        if "weights_only" in config:
            config.weights_only = True
        if "verbose" in config:
            config.verbose = False  # the table at the end says it better
        self._hold(config)

    def _hold(self, config: Namespace) -> None:
        """Lock the run's folder. Of one that is resumed only now is it certain which checkpoint is the last."""
        assert self.folder is not None
        first = not getattr(rank_zero_only, "rank", 0)
        if first and (self.keep or self.resumed):
            self.lock.take(self.folder, "resume" if self.resumed else "trainer.default_root_dir")
        if not self.resumed:
            return
        try:
            if first:
                aftermath.tidy(self.folder)
            config.ckpt_path = str(last_checkpoint(self.folder))
            check_checkpoint(config.ckpt_path, self.subcommand)
        except BaseException:
            self.lock.release()
            raise

    def instantiate_classes(self) -> None:
        """Make data, model and trainer; a folder that was made for nothing goes."""
        try:
            super().instantiate_classes()
            check_word(str(self.config[self.subcommand].get("ckpt_path")), callbacks_in(self.trainer))
            if self.subcommand == "fit" and isinstance(self.model, ImageClassifier):
                self.model.make_optimizer()  # a value that it refuses is told before any costly work
        except BaseException:
            self.lock.release()
            if self.folder is not None and not self.resumed:
                rundir.remove_if_empty(self.folder)
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that keeps a record and writes its checkpoints atomically."""
        assert self.folder is not None
        config = self.config_init[self.subcommand]
        self.record = Record(self.folder, self.text, int(config.seed_everything), self.started, self.show)
        callbacks = config.trainer.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        checkpointing = config.trainer.enable_checkpointing is not False and not config.trainer.barebones
        going_on = self.subcommand == "fit" and config.get("ckpt_path") is not None
        self.record.resizes = going_on and any(isinstance(each, BatchSizeFinder) for each in callbacks)
        callbacks = callbacks_of(callbacks, self.folder, checkpointing, str(self.subcommand), going_on)
        plugins = plugins_of(config.trainer)
        try:
            return super().instantiate_trainer(plugins=plugins, callbacks=[*callbacks, self.record], **kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise InputError(f"trainer: {' '.join(str(error).split())}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        if self.act:
            self.execute()

    def execute(self) -> None:
        """Run the command whose objects were made."""
        failed, before = True, current_run()
        try:
            with hangup_as_termination():
                super()._run_subcommand(str(self.subcommand))
            failed = False
        except (MemoryError, RuntimeError) as error:
            what = out_of_memory(error)
            if what is None:
                raise
            loading = self.datamodule.loading
            sizes = f"batch_size (now {loading.batch_size}) or eval_batch_size (now {loading.eval_batch_size})"
            raise InputError(f"{what}: lower {sizes} of the data, or choose a smaller network") from error
        finally:
            try:
                for logger in self.trainer.loggers:
                    if isinstance(logger, Wandb):
                        logger.finish(failed)
                    else:
                        finish_foreign(logger, before, failed)
            finally:
                self.lock.release()

    def after_fit(self) -> None:
        """Every fit ends with a test of the weights it ended with."""
        for each in callbacks_in(self.trainer):
            if isinstance(each, BatchSizeFinder):  # it is for training
                callbacks_in(self.trainer).remove(each)
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        self.after_test()

    def after_test(self) -> None:
        """Show what was measured."""
        if self.show and self.trainer.is_global_zero:
            acceptance = getattr(self.model, "acceptance", None)
            print_table(self.record.measures, self.record.accepted, acceptance, self.record.folder, self.record.notes)

    def after_validate(self) -> None:
        """Show what was measured."""
        self.after_test()

    def parser_of(self, command: str | None) -> Parser:
        """The parser of one command."""
        parser = self._parser(command)
        assert isinstance(parser, Parser)
        return parser


@dataclass(frozen=True)
class Result:
    """What a run achieved, and what it was made of.

    Attributes:
        measures: By name, each with value, n and 95 % interval.
        accepted: The acceptance gate's verdict; None without a gate.
        facts: What is known without the model.
        notes: What a reader of the measures must know, such as that nothing was trained.
        directory: The run's folder.
        seconds: Wall time of the whole run.
        model: As it was when the run ended.
        datamodule: As it was when the run ended.
        trainer: As it was when the run ended.
    """

    measures: dict[str, Interval]
    accepted: bool | None
    facts: Facts
    directory: Path
    seconds: float
    model: LightningModule
    datamodule: LightningDataModule
    trainer: Trainer
    notes: tuple[str, ...] = ()


def run(
    *configs: str | Path | dict[str, Any],
    command: str = "fit",
    overrides: list[str] | None = None,
    resume: str | Path | None = None,
    show: bool = True,
) -> Result:
    """Run an experiment, as the command does.

    Args:
        configs: YAML files, names of shipped ones, or dictionaries; later ones win.
        command: ``fit`` (which ends with a test), ``validate``, ``test`` or ``predict``.
        overrides: Such as ``["trainer.max_epochs=3", "data.trigger=SinglePixel"]``.
        resume: The folder of a run to go on with, from its last checkpoint.
        show: Whether it draws pictures and prints its table; False where it is one of many.

    Raises:
        InputError: If the configuration is wrong; one line that names the field, the value and the remedy.
    """
    args = [command]
    for config in configs:
        args += ["--config", _as_text(config)]
    args += [f"--{override.removeprefix('--')}" for override in overrides or []]
    if resume is not None:
        args += ["--resume", str(resume)]
    line = start(args, show=show)
    datamodule = line.datamodule
    return Result(
        measures=line.record.measures,
        accepted=line.record.accepted,
        facts={} if datamodule.secret else datamodule.facts(),
        directory=line.record.folder,
        seconds=time.perf_counter() - line.started,
        model=line.model,
        datamodule=datamodule,
        trainer=line.trainer,
        notes=tuple(line.record.notes),
    )


def start(args: list[str], act: bool = True, keep: bool = True, show: bool = True) -> CommandLine:
    """Parse a command line and run it.

    Args:
        args: The command and its options.
        act: Whether to run it, or only to make model, data and trainer.
        keep: Whether the run has a folder.
        show: Whether it draws pictures and prints its table.

    Raises:
        InputError: Whatever a person got wrong, in one line.
    """
    import_all()
    _be_quiet()
    keep_freed_memory()
    ranks.bound_rendezvous()
    prepared = prepare(args)
    try:
        return CommandLine(prepared.args, prepared.name, prepared.folder, act, keep, show)
    except Exception as error:
        ours = input_error(error)
        if ours is not None:
            raise ours from error
        if isinstance(error, argparse.ArgumentError | OmegaConfBaseException):
            raise InputError(one_line(error, _top_level_keys())) from error
        if isinstance(error, MisconfigurationException):
            raise InputError(" ".join(str(error).split())) from error
        if isinstance(error, ValueError | RuntimeError) and str(error).strip().startswith(REFUSALS):
            raise InputError(f"trainer: {' '.join(str(error).split())}") from error
        if (gone := ranks.lost(_root_of(error))) is not None:
            raise gone from error
        if (what := out_of_memory(_root_of(error))) is not None:
            text = f"{what} before anything was run: choose a smaller network or smaller images"
            raise InputError(text) from error
        refused = refusal_of(error)
        if refused is not None:
            raise refused from error
        if "Does not validate against any" in str(error):  # in a constructor, and not of our making
            raise _root_of(error) from None
        if (blame := blamed(_root_of(error))) is not None:
            raise blame from error
        raise


def _as_text(config: str | Path | dict[str, Any]) -> str:
    return json.dumps(config) if isinstance(config, dict) else str(config)


def _fill(value: Any, folder: Path) -> Any:
    """`rundir.fill` for what a parser holds."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _fill(part, folder) for key, part in vars(value).items()})
    if isinstance(value, list):
        return [_fill(part, folder) for part in value]
    return rundir.fill(value, folder)


def _complete(init_args: Namespace, config: Namespace, folder: Path, resumed: bool) -> None:
    """Name, group, job type and tags of a W&B run, from what is being run."""
    chain, part = [], config.data
    while part is not None and "class_path" in part:
        chain.append(part.class_path.rsplit(".", 1)[-1])
        part = part.get("init_args", Namespace()).get("base")
    model = config.model
    backbone = model.init_args.get("backbone") if model is not None and "init_args" in model else None
    names = [*chain, *([backbone.class_path.rsplit(".", 1)[-1]] if isinstance(backbone, Namespace) else [])]
    if not chain:
        return
    defaults = {
        "name": f"{folder.parent.name}/{folder.name}",
        "group": chain[-1],
        "job_type": chain[0] if len(chain) > 1 else "clean",
        "tags": names,
    }
    for key, value in defaults.items():
        if init_args.get(key) is None:
            init_args[key] = value
    known = folder / "wandb_id"
    if resumed and known.is_file():
        init_args["id"] = known.read_text().strip()


def check_classes(value: Any, where: tuple[str, ...]) -> None:
    """Refuse a ``class_path`` that is no class: the parser would call any function with the arguments beside it."""
    if isinstance(value, Namespace):
        path = value.get("class_path")
        if isinstance(path, str) and not isinstance(resolve_name(path), type):
            raise bad(".".join(where), path, "is no class")
        for key, part in vars(value).items():
            check_classes(part, where if key == "init_args" else (*where, str(key)))
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            check_classes(part, where)


def _root_of(error: BaseException) -> BaseException:
    """What went wrong first."""
    return error if error.__cause__ is None else _root_of(error.__cause__)


def _top_level_keys() -> list[str]:
    """Keys and options at the top of a config, for suggestions."""
    import inspect

    trainer = [f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    options = ["config", "resume", "ckpt_path", "weights", "out", "limit"]
    return ["seed_everything", "trainer", "model", "data", "data.class_path", "model.class_path", *trainer, *options]


def _be_quiet() -> None:
    """Leave out advertisements, and what the table and metrics.json say anyway."""
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed"):
        logger = logging.getLogger(f"lightning.{name}")
        if not any(isinstance(known, _NoNoise) for known in logger.filters):
            logger.addFilter(_NoNoise())
    for message in (
        r".*does not have many workers.*",
        r".*It is recommended to use `self\.log\(.*sync_dist=True.*",  # measures are summed over the ranks already
        r".*`isinstance\(treespec, LeafSpec\)`.*",
        r".*smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*The dirpath has changed from .*",  # each run has its own
        r".*callbacks used to create the checkpoint need to be provided.*",  # the run's own, to a tuner
    ):
        warnings.filterwarnings("ignore", message)


class _NoNoise(logging.Filter):
    said = ("Tip:", "Seed set to", "TPU available: False", "Loading `train_dataloader` to estimate")

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(noise in record.getMessage() for noise in self.said)
