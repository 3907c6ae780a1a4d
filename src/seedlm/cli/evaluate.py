"""``seedlm evaluate``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from seedlm.cli.console import in_bytes, kept, note, show, show_progress, stopped
from seedlm.cli.options import Backend, Device, Dtype, TrustRemoteCode
from seedlm.errors import EvaluationError


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, packed or not, GGUF file, or Hub repository (owner/name).")],
    wikitext: Annotated[
        Path | None, typer.Option(help="The raw WikiText-2 file, wiki.test.raw, joined as papers do.", metavar="FILE")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Any text file instead, as it is.", metavar="FILE")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with, token by token: the original.", metavar="MODEL")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.", metavar="TOKENS")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Score the first N windows only; default: all.", metavar="N")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.", metavar="N")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    packed: Annotated[bool, typer.Option("--packed", help="Leave packed weights packed: less memory, slower.")] = False,
    backend: Backend = "auto",
    baseline: Annotated[
        str | None,
        typer.Option(help="Quantise MODEL by another library first, for comparison: nf4-4, hqq-3, gptq-4...", metavar="NAME"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text for a baseline that is calibrated (gptq, awq, exl3).", metavar="FILE")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to create, and what it saw as .records.json.gz; OUT.partial is the unfinished run.", metavar="FILE"
        ),
    ] = None,
    tokens_out: Annotated[Path | None, typer.Option(help=".npz file to create: every prediction.", metavar="FILE")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot tasks or groups too: names with commas, or 'paper' for its five.", metavar="NAMES"),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Folder of local files for the tasks, instead of the Hub.", metavar="FOLDER")
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(help="The first N questions of each task only; default: all.", metavar="N")
    ] = None,
    task_batch: Annotated[int, typer.Option(help="Answers in one forward pass.", metavar="N")] = 8,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to continue, one a line, instead of the built-in six.", metavar="FILE")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to continue each prompt by.", metavar="N")] = 48,
    layers: Annotated[int, typer.Option(help="Windows on which to hold every layer against the reference's.", metavar="N")] = 2,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub; default: main.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure how well a model predicts a text, and how far it is from a reference.

    Perplexity by the papers' protocol; with a reference also KL divergence and agreement on the most likely token. Stopped at
    any moment, the same command with --out goes on where it was.
    """
    from seedlm.evaluation.prompts import PROMPTS, read_prompts
    from seedlm.evaluation.settings import TASKS, Settings, check_context, check_request
    from seedlm.evaluation.text import Text
    from seedlm.integrations.transformers.before import check_backend, find, longest_text

    if (wikitext is None) == (text is None):
        raise EvaluationError("give a text: --wikitext FILE (wiki.test.raw) or --text FILE, one of them")
    settings = Settings(
        context=context,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        packed=packed,
        backend=backend,
        baseline=baseline,
        calibration=str(calibration) if calibration else None,
        tasks=TASKS if tasks == "paper" else tuple(tasks.split(",")) if tasks else (),
        task_data=str(task_data) if task_data else None,
        task_limit=task_limit,
        task_batch=task_batch,
        prompts=read_prompts(prompts) if prompts else PROMPTS,
        new_tokens=new_tokens,
        layers=layers,
        trust_remote_code=trust_remote_code,
    )
    content = Text.from_wikitext(wikitext) if wikitext else Text.from_file(text or "")
    check_request(content, settings, out, tokens_out)
    try:
        models = [find(model, revision, note), *([] if reference is None else [find(reference, tell=note)])]
        check_backend(backend, models[0].path)
        for found in models:
            check_context(longest_text(found.path), settings)
        against = "" if reference is None else f", against {reference}: {models[1]}"
        note(f"{model}: {models[0]}{against}; on {content.path}, {len(content.content.encode()) / 1e6:.2f} MB")
        with show_progress() as (on_progress, _):
            on_progress("open", 0, 0)
            from transformers.utils import logging  # and torch: what was mistyped has been answered without them

            from seedlm.evaluation.run import evaluate as run

            logging.set_verbosity_error()  # a text is longer than a model's context, which its tokenizer warns about
            logging.disable_progress_bar()
            results = run(
                model,
                content,
                settings,
                reference=reference,
                out=out,
                tokens_out=tokens_out,
                revision=revision,
                on_progress=on_progress,
            )
    except KeyboardInterrupt as error:
        stopped(error, kept(out, "holds what is done") if out is not None else "")
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        _print_results(results)


def _print_results(results: dict[str, Any]) -> None:
    def estimate(name: str) -> str:
        value, error = results["metrics"][name].values()
        if value is None:
            return "not finite"
        return f"{value:.4f}" + (f" +- {error:.4f}" if error is not None else "")

    for role in ("model", "reference"):
        if info := results[role]:
            bits = [f"{info['bits_per_weight']:.4f} bits a weight"] if info["bits_per_weight"] else []
            bits += [f"the whole model {info['model_bits_per_weight']:.4f}"] if info["model_bits_per_weight"] else []
            show(f"{role:17} {info['name']} ({', '.join([info['format'], *bits, in_bytes(info['bytes'])])})")
    if quantized := results["run"]["baseline"]:
        libraries = ", ".join(f"{library} {number}" for library, number in quantized["libraries"].items())
        kind = "calibrated" if quantized["calibrated"] else "data-free"
        show(f"quantised by      {quantized['name']} ({libraries}; {kind}): {quantized['bits_per_weight']:.4f} bits a weight")
    facts, run, place = results["text"], results["run"], results["environment"]
    bos = "starting with" if facts["starts_with_bos"] else "without"
    show(f"text              {facts['path']}: {facts['form']}; {facts['tokens']:,} tokens, {bos} BOS")
    show(
        f"protocol          {facts['windows']} windows of {results['settings']['context']} tokens, each alone, "
        f"{facts['predictions']:,} predictions; errors are standard errors over windows"
    )
    show(f"perplexity        {estimate('perplexity')}")
    if results["reference"]:
        show(f"of the reference  {estimate('reference_perplexity')}; ratio {estimate('perplexity_ratio')}")
        show(f"KL divergence     {estimate('kl')} nats a token")
        show(f"same top token    {estimate('top1_agreement')} of all")
    for role, label, key in (("model", "multiplied by", "backends"), ("reference", "the reference", "reference_backends")):
        packed = results[role] and results[role]["calibrated"] is not None
        if packed and not (role == "model" and run["baseline"]):
            used = ", ".join(f"{name} ({count} layers)" for name, count in (run[key] or {}).items())
            show(f"{label:17} {used or 'torch, its weights dequantized after loading'}")
    speed = [f"{run['tokens_per_second']:,.0f} tokens/s"] if run["tokens_per_second"] else []
    memory = [f"at most {in_bytes(run['peak_memory_bytes'])} of memory"] if run["peak_memory_bytes"] else []
    for task, answer in results["tasks"].items():
        best = "acc_norm" if "acc_norm" in answer else "acc"
        for kind, found in (answer.get("metrics") or {best: answer[best]}).items():
            value, error = found.values()
            spread = f" +- {error:.4f}" if error is not None else ""
            show(f"{task:17} {value:.4f}{spread} ({kind}, {answer['questions']} questions, version {answer['version']})")
    show("time              " + ", ".join([f"{run['seconds']:.1f} s", *speed, *memory]))
    show(f"on                {place['device_name']} ({place['device']}), {run['dtype']}, torch {place['torch']}")
