"""What every command line shares: flags, logging to stderr, and how a program ends."""

import ast
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

from aoe_jax.config.checks import require
from aoe_jax.errors import DivergedError, Interrupted, Stopped, UserError

FLAGS = flags.FLAGS
flags.DEFINE_bool("debug", False, "Show the traceback of a user's mistake.")

_ROUTING = re.compile(r"--?(no)?config\.routing\.(\w+)(?:=(.*))?", re.DOTALL)
_NO_CONFIG = "--config is missing; name a configuration file, such as --config=configs/tiny.py"
_WORDS = ("true", "false", "none")
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def define_config_flag():
    """Defines `--config=FILE.py[:VARIANT]` with overrides `--config.GROUP.FIELD=VALUE`."""
    return config_flags.DEFINE_config_file(
        "config", None, "Configuration file, FILE.py or FILE.py:VARIANT."
    )


def define_mesh_flag():
    """Defines `--mesh` for commands that use a trained model; see `evaluation.models.mesh_axes`."""
    return flags.DEFINE_string(
        "mesh",
        None,
        "devices along axes of the mesh, such as fsdp=4,expert=2; by default as in training, or "
        "the whole model on each",
    )


def parsed_config(flag):
    """The checked `Config` of a config flag."""
    from aoe_jax.config.run import Config  # imports JAX

    known = {group.name for group in dataclasses.fields(Config)}
    if flag.value is None and not FLAGS["config"].present:
        raise UserError(_NO_CONFIG)
    file = FLAGS["config"].config_filename
    try:
        groups = dict(flag.value)
    except OSError as e:  # ml_collections reports a missing file only here
        raise UserError(f"--config={file}: {_config_mistake(e)}") from e
    except (TypeError, ValueError) as e:
        raise UserError(
            f"--config={file}: get_config() must return a ConfigDict; start from default_config()"
        ) from e
    for name, values in groups.items():
        if name in known and not isinstance(values, Mapping | ConfigDict):
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

    The last line on stderr says why the program ended early: a mistake of the user (`UserError`,
    exit status 2), training that diverged (`DivergedError`, 4), a request to stop (`Stopped`), or
    any other exception (1), whose traceback comes before.
    """
    # A mistake on the command line itself leaves FLAGS.debug unparsed.
    debug = not {"--debug", "--debug=true", "-debug", "-debug=true"}.isdisjoint(sys.argv[1:])
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
        first_line = (str(e).strip().splitlines() or [""])[0][:300]
        notes = "".join(f"; {note}" for note in getattr(e, "__notes__", []))
        _end_at_once(1, f"failed: {type(e).__name__}: {first_line}{notes}")
    sys.exit(status)


def _end_at_once(status, last_line):
    # Unlike sys.exit, this gives threads in the background no time to print tracebacks.
    print(last_line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def _parse(argv):
    app.define_help_flags()
    absl_logging.set_verbosity(absl_logging.ERROR)
    for module, found in FLAGS.flags_by_module_dict().items():
        if not module.startswith("absl."):
            for flag in found:  # --help lists the key flags of the main module only
                FLAGS.register_key_flag_for_module(argv[0], flag)
    _check_override_names(argv)
    routing = _taken_routing(argv)
    try:
        arguments = FLAGS(argv)
        if routing:
            if "config" not in FLAGS or not FLAGS["config"].present:
                raise UserError(_NO_CONFIG)
            _set_routing(FLAGS.config, routing)
    except UserError:
        raise
    except SystemExit as e:
        help_flag = r"--?help(full|short|xml)?(=true)?"
        if any(re.fullmatch(help_flag, argument) for argument in argv[1:]):
            raise SystemExit(0) from None  # absl ends --help with status 1
        raise UserError(
            f"--config={_value_of('config', argv)}: get_config() called sys.exit({e.code!r})"
        ) from e
    except flags.Error as e:
        raise UserError(_flag_mistake(e)) from e
    except Exception as e:  # a configuration file is code, which can raise anything
        raise UserError(f"--config={_value_of('config', argv)}: {_config_mistake(e)}") from e
    return arguments


def _taken_routing(argv):
    """Takes `--config.routing.FIELD=VALUE` out of a command line: `{field: value}`.

    ml_collections knows the fields of the router in the configuration file, and not those of the
    router that `--config.routing.name` chooses.
    """
    found = {}
    for argument in [a for a in argv[1:] if _ROUTING.fullmatch(a)]:
        no, field, value = _ROUTING.fullmatch(argument).groups()
        if value is None:
            value = "false" if no else "true"
        try:
            found[field] = ast.literal_eval(value.capitalize() if value in _WORDS else value)
        except (SyntaxError, ValueError):
            found[field] = value
        argv.remove(argument)
    return found


def _set_routing(config, values):
    """Changes the group `routing`: fields of its router, or of another one that `name` chooses."""
    from aoe_jax.config.run import ROUTED_KINDS, routing_dict  # imports JAX

    kind = config.experts.kind
    name = values.pop("name", config.routing.name if kind in ROUTED_KINDS else kind)
    if kind not in ROUTED_KINDS:
        wanted = f"leave it out, because experts.kind={kind!r} has no router"
        require(name == kind, "routing.name", name, wanted)
    kept = dict(config.routing) if name == config.routing.name else {}
    with config.unlocked():
        config.routing = routing_dict(**kept | {"name": name} | values)


def _check_override_names(argv):
    # ml_collections would name neither the flag nor the known fields.
    found = (argument.split("=", 1)[0] for argument in argv[1:])
    overrides = [flag for flag in found if re.match(r"--?(no)?config\.", flag)]
    if not overrides:
        return
    from aoe_jax.config.run import RENAMED, Config  # imports JAX

    groups = {group.name: group.type for group in dataclasses.fields(Config)}
    for flag in overrides:
        group, _, field = flag.split(".", 1)[1].partition(".")
        if group in RENAMED:
            raise UserError(f"config.{group} is gone; set config.{RENAMED[group]}")
        if group not in groups:
            raise UserError(f"config.{group} is unknown; known are {', '.join(groups)}")
        if f"{group}.{field}" in RENAMED:
            raise UserError(
                f"config.{group}.{field} is gone; set config.{RENAMED[f'{group}.{field}']}"
            )
        if group == "routing":
            continue  # its fields depend on its name
        known = [f.name for f in dataclasses.fields(groups[group])]
        if field not in known:
            known = ", ".join(known)
            raise UserError(f"config.{group}.{field or 'FIELD'} is unknown; known are {known}")


def _value_of(name, argv):
    """The value of a flag on a command line that could not be parsed."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = argument.lstrip("-").partition("=")
        if flag == name:
            return value if equals else following
    return ""


def _flag_mistake(error):
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith("config."):
            return f"--{error.flagname}: {_NO_CONFIG}"
        _, _, suggestion = text.partition(". ")
        return f"--{error.flagname} is no flag; --help lists them. {suggestion}".removesuffix(". ")
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
    """The mistake in a configuration file, with its line."""
    if isinstance(error, OSError):
        cause = error.__cause__ or error  # ml_collections wraps it
        reason = cause.strerror or "no such file"
        return f"can't be read ({reason}); name a configuration file, such as configs/tiny.py"
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return "has no function get_config()"
    cause = error.__context__ if isinstance(error, flags.Error) and error.__context__ else error
    while isinstance(cause, TypeError | ValueError) and "parsing config file" in str(cause):
        if cause.__context__ is None:
            break
        cause = cause.__context__
    text = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
    if isinstance(cause, SyntaxError):  # its text names the line
        return text
    lines = [
        line
        for line in traceback.extract_tb(cause.__traceback__)
        if "ml_collections" not in line.filename and line.filename != __file__
    ]
    return f"{text} (line {lines[-1].lineno} of {lines[-1].filename})" if lines else text


def _hide_background_errors():
    # Orbax's threads print tracebacks when a read or write fails; the failure itself is raised too.
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
