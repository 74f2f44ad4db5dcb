"""The command line of sleb-serve. Only this package prints."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence

from sleb_serve import __version__
from sleb_serve.cli import (
    bench,
    convert,
    evaluate,
    heal,
    inspect,
    plan,
    publish,
    select,
    serve,
    study,
    watch,
)
from sleb_serve.cli.arguments import Parser
from sleb_serve.cli.signals import StoppedError, ended_by_signals
from sleb_serve.errors import SlebError
from sleb_serve.utils.extras import extras_named
from sleb_serve.utils.terminal import one_line

COMMANDS = (
    *select.COMMANDS,
    *heal.COMMANDS,
    *inspect.COMMANDS,
    *plan.COMMANDS,
    *evaluate.COMMANDS,
    *watch.COMMANDS,
    *convert.COMMANDS,
    *publish.COMMANDS,
    *bench.COMMANDS,
    *study.COMMANDS,
)
_LM_EVAL = "run lm-eval's own command line; --model sleb takes manifest=M.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 if the answer is no; 2 for an error; 130 after Ctrl-C; 128 plus the
        signal number for another signal.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a bar must still show the table.
            stream.reconfigure(errors="replace")
    parser, serve_parser = parsers()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with ended_by_signals(), extras_named(next(iter(arguments), "sleb-serve")):
            return _run(parser, serve_parser, arguments)
    except SlebError as error:
        print(f"sleb-serve: error: {one_line(as_options(str(error), parser))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader closed the pipe; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # Other libraries also hit full disks and missing folders.
        print(f"sleb-serve: error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except MemoryError:
        print("sleb-serve: error: out of memory; ask for less at a time", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sleb-serve: interrupted{_hint(parser, arguments)}", file=sys.stderr)
        return 130
    except StoppedError as error:
        print(f"sleb-serve: {error}{_hint(parser, arguments)}", file=sys.stderr)
        return error.code


def _hint(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """Return how to resume an interrupted command, if it can be resumed."""
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    command = commands.choices.get(next(iter(arguments), ""))
    resumes = command is not None and "--resume" in command._option_string_actions
    return "; re-run with --resume to continue" if resumes else ""


def _run(
    parser: argparse.ArgumentParser,
    serve_parser: argparse.ArgumentParser,
    arguments: Sequence[str],
) -> int:
    _check(arguments)
    if arguments[:1] == ["serve"]:
        return serve.run_serve(serve_parser, arguments[1:])
    if arguments[:1] == ["lm-eval"]:
        from sleb_serve.evaluation.lm_eval import run

        run(arguments[1:])
        return 0
    options = parser.parse_args(arguments)
    command = next(command for command in COMMANDS if command.name == options.command)
    return command.run(options)


@functools.cache
def parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the main parser and the parser of `serve`, which passes other options to vLLM."""
    parser = Parser(
        prog="sleb-serve",
        description="Find the transformer blocks an LLM can do without, serve it without them in "
        "vLLM, measure the gain.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, examples: str | None) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    for command in COMMANDS:
        command.add(add(command.name, command.help, command.examples))
    serve_parser = add("serve", serve.HELP, serve.EXAMPLES)
    serve.add_serve(serve_parser)
    commands.add_parser("lm-eval", help=_LM_EVAL, add_help=False)
    return parser, serve_parser


def _check(arguments: Sequence[str]) -> None:
    """Refuse arguments that would cause a traceback in argparse or the file system."""
    for argument in arguments:
        if re.fullmatch(r"-[^=]*=--", argument, re.DOTALL):
            raise SlebError(f"{argument}: give a value behind the =")
        for c in argument:
            if "\ud800" <= c <= "\udfff" or c == "\x00":
                # Do not repeat the argument: a URL may contain a password.
                raise SlebError(f"an argument contains {c}, which is not valid text; remove it")


def as_options(message: str, parser: argparse.ArgumentParser) -> str:
    """Translate a library error into command-line terms.

    The library writes its parameters as ``name=value`` or in backticks; this turns them into
    options.
    """
    flags = dict(_flags(parser))

    def flag(name: str) -> str | None:
        return flags.get(name) or flags.get(f"{name}_")

    def given(match: re.Match[str]) -> str:
        found = flag(match[1])
        return match[0] if found is None else f"{found} "

    def named(match: re.Match[str]) -> str:
        return flag(match[1]) or match[0]

    return re.sub(r"`([a-z_]+)`", named, re.sub(r"(?<![\w{\"'-])([a-z_]+)=(?=\S)", given, message))


def _flags(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield each parameter with its option."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                yield from _flags(nested)
        elif action.option_strings:
            yield action.dest, max(action.option_strings, key=len)
