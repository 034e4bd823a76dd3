"""One dataclass per command is the only source of its flags, its YAML file and its Python arguments.

A field is made with `option(default, help)`; its annotation says what it accepts: `str`, `int`, `float`, `bool`,
`Literal[...]`, and any of these `| None`. `num_retain` in Python and YAML is `--num-retain` on the command line.
A field made with `arguments(help, metavar)` is a `tuple[str, ...]`: the words that stand on the command line without a
flag, a list of strings in Python and YAML.
"""

import argparse
import dataclasses
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

import fillm
from fillm.documents import read_yaml_document
from fillm.errors import EndedByAnother, FillmError, InterruptedRun, OutOfMemoryError, UsageError
from fillm.signals import handled

Config = TypeVar("Config")
_MOST_NAMED = 4  # unknown settings


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field of a command's dataclass: its default and the line that `--help` prints for it."""
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar})


def arguments(help: str, metavar: str) -> Any:
    """A field of a command's dataclass, a `tuple[str, ...]`: the words without a flag, none unless given."""
    return dataclasses.field(default=(), metadata={"help": help, "metavar": metavar, "positional": True})


def flag_name(field: str) -> str:
    """`num_retain` -> `--num-retain`."""
    return "--" + field.replace("_", "-")


def _unpack(annotation: Any) -> tuple[Any, bool]:
    """The type without `None`, and whether `None` was allowed."""
    if get_origin(annotation) in (Union, types.UnionType):
        kept = [a for a in get_args(annotation) if a is not type(None)]
        return kept[0], len(kept) < len(get_args(annotation))
    return annotation, False


def _convert(cls: type, name: str, value: Any) -> Any:
    """`value` as the field's type, or a `UsageError` that names the field and what it takes."""
    kind, optional = _unpack(get_type_hints(cls)[name])
    if value is None and optional:
        return None
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UsageError(f"{flag_name(name)}: {value!r} is none of {', '.join(map(str, get_args(kind)))}")
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is str:
        if isinstance(value, str):
            return value
    elif get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
            return tuple(value)
        raise UsageError(f"{name}: {value!r} is not a list of strings")
    elif kind is int and not isinstance(value, bool):
        try:
            return int(str(value))
        except ValueError:
            pass
    elif kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise UsageError(f"{flag_name(name)}: {value!r} is not of type {kind.__name__}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message} (see {self.prog} --help)")


def build_parser(cls: type, prog: str) -> argparse.ArgumentParser:
    """The command-line parser of a command's dataclass; a flag not given is absent from the result."""
    parser = _Parser(
        prog=prog,
        description=(cls.__doc__ or "").strip(),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,  # an abbreviation in somebody's script would change its meaning with the next option
    )
    parser.add_argument("--version", action="version", version=f"fillm {fillm.__version__}", help="print it and stop")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings; a run.yaml replays its run")
    parser.add_argument("--print_config", "--print-config", action="store_true", help="print the settings and stop")
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, _ = _unpack(hints[field.name])
        text = field.metadata["help"]
        if field.metadata.get("positional"):
            parser.add_argument(field.name, metavar=field.metadata["metavar"], nargs="*", help=text.replace("%", "%%"))
            continue
        if field.default is not None and field.default is not False:
            shown = repr(field.default) if "\n" in str(field.default) else field.default
            text += f" (default: {shown})"
        text = text.replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag_name(field.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else None
            metavar = field.metadata["metavar"] or choices or kind.__name__.upper()
            parser.add_argument(flag_name(field.name), metavar=metavar, help=text)
    return parser


def read_settings(path: str) -> dict[str, Any]:
    """The settings in a YAML file: the mapping itself, or the `settings` part of a run's `run.yaml`."""
    try:
        loaded = read_yaml_document(path)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"--config {path}: not YAML: {error}") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("settings"), Mapping):
        loaded = loaded["settings"]
    if not isinstance(loaded, Mapping):
        raise UsageError(f"--config {path}: expected a mapping of settings")
    return dict(loaded)


def from_mapping(cls: type[Config], settings: Mapping[str, Any], where: str = "settings") -> Config:
    """An instance of `cls` from a mapping; unknown names and wrong types are `UsageError`s that name them."""
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(settings) - known, key=str)
    if unknown:
        first, more = unknown[:_MOST_NAMED], len(unknown) - _MOST_NAMED
        others = f" and {more} more; are they another command's?" if more > 0 else ""
        raise UsageError(f"{where}: no setting is called {', '.join(map(repr, first))}{others}")
    return cls(**{name: _convert(cls, name, value) for name, value in settings.items()})


def parse(cls: type[Config], argv: Sequence[str], prog: str) -> Config | None:
    """The settings from the command line over `--config` over the defaults; `None` after `--print_config`."""
    given = vars(build_parser(cls, prog).parse_intermixed_args(list(argv)))
    path, show = given.pop("config", None), given.pop("print_config", False)
    settings = {**(read_settings(path) if path else {}), **given}
    config = from_mapping(cls, settings, where=path or "command line")
    if show:
        sys.stdout.write(to_yaml(dataclasses.asdict(config)))
        return None
    return config


def to_yaml(settings: Mapping[str, Any]) -> str:
    """YAML in the order of the mapping; what `read_settings` reads back."""
    return yaml.safe_dump(dict(settings), sort_keys=False, width=120)


def printable(text: str) -> str:
    """A text on one line, in which what would move a terminal's cursor or change its colour is written out."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return printable(str(error)) or type(error).__name__


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code that a further Ctrl-C no longer replaces by the signal's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which nothing may take for an error that can be got over: libraries do that with any `Exception`."""


@contextmanager
def _terminated_in_words() -> Iterator[None]:
    """SIGTERM outside of a pass, which notes it and saves its state first, ends the command like a Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int) -> None:
        raise _Terminated

    with handled({signal.SIGTERM: stop}):
        yield


def _interruption(cls: type, by: KeyboardInterrupt) -> InterruptedRun:
    """What an interrupted command says last."""
    how = "stopped by SIGTERM" if isinstance(by, _Terminated) else "interrupted at once"
    if "resume" in {field.name for field in dataclasses.fields(cls)}:
        return InterruptedRun(f"{how}; --resume continues from what was saved before, if any")
    return InterruptedRun(f"{how}; start it again")


@contextmanager
def _somewhere_to_write() -> Iterator[None]:
    """Started with a closed stdout or stderr, python has none: what is written there goes nowhere."""
    with ExitStack() as stack:
        for stream, redirected in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is None:
                stack.enter_context(redirected(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        yield


@_somewhere_to_write()
def run_command(cls: type[Config], main: Callable[[Config], None], argv: Sequence[str] | None, prog: str) -> int:
    """Parse, run, and turn named errors into one line on stderr and their exit code.

    Returns:
        0 done, 2 wrong use or bad input, 3 interrupted and resumable. Any other exception is a fault of ours and
        leaves with its traceback (exit code 1).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        with _terminated_in_words():
            config = parse(cls, argv, prog)
            if config is not None:
                debug = debug or bool(getattr(config, "debug", False))
                main(config)
        return 0
    except KeyboardInterrupt as stopped:
        error: FillmError = _interruption(cls, stopped)
    except EndedByAnother as ended:
        return ended.exit_code
    except MemoryError:
        error = OutOfMemoryError("out of memory; close other programs, or give it less to do at once")
    except FillmError as caught:
        error = caught
    if debug:
        traceback.print_exception(error)
    print(f"{prog}: {one_line(error)}", file=sys.stderr)
    return error.exit_code
