"""The command line: verbs, recipe path, key=value overrides. No logic.

Decides only how arguments are read and how an error ends: one line on stderr and exit code 2 (130 after a signal).
Nothing heavy is imported before a verb is known, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastdraft.streams import forget_stdout, open_closed_streams, take_any_character

_STAGES = {
    "design": "target -> draft architecture and first weights",
    "prepare": "corpora -> tokenised, packed shards",
    "pretrain": "text shards -> a language model",
    "continue_pretrain": "code and text shards -> a model of both",
    "synthesize": "prompts -> responses that the target writes",
    "align": "responses -> a draft that predicts this target",
    "evaluate": "draft x target x tasks -> acceptance, block efficiency",
    "export": "the draft as runtimes load it",
    "benchmark": "the exported pair on this device's clock, beside the prediction",
    "report": "everything on one page",
}

_PARALLEL = ("pretrain", "continue_pretrain", "align")
"""Stages that work on many devices."""

_MACHINES = """\
Training stages take one process for each device; the other stages run once,
on the first machine. The same batches are trained in the same order whatever
the number of processes: a run may go on with more or fewer. One machine of 8:
  fastdraft run RECIPE --nproc-per-node 8
Two machines of 8 that share a disk, HOST being the first one's name; on it,
and on the second one:
  fastdraft run RECIPE --nproc-per-node 8 --nnodes 2 --master-addr HOST
  fastdraft run RECIPE --nproc-per-node 8 --nnodes 2 --master-addr HOST \\
      --node-rank 1
"""

_INVALID_CHOICE = re.compile(r"argument (\S+): invalid choice: '?([^']*)'? \(choose from (.*)\)")

_DESCRIPTION = """\
Makes a small draft model for any language model, so that speculative decoding
answers faster at no change in output.
"""
_EPILOG = """\
a first run, a small real target that comes with the package:
  fastdraft run demo
your own target:
  fastdraft inspect meta-llama/Llama-3.1-8B-Instruct  what it is
  fastdraft recipes --copy llama-3.1-8b               a recipe to edit
  fastdraft check llama-3.1-8b.yaml                   tokens, time, disk, memory
  fastdraft run llama-3.1-8b.yaml pretrain.tokens=1B  any key can be set here
  fastdraft generate runs/llama-3.1-8b --prompt "def quicksort("
An interrupted run goes on when the same command is given again.
"""


class _Parser(argparse.ArgumentParser):
    """Ends a wrong argument as every other error: one line that names the remedy, exit code 2."""

    def error(self, message: str) -> NoReturn:
        found = _INVALID_CHOICE.fullmatch(message)
        if found:
            choices = [choice.strip(" '") for choice in found[3].split(",")]
            near = difflib.get_close_matches(found[2], choices, n=1)
            remedy = f"did you mean '{near[0]}'?" if near else f"see {self.prog} --help"
            message = f"{found[1]}: '{found[2]}': must be one of {', '.join(choices)}; {remedy}"
        else:
            message = f"{message.removeprefix('argument ')}; see {self.prog} --help"
        self.exit(2, f"fastdraft: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, ready for `--help` of every verb."""
    parser = _Parser(
        prog="fastdraft",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    run = _recipe_verb(verbs, "run", "every stage of a recipe, one after the other", _run)
    run.add_argument(
        "--dry-run", action="store_true", help="check everything and print the forecast, run nothing"
    )
    _add_redo(run)
    _add_machines(run)
    for name, summary in _STAGES.items():
        stage = _recipe_verb(verbs, name, f"stage: {summary}", _run)
        _add_redo(stage)
        if name in _PARALLEL:
            _add_machines(stage)
        if name == "export":
            _add_export(stage)
        if name == "benchmark":
            stage.epilog = "example: fastdraft benchmark demo benchmark.repeats=5"
    check = _recipe_verb(verbs, "check", "validate a recipe; forecast tokens, time, disk, memory", _check)
    check.add_argument("--json", action="store_true", help="print the forecast as JSON on stdout")
    check.add_argument(
        "--contact",
        action="store_true",
        help="ask the recipe's servers what they serve, with a few one-token questions",
    )
    _add_inspect(verbs)
    _add_preview(verbs)
    _add_generate(verbs)
    recipes = verbs.add_parser(
        "recipes",
        help="list the shipped recipes, or copy one to edit",
        description="Lists the shipped recipes. Every key is described in docs/recipe.md.",
        epilog="example: fastdraft recipes --copy starter",
    )
    recipes.add_argument("--copy", metavar="NAME", help="write NAME.yaml into the working directory")
    recipes.set_defaults(call=_recipes)
    return parser


def _recipe_verb(
    verbs: Any, name: str, summary: str, call: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example: fastdraft {name} demo run.seed=1 pretrain.tokens=1M",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe such as demo"
    )
    override = "set any key of the recipe, for example pretrain.tokens=4M"
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=override)
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.set_defaults(call=call)
    return parser


def _add_redo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redo",
        metavar="STAGE",
        action="append",
        default=[],
        choices=sorted(_STAGES),
        help="throw away STAGE and what builds on it first",
    )


def _add_machines(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    group = parser.add_argument_group("many devices", _MACHINES)
    group.add_argument(
        "--nproc-per-node",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, one a device (default 1)",
    )
    group.add_argument(
        "--nnodes", type=int, default=1, metavar="N", help="machines (default 1); give the command on each"
    )
    group.add_argument(
        "--node-rank", type=int, default=0, metavar="I", help="this machine's number, from 0 (default 0)"
    )
    group.add_argument("--master-addr", default="", metavar="HOST", help="name or address of machine 0")
    group.add_argument(
        "--master-port",
        type=int,
        default=29500,
        metavar="PORT",
        help="a free port of machine 0 (default 29500)",
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="times that lost processes are replaced (default 3)",
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("any model, without a recipe: fastdraft export DIR --format openvino")
    group.add_argument(
        "--format",
        choices=["openvino"],
        help="the runtime; RECIPE is then a Hugging Face directory or hub id",
    )
    group.add_argument(
        "--weights",
        choices=["fp32", "fp16", "int8", "int4"],
        default="int8",
        help="precision of the weights (default int8)",
    )
    group.add_argument("--output", metavar="DIR", help="the new folder (default NAME-FORMAT-WEIGHTS)")
    group.add_argument(
        "--target", metavar="DIR", help="an exported target that the model must serve as a draft"
    )
    parser.set_defaults(call=_export)


def _add_inspect(verbs: Any) -> None:
    parser = verbs.add_parser(
        "inspect",
        help="a target's anatomy, its vocabulary's traps, candidate drafts with their costs",
        description="Reads a target's config and tokenizer, never its weights (but with --measure), and tells which drafts suit it.",
        epilog="example: fastdraft inspect Qwen/Qwen3-8B",
    )
    parser.add_argument(
        "target", metavar="TARGET", help="a model directory, a hub id, or shipped:targets/starter"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="time the target and drafts of these shapes on this device, untrained",
    )
    _add_measure(parser)
    parser.set_defaults(call=_inspect)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "with --measure",
        "Builds the target (unless TARGET is an exported model) and each candidate draft with random weights in a temporary "
        "folder, times single passes, and forecasts the speed-up for three acceptance rates and every K: size and depth can be "
        "chosen before anything is trained. A 3.8 B target takes 3 minutes on two cores, 7 GB of memory and 5 GB of disk, where TMPDIR "
        "(on Windows TEMP) says.",
        argument_default=argparse.SUPPRESS,
    )
    weights = ["fp32", "fp16", "int8", "int4"]
    group.add_argument("--runtime", choices=["openvino"], help="whose passes (default openvino)")
    group.add_argument("--weights", choices=weights, help="the target's precision (default int4)")
    group.add_argument("--draft-weights", choices=weights, help="the drafts' precision (default int8)")
    drafts = "HIDDENxLAYERS, as 512x6, or folders of exported drafts (default: the listed candidates)"
    group.add_argument("--draft", nargs="+", metavar="SHAPE", help=drafts)
    group.add_argument("--device", metavar="NAME", help="OpenVINO's name (default CPU)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: OpenVINO's choice)")
    group.add_argument(
        "--num-speculative-tokens",
        type=int,
        nargs="+",
        metavar="K",
        help="tokens proposed per round (default 1 2 3 4 5)",
    )
    group.add_argument(
        "--prefix", type=int, metavar="TOKENS", help="tokens in the cache before each pass (default 128)"
    )


def _add_preview(verbs: Any) -> None:
    parser = verbs.add_parser(
        "preview",
        help="synthetic rows as text, the trained tokens coloured",
        description="Shows rows of a run as text, special tokens written out; the tokens that the draft is trained on are green on a "
        "terminal and stand between [[ and ]] in a file or a pipe.",
        epilog="example: fastdraft preview runs/demo --stage align --count 3 | less",
    )
    parser.add_argument(
        "--stage",
        choices=("synthesize", "align"),
        default="synthesize",
        help="synthesize: what the target wrote (default); align: rows of the training batches as the draft reads them",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder such as runs/demo")
    parser.add_argument("--count", type=int, default=5, help="rows to show (default 5)")
    parser.set_defaults(call=_preview)


def _add_generate(verbs: Any) -> None:
    parser = verbs.add_parser(
        "generate",
        help="text streaming out, accepted tokens coloured; speed-up at the end",
        description="Writes with the target and its draft, lossless speculative decoding in torch, accepted tokens green on a terminal. "
        "Tells tokens per target pass and the time beside the target's alone.",
        epilog="example: fastdraft generate runs/demo --prompt 'def quicksort(' -k 4 --temperature 0.6",
    )
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's folder such as runs/demo (gives target and draft)"
    )
    parser.add_argument("--target", help="target directory or hub id, instead of RUN's")
    parser.add_argument("--draft", help="draft directory, instead of RUN's")
    parser.add_argument(
        "--prompt", help="text to continue, or the question with --chat; read from stdin when absent"
    )
    parser.add_argument(
        "--chat", action="store_true", help="use the chat template; without --prompt, a conversation"
    )
    parser.add_argument(
        "-k",
        "--num-speculative-tokens",
        type=int,
        default=3,
        metavar="K",
        help="tokens proposed per round (default 3)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all (default)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default 256")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, xpu, mps")
    parser.add_argument(
        "--color", action=argparse.BooleanOptionalAction, default=None, help="default: on a terminal"
    )
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time the target alone (default)",
    )
    parser.set_defaults(call=_generate)


def _run(arguments: argparse.Namespace) -> None:
    from fastdraft import pipeline
    from fastdraft.console import Console
    from fastdraft.recipe.recipe import load_recipe

    if getattr(arguments, "dry_run", False):
        _check(arguments)
        return
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    only = None if arguments.verb == "run" else [arguments.verb]
    console = Console(quiet=arguments.quiet)
    if getattr(arguments, "nproc_per_node", 1) * getattr(arguments, "nnodes", 1) == 1:
        pipeline.run(recipe, console, only=only, redo=arguments.redo)
        return
    from fastdraft.commands import launch

    names = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "max_restarts")
    machines = launch.Machines(**{name: getattr(arguments, name) for name in names})
    launch.run(recipe, console, machines, only=only, redo=arguments.redo)


def _export(arguments: argparse.Namespace) -> None:
    if arguments.format is None:
        _run(arguments)
        return
    from fastdraft.commands import export
    from fastdraft.console import Console

    settings = {name: getattr(arguments, name) for name in ("format", "weights", "output", "target")}
    export.run(arguments.recipe, console=Console(quiet=arguments.quiet), **settings)


def _check(arguments: argparse.Namespace) -> None:
    from fastdraft.commands import check
    from fastdraft.console import Console
    from fastdraft.recipe.recipe import load_recipe

    recipe, console = load_recipe(arguments.recipe, arguments.overrides), Console(quiet=arguments.quiet)
    processes = getattr(arguments, "nproc_per_node", 1) * getattr(arguments, "nnodes", 1)
    as_json, contact = getattr(arguments, "json", False), getattr(arguments, "contact", False)
    check.run(recipe, console, as_json=as_json, contact=contact, processes=processes)


def _inspect(arguments: argparse.Namespace) -> None:
    from fastdraft.commands import inspect
    from fastdraft.commands.inspect_measure import settings_of
    from fastdraft.console import Console

    inspect.run(
        arguments.target,
        revision=arguments.revision,
        console=Console(),
        as_json=arguments.json,
        measuring=settings_of(vars(arguments)),
    )


def _preview(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from fastdraft.commands import preview
    from fastdraft.console import Console

    preview.run(Path(arguments.run), arguments.count, Console(), arguments.stage)


def _generate(arguments: argparse.Namespace) -> None:
    from fastdraft.commands import generate
    from fastdraft.commands.generate import find_pair
    from fastdraft.console import Console

    ours = ("verb", "call", "version", "run", "target", "draft")
    settings = {name: value for name, value in vars(arguments).items() if name not in ours}
    target, draft = find_pair(arguments.run, arguments.target, arguments.draft)
    generate.run(target=target, draft=draft, console=Console(), **settings)


def _recipes(arguments: argparse.Namespace) -> None:
    from fastdraft.commands import recipes

    recipes.run(arguments.copy)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand on either side of an option, which argparse alone does not allow."""
    arguments, extra = parser.parse_known_args(argv)
    unknown = [text for text in extra if text.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        name, options = (
            unknown[0].partition("=")[0],
            [f"--{key.replace('_', '-')}" for key in vars(arguments)],
        )
        near = difflib.get_close_matches(name, options, n=1)
        parser.error(f"{name}: no such argument" + (f": did you mean {near[0]}?" if near else ""))
    if extra:
        arguments.overrides = [*arguments.overrides, *extra]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    open_closed_streams()
    parser = build_parser()
    arguments = _parse(parser, argv)
    if arguments.version:
        from fastdraft import __version__

        print(__version__)
        return 0
    if not arguments.verb:
        parser.print_help()
        return 2
    return _guarded(arguments)


def _guarded(arguments: argparse.Namespace) -> int:
    """Calls the verb; whatever the user can mend ends in one line."""
    from fastdraft.errors import FastDraftError, machine_errors

    # Threads that spin while they wait starve each other on a machine that does anything else; must be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    take_any_character()
    try:
        with machine_errors(_place(arguments), "use a smaller target.dtype, or a machine with more memory"):
            arguments.call(arguments)
            sys.stdout.flush()
    except FastDraftError as error:
        return _say(f"fastdraft: {error}", error.exit_code)
    except KeyboardInterrupt:
        again = "; run the same command again to go on" if hasattr(arguments, "recipe") else ""
        return _say(f"{chr(10) if sys.stderr.isatty() else ''}fastdraft: stopped{again}", 130)
    except BrokenPipeError:
        forget_stdout()  # whoever read our output has gone: say nothing
        return 0
    return 0


def _say(line: str, exit_code: int) -> int:
    """The last line; where stderr has gone too, the exit code must do."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr)
    return exit_code


def _place(arguments: argparse.Namespace) -> Any:
    from pathlib import Path

    return Path(getattr(arguments, "recipe", None) or ".")
