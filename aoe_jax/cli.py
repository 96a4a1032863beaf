"""What every command line shares: flags, logging to stderr, and how a program ends."""

import dataclasses
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from aoe_jax.config import Config
from aoe_jax.errors import DivergedError, Interrupted, Stopped, UserError

FLAGS = flags.FLAGS
flags.DEFINE_bool("debug", False, "Show the traceback of a user's mistake.")

_GROUPS = {
    group.name: [f.name for f in dataclasses.fields(group.type)]
    for group in dataclasses.fields(Config)
}
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def define_config_flag():
    """Defines `--config=FILE.py[:VARIANT]` with overrides `--config.GROUP.FIELD=VALUE`."""
    return config_flags.DEFINE_config_file(
        "config", None, "Configuration file, FILE.py or FILE.py:VARIANT."
    )


def define_mesh_flag():
    """Defines `--mesh`, how a model that is used lies on devices; see
    `evaluation.models.mesh_axes`.
    """
    described = (
        "devices along axes of the mesh, such as fsdp=4,expert=2; by default as in training, or "
        "the whole model on each"
    )
    return flags.DEFINE_string("mesh", None, described)


def parsed_config(flag):
    """The checked `Config` of a config flag."""
    if flag.value is None and not FLAGS["config"].present:
        raise UserError(
            "--config is missing; name a configuration file, such as --config=configs/tiny.py"
        )
    file = FLAGS["config"].config_filename
    try:
        groups = dict(flag.value)
    except OSError as e:  # of a missing file; ml_collections keeps it until here
        raise UserError(f"--config={file}: {_config_mistake(e)}") from e
    except (TypeError, ValueError) as e:
        raise UserError(
            f"--config={file}: get_config() must return a ConfigDict; start from default_config()"
        ) from e
    for name, values in groups.items():
        if name in _GROUPS and not isinstance(values, Mapping | ConfigDict):
            raise UserError(
                f"config.{name}={values!r}: must be a group of fields; start from default_config()"
            )
    return Config.from_config_dict(groups)


def required(flag):
    """The value of a flag that must be given."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing; name {FLAGS[flag.name].help}")
    return flag.value


def run(main):
    """Parses the command line, sets up logging, calls `main()` and exits with what it returns.

    Whatever ends it is said in a last line on stderr: a mistake of the user's (`UserError`, status
      2), a run that can't get
    on (`DivergedError`, 4), a request to stop (`Stopped`), or an unforeseen exception (1), after
    its traceback.
    """
    debug = any(argument.lstrip("-") in ("debug", "debug=true") for argument in sys.argv[1:])
    try:
        arguments = _parse(sys.argv)
        if arguments[1:]:
            raise UserError(f"unexpected argument {arguments[1]!r}; flags look like --name=value")
        _set_up_logging()
        if not debug:
            _hide_background_errors()
        status = main()
    except (UserError, DivergedError) as e:
        if debug:
            traceback.print_exc()
        _end_at_once(e.status, f"error: {e}")
    except Stopped as e:
        if e.others_go_on:
            _end_at_once(e.status, str(e))
        print(e, file=sys.stderr, flush=True)
        status = e.status
    except KeyboardInterrupt:
        _end_at_once(Interrupted.status, "interrupted")
    except Exception as e:
        traceback.print_exc()
        notes = "".join(f"; {note}" for note in getattr(e, "__notes__", []))
        _end_at_once(
            1,
            f"failed: {type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:300]}{notes}",
        )
    sys.exit(status)


def _end_at_once(status, last_line):
    """Not by sys.exit: what still runs in the background would print tracebacks."""
    print(last_line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def _parse(argv):
    app.define_help_flags()
    absl_logging.set_verbosity(absl_logging.ERROR)
    for module, found in FLAGS.flags_by_module_dict().items():
        if not module.startswith("absl."):
            for flag in found:  # so that --help lists them, and not those of the main module alone
                FLAGS.register_key_flag_for_module(argv[0], flag)
    _check_override_names(argv)
    try:
        return FLAGS(argv)
    except UserError:
        raise
    except SystemExit as e:  # absl ends --help with status 1
        if any(
            re.fullmatch(r"--?help(full|short|xml)?(=true)?", argument) for argument in argv[1:]
        ):
            raise SystemExit(0) from None
        raise UserError(
            f"--config={_value_of('config', argv)}: get_config() called sys.exit({e.code!r})"
        ) from e
    except flags.Error as e:
        raise UserError(_flag_mistake(e)) from e
    except Exception as e:  # a configuration file is code: whatever is wrong with it shows here
        raise UserError(f"--config={_value_of('config', argv)}: {_config_mistake(e)}") from e


def _check_override_names(argv):
    """ml_collections names neither the flag nor the known fields."""
    for argument in argv[1:]:
        flag = argument.split("=", 1)[0]
        if not re.match(r"--?(no)?config\.", flag):
            continue
        group, _, field = flag.split(".", 1)[1].partition(".")
        if group not in _GROUPS:
            raise UserError(f"config.{group} is unknown; known are {', '.join(_GROUPS)}")
        if field not in _GROUPS[group]:
            raise UserError(
                f"config.{group}.{field or 'FIELD'} is unknown; known are {', '.join(_GROUPS[group])}"
            )


def _value_of(name, argv):
    """The value that the command line gives a flag which could not be parsed."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = argument.lstrip("-").partition("=")
        if flag == name:
            return value if equals else following
    return ""


def _flag_mistake(error):
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith("config."):
            return f"--{error.flagname}: --config is missing; name a configuration file, such as --config=configs/tiny.py"
        return f"--{error.flagname} is no flag; --help lists them" + (
            f". {text.split('. ', 1)[1]}" if ". " in text else ""
        )
    if isinstance(error, flags.IllegalFlagValueError) and text.startswith("flag --"):
        name, _, value = text.removeprefix("flag --").split(": ", 1)[0].partition("=")
        if name == "config":
            return f"--config={value}: {_config_mistake(error)}"
        kind = FLAGS[name].flag_type() if name in FLAGS else ""
        if kind in _TYPES:
            lowest = getattr(FLAGS[name].parser, "lower_bound", None)
            bound = "" if lowest is None else f", {lowest} or greater"
            return f"--{name}={value}: must be {_TYPES[kind]}{bound}"
    return text[:400]


def _config_mistake(error):
    """What is wrong in a configuration file, and on which line."""
    if isinstance(error, OSError):
        cause = error.__cause__ or error  # ml_collections wraps it
        return f"can't be read ({cause.strerror or 'no such file'}); name a configuration file, such as configs/tiny.py"
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return "has no function get_config()"
    cause = error.__context__ if isinstance(error, flags.Error) and error.__context__ else error
    while (
        isinstance(cause, TypeError | ValueError)
        and "parsing config file" in str(cause)
        and cause.__context__
    ):
        cause = cause.__context__
    text = " ".join(str(cause).split())[:300]
    lines = [] if isinstance(cause, SyntaxError) else traceback.extract_tb(cause.__traceback__)
    lines = [
        line
        for line in lines
        if "ml_collections" not in line.filename and line.filename != __file__
    ]
    where = f" (line {lines[-1].lineno} of {lines[-1].filename})" if lines else ""
    return f"{type(cause).__name__}: {text}{where}"


def _hide_background_errors():
    """Hides what Orbax's threads print when a read or write has failed; the failure itself is
    raised and reported.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)

    def hook(kind, error, trace):
        if str(error) != "Event loop is closed":
            sys.__excepthook__(kind, error, trace)

    def unraisable_hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.excepthook, sys.unraisablehook = hook, unraisable_hook


def _set_up_logging():
    absl_logging.use_absl_handler()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("aoe_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
