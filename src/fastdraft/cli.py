"""The command line: one typer function for each verb, arguments in and one call out.

Whatever the user can mend ends in one line on stderr and exit code 2; a stop by a signal in exit code 130.
Verbs import what they need inside, so that `fastdraft --help` answers at once.
"""

# ruff: noqa: B008 (typer reads options from the defaults)

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from typer import Argument, Exit, Option, Typer, TyperException

from fastdraft import __version__
from fastdraft.errors import FastDraftError, RecipeError, machine_errors
from fastdraft.stages import SPREAD, SUMMARIES

_STOPPED = 130
F = TypeVar("F", bound=Callable[..., Any])

_EPILOG = """\
\b
a first run, for a real target of 135M parameters (README.md: make demo):
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
    help="Makes a small draft model for any language model, so that speculative decoding answers faster at no"
    " change in output.",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _argument(default: Any, metavar: str, help: str) -> Any:
    return Argument(default, metavar=metavar, help=help, show_default=False)


def _verb(name: str, help: str, example: str) -> Callable[[F], F]:
    return app.command(name, help=help, short_help=help, epilog=f"\b\nexample: fastdraft {example}")


Recipe = Annotated[str, Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe such as demo.")]
_SET = "Set any key of the recipe, such as pretrain.tokens=4M."
Overrides = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help=_SET)]
Quiet = Annotated[bool, Option("--quiet", help="Print warnings and errors only.")]
_REDO = "First throw away STAGE and what builds on it; may be repeated."
Redo = Annotated[list[str] | None, Option(metavar="STAGE", help=_REDO)]
Ray = Annotated[str, Option("--ray", metavar="ADDRESS", help="Use a Ray cluster: HOST:PORT, or auto.")]
Json = Annotated[bool, Option("--json", help="Print JSON on stdout.")]
Precision = Literal["fp32", "fp16", "int8", "int4"]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise Exit


@app.callback()
def _root(
    version: bool = Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options before the verb."""


def _stages(
    recipe: str, overrides: list[str] | None, redo: list[str] | None, quiet: bool, only: str | None = None
) -> None:
    from fastdraft import pipeline
    from fastdraft.console import Console
    from fastdraft.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    pipeline.run(loaded, Console(quiet=quiet), only=[only] if only else None, redo=redo or ())


def _stage_verb(name: str | None) -> Callable[..., None]:
    def stage(recipe: Recipe, overrides: Overrides = None, redo: Redo = None, quiet: Quiet = False) -> None:
        _stages(recipe, overrides, redo, quiet, only=name)

    def spread(
        recipe: Recipe, overrides: Overrides = None, redo: Redo = None, quiet: Quiet = False, ray: Ray = ""
    ) -> None:
        cluster = [f"run.cluster.address='{ray}'"] if ray else []
        _stages(recipe, [*(overrides or ()), *cluster], redo, quiet, only=name)

    return spread if name in (None, *SPREAD) else stage


def _export(
    recipe: str = _argument(..., "RECIPE", "A recipe; with --format a model directory or hub id."),
    overrides: Overrides = None,
    redo: Redo = None,
    quiet: Quiet = False,
    format: Literal["openvino"] | None = Option(None, help="Export a model, without a recipe."),
    weights: Precision = Option("int8", help="With --format: precision of the weights."),
    output: str | None = Option(None, help="With --format: the new folder (NAME-FORMAT-WEIGHTS)."),
    target: str | None = Option(None, help="With --format: an exported target to pair it with."),
) -> None:
    if format is None:
        _stages(recipe, overrides, redo, quiet, only="export")
        return
    from fastdraft.console import Console
    from fastdraft.stages.export import export_model

    console = Console(quiet=quiet)
    export_model(recipe, format=format, weights=weights, output=output, target=target, console=console)


_SETTING = "demo run.seed=1 align.tokens=1M"
_verb("run", "Every stage of a recipe, one after the other.", f"run {_SETTING}")(_stage_verb(None))
for _name, _summary in SUMMARIES.items():
    if _name == "export":
        _example = "export models/my-draft --format openvino"
        _verb(_name, f"Stage: {_summary}; or any model, without a recipe.", _example)(_export)
    else:
        _verb(_name, f"Stage: {_summary}.", f"{_name} {_SETTING}")(_stage_verb(_name))


@_verb("check", "Validate a recipe; forecast tokens, time, disk, memory.", "check demo run.device=cpu")
def _check(recipe: Recipe, overrides: Overrides = None, json: Json = False, quiet: Quiet = False) -> None:
    from fastdraft.commands import check
    from fastdraft.console import Console
    from fastdraft.recipe.recipe import load_recipe

    check.run(load_recipe(recipe, overrides or ()), Console(quiet=quiet), as_json=json)


@_verb("inspect", "A target's anatomy, its traps, candidate drafts and their costs.", "inspect Qwen/Qwen3-8B")
def _inspect(
    target: str = _argument(
        ..., "TARGET", "A model directory, a hub id, a GGUF file, or shipped:targets/starter."
    ),
    revision: str | None = Option(None, help="Branch, tag or commit on the hub."),
    json: Json = False,
    measure: bool = Option(False, "--measure", help="Time the target and untrained drafts here."),
    weights: Precision = Option("int4", help="With --measure: the target's precision."),
    draft_weights: Precision = Option("int8", help="With --measure: the drafts' precision."),
    draft: list[str] = Option(
        [], help="With --measure: a shape such as 512x6, or an exported draft; repeat."
    ),
    threads: int = Option(0, min=0, help="With --measure: CPU threads; 0 is the runtime's choice."),
    k: list[int] = Option([], "--num-speculative-tokens", "-k", min=1, help="With --measure: K; repeat."),
    prefix: int = Option(128, min=1, help="With --measure: tokens in the cache before each pass."),
    runtime: Literal["openvino", "llamacpp", "vllm"] = Option(
        "openvino", help="With --measure: what runs them."
    ),
    server: str = Option("", help="Of llamacpp: a llama-server; of vllm: Python of an environment with it."),
    acceptance: float = Option(
        0.45, min=0, max=1, help="With --runtime vllm: of an untrained draft, by chance."
    ),
) -> None:
    from fastdraft.commands import inspect
    from fastdraft.commands.measure import MeasureSettings
    from fastdraft.console import Console

    ks = tuple(k) or (1, 2, 3, 4, 5)
    settings = MeasureSettings(
        weights, draft_weights, tuple(draft), threads, ks, prefix, runtime, server, acceptance
    )
    measuring = settings if measure else None
    inspect.run(target, revision=revision, console=Console(), as_json=json, measuring=measuring)


@_verb("preview", "Synthetic rows as text, the trained tokens coloured.", "preview runs/demo --stage align")
def _preview(
    run: Path = _argument(..., "RUN", "A run's folder such as runs/demo."),
    stage: Literal["synthesize", "align"] = Option("synthesize", help="What the target wrote, or batches."),
    count: int = Option(5, min=1, help="Rows to show."),
) -> None:
    from fastdraft.commands import preview
    from fastdraft.console import Console

    preview.run(run, count, Console(), stage)


@_verb("generate", "Text, accepted tokens coloured; the speed-up.", "generate runs/demo --prompt 'def sort('")
def _generate(
    run: str | None = _argument(None, "RUN", "A run's folder such as runs/demo: gives target and draft."),
    target: str | None = Option(None, help="Target directory or hub id, instead of RUN's."),
    draft: str | None = Option(None, help="Draft directory, instead of RUN's."),
    prompt: str | None = Option(None, help="Text to continue, or --chat's question; else read from stdin."),
    chat: bool = Option(False, "--chat", help="Use the chat template; without --prompt, a conversation."),
    proposer: Literal["draft", "lookup", "both", "nothing"] = Option("both", help="What proposes tokens."),
    k: int | None = Option(
        None,
        "--num-speculative-tokens",
        "-k",
        min=1,
        max=64,
        help="The draft's per round; default: RUN's best.",
    ),
    num_lookup_tokens: int | None = Option(None, min=1, max=64, help="Lookup's; default: RUN's best."),
    temperature: float = Option(0.0, min=0, help="0 is greedy."),
    top_k: int = Option(0, min=0, help="0 keeps all."),
    top_p: float = Option(1.0, min=0, max=1, help="1 keeps all."),
    max_new_tokens: int = Option(256, min=1, help="Length at which an answer is cut."),
    seed: int = Option(0, min=0, max=2**63 - 1, help="Of sampling."),
    device: str = Option("auto", help="auto, cpu, cuda, xpu or mps."),
    runtime: Literal["openvino", "transformers"] | None = Option(
        None, help="Default: openvino where RUN has both models exported for it."
    ),
    color: bool | None = Option(None, help="Default: on a terminal."),
    compare: bool = Option(True, help="Also time the target alone."),
) -> None:
    from fastdraft.commands import generate
    from fastdraft.console import Console

    found_target, found_draft = generate.find_pair(run, target, draft, proposer)
    generate.run(
        target=found_target,
        draft=found_draft,
        exports=generate.find_exports(runtime, run, target, draft, device, proposer),
        prompt=prompt,
        chat=chat,
        proposer=proposer,
        num_speculative_tokens=k,
        num_lookup_tokens=num_lookup_tokens,
        folder=run,
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


@_verb("recipes", "List shipped recipes, copy one, or write one for a target.", "recipes --for Qwen/Qwen3-8B")
def _recipes(
    copy: str | None = Option(None, metavar="NAME", help="Write NAME.yaml here, to edit."),
    target: str | None = Option(
        None, "--for", metavar="TARGET", help="Write a recipe for a model on this machine, speeds measured."
    ),
    hours: float | None = Option(None, min=0.05, max=1000, help="With --for: writing and training; 1.5."),
    minutes: float | None = Option(None, min=3, max=60_000, help="With --for: the same, in minutes."),
    writer: str = Option("", metavar="MODEL", help="With --for: a sibling that writes in TARGET's place."),
    start: str = Option("", "--from", metavar="DRAFT", help="With --for: an earlier draft to re-align."),
    data: str = Option("", metavar="PATH", help="With --for: your prompts, JSONL or Parquet, or a folder."),
    tasks: str = Option(
        "code,chat,text", help="With --for: of these and summary, or files of prompts to evaluate on."
    ),
    called: str = Option("", "--name", help="With --for: of recipe and run; default: the target's."),
    threads: int = Option(0, min=0, help="With --for: CPU threads; 0 takes all cores."),
) -> None:
    from fastdraft.recipe.recipe import shipped_recipes

    if target is not None:
        from fastdraft.commands import recipe_for
        from fastdraft.console import Console

        if hours and minutes:
            found = f"--hours {hours:g} and --minutes {minutes:g}: one of the two"
            raise RecipeError(found, "leave one out")
        time = hours or (minutes or 90) / 60
        asked = recipe_for.Asked(target, time, called, writer, start, data, threads, tasks)
        recipe_for.run(asked, Console())
        return
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
    # Threads that spin while they wait starve each other on a busy machine; set before torch loads.
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
    # Of torchrun's processes one tells of the stop.
    if exit_code != _STOPPED or os.environ.get("RANK", "0") == "0":
        print(f"fastdraft: {line}", file=sys.stderr)
    return exit_code
