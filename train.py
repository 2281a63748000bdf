"""Trains a detector on pictures with boxes in COCO format.

    python train.py --config=configs/yolos_s.py --workdir=runs/yolos_s --config.data.root=/data/coco

The same command resumes. ``configs/common.py`` lists every key; any of them can be given as
``--config.KEY=VALUE``. The last line printed is JSON: AP, AP50, seconds and where things are.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import common
from yolos_jax import interrupt, other_names, preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "One of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, made if missing.")


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Returns every key with its value; keys are dotted."""
    found = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def refuse_unknown_keys(argv: list[str], known: dict[str, object]) -> None:
    """Raises flags.Error for an override of a key that the configuration lacks."""
    for argument in argv:
        name = argument.lstrip("-").split("=")[0]
        if not name.startswith(("config.", "noconfig.")):
            continue
        key = name.split("config.", 1)[1]
        if key not in known:
            hint = other_names.hint(key, {path: f"--config.{path}" for path in known})
            raise flags.Error(f"unknown key --config.{key}{hint}")


def refuse_given_twice(argv: list[str], defaults: dict[str, object]) -> None:
    """Raises flags.Error for two configurations, and for a list of which there would be two.

    The flags' library would join the lists.
    """
    names = [argument.lstrip("-").split("=")[0] for argument in argv if argument.startswith("-")]
    if names.count("config") > 1:
        raise flags.Error(f"--config is given {names.count('config')} times; expected one of them")
    for key, default in defaults.items():
        count = names.count(f"config.{key}")
        if isinstance(default, tuple) and count > 1:
            raise flags.Error(f"--config.{key} is given {count} times; expected one list")


def refuse_wrong_elements(config: ConfigDict, defaults: dict[str, object]) -> None:
    """Raises flags.Error for a list whose elements are not of the kind that it had."""
    for key, value in leaves(config).items():
        default = defaults.get(key)
        if isinstance(value, tuple) and default:
            kinds = (int,) if isinstance(default[0], int) else (type(default[0]), int)
            for element in value:
                if not isinstance(element, kinds):
                    raise flags.Error(
                        f"--config.{key}={value}: expected a list of {kinds[0].__name__}, "
                        f"such as {default}"
                    )


def load_defaults(argv: list[str]) -> dict[str, object]:
    """Returns the keys of the configuration file that argv names, before any override."""
    for i, argument in enumerate(argv):
        name, equals, path = argument.lstrip("-").partition("=")
        if name == "config":
            path = path if equals else (argv + [""])[i + 1]
            if not os.path.isfile(path):
                raise flags.Error(f"--config={path}: no such file; expected one of configs/")
            content = runpy.run_path(path)
            if "get_config" not in content:
                raise flags.Error(f"--config={path}: has no function get_config")
            try:
                return leaves(content["get_config"]())
            except Exception as error:  # whatever a recipe does: a key that there is not, mostly
                places = traceback.extract_tb(error.__traceback__)
                line = max((i for i, at in enumerate(places) if at.filename == path), default=-1)
                place = f", line {places[line].lineno}" if line >= 0 else ""
                raise flags.Error(f"--config={path}{place}: {said_by(error)}") from error
    raise flags.Error("--config is missing: one of configs/")


def said_by(error: BaseException) -> str:
    """What an error of a recipe says; of a mistyped key without all the others."""
    while error.args and isinstance(error.args[0], BaseException):  # as ml_collections raises them
        error = error.args[0]
    # A KeyError's own text is in quotes.
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    text = " ".join(re.sub(r"(?s) Other fields present: .*?(?=\nDid you|\Z)", "", text).split("\n"))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the command line; what is wrong with it is one line, not a stack of calls."""
    try:
        if {"-h", "--help", "--helpfull"} & set(argv):
            return flags.FLAGS(argv)
        defaults = load_defaults(argv[1:])
        refuse_unknown_keys(argv[1:], defaults)
        refuse_given_twice(argv[1:], defaults)
        remaining = flags.FLAGS(argv)
        refuse_wrong_elements(_CONFIG.value, defaults)
        if len(remaining) > 1:
            raise flags.Error(f"unexpected arguments: {' '.join(remaining[1:])}")
        if not _WORKDIR.value:
            raise flags.Error("--workdir is missing: a folder for the run")
        return remaining
    except (SyntaxError, ImportError) as error:
        sys.exit(f"train.py: --config: {error}")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")


def main(argv: list[str]) -> None:
    del argv
    # Libraries tell their whole story at INFO; what a run has to say it prints.
    logging.set_verbosity(logging.WARNING)
    with interrupt.one_line("train.py"):
        train()


def train() -> None:
    """Trains and prints the last line; ends the program with one message where it cannot."""
    asked = preemption.Preemption()
    try:
        asked.listen()  # while importing, too
        from yolos_jax import launch, trainer
        from yolos_jax.programs import Programs

        summary = trainer.train(
            _CONFIG.value,
            _WORKDIR.value,
            changeable_on_resume=common.CHANGEABLE_ON_RESUME,
            defaults=common.get_config().to_dict(),
            preemption=asked,
        )
    except (Exception, preemption.Stopped) as error:
        # Where C code imports Python's, a request to stop comes out as another error.
        if isinstance(error, preemption.Stopped) or asked.early:
            reason = error if isinstance(error, preemption.Stopped) else "asked to stop"
            message = f"train.py: {reason}, before the first step; nothing to save"
            preemption.leave(message, _CONFIG.value.mesh.stopped_code)
        fail(error)
    except KeyboardInterrupt:  # the second request to stop, or one to several processes
        from yolos_jax import launch

        launch.interrupted("train.py")
        raise
    if launch.is_first():
        print(json.dumps(summary))
    code = 0 if summary["finished"] else _CONFIG.value.mesh.stopped_code
    if Programs.abandoned:
        launch.finish(code)
    if code:
        sys.exit(code)


def fail(error: Exception) -> None:
    """Ends the program with one line; raises what nobody expected."""
    try:
        from yolos_jax import launch
        from yolos_jax.programs import Programs, no_room
    except ImportError:  # what they need is not installed
        sys.exit(f"train.py: {error}")
    if isinstance(error, ValueError | ImportError):
        (launch.end if Programs.abandoned else launch.fail)(f"train.py: {error}")
    if isinstance(error, OSError):
        # A thread that was writing a checkpoint may never end: it is not waited for.
        launch.end(f"train.py: {error}")
    if not (what := no_room(error)):
        raise error
    launch.end(
        f"train.py: out of memory; more microbatches, model.remat='full', a smaller batch_size "
        f"or (with several devices) mesh.fsdp need less: {what}"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
