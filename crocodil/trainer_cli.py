"""`crocodil fit | validate | test | predict`: a LightningCLI over the stages."""

import json
import os
import re
import sys
import warnings
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from crocodil.data.block_datamodule import BlockDataModule
from crocodil.modules import ShardedStrategy
from crocodil.modules.checkpoint_io import WholeCheckpointIO
from crocodil.modules.checkpoints import read_checkpoint
from crocodil.modules.integrity import remove
from crocodil.modules.resume import Found, check_same_run, newest_checkpoint, run_settings
from crocodil.output import check_writable

CALLBACK_GROUP = "crocodil.callbacks"
HARMLESS = (
    "LightningCLI's args parameter",  # it fears that arguments given here hide those of the process: they are those
    ".*isinstance\\(treespec, LeafSpec\\)",  # Lightning's own use of a deprecated call
    "Found .* module\\(s\\) in eval mode",  # the frozen autoencoder is meant to be
    ".*does not have many workers",  # batches are slices of a memory-mapped array
    "Your `IterableDataset` has `__len__` defined",  # the epochs of a stream are batches of its loader
)
"""Warnings of libraries that a user can do nothing about, with the reason why each is right to be silent."""


class OneSentenceParser(LightningArgumentParser):
    """Says what is wrong in one sentence instead of a usage page."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raises the shortened message as a ValueError."""
        raise ValueError(one_sentence(message)) from ex


def one_sentence(message: str) -> str:
    """The part of a jsonargparse message that tells what to mend.

    Its messages nest: each member of a union complains in turn as a bullet, indented below the key it is about. The
    innermost complaints that are neither about None nor about the ways to name a class tell most.
    """
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        known = ", ".join(sorted(entry.name for entry in entry_points(group=CALLBACK_GROUP)))
        return f"there is no class {unknown[1]}; give an import path, or for a callback one of the short names {known}"
    message = re.sub(r":\n +(?=[^-\s])", ": ", message)
    bullets = re.findall(r"^( *)- (.+)$", message, flags=re.MULTILINE)
    general = r".*NoneType|.*:$|a class path \(str\)|a dict with|Not a valid subclass"
    telling = [(len(indent), text) for indent, text in bullets if not re.match(general, text)]
    if not telling:
        return " ".join(line.strip() for line in message.splitlines()[:2])
    deepest = max(indent for indent, _ in telling)
    key = re.search(r'key "([^"]+)"', message)
    place = f"{key[1]}: " if key else ""
    return place + "; ".join(dict.fromkeys(text for indent, text in telling if indent == deepest))


class CountingTrainer(Trainer):
    """A Trainer whose options tell a number of batches (an int) from a share of them (a float), 1 from 1.0.

    Lightning writes these types as `Optional[Union[int, float]]`, of which `typing` keeps one object for both orders of
    int and float. Whichever module asked first decides the order, and with it whether the command line's 1 is read as
    1.0, all batches. Types with a bar are not kept.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **options,
        )


class CrocodilCLI(LightningCLI):
    """Stages and DataModules by `class_path`; the vocabulary is linked from the data."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            LightningModule,  # a stage or an evaluation
            BlockDataModule,
            trainer_class=CountingTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+"},
            parser_class=OneSentenceParser,
            seed_everything_default=0,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, without the option to run pickles: checkpoints are plain data."""
        return {name: skipped | {"weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what must never be configured twice."""
        parser.link_arguments("data.vocabulary", "model.init_args.vocabulary", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuses an unfit command or `--ckpt_path` before any work is done."""
        super().parse_arguments(parser, args)
        module, _, name = self.config[self.config.subcommand].model.class_path.rpartition(".")
        model = getattr(import_module(module), name)
        if model.stage == "evaluation" and (self.config.subcommand != "test" or self._ckpt_path()):
            raise ValueError(f"{name} evaluates a pipeline folder: run it with `crocodil test`, without --ckpt_path")
        if path := self._ckpt_path():
            read_checkpoint(path, model.stage)

    def _ckpt_path(self) -> Path | None:
        given = self.config[self.config.subcommand].ckpt_path
        return None if given in (None, "best", "last", "hpc") else Path(given)

    def instantiate_classes(self) -> None:
        """Refuses a `--ckpt_path` that the Trainer's strategy cannot read."""
        super().instantiate_classes()
        if path := self._ckpt_path():
            self._check_kind(path)

    def _check_kind(self, path: Path) -> None:
        if path.is_dir() != isinstance(self.trainer.strategy, ShardedStrategy):
            kinds = ("sharded", "with") if path.is_dir() else ("whole", "without")
            raise ValueError(
                f"{path} is a {kinds[0]} checkpoint: go on from it {kinds[1]} --trainer.strategy=fsdp2; "
                "`crocodil export` and later stages take either kind"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer whose checkpoints are whole or not there."""
        plugins = as_list(self.config_init[self.subcommand].trainer.plugins)
        return super().instantiate_trainer(plugins=[*plugins, WholeCheckpointIO()], **kwargs)

    def fit(self, **options: Any) -> None:
        """Trains, and without `--ckpt_path` goes on from the run's newest whole checkpoint.

        Raises:
            ValueError: if that is of another run, or none of its checkpoints is whole.
        """
        self.model.run_settings = self._run_settings()
        found = None if options["ckpt_path"] else self._newest_checkpoint()
        if found is not None:
            check_same_run(found, self.model.run_settings)
            self._check_kind(found.path)
            if self._is_finished(found):
                return
            options["ckpt_path"] = str(self._go_on(found))
        self.trainer.fit(**options)

    def _newest_checkpoint(self) -> Found | None:
        """That of the folders which the configuration's ModelCheckpoints name; without one a run begins anew."""
        callbacks = [each for each in self.trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        folders = {Path(callback.dirpath): None for callback in callbacks if callback.dirpath is not None}
        for folder in folders:
            check_writable(folder)
        return newest_checkpoint(list(folders), self.model.stage)

    def _run_settings(self) -> dict[str, Any]:
        dumped = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, format="json")
        config = json.loads(dumped)[self.subcommand]
        built = as_list(self.config_init[self.subcommand].trainer.callbacks)  # and behind them those of the CLI
        pairs = zip(as_list(config["trainer"]["callbacks"]), built, strict=False)
        kept = [settings for settings, callback in pairs if getattr(callback, "weight_copies", 0)]
        settings = run_settings(config, self.trainer.world_size, kept)
        return settings | {
            "autoencoder": self.model.network_configs().get("autoencoder")
        }  # there may be another by now

    def _is_finished(self, found: Found) -> bool:
        is_finished = 0 <= self.trainer.max_steps <= found.step
        if is_finished:
            self._tell(
                f"the {found.step} steps of this run are done: {found.path}; for a longer run give more "
                f"--trainer.max_steps, to start anew another --trainer.default_root_dir, or remove {found.path.parent}"
            )
        return is_finished

    def _go_on(self, found: Found) -> Path:
        for path in found.damaged:
            aside = path.with_name(f"{path.name}.damaged")  # it must not become the previous of the next one
            self._tell(f"{path} is damaged, and will be {aside}")
            if self.trainer.is_global_zero:
                remove(aside)
                path.rename(aside)
        self._tell(
            f"going on from step {found.step} of {found.path}; to start anew, give another --trainer.default_root_dir "
            f"or remove {found.path.parent}"
        )
        return found.path

    def _tell(self, sentence: str) -> None:
        if self.trainer.is_global_zero:
            print(f"crocodil: {sentence}", file=sys.stderr)

    def before_instantiate_classes(self) -> None:
        """Refuses an unwritable output folder before any work is done."""
        root = self.config[self.subcommand].trainer.default_root_dir
        check_writable(root or os.getcwd())


def as_list(value: Any) -> list[Any]:
    """What the Trainer takes as one, many or none."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def load_callback_plugins() -> None:
    """Imports the callbacks of the entry-point group, so that their short names are known."""
    for entry in entry_points(group=CALLBACK_GROUP):
        try:
            entry.load()
        except Exception as error:  # one broken plug-in must not stop runs that do not use it
            warnings.warn(f"the callback {entry.name} ({entry.value}) cannot be imported: {error}", stacklevel=2)


def run_trainer(arguments: list[str], cli: type[CrocodilCLI] = CrocodilCLI) -> CrocodilCLI:
    """Runs `fit`, `validate`, `test` or `predict` in this process.

    Args:
        arguments: the command and its options, as on the command line.
        cli: what carries them out.

    Raises:
        ValueError: if the options or the files they name are wrong.
    """
    load_callback_plugins()
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    try:
        return cli(arguments)
    except ValueError as error:  # a ValueError of a constructor comes back wrapped
        raise ValueError(one_sentence(str(error))) from error
    except RuntimeError as error:
        if lost := re.search(r"DataLoader worker.*", str(error)):
            raise ValueError(
                f"a process that reads data was lost ({lost[0].rstrip('. ')}), most often for want of memory: give "
                "fewer --data.init_args.num_workers; the same command goes on from the last checkpoint"
            ) from error
        raise
