"""The command `fuseformer`: what each command takes; the work is done in `tuning`.

What needs the packages of the extra [tune] is imported when a command runs, so that `fuseformer
info` works without them.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .info import describe, describe_kernels, survey
from .tuning.recipe import Recipe, add_flags, flags_given, merged, read_recipe
from .tuning.scripts import AUTO, TOKENISERS
from .tuning.signals import InterruptedRunError

if TYPE_CHECKING:
    from .tuning.train import Outcome

Command = Callable[[argparse.Namespace], str]


def _recipe_and_given(arguments: argparse.Namespace) -> tuple[Recipe, Mapping[str, Any]]:
    """Return the recipe of file and flags, and the fields that either of them set."""
    recipe, given = Recipe(), flags_given(arguments)
    if arguments.recipe is not None:
        recipe, from_file = read_recipe(arguments.recipe)
        given = from_file | given
    return merged(recipe, given, "flags"), given


def _pretrain(arguments: argparse.Namespace) -> str:
    from .tuning.commands import pretrain

    outcome = pretrain(*_recipe_and_given(arguments), arguments.output, arguments.resume)
    return _saved(outcome)


def _tune(arguments: argparse.Namespace) -> str:
    from .tuning.commands import tune

    outcome = tune(
        *_recipe_and_given(arguments), arguments.output, arguments.resume, arguments.model
    )
    return _saved(outcome)


def _saved(outcome: "Outcome") -> str:
    if outcome.signal:
        raise InterruptedRunError(outcome.signal)
    return f"saved {outcome.checkpoint}"


def _evaluate(arguments: argparse.Namespace) -> str:
    from .tuning.commands import evaluate_run

    return evaluate_run(
        arguments.model,
        arguments.records,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        output=arguments.json,
        device=arguments.device,
        tokenise=arguments.tokenise,
    )


def _generate(arguments: argparse.Namespace) -> str:
    from .tuning.commands import generate_text

    what = ("prompt", "instruction", "input", "max_new_tokens", "device")
    names = (*what, "no_repeat", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(arguments, name) for name in names}
    return generate_text(arguments.model, **options)


def _demo(arguments: argparse.Namespace) -> str:
    from .tuning.demo import run_demo

    return run_demo(arguments.output, quick=arguments.quick)


def _info(arguments: argparse.Namespace) -> str:
    if arguments.kernels is not None:
        return describe_kernels(arguments.kernels)
    return json.dumps(survey(), indent=1) if arguments.json else describe()


def _doctor(arguments: argparse.Namespace) -> str:
    from .doctor import examine

    findings = examine()
    text = "\n".join(map(str, findings))
    failed = [f"{f.backend} on {f.device}" for f in findings if f.status == "FAILED"]
    if failed:
        print(text)
        raise RuntimeError(f"{', '.join(failed)} gave no right answer; the lines above say why")
    return text


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--recipe", type=Path, help="TOML file of recipe fields")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output, its recipe included"
    )
    add_flags(parser, Recipe())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fuseformer", description="Fused ops for PyTorch Transformers, and models on them."
    )
    parser.add_argument("--version", action="version", version=f"fuseformer {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error comes from, not its line only"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Command, help: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        own.set_defaults(run=run)
        return own

    text = "versions, devices, which backends can run here and why others cannot"
    own = command("info", _info, text)
    kind = own.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="the same, for programs to read")
    kind.add_argument(
        "--kernels",
        type=int,
        metavar="ARCH",
        help="instead, tiles, registers and occupancy of the CUDA C++ kernels compiled for ARCH, "
        "80 for sm_80",
    )

    text = "run a small forward and backward pass on every backend that can run here"
    command("doctor", _doctor, text)

    own = command("pretrain", _pretrain, "train a new model on plain text")
    _add_training(own)

    own = command("tune", _tune, "train a checkpoint, or a new model, on instruction records")
    own.add_argument("--model", type=Path, help="run or checkpoint to start from")
    _add_training(own)

    own = command("evaluate", _evaluate, "judge a run by what it has not seen")
    own.add_argument("model", type=Path, metavar="RUN", help="run or checkpoint")
    own.add_argument(
        "--records",
        type=Path,
        nargs="*",
        action="extend",
        default=[],
        help="JSONL files instead of the run's own",
    )
    own.add_argument("--limit", type=int, help="answers to write for each open task")
    own.add_argument("--max-new-tokens", type=int, default=40)
    own.add_argument(
        "--tokenise",
        default=AUTO,
        choices=(AUTO, *TOKENISERS),
        help="how BLEU splits texts; auto: as the script of each reference asks (default)",
    )
    own.add_argument("--json", type=Path, help="write the metrics to this file")
    own.add_argument("--device", default="auto")

    own = command("generate", _generate, "let a run continue a prompt or answer an instruction")
    own.add_argument("model", type=Path, metavar="RUN", help="run or checkpoint")
    own.add_argument("prompt", nargs="?", help="text to continue (default: standard input)")
    own.add_argument("--instruction", help="instruction to answer, in the template of tuning")
    own.add_argument("--input", default="", help="what the instruction is about")
    own.add_argument(
        "--max-new-tokens", type=int, help="default: 60, or what the model has room for"
    )
    own.add_argument("--no-repeat", type=int, metavar="N", help="let no N tokens in a row recur")
    own.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    own.add_argument("--top-k", type=int, help="draw from the K likeliest tokens")
    own.add_argument("--top-p", type=float, help="draw from the likeliest tokens that add up to P")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--device", default="auto")

    own = command("demo", _demo, "pretrain, tune, judge and report, in minutes on a CPU")
    own.add_argument("--output", type=Path, default=Path("demo"), help="folder (default: demo)")
    own.add_argument("--quick", action="store_true", help="a tiny run that shows the way only")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    2 is for what the user can mend, 130 and 143 for what SIGINT and SIGTERM ended early.
    """
    parsed = _parser().parse_args(arguments)
    try:
        text = parsed.run(parsed)
        if text:
            print(text, flush=True)
    except BrokenPipeError:  # the reader of the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except InterruptedRunError as interruption:  # what was saved has been said
        return interruption.status
    except KeyboardInterrupt:  # training saves and returns; this is everything else
        print(f"fuseformer {parsed.command}: interrupted", file=sys.stderr)
        return 130
    # PyTorch reports memory that it cannot get as a RuntimeError.
    except (ValueError, OSError, ModuleNotFoundError, MemoryError, RuntimeError) as error:
        if parsed.traceback:
            raise
        remedy = ""
        if isinstance(error, ModuleNotFoundError):
            remedy = '; install what tuning needs with: pip install "fuseformer[tune]"'
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"fuseformer {parsed.command}: {message}{remedy}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(
        "start `fuseformer` or `python -m fuseformer_command`: here PyTorch is loaded too early"
    )
