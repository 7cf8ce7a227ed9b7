"""The command line: ``opweave compile | run | explain | verify | fit | export | view | bench | hw | passes | experts |
pipeline``.

Exit codes: 0 done; 1 outputs differ from the reference; 130 stopped by Ctrl-C, with the best plan so far written
unless standard error says "abandoned"; 141 nobody reads what is printed any more; anything else is the ``exit_code`` of
the error (see ``errors.py``): 2 option, 3 model, 4 machine, 5 infeasible, 6 plan file, 7 verification, 8 execution,
70 internal.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer
import typer.core

from ..errors import InternalError, OptionError, OpweaveError
from . import benching, experts, inspecting, pipeline, planning
from .shared import INTERRUPTED, UNREAD, print_json

__all__ = ["app", "main"]


class _Abandoned(Exception):
    """Ctrl-C where nothing was there to keep."""


class _Unread(Exception):
    """Whoever read what is printed has gone, as ``head`` does."""


class _Commands(typer.core.TyperGroup):
    """Typer ends quietly on Ctrl-C and on closed pipes, with exit codes that commands return as well: here told apart.

    A command that prints to a closed pipe has written its files before.
    """

    def invoke(self, ctx: Any) -> Any:  # typer does not export the class of its contexts
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Abandoned from interrupt
        except BrokenPipeError as error:
            raise _Unread from error


app = typer.Typer(
    name="opweave",
    cls=_Commands,
    help="Weave a model's operators onto an accelerator: order, residency and addresses, proven and executed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    help="How good the kernels are: on a GPU against their peers, without one by inspection.", no_args_is_help=True
)
hw = typer.Typer(help="Machines opweave can plan for.", no_args_is_help=True)
_COMMANDS: tuple[Callable[..., Any], ...] = (
    *(planning.compile, planning.run, planning.explain, planning.fit),
    *(inspecting.verify, inspecting.view, inspecting.export, inspecting.passes, experts.experts),
    pipeline.pipeline,
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(bench, name="bench")
bench.command("kernels")(benching.kernels)
bench.command("resources")(benching.resources)
bench.command("compare")(benching.compare)
app.add_typer(hw, name="hw")
hw.command("list")(inspecting.hw_list)
hw.command("show")(inspecting.hw_show)


def main() -> None:
    """Run the command line and exit with the documented code."""
    try:
        code = app(standalone_mode=False)
    except OpweaveError as error:
        _fail(error)
    except (KeyboardInterrupt, _Abandoned):
        _abandon()
    except _Unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        sys.exit(UNREAD)
    except Exception as error:
        if not hasattr(error, "format_message"):
            traceback.print_exc()
            _fail(InternalError(f"unexpected {type(error).__name__}: {error}", hint="please report this"))
        if not error.format_message():  # no command was given, and the help has been shown instead
            sys.exit(OptionError.exit_code)
        _fail(OptionError(error.format_message(), hint="opweave COMMAND --help lists the options"))
    sys.exit(code if isinstance(code, int) else 0)


def _abandon() -> NoReturn:
    sys.stderr.write("opweave: abandoned\n")
    if "--json" in sys.argv:
        print_json({"error": {"code": "interrupted", "message": "abandoned by Ctrl-C", "hint": ""}})
    sys.exit(INTERRUPTED)


def _fail(error: OpweaveError) -> NoReturn:
    if "--json" in sys.argv:
        print_json({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
    else:
        sys.stderr.write(f"error[{error.code}]: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"hint: {error.hint}\n")
    sys.exit(error.exit_code)
