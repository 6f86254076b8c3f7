"""The command line: `python -m trainerkit` and the console script `trainerkit`.

Help, listings and errors about the config need neither torch nor Lightning, and do not import them.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainerkit.errors import UserError, answering, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

GROUPS = ("task", "data", "network", "loss", "optimizer", "scheduler", "callbacks", "trainer", "logger", "experiment")

# Hydra's flags that are handed on, and whether a value follows.
_FLAGS = {"-m": False, "--multirun": False, "--resolve": False} | dict.fromkeys(
    ("--cfg", "-c", "--package", "-p", "--info", "-i"), True
)

_USAGE = """\
Usage: python -m trainerkit task=NAME [group=choice] [key=value] …      (also: trainerkit task=NAME …)
"""

_EXAMPLES = """\
Examples
  python -m trainerkit task=mae
  python -m trainerkit task=mae optimizer.lr=5e-4 trainer.max_epochs=30 out_dir=runs/mine
  python -m trainerkit -m task=mae task.network.latent_dim=16,64 seed=0,1

Groups are chosen by group=choice, the same way for all of them. `callbacks` is a list: callbacks=[default,NAME] adds
NAME, callbacks.NAME=null removes one. Any key of the config is set by its path, a.b.c=value.

Keys     stage=fit|validate|test|predict   resume=auto|null|PATH   out_dir=FOLDER   seed=NUMBER
Flags    -m, --multirun    every combination of comma-separated values
         --cfg job         print the composed config and stop
         --config-dir DIR  a folder of your own groups (DIR/task/mine.yaml is task=mine)
         --help            this text
         --version
Trust    allow=PACKAGE     let configs build classes of another package
         trust=true        let checkpoints run code (docs/security.md)
Replay   replay RUN OTHER  the first step in which two runs with callbacks=[default,step_hashes] differ
         replay RUN        train such a run again in a temporary folder, and the same"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 for what the user can put right, 128 + n after signal n."""
    with answering():
        _main(list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> None:
    if _run_as_child():
        return
    if "--version" in arguments:
        from trainerkit import __version__

        print(f"trainerkit {__version__}")
        return
    config_dir, arguments = _take_option(arguments, "--config-dir", "-cd")
    if config_dir is not None and not os.path.isdir(config_dir):
        raise UserError(f"--config-dir {config_dir}: there is no such folder.")
    if {"--help", "-h"} & set(arguments):
        _print_help(config_dir)
        return
    trusted, arguments = _take_allowed(arguments)
    if trusted:
        # Processes that are started for other devices trust the same.
        before = os.environ.get("TRAINERKIT_ALLOW", "")
        os.environ["TRAINERKIT_ALLOW"] = ",".join(filter(None, [before, *trusted]))
    if arguments[:1] == ["replay"]:
        from trainerkit.plugins import AllowList
        from trainerkit.replay import replay

        if replay(arguments[1:], AllowList(trusted)):
            sys.exit(1)
        return
    flags, overrides = _split(arguments)
    if not arguments:
        _print_tasks(config_dir)
        return
    overrides = _with_overrides_of_run(overrides)
    if not any(override.lstrip("+").startswith("task=") for override in overrides):
        raise UserError(_no_task(overrides))

    from trainerkit.compose import compose_config, with_text_quoted
    from trainerkit.hydra_parts import check_search_path

    overrides = [with_text_quoted(override) for override in overrides]

    if config_dir is not None:
        check_search_path(config_dir)
    cfg = compose_config(overrides, config_dir)
    _check_trust(cfg, overrides)
    if flags:
        _hand_to_hydra(cfg, flags, overrides, config_dir, trusted)
    else:
        from trainerkit.plugins import AllowList
        from trainerkit.run import run

        run(cfg, overrides, AllowList(trusted), _again(config_dir, trusted))


def _check_trust(cfg: "DictConfig", overrides: list[str]) -> None:
    """Files are unpickled only if the user says so: a config may be a stranger's, and is not asked."""
    from omegaconf import OmegaConf

    if "trust" in map(_key, overrides):
        return
    if OmegaConf.is_interpolation(cfg, "trust") or cfg.get("trust") is not False:
        raise UserError("trust: only the command line may set it, and one of the configs did.")


def _again(config_dir: str | None, trusted: list[str]) -> list[str]:
    """What a command that goes on needs beside the overrides."""
    return [*(["--config-dir", config_dir] if config_dir else []), *(f"allow={name}" for name in trusted)]


def _run_as_child() -> bool:
    """In a process that Lightning started for another device: run the config that the first process resolved."""
    from trainerkit.plugins import AllowList

    path = os.environ.get("TRAINERKIT_RESOLVED_CONFIG")
    if path is None or os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    from omegaconf import OmegaConf

    from trainerkit.run import run

    cfg = OmegaConf.load(path)
    run(cfg, [], AllowList(), [])  # type: ignore[arg-type]
    return True


def _hand_to_hydra(
    cfg: "DictConfig", flags: list[str], overrides: list[str], config_dir: str | None, trusted: list[str]
) -> None:
    """Sweeps and the flags that print configs are Hydra's own."""
    from functools import partial

    import hydra
    from hydra.core.plugins import Plugins

    from hydra_plugins.trainerkit_sweeper import OptunaSweeper
    from trainerkit.compose import CONFIG_MODULE, CONFIG_NAME
    from trainerkit.hydra_parts import check_hydra
    from trainerkit.multirun import Sweep
    from trainerkit.plugins import AllowList, register_search_path

    allow = AllowList(trusted)
    check_hydra(overrides, allow, config_dir)
    register_search_path(config_dir)
    # Hydra finds it by itself in an ordinary install, and not in an editable one.
    Plugins.instance().register(OptunaSweeper)
    start = hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, version_base="1.3")
    if not {"-m", "--multirun"} & set(flags):
        sys.argv = [sys.argv[0], *flags, *overrides]
        start(lambda cfg: None)()  # prints a config, and runs nothing
        return
    if others := [flag for flag in flags if flag.startswith("-") and flag not in ("-m", "--multirun")]:
        raise UserError(f"-m with {' '.join(others)}: what prints a config starts no sweep; leave out one of them.")
    trust = partial(_check_trust, overrides=overrides)  # a config that the sweep chose may have set it
    sweep = Sweep(cfg, overrides, allow, _again(config_dir, trusted), trust)
    sys.argv = [sys.argv[0], *flags, *sweep.overrides]
    with sweep:
        start(sweep.job)()


def _with_overrides_of_run(overrides: list[str]) -> list[str]:
    """To evaluate a run, begin with what it was trained with: `stage=test out_dir=runs/mae/…` is enough."""
    given = dict(override.partition("=")[::2] for override in overrides)
    if given.get("stage", "fit") == "fit" or "out_dir" not in given:
        return overrides
    path = os.path.join(os.path.expanduser(given["out_dir"]), "overrides.txt")
    if not os.path.exists(path):
        return overrides
    try:
        with open(path, encoding="utf-8") as file:
            before = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); it is damaged, remove it.") from error
    # The folder may be a stranger's: what it says on trust, and on Hydra's own parts, does not count.
    replaced = {*given, "stage", "resume", "out_dir", "trust"}
    kept = [line for line in before if _key(line) not in replaced and not _key(line).startswith("hydra")]
    if kept:
        print(f"trainerkit: with the run's own {' '.join(kept)}")
    return [*kept, *overrides]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _no_task(overrides: list[str]) -> str:
    keys = [override.partition("=")[0] for override in overrides]
    near = next((key for key in keys if nearest(key, ["task"])), None)
    misspelt = f"{near}: there is no such key. Did you mean task?" if near else "no task was chosen. Add task=NAME."
    return f"{misspelt} `python -m trainerkit` lists the tasks."


def _take_option(arguments: list[str], *names: str) -> tuple[str | None, list[str]]:
    value, rest = None, []
    waiting = False
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if waiting:
            value, waiting = argument, False
        elif name in names:
            value, waiting = (text, False) if equals else (None, True)
        else:
            rest.append(argument)
    if waiting:
        raise UserError(f"{names[0]}: needs a folder after it.")
    return value, rest


def _take_allowed(arguments: list[str]) -> tuple[list[str], list[str]]:
    """`allow=` is not a config key: no config file may say what is trusted."""
    trusted = [
        name for a in arguments if a.startswith("allow=") for name in a.removeprefix("allow=").strip("[]").split(",")
    ]
    return trusted, [argument for argument in arguments if not argument.startswith("allow=")]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    waiting = False
    for argument in arguments:
        if waiting or argument.startswith("-"):
            if not waiting and argument.partition("=")[0] not in _FLAGS:
                raise UserError(f"{argument}: there is no such flag; see python -m trainerkit --help.")
            flags.append(argument)
            waiting = not waiting and _FLAGS[argument.partition("=")[0]] and "=" not in argument
        elif "=" in argument or argument.startswith("~"):
            overrides.append(argument)
        else:
            hint = f"did you mean task={argument}? See python -m trainerkit --help."
            raise UserError(f"{argument}: must be key=value; {hint}")
    return flags, overrides


def _print_tasks(config_dir: str | None) -> None:
    from trainerkit.compose import choices, config_loader, summary

    with config_loader(config_dir) as loader:
        print("Tasks")
        for name in choices(loader, "task"):
            print(f"  {name:<16} {summary(loader, 'task', name)}")
    print("\nStart one by   python -m trainerkit task=NAME\nAll the rest   python -m trainerkit --help")


def _print_help(config_dir: str | None) -> None:
    from trainerkit.compose import choices, config_loader

    with config_loader(config_dir) as loader:
        print(_USAGE)
        print("Groups and their choices")
        for group in GROUPS:
            print(_wrapped(f"  {group:<11} ", choices(loader, group)))
    print(f"\n{_EXAMPLES}")


def _wrapped(label: str, words: list[str], width: int = 118) -> str:
    import textwrap

    return textwrap.fill(", ".join(words), width, initial_indent=label, subsequent_indent=" " * len(label))


if __name__ == "__main__":
    main()
