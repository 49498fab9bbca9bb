"""The `vatt` command: argument handling and nothing else. What the commands are stands in `commands`.

Exit codes: 0 success; 1 failed; 2 bad usage or bad input; 75 interrupted, saved and resumable; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from vatt.engine.commands import BAD_INPUT, COMMANDS, FAILED, GROUPS, UsageError

INTERRUPTED = 130
EXIT_CODES = """exit codes: 0 success, 1 failed, 2 bad usage or input,
75 interrupted and saved (the same command resumes), 130 interrupted"""

# ---- the parser ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see: {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "vatt",
        description="Train VATT: video, audio and text Transformers, from raw clips.",
        epilog=EXIT_CODES + "\n`vatt COMMAND --help` shows an example of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # DeepSpeed's launcher puts this before the command; the rank itself is read from LOCAL_RANK, which it sets as well.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    table = "\n".join(f"{command.name:<20}{command.help}" for command in COMMANDS)
    top = parser.add_subparsers(title="commands", description=table, metavar="COMMAND", required=True, parser_class=_Parser)
    groups: dict[str, argparse._SubParsersAction] = {"": top}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            folder = top.add_parser(group, description=GROUPS[group], allow_abbrev=False)
            groups[group] = folder.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
        usage = f"vatt {command.name} [-h] CONFIG [--section.key VALUE ...]" if command.overrides else None
        listed: dict[str, Any] = {"help": command.help} if group else {}  # the top's own table lists every command already
        leaf = groups[group].add_parser(
            name,
            **listed,
            description=command.help,
            epilog=f"example:\n  {command.example}",
            usage=usage,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        leaf.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
        command.arguments(leaf)
        leaf.set_defaults(run=command.run)
    return parser


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what argparse shall see, the `--section.key VALUE` pairs).

    Whether a key exists is for `config_file` to say: it knows the nearest one. Only commands that take overrides
    are treated so; elsewhere an unknown flag stays argparse's to refuse.
    """
    start = next(
        (end for command in COMMANDS if command.overrides and (end := _end_of(command.name, arguments))), len(arguments)
    )
    plain, overrides, rest = list(arguments[:start]), [], list(arguments[start:])
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument in ("--help", "--debug"):
            plain.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return plain, overrides


def _end_of(name: str, arguments: Sequence[str]) -> int:
    """Where the words of a command end in `arguments`; 0 = it is not the command given."""
    words = name.split()
    for i in range(len(arguments)):
        if arguments[i : i + len(words)] == words:
            return i + len(words)
        if not arguments[i].startswith("-") and not arguments[i].isdigit():  # a digit: the value of --local_rank
            break
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error is one line on stderr."""
    # OpenMP threads that spin while they wait starve each other as soon as anything else runs on a core, many times over
    # (benchmarks/LOG.md). The variable is read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    plain, overrides = take_overrides(arguments)
    try:
        args = build_parser().parse_args(plain)
        args.overrides = overrides
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if "--debug" in plain:
            traceback.print_exc()
        message, code = explain(error)
        print(f"error: {message}", file=sys.stderr)
        return code


def explain(error: Exception) -> tuple[str, int]:
    """(message, exit code). Our own errors are written for the user; anything else says what it is."""
    if type(error).__module__.startswith("vatt.") or isinstance(error, UsageError):
        return str(error), getattr(error, "exit_code", BAD_INPUT)
    if isinstance(error, OSError) and error.filename:
        wrong_path = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError))
        return f"{error.filename}: {(error.strerror or 'cannot be used').lower()}", BAD_INPUT if wrong_path else FAILED
    return f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)", FAILED


if __name__ == "__main__":
    sys.exit(main())
