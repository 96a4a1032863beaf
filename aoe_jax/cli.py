"""Shared by all commands: flags, logging to stderr, and how a program ends."""

import ast
import atexit
import contextlib
import logging
import os
import runpy
import signal
import sys
import textwrap
import threading
import traceback
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from aoe_jax import faults
from aoe_jax.config.checks import misfit, require, require_flag
from aoe_jax.errors import Failure, Interrupted, MachineFault, Stopped, UserError, shown
from aoe_jax.paths import local_file, parsed_path

log = logging.getLogger(__name__)

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
_BROKEN_PIPE = 128 + signal.SIGPIPE  # like programs that the signal ends
_NOTES_OF_JAX = ("---", "For simplicity")
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "numbers, such as (0, 2)",
}


class Forgiving:
    """A file that drops what cannot be written: a disk that is full of a log ends no command."""

    def __init__(self, file):
        """Writes to `file`, such as stderr."""
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, text):
        """Writes a text if possible."""
        with contextlib.suppress(OSError, ValueError):
            self._file.write(text)

    def flush(self):
        """Flushes if possible."""
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()


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
        from aoe_jax.training.workdir import read_run_config  # imports JAX

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
    """Parses the command line, sets up logging, calls `main()` and exits with what it returns.

    The last line on stderr says why the program ended early: a `Failure` with its exit status, a
    device without enough memory (2), a fault of a disk, a network or memory (5), a request to stop
    (`Stopped`), a pipe that nobody reads (141), or any other exception (1), whose traceback comes
    before.
    """
    _open_standard_files()
    # After a mistake on the command line, FLAGS.debug is not parsed.
    debug = not {"--debug", "--debug=true", "-debug", "-debug=true"}.isdisjoint(sys.argv[1:])
    try:
        _parse(sys.argv)
        if FLAGS.help:
            print(_help(main.__module__))
            sys.exit(0)
        _set_up_logging()
        faults.retry_seconds = FLAGS.retry_seconds
        _check_working_directory()
        if not debug:
            _hide_background_errors()
        status = main()
        if problem := _flush_stdout():
            raise problem
    except Failure as e:
        if debug:
            traceback.print_exc()
        _end_at_once(e.status, f"error: {e}{_notes(e) if isinstance(e, MachineFault) else ''}")
    except Stopped as e:
        if e.others_go_on:
            _end_at_once(e.status, str(e))
        print(e, file=sys.stderr, flush=True)
        status = e.status
    except KeyboardInterrupt:
        _end_at_once(Interrupted.status, "interrupted")
    except BrokenPipeError:
        _end_at_once(_BROKEN_PIPE, "error: nobody reads the output any more")
    except Exception as e:
        status, first_line = faults.status_of(e), (str(e).strip().splitlines() or [""])[0][:300]
        if faults.fills_device(e):
            last_line = f"error: {_device_is_full(e)}"
        elif faults.lacks_credentials(e):
            wanted = "log in to the object store on this machine"
            last_line = f"error: {faults.reason(e)}; {wanted}"
        elif status == MachineFault.status:
            reason = faults.reason(e)
            why = first_line if reason in first_line else f"{first_line} ({reason})"
            last_line = f"error: {why if first_line else reason}{_notes(e)}"
        else:
            last_line = f"failed: {type(e).__name__}: {first_line}{_notes(e)}"
        of_system = isinstance(e, OSError | MemoryError) or faults.is_of_network(e)
        is_foreseen = status == UserError.status or (status == MachineFault.status and of_system)
        if debug or not is_foreseen:
            traceback.print_exc()
        _end_at_once(status, last_line)
    _end(status or 0)


def print_if_possible(text):
    """Prints a text; only logs a warning if that fails, because the command has done its work."""
    try:
        print(text, flush=True)
    except OSError as e:
        _flush_stdout()
        log.warning(f"the result cannot be printed ({faults.reason(e)})")


def _open_standard_files():
    """Opens standard files that are closed, because other files would get their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)  # child processes need them too
    os.close(number)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = Forgiving(sys.stderr or open(2, "w", closefd=False))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")


def _check_working_directory():
    try:
        os.getcwd()
    except FileNotFoundError as e:
        raise UserError("the working directory has been deleted; change to another one") from e


def _flush_stdout():
    """Flushes stdout; returns the error if it cannot be written, and drops the rest."""
    try:
        sys.stdout.flush()
    except OSError as e:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return e
    return None


def _notes(error):
    # JAX adds notes about its traceback to the exceptions of functions that it calls.
    firsts = [note.partition("\n")[0] for note in getattr(error, "__notes__", [])]
    return "".join(f"; {first}" for first in firsts if not first.startswith(_NOTES_OF_JAX))


def _device_is_full(error):
    """Says which fields or flags of this command need less memory."""
    if "config" in FLAGS:
        cure = (
            "raise train.accumulate, lower train.batch_size, set model.remat='layer', or split the "
            "model by mesh.fsdp; python -m aoe_jax.plan computes what fits"
        )
    else:
        cure = "split the model over more devices, such as --mesh=fsdp=4, or give it less at a time"
    return f"the memory of a device is exhausted ({faults.reason(error)}); {cure}"


def _end(status):
    # Like sys.exit without the interpreter's end: before Python 3.14, a thread of a C++ library
    # that asks for Python meanwhile aborts the process.
    try:  # a signal changes no status, as with sys.exit
        with contextlib.suppress(BaseException):
            threading._shutdown()
        atexit._run_exitfuncs()
        sys.stderr.flush()
        _flush_stdout()
    finally:
        os._exit(status)


def _end_at_once(status, last_line):
    # Unlike sys.exit, this gives threads in the background no time to print tracebacks.
    print(last_line, file=sys.stderr, flush=True)
    _flush_stdout()
    os._exit(status)


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
