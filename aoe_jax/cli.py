"""The code that all commands share: parsing flags, running `main`, and the exit status."""

import ast
import atexit
import contextlib
import functools
import logging
import os
import re
import signal
import sys
import threading
import traceback

from absl import flags
from absl import logging as absl_logging

from aoe_jax.config.checks import did_you_mean, misfit, require, require_flag
from aoe_jax.errors import Failure, Interrupted, MachineFault, Stopped, Terminated, UserError, shown
from aoe_jax.storage import retry
from aoe_jax.storage.paths import parsed_path

FLAGS = flags.FLAGS
flags.DEFINE_bool("debug", False, "show the traceback of every error")
flags.DEFINE_float(
    "retry_seconds",
    60.0,
    "seconds for which reads and writes are repeated when a disk or the network fails",
    lower_bound=0,
    upper_bound=10**6,
)
flags.DEFINE_bool("help", False, "show this help", short_name="h")
flags.disclaim_key_flags()  # flags that functions below define belong to the calling module

# Package -> extra of `pip install '.[EXTRA]'` that brings it.
_EXTRAS = {"wandb": "wandb", "gcsfs": "gs", "s3fs": "s3", "ray": "ray", "sklearn": "prune"}
_EXTRAS |= {"lm_eval": "eval", "datasets": "huggingface"}
_NO_CONFIG = "--config is missing; name a Python file with get_config(), or aoe_jax:tiny"
_BROKEN_PIPE = 128 + signal.SIGPIPE  # exit status that shells report after a SIGPIPE
_NOTES_OF_JAX = ("---", "For simplicity")


def _value(text, kinds):
    """Parses the text of a flag. Returns the text if that fails; `Config` then refuses it."""
    if text == "None" and type(None) in kinds:
        return None
    if str in kinds:
        return text
    with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    return text


def define_config_flag():
    """Defines `--config`, and a flag `--config.GROUP.FIELD` for every field."""
    from aoe_jax.config.run import field_types  # imported late, because it imports JAX

    types = field_types()
    # Which fields the group has depends on `routing.name`, which may be in the file.
    types["routing"] = set(re.findall(r"-config\.routing\.(\w+)", " ".join(sys.argv)))
    for group, fields in types.items():
        for field in fields:
            flags.DEFINE_string(f"config.{group}.{field}", None, "", module_name="config")
    about = (
        "FILE.py, FILE.py:VARIANT, aoe_jax:NAME, aoe_jax:NAME:VARIANT or the config.json of a run; "
        "--config.GROUP.FIELD=VALUE changes a field, such as --config.train.steps=2000; the groups "
        f"are {', '.join(types)}"
    )
    return flags.DEFINE_string("config", None, about)


def define_engine_flag():
    """Defines `--engine` for commands whose work is many independent tasks."""
    about = "where the work runs: on this machine, or on all nodes of a Ray cluster"
    return flags.DEFINE_enum("engine", "local", ["local", "ray"], about)


def define_mesh_flag():
    """Defines `--mesh` for commands that use a trained model. `evaluation.models` parses it."""
    about = "such as fsdp=4,expert=2; default: the run's mesh if it fits, else one model per device"
    return flags.DEFINE_string("mesh", None, f"devices along axes of the mesh, {about}")


def parsed_config(flag, default=None):
    """The `Config` of `--config` (else of `default`) after the changes by flags."""
    from aoe_jax.config.run import Config, field_types, types_of
    from aoe_jax.methods import LAYERS, find_method
    from aoe_jax.storage.config_files import read_config

    if not (flag.value or default):
        raise UserError(_NO_CONFIG)
    groups, routing = read_config(flag.value or default), {}
    given = [name for name in FLAGS if name.startswith("config.") and FLAGS[name].present]
    types = field_types()
    for name in given:
        _, group, field = name.split(".")
        if group == "routing":
            routing[field] = FLAGS[name].value
        else:
            fields = groups.setdefault(group, {})
            fields[field] = _value(FLAGS[name].value, types[group][field])
    if routing:  # changes the file's routing method, or selects the method `routing.name`
        kind, of_file = groups.get("experts", {}).get("kind"), groups.get("routing", {})
        has_router = kind not in LAYERS
        default = "top_k" if has_router else kind
        before = of_file.get("name", default)
        name = routing.get("name", before if has_router else kind)
        wanted = f"leave it out, because experts.kind={kind!r} has no router"
        require(has_router or name == kind, "routing.name", name, wanted)
        types = types_of(find_method(name))
        routing = {field: _value(text, types.get(field, ())) for field, text in routing.items()}
        groups["routing"] = (of_file if before == name else {}) | routing | {"name": name}
    return Config.for_training(groups)


def required(flag):
    """The value of a flag. Raises `UserError` if it is missing."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing; name {FLAGS[flag.name].help}")
    return flag.value


def path_of(flag, in_store=False):
    """The path that a flag names. Raises `UserError` if the flag is missing or the path invalid."""
    return parsed_path(required(flag), f"--{flag.name}", in_store)


def refuse(wanted, *unused):
    """Raises `UserError` if one of the flags `unused` is given. `wanted` ends the message."""
    for flag in unused:
        require_flag(not flag.present, flag.name, flag.value, wanted)


def file_to_write(flag):
    """Returns the path of a file that the command writes at its end, or None without the flag.
    Raises `UserError` if the path is a folder, or if its parent folder is missing.
    """
    if not flag.value:
        return None
    path = path_of(flag)
    require_flag(not path.is_dir(), flag.name, path, "is a folder; name a file")
    require_flag(path.parent.is_dir(), flag.name, path, f"there is no folder {path.parent}")
    return path


def refuse_empty(*of):
    """Raises `UserError` if one of the flags is on the command line with an empty value."""
    for flag in of:
        if flag.present and not flag.value:
            raise UserError(f"--{flag.name}= names nothing; see --help")


def command(main):
    """Returns the console script's function, which runs `main`. With `python -m`, also calls it."""
    script = functools.partial(run, main)
    if main.__module__ == "__main__":
        script()
    return script


def run(main):
    """Runs a command, and ends the program with its exit status."""
    ended_with = []
    # Ends with `os._exit`, because the interpreter could abort if a C++ thread calls Python during
    # the shutdown. Handlers that libraries register later run before this one.
    atexit.register(lambda: ended_with and os._exit(ended_with[0]))
    signal.signal(signal.SIGTERM, _terminate)
    status, is_orderly = execute(main, sys.argv)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not is_orderly:  # exits at once, so that background threads cannot print tracebacks
        os._exit(status)
    ended_with.append(status)
    sys.exit(status)


def _terminate(number, frame):
    signal.signal(number, signal.SIG_IGN)  # a second SIGTERM must not interrupt the clean-up
    raise Terminated("terminated")


def execute(main, argv):
    """Parses a command line, sets up logging and calls `main()`. Returns `(exit status, whether the
    interpreter may end normally)`; the second is False after a failure.

    The last line on stderr describes an exception, and its exit status is that of `_end_of`.
    `--debug` also prints its traceback.
    """
    # Reads `argv` itself, because `FLAGS.debug` is not set if another flag has a mistake.
    debug = not {"--debug", "--debug=true", "-debug", "-debug=true"}.isdisjoint(argv[1:])
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _parse(argv)
        if FLAGS.help:
            print(_help(main.__module__))
            return 0, True
        _set_up_logging(debug)
        retry.retry_seconds = FLAGS.retry_seconds
        status = main() or 0
        sys.stdout.flush()
        return status, True
    except (Exception, Stopped, KeyboardInterrupt) as e:
        status, last_line, has_traceback = _end_of(e)
        if has_traceback or (debug and isinstance(e, Exception)):
            traceback.print_exception(e)
        with contextlib.suppress(OSError):  # a closed terminal
            print(last_line, file=sys.stderr, flush=True)
        return status, isinstance(e, Stopped) and not e.others_go_on


def _set_up_logging(debug):
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("aoe_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not debug:  # hides tracebacks of Orbax: this program reports the same exceptions
        absl_logging.set_verbosity(absl_logging.FATAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
        sys.unraisablehook = _show_unraisable


def _show_unraisable(found):
    if threading.current_thread() is threading.main_thread():  # not a thread of tensorstore
        sys.__unraisablehook__(found)


def _end_of(error):
    """Returns `(exit status, last line, whether a traceback is printed)` for an exception. Statuses
    are those of a `Failure` or `Stopped`, 2 (no device memory), 5 (a fault), 141, 130, or 1.
    """
    if isinstance(error, Stopped):
        return error.status, str(error), False
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.status, "interrupted", False
    if isinstance(error, BrokenPipeError):
        return _BROKEN_PIPE, "error: nobody reads the output any more", False
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in _EXTRAS:
        wanted = f"pip install '.[{_EXTRAS[package]}]'"
        return UserError.status, f"error: the package {package} is missing; {wanted}", False
    status, reason = retry.status_of(error), retry.reason(error)
    line = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, Failure):
        notes = _notes(error) if isinstance(error, MachineFault) else ""
        return status, f"error: {error}{notes}", False
    if retry.fills_device(error):
        return status, f"error: the memory of a device is exhausted ({reason}); {_cure()}", False
    if retry.lacks_credentials(error):
        return status, f"error: {reason}; log in to the object store on this machine", False
    if status == MachineFault.status:
        line = (line if reason in line else f"{line} ({reason})") if line else reason
        of_system = isinstance(error, OSError | MemoryError) or retry.is_of_network(error)
        return status, f"error: {line}{_notes(error)}", not of_system
    return status, f"failed: {type(error).__name__}: {line}{_notes(error)}", True


def _notes(error):
    # Omits the notes about tracebacks that JAX adds to the exceptions of functions that it calls.
    firsts = [note.partition("\n")[0] for note in getattr(error, "__notes__", [])]
    return "".join(f"; {first}" for first in firsts if not first.startswith(_NOTES_OF_JAX))


def _cure():
    """Returns advice: the fields or flags of this command that reduce its memory use."""
    if "config" in FLAGS:
        return (
            "raise train.accumulate, lower train.batch_size, set model.remat='layer', or split the "
            "model by mesh.fsdp; python -m aoe_jax.plan computes what fits"
        )
    return "split the model over more devices, such as --mesh=fsdp=4, or pass less text at a time"


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
    modules = [sys.argv[0] if module == "__main__" else module]  # absl's name for `__main__`
    modules += ["aoe_jax.distributed"] if "distributed" in vars(sys.modules[module]) else []
    flags_of_modules = map(FLAGS.module_help, [*modules, __name__])
    return "\n".join([sys.modules[module].__doc__, *flags_of_modules])


def _flag_mistake(error):
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith("config."):
            if "config" in FLAGS:
                from aoe_jax.config.run import Config

                _, group, *fields = error.flagname.split(".")
                Config.from_config_dict({group: {".".join(fields) or "FIELD": None}})
            return _NO_CONFIG
        wrong, names = f"--{error.flagname}", [f"--{name}" for name in FLAGS]
        return f"{wrong} is no flag; --help lists them{did_you_mean(wrong, names)}"
    return text.removeprefix("flag ")[:400]
