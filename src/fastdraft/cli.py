"""The command line: one typer function for each verb, arguments in and one call out.

Whatever the user can mend ends in one line on stderr and exit code 2; a stop by a signal in exit code 130.
Verbs import what they need inside, so that `fastdraft --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Exit, Option, Typer, TyperException

from fastdraft.errors import FastDraftError, RecipeError, machine_errors
from fastdraft.stages import SUMMARIES

_STOPPED = 130

_EPILOG = """\
\b
a first run, a small real target that comes with the package:
  fastdraft run demo
your own target:
  fastdraft inspect meta-llama/Llama-3.1-8B-Instruct  what it is
  fastdraft recipes --copy llama-3.1-8b               a recipe to edit
  fastdraft check llama-3.1-8b.yaml                   tokens, time, disk
  fastdraft run llama-3.1-8b.yaml pretrain.tokens=1B  any key can be set
  fastdraft generate runs/llama-3.1-8b --prompt "def quicksort("
many devices: training takes one process for each, the other stages one:
  torchrun --nproc-per-node 8 -m fastdraft run llama-3.1-8b.yaml
An interrupted run goes on when the same command is given again.
"""

app = Typer(
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Makes a small draft model for any language model, so that speculative decoding answers faster at no change in output.",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _argument(metavar: str, help: str) -> Any:
    return Argument(metavar=metavar, help=help, show_default=False)


def _verb(name: str, help: str, example: str) -> Any:
    return app.command(name, help=help, short_help=help, epilog=f"\b\nexample: fastdraft {example}")


Recipe = Annotated[str, _argument("RECIPE", "A YAML file, or the name of a shipped recipe such as demo.")]
Overrides = Annotated[
    list[str] | None, _argument("KEY=VALUE", "Set any key of the recipe, such as pretrain.tokens=4M.")
]
Quiet = Annotated[bool, Option("--quiet", help="Print warnings and errors only.")]
Redo = Annotated[
    list[str] | None,
    Option("--redo", metavar="STAGE", help="Throw away STAGE and what builds on it first; may be repeated."),
]
Json = Annotated[bool, Option("--json", help="Print JSON on stdout.")]
Precision = Literal["fp32", "fp16", "int8", "int4"]
_FORMAT, _MEASURE = "With --format:", "With --measure:"


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastdraft import __version__

        print(__version__)
        raise Exit


@app.callback()
def _root(
    version: Annotated[
        bool, Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before the verb."""


@_verb("run", "Every stage of a recipe, one after the other.", "run demo run.seed=1 pretrain.tokens=1M")
def _run(recipe: Recipe, overrides: Overrides = None, redo: Redo = None, quiet: Quiet = False) -> None:
    _stages(recipe, overrides, redo, quiet)


def _stages(
    recipe: str, overrides: list[str] | None, redo: list[str] | None, quiet: bool, only: str | None = None
) -> None:
    from fastdraft import pipeline
    from fastdraft.console import Console
    from fastdraft.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    pipeline.run(loaded, Console(quiet=quiet), only=[only] if only else None, redo=redo or ())


def _export(
    recipe: Annotated[
        str, _argument("RECIPE", "A recipe; with --format a Hugging Face directory or hub id.")
    ],
    overrides: Overrides = None,
    redo: Redo = None,
    quiet: Quiet = False,
    format: Annotated[
        Literal["openvino"] | None, Option(help="Export a model for this runtime, without a recipe.")
    ] = None,
    weights: Annotated[Precision, Option(help=f"{_FORMAT} precision of the weights.")] = "int8",
    output: Annotated[
        str | None, Option(metavar="DIR", help=f"{_FORMAT} the new folder (default NAME-FORMAT-WEIGHTS).")
    ] = None,
    target: Annotated[
        str | None,
        Option(metavar="DIR", help=f"{_FORMAT} an exported target that the model must serve as a draft."),
    ] = None,
) -> None:
    if format is None:
        _stages(recipe, overrides, redo, quiet, only="export")
        return
    from fastdraft.console import Console
    from fastdraft.stages.export import export_model

    export_model(
        recipe, format=format, weights=weights, output=output, target=target, console=Console(quiet=quiet)
    )


def _stage_verb(name: str) -> Callable[..., None]:
    def stage(recipe: Recipe, overrides: Overrides = None, redo: Redo = None, quiet: Quiet = False) -> None:
        _stages(recipe, overrides, redo, quiet, only=name)

    return stage


for _name, _summary in SUMMARIES.items():
    if _name == "export":
        _example = "export models/my-draft --format openvino"
        _verb(_name, f"Stage: {_summary}; or any model, without a recipe.", _example)(_export)
    else:
        _verb(_name, f"Stage: {_summary}.", f"{_name} demo run.seed=1 pretrain.tokens=1M")(_stage_verb(_name))


@_verb("check", "Validate a recipe; forecast tokens, time, disk, memory.", "check demo run.device=cpu")
def _check(recipe: Recipe, overrides: Overrides = None, json: Json = False, quiet: Quiet = False) -> None:
    from fastdraft.commands import check
    from fastdraft.console import Console
    from fastdraft.recipe.recipe import load_recipe

    check.run(load_recipe(recipe, overrides or ()), Console(quiet=quiet), as_json=json)


@_verb(
    "inspect",
    "A target's anatomy, its vocabulary's traps, candidate drafts with their costs.",
    "inspect Qwen/Qwen3-8B",
)
def _inspect(
    target: Annotated[str, _argument("TARGET", "A model directory, a hub id, or shipped:targets/starter.")],
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the hub.")] = None,
    json: Json = False,
    measure: Annotated[
        bool, Option("--measure", help="Time the target and drafts of these shapes here, untrained.")
    ] = False,
    weights: Annotated[Precision, Option(help=f"{_MEASURE} the target's precision.")] = "int4",
    draft_weights: Annotated[Precision, Option(help=f"{_MEASURE} the drafts' precision.")] = "int8",
    draft: Annotated[
        list[str] | None,
        Option(
            metavar="SHAPE", help=f"{_MEASURE} 512x6 (width x layers) or an exported draft's folder; repeat."
        ),
    ] = None,
    device: Annotated[str, Option(metavar="NAME", help=f"{_MEASURE} OpenVINO's name.")] = "CPU",
    threads: Annotated[int, Option(min=0, help=f"{_MEASURE} CPU threads; 0 is OpenVINO's choice.")] = 0,
    num_speculative_tokens: Annotated[
        list[int] | None,
        Option(
            "--num-speculative-tokens",
            "-k",
            min=1,
            max=64,
            help=f"{_MEASURE} tokens a round (1 to 5); repeat.",
        ),
    ] = None,
    prefix: Annotated[int, Option(min=1, help=f"{_MEASURE} tokens in the cache before each pass.")] = 128,
) -> None:
    from fastdraft.commands import inspect
    from fastdraft.commands.measure import MeasureSettings
    from fastdraft.console import Console

    settings = MeasureSettings(
        weights=weights,
        draft_weights=draft_weights,
        draft=tuple(draft or ()),
        device=device,
        threads=threads,
        num_speculative_tokens=tuple(num_speculative_tokens or (1, 2, 3, 4, 5)),
        prefix=prefix,
    )
    inspect.run(
        target, revision=revision, console=Console(), as_json=json, measuring=settings if measure else None
    )


@_verb(
    "preview",
    "Synthetic rows as text, the trained tokens coloured.",
    "preview runs/demo --stage align --count 3 | less",
)
def _preview(
    run: Annotated[Path, _argument("RUN", "A run's folder such as runs/demo.")],
    stage: Annotated[
        Literal["synthesize", "align"],
        Option(help="What the target wrote, or rows of the training batches as the draft reads them."),
    ] = "synthesize",
    count: Annotated[int, Option(min=1, help="Rows to show.")] = 5,
) -> None:
    from fastdraft.commands import preview
    from fastdraft.console import Console

    preview.run(run, count, Console(), stage)


@_verb(
    "generate",
    "Text streaming out, accepted tokens coloured; speed-up at the end.",
    "generate runs/demo --prompt 'def sort(' --temperature 0.6",
)
def _generate(
    run: Annotated[
        str | None, _argument("RUN", "A run's folder such as runs/demo, which gives target and draft.")
    ] = None,
    target: Annotated[str | None, Option(help="Target directory or hub id, instead of RUN's.")] = None,
    draft: Annotated[str | None, Option(help="Draft directory, instead of RUN's.")] = None,
    prompt: Annotated[
        str | None, Option(help="Text to continue, or with --chat the question; read from stdin when absent.")
    ] = None,
    chat: Annotated[
        bool, Option("--chat", help="Use the chat template; without --prompt, a conversation.")
    ] = False,
    num_speculative_tokens: Annotated[
        int,
        Option(
            "--num-speculative-tokens", "-k", min=1, max=64, metavar="K", help="Tokens proposed per round."
        ),
    ] = 3,
    temperature: Annotated[float, Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, Option(min=0, help="0 keeps all.")] = 0,
    top_p: Annotated[float, Option(min=0, max=1, help="1 keeps all.")] = 1.0,
    max_new_tokens: Annotated[int, Option(min=1)] = 256,
    seed: Annotated[int, Option(min=0, max=2**63 - 1, help="Of sampling.")] = 0,
    device: Annotated[str, Option(help="auto, cpu, cuda, xpu or mps.")] = "auto",
    color: Annotated[bool | None, Option(help="Default: on a terminal.")] = None,
    compare: Annotated[bool, Option(help="Also time the target alone.")] = True,
) -> None:
    from fastdraft.commands import generate
    from fastdraft.commands.generate import find_pair
    from fastdraft.console import Console

    found_target, found_draft = find_pair(run, target, draft)
    generate.run(
        target=found_target,
        draft=found_draft,
        prompt=prompt,
        chat=chat,
        num_speculative_tokens=num_speculative_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
        color=color,
        compare=compare,
        console=Console(),
    )


@_verb("recipes", "List the shipped recipes, or copy one to edit.", "recipes --copy starter")
def _recipes(
    copy: Annotated[
        str | None, Option("--copy", metavar="NAME", help="Write NAME.yaml here, to edit.")
    ] = None,
) -> None:
    from fastdraft.recipe.recipe import shipped_recipes

    shipped = shipped_recipes()
    if copy is None:
        for name, path in shipped.items():
            print(f"{name:<14}{path.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}")
        print("\nedit one: fastdraft recipes --copy NAME; or run it as it is: fastdraft run NAME")
        return
    name = copy.removesuffix(".yaml")
    if name not in shipped:
        raise RecipeError(f"--copy: {copy}: no shipped recipe", f"shipped ones: {', '.join(shipped)}")
    with open(f"{name}.yaml", "x", encoding="utf-8") as file:
        file.write(shipped[name].read_text(encoding="utf-8"))
    print(f"wrote {name}.yaml: edit it, then `fastdraft check {name}.yaml` and `fastdraft run {name}.yaml`")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    # Threads that spin while they wait starve each other on a machine that does anything else; must be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with machine_errors("fastdraft", "use a smaller model, or a machine with more memory"):
            code = app(args=arguments or ["--help"], prog_name="fastdraft", standalone_mode=False)
    except FastDraftError as error:
        return _end(str(error), error.exit_code)
    except TyperException as error:
        return _end(f"{error.format_message().rstrip('.')}; see fastdraft --help", 2)
    if code == _STOPPED:
        return _end("stopped; run the same command again to go on", _STOPPED)
    return (code if isinstance(code, int) else 0) if arguments else 2


def _end(line: str, exit_code: int) -> int:
    if (
        exit_code != _STOPPED or os.environ.get("RANK", "0") == "0"
    ):  # of torchrun's processes one tells of the stop
        print(f"fastdraft: {line}", file=sys.stderr)
    return exit_code
