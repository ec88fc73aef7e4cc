"""The verb `neighbors`: write passages next to a topic, for the retain set."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lowmem_rmu.cli.errors import INTERRUPTED, friendly_exit
from lowmem_rmu.cli.startup import quiet_libraries
from lowmem_rmu.errors import UserError


def neighbors(
    preset: Annotated[
        str, typer.Argument(help="The name of a preset, or the path of a YAML file: its model writes.")
    ],
    subjects: Annotated[
        list[str],
        typer.Argument(help="Subjects next to the topic that must stay, e.g. marketing accounting."),
    ],
    count: Annotated[int, typer.Option(min=1, help="Passages per subject.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a passage.")] = 100,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change a setting of the preset."),
    ] = None,
    to: Annotated[Path, typer.Option(help="The file to write.")] = Path("neighbors.jsonl"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Let the base model write passages about subjects next to a topic, for the retain set."""
    quiet_libraries()
    with friendly_exit():
        if to.suffix.lower() != ".jsonl":
            raise UserError(
                "The passages are JSON lines, and a corpus is read by its ending.",
                f"Name the file {to.with_suffix('.jsonl')}.",
            )
        if to.exists():
            raise UserError(
                f"{to} exists already.",
                "Delete it, or choose another file with --to.",
            )
        to.parent.mkdir(parents=True, exist_ok=True)

        from lowmem_rmu.config.loading import load_preset
        from lowmem_rmu.model.loading import resolve_device
        from lowmem_rmu.model.spec import ModelSpec
        from lowmem_rmu.neighbors import save_passages, write_passages

        spec = ModelSpec(load_preset(preset, set_ or []).model)
        tokenizer = spec.tokenizer
        model = spec.load(resolve_device(device))

        def report(written: int, total: int) -> None:
            print(f"{written} of {total} passages", file=sys.stderr)

        try:
            passages = write_passages(model, tokenizer, subjects, count, max_new_tokens, seed, report)
        except KeyboardInterrupt:
            print(f"Stopped. {to} was not written.", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        save_passages(passages, to)
        print(
            f"Wrote {len(passages)} passages to {to}. Read some of them: delete those that are about "
            "the topic itself."
        )
        print(
            "Then add the file to the retain set of the preset:\n"
            "  retain:\n"
            "    corpora:\n"
            f"      - {{source: {as_source(to)}, share: 0.3}}"
        )


def as_source(file: Path) -> str:
    """Return a path as a preset names it: local sources start with `./`, `../`, `/` or `~`."""
    return str(file) if file.is_absolute() or file.parts[0] in ("..", "~") else f"./{file.as_posix()}"
