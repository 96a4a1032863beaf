"""Shared by all commands: their flags and how they run."""

import ast
import os
import runpy
import signal
import sys
import textwrap
import traceback
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from aoe_jax import program
from aoe_jax.config.checks import misfit, require, require_flag
from aoe_jax.errors import Stopped, Terminated, UserError, shown
from aoe_jax.storage import retry
from aoe_jax.storage.paths import local_file, parsed_path

FLAGS = flags.FLAGS
flags.DEFINE_bool("debug", False, "show the traceback of a user's mistake")
flags.DEFINE_float(
    "retry_seconds",
    60.0,
    "seconds for which reads and writes are repeated when a disk or the network fails",
    lower_bound=0,
    upper_bound=10**6,
)
flags.DEFINE_bool("help", False, "show this help", short_name="h")
flags.disclaim_key_flags()  # flags that functions here define belong to their callers

_EXAMPLE = "configs/tiny.py of the repository"
_NO_CONFIG = f"--config is missing; name a Python file with get_config(), such as {_EXAMPLE}"
_HELP_WIDTH = 100  # columns, like those of the docstrings
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "numbers, such as (0, 2)",
}


class _FieldParser(flags.ArgumentParser):
    """Parses values of a field of one kind, or None where `has_none`."""

    def __init__(self, kind, has_none):
        self.kind, self.has_none = kind, has_none

    def parse(self, argument):
        if self.has_none and argument == "None":
            return None
        if self.kind is not tuple:
            return self.kind(argument)
        try:
            return tuple(ast.literal_eval(f"[{argument.strip('()[]')}]"))
        except (SyntaxError, RecursionError, MemoryError) as e:
            raise ValueError(e) from e

    def flag_type(self):
        return self.kind.__name__


def define_config_flag():
    """Defines `--config`, and `--config.GROUP.FIELD=VALUE` of every field."""
    from aoe_jax.config.run import field_types  # imports JAX

    for group, fields in field_types().items():
        for field, (kind, *others) in fields.items():
            name = f"config.{group}.{field}"
            if kind is bool:
                flags.DEFINE_bool(name, None, "")
            else:
                flags.DEFINE(_FieldParser(kind, type(None) in others), name, None, "")
    about = (
        "FILE.py, FILE.py:VARIANT or the config.json of a run; --config.GROUP.FIELD=VALUE changes "
        f"a field, such as --config.train.steps=2000; the groups are {', '.join(field_types())}"
    )
    return flags.DEFINE_string("config", None, about)


def define_mesh_flag():
    """Defines `--mesh` for commands that use a trained model; see `evaluation.models.mesh_axes`."""
    about = "such as fsdp=4,expert=2; default: that of the run, else the whole model on each device"
    return flags.DEFINE_string("mesh", None, f"devices along axes of the mesh, {about}")


def parsed_config(flag, default=None):
    """The checked `Config` of `--config`, or of the file `default`, and `--config.GROUP.FIELD`."""
    from aoe_jax.config.run import Config
    from aoe_jax.methods import LAYERS

    has_default = default and Path(default).exists()
    if not flag.value and not has_default:
        raise UserError(_NO_CONFIG)
    groups, routing = _read_config(flag.value or default), {}
    for name in FLAGS:
        if name.startswith("config.") and FLAGS[name].present:
            _, group, field = name.split(".")
            values = routing if group == "routing" else groups.setdefault(group, {})
            values[field] = FLAGS[name].value
    if routing:  # fields of the router in the file, or of another one that `routing.name` chooses
        kind, of_file = groups.get("experts", {}).get("kind"), groups.get("routing", {})
        default = kind if kind in LAYERS else "top_k"
        name = routing.get("name", kind if kind in LAYERS else of_file.get("name", default))
        wanted = f"leave it out, because experts.kind={kind!r} has no router"
        require(kind not in LAYERS or name == kind, "routing.name", name, wanted)
        kept = of_file if of_file.get("name", default) == name else {}
        groups["routing"] = kept | routing | {"name": name}
    return Config.from_config_dict(groups)


def _read_config(name):
    """`{group: {field: value}}` of `FILE.py`, `FILE.py:VARIANT` or the `config.json` of a run."""
    scheme, slashes, rest = name.rpartition("://")
    file, _, variant = rest.partition(":")
    file = local_file(parsed_path(f"{scheme}{slashes}{file}", "--config", in_store=True))
    if file.suffix == ".json" and not variant:
        from aoe_jax.training.run_folder import read_run_config  # imports JAX

        return read_run_config(file).to_dict()
    config = call_in_file(f"--config={name}", file, "get_config", *filter(None, [variant]))
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={name}: get_config() must return a ConfigDict; start from default_config()"
        )
    for group, values in config.items():
        wanted = "must be a group of fields; start from default_config()"
        require(isinstance(values, ConfigDict), group, values, wanted)
    return config.to_dict()


def call_in_file(flag, file, function, *args):
    """The result of a function in a Python file that the user has written. Raises `UserError`,
    whose message begins with `flag`, such as `--config=FILE`, if the file or the function is
    missing, or the function raises an exception.
    """
    if not Path(file).is_file():
        example = _EXAMPLE if function == "get_config" else "configs/compare/tiny.py"
        wanted = f"name a Python file with {function}(), such as {example}"
        raise UserError(f"{flag}: cannot be read (no such file); {wanted}")
    if os.getcwd() not in sys.path:  # `python -m` adds it, console scripts do not
        sys.path.append(os.getcwd())
    try:
        found = runpy.run_path(str(file))
        if function not in found:
            raise UserError(f"{flag}: has no function {function}()")
        return found[function](*args)
    except UserError:
        raise
    except SystemExit as e:
        raise UserError(f"{flag}: {function}() called sys.exit({e.code!r})") from e
    except Exception as e:  # the file is code, which can raise anything
        text = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == str(file)]
        line = f" (line {frames[-1].lineno} of {file})" if frames else ""
        raise UserError(f"{flag}: {text}{line}") from e


def required(flag):
    """The value of a flag that must be given."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing; name {FLAGS[flag.name].help}")
    return flag.value


def path_of(flag, in_store=False):
    """The path of a flag that must be given; see `parsed_path`."""
    return parsed_path(required(flag), f"--{flag.name}", in_store)


def refuse(wanted, *unused):
    """Refuses unused flags that are on the command line; `wanted` says what they belong to."""
    for flag in unused:
        require_flag(not flag.present, flag.name, flag.value, wanted)


def file_to_write(flag):
    """The path of a flag for a file that is written at the end, or None. Raises `UserError` now if
    there is no folder for it.
    """
    if not flag.value:
        return None
    path = path_of(flag)
    require_flag(not path.is_dir(), flag.name, path, "is a folder; name a file")
    require_flag(path.parent.is_dir(), flag.name, path, f"there is no folder {path.parent}")
    return path


def refuse_empty(*of):
    """Refuses flags that are on the command line without a value."""
    for flag in of:
        if flag.present and not flag.value:
            raise UserError(f"--{flag.name}= names nothing; see --help")


def run(main):
    """Parses the command line, sets up logging, calls `main()`, and ends the program: with what it
    returns, or by `program.end_early`.
    """
    program.open_standard_files()
    # After a mistake on the command line, FLAGS.debug is not parsed.
    debug = not {"--debug", "--debug=true", "-debug", "-debug=true"}.isdisjoint(sys.argv[1:])
    try:
        signal.signal(signal.SIGTERM, _terminate)
        _parse(sys.argv)
        if FLAGS.help:
            print(_help(main.__module__))
            sys.exit(0)
        program.set_up_logging(debug)
        retry.retry_seconds = FLAGS.retry_seconds
        _check_working_directory()
        status = main()
        if problem := program.flush_stdout():
            raise problem
    except (Exception, Stopped, KeyboardInterrupt) as e:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        program.end_early(e, debug)
    program.end(status or 0)


def _terminate(number, frame):
    signal.signal(number, signal.SIG_IGN)  # often a second one follows, which must not stop the end
    raise Terminated("terminated")


def _check_working_directory():
    try:
        os.getcwd()
    except FileNotFoundError as e:
        raise UserError("the working directory has been deleted; change to another one") from e


def _parse(argv):
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        arguments = FLAGS(argv)
    except flags.Error as e:
        raise UserError(_flag_mistake(e)) from e
    for name in FLAGS:
        value = FLAGS[name].value
        for part in value if isinstance(value, list) else [value]:
            is_name = name == "input"  # file names need not be UTF-8
            require_flag(is_name or not misfit(part), name, shown(part), misfit(part))
    if arguments[1:]:
        raise UserError(f"unexpected argument {arguments[1]!r}; flags look like --name=value")


def _help(module):
    """The docstring of a command and its flags, without `--config.GROUP.FIELD`."""
    of_modules = FLAGS.flags_by_module_dict()
    name = sys.argv[0] if module == "__main__" else module  # absl's name of the module
    groups = {"flags": of_modules.get(name, [])}
    if "distributed" in vars(sys.modules[module]):
        groups["several processes"] = of_modules["aoe_jax.distributed"]
    groups["all commands"] = of_modules[__name__]
    parts = [sys.modules[module].__doc__.strip()]
    for title, found in groups.items():
        lines = [_flag_help(flag) for flag in found if not flag.name.startswith("config.")]
        parts += ["\n".join([f"{title}:", *lines])] if lines else []
    return "\n\n".join(parts)


def _flag_help(flag):
    if flag.boolean:
        usage = f"--[no]{flag.name}" if flag.default else f"--{flag.name}"
    else:
        usage = f"--{flag.name}=..."
    has_default = flag.default is not False and flag.default not in (None, "", [], [""])
    default = f" (default: {flag.default_as_str.strip(chr(39))})" if has_default else ""
    return textwrap.fill(
        f"{' '.join(flag.help.split())}{default}",
        _HELP_WIDTH,
        initial_indent=f"  {usage:<20} ",
        subsequent_indent=" " * 23,
        break_on_hyphens=False,
    )


def _flag_mistake(error):
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith("config."):
            if "config" in FLAGS:
                _refuse_field(*error.flagname.split(".")[1:])
            return _NO_CONFIG
        _, _, suggestion = text.partition(". ")
        return f"--{error.flagname} is no flag; --help lists them. {suggestion}".removesuffix(". ")
    if isinstance(error, flags.IllegalFlagValueError) and text.startswith("flag --"):
        name, _, value = text.removeprefix("flag --").split(": ", 1)[0].partition("=")
        kind = FLAGS[name].flag_type() if name in FLAGS else ""
        if kind in _TYPES:
            parser = FLAGS[name].parser
            lowest, highest = (getattr(parser, f"{end}_bound", None) for end in ("lower", "upper"))
            bound = "" if lowest is None else f", {lowest} or greater"
            bound = bound if highest is None else f" from {lowest} to {highest}"
            none = " or None" if getattr(parser, "has_none", False) else ""
            return f"--{name}={value}: must be {_TYPES[kind]}{bound}{none}"
    return text[:400]


def _refuse_field(group, *fields):
    from aoe_jax.config.run import RENAMED, Config, field_types

    field = ".".join(fields) or "FIELD"
    if group == "routing" and f"routing.{field}" not in RENAMED:
        known = ", ".join(field_types()["routing"])
        raise UserError(f"config.routing.{field} is unknown; fields of routers are {known}")
    Config.from_config_dict({group: {field: None}})
