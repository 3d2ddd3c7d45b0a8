"""Running binaries: the command line, its help, errors in one line, exit codes.

A binary has `define_flags(values)` and `main(values)` and ends with `common.run(define_flags, main)` under its
`__main__` guard. Flags come into being there only; importing a binary defines none, so tests and other code can call
`main(parse(define_flags, [...]))` in their own process.
"""

import inspect
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging

from experiments.shared import flag_groups

_BAD_INPUT, _INTERRUPTED = 2, 130


def parse(
    define_flags: Callable[[flags.FlagValues], None], arguments: Sequence[str]
) -> flags.FlagValues:
    """Flag values of a binary for a list of arguments, apart from the process's own flags."""
    values = flags.FlagValues()
    define_flags(values)
    rest = values(["binary", *arguments])[1:]
    if rest:
        raise flags.Error(_unexpected(rest))
    return values


def guarded(main: Callable[[flags.FlagValues], None], values: flags.FlagValues) -> int:
    """Runs `main`; bad input becomes one line on stderr. Returns the exit code."""
    try:
        main(values)
    except Exception as error:
        if not _is_bad_input(error):
            raise
        return _refused(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def run(
    define_flags: Callable[[flags.FlagValues], None], main: Callable[[flags.FlagValues], None]
) -> None:
    """Runs a binary with the process's command line; does not return."""
    theirs = set(flags.FLAGS)
    define_flags(flags.FLAGS)
    own = set(flags.FLAGS) - theirs
    # absl would raise the default to INFO; --verbosity=0 still does.
    absl_logging.set_verbosity(absl_logging.WARNING)

    def parse_or_exit(argv: list[str]) -> list[str]:
        text = lambda: flag_groups.help_text(flags.FLAGS, own, inspect.getmodule(main))
        # absl has defined its own by now.
        for name, short in (("help", "h"), ("helpshort", "?")):
            flags.DEFINE_flag(_Help(name, short, text))
        try:
            rest = flags.FLAGS(argv)[1:]
            if rest:
                raise flags.Error(_unexpected(rest))
        except flags.Error as error:
            message = str(error).rstrip(".")
            sys.exit(_refused(f"{message}; --help lists the flags"))
        return argv[:1]

    app.run(lambda argv: guarded(main, flags.FLAGS), flags_parser=parse_or_exit)


class _Help(flags.BooleanFlag):
    """Prints a text and ends the process where the flag is given; takes the place of absl's flag of that name."""

    def __init__(self, name: str, short_name: str, text: Callable[[], str]):
        super().__init__(name, False, "show this help", short_name, allow_override=True)
        self._text = text

    def parse(self, argument) -> None:
        if self._parse(argument):
            print(self._text())
            sys.exit(0)


def _is_bad_input(error: Exception) -> bool:
    """Whether it is an OSError or a SpecjaxError; by name, so that a binary can do without JAX, which that brings."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return isinstance(error, OSError) or "specjax.errors.SpecjaxError" in kinds


def _unexpected(arguments: Sequence[str]) -> str:
    return f"unexpected argument {arguments[0]!r}; flags are --name=value"


def _refused(error: object) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return _BAD_INPUT
