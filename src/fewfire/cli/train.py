"""`fewfire train CONFIG.toml`: pretrain or fine-tune; the same command goes on where a run stopped."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def train(
    config: Annotated[str, typer.Argument(help="A TOML file; docs/train.md lists every key.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. run.steps=100.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: all cores).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout at the end.")] = False,
) -> None:
    """Train a model. Ctrl-C saves and says how to go on; a second Ctrl-C stops at once."""
    from fewfire.cli.output import note, print_json
    from fewfire.cli.progress import TrainProgress
    from fewfire.train.settings import read_settings

    overrides = list(set_ or [])
    overrides += [] if threads is None else [f"run.threads={threads}"]
    overrides += [] if seed is None else [f"run.seed={seed}"]
    settings = read_settings(config, tuple(overrides))
    from fewfire.train.loop import Trainer

    with TrainProgress(quiet=as_json) as progress:
        trainer = Trainer(settings, progress)
        if not as_json:
            note(_describe(trainer))
        with _Interrupt() as interrupt:
            result = trainer.run(stop=interrupt.asked)
    if result.interrupted:
        again = " ".join(["fewfire train", config, *(f"--set {each}" for each in set_ or [])])
        note(f"stopped after step {result.step} and saved; go on with: {again}")
    else:
        note(f"done: {trainer.export()}")
    if as_json:
        print_json(_document(trainer, result))
    if result.interrupted:
        raise typer.Exit(130)


def _describe(trainer: Any) -> str:
    from fewfire.plan.count import count as count_parameters
    from fewfire.sizes import format_count

    count = count_parameters(trainer.config)
    corpus = trainer.corpus
    return (
        f"{trainer.config.family}: {format_count(count.total)} parameters, {format_count(count.active)} active; "
        f"{corpus.train.num_tokens:,} training tokens, {corpus.held_out.num_tokens:,} held out; folder {trainer.folder}"
    )


def _document(trainer: Any, result: Any) -> dict[str, Any]:
    evaluation = result.evaluation
    return {
        "folder": str(trainer.folder),
        "step": result.step,
        "interrupted": result.interrupted,
        "tokens_per_s": result.tokens_per_s,
        "bits_per_byte": None if evaluation is None else evaluation.bits_per_byte,
        "nats_per_token": None if evaluation is None else evaluation.nats_per_token,
        "router": []
        if evaluation is None
        else [
            {"layer": h.layer, "max_vio": h.max_vio, "noise_floor": h.noise_floor, "dead": h.num_dead, "load": h.load}
            for h in evaluation.health
        ],
    }


class _Interrupt:
    """Within the block, the first Ctrl-C or SIGTERM only asks; the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> _Interrupt:
        import signal

        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
