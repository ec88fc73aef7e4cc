"""An export in the format that was asked for: written, verified and described in a folder that is there only
once it is whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lowmem_rmu.config.paths import is_local, short_name
from lowmem_rmu.errors import UserError
from lowmem_rmu.export.card import write_card
from lowmem_rmu.export.folder import link_or_copy, new_folder
from lowmem_rmu.export.gguf.modelfile import modelfile
from lowmem_rmu.export.gguf.writer import Kind, write_gguf, write_gguf_adapter
from lowmem_rmu.export.merge.streamed import Merged, companion_files, write_merged
from lowmem_rmu.export.merge.update import Base, Update, adapter_of, model_settings, update_of
from lowmem_rmu.export.reproduce import write_reproduce
from lowmem_rmu.export.verification import Follow, Verification, follow_nothing, verify
from lowmem_rmu.model.saved import CONFIG, WEIGHTS, read_adapter_settings
from lowmem_rmu.runs.files import write_atomically, write_json
from lowmem_rmu.runs.folder import RunFolder

Format = Literal["adapter", "merged", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)
KINDS: tuple[Kind, ...] = get_args(Kind)
REPRODUCE = "reproduce"


@dataclass(frozen=True)
class Wanted:
    """What an export is to be."""

    format: Format
    base: Base = "original"
    kind: Kind = "q8_0"
    """How a GGUF file stores its matrices."""
    link: bool = True
    """Files that stay as they are may be hard links."""
    verified: bool = True


@dataclass(frozen=True)
class Exported:
    """What was done, a sentence each, and how the export answered."""

    sentences: list[str]
    verification: Verification | None


def export(
    run: RunFolder, wanted: Wanted, to: Path, device: torch.device, follow: Follow = follow_nothing
) -> Exported:
    """Write the whole export into `to`: weights, `reproduce/`, `verification.json`, and the card with the
    hashes of all of them.

    Raises UserError, and leaves nothing, where the weights cannot be written; what else is missing is said in
    a sentence.
    """
    if wanted.format == "adapter" and wanted.base != "original":
        raise UserError(
            "An adapter is added to a model only later, so --base does not go with --format adapter.",
            "Leave one of them out.",
        )
    write = {"adapter": write_adapter, "merged": write_whole_model, "gguf": write_gguf_files}[wanted.format]
    adapter_of(run)
    with new_folder(to) as folder:
        sentences = write(run, wanted, folder)
        _or_told(
            lambda: write_reproduce(run, folder / REPRODUCE), "How to make it again is not in it", sentences
        )
        verification = (
            _or_told(lambda: verify(run, folder, device, follow), "Not verified", sentences)
            if wanted.verified
            else None
        )
        _or_told(lambda: write_card(run, folder, wanted.format, verification), "It has no card", sentences)
    return Exported(sentences, verification)


def _or_told(act: Callable[[], Any], otherwise: str, sentences: list[str]) -> Any:
    """Do a part of the export that a run may not allow (it measured nothing, or its texts are gone), and note
    it in words instead of failing.
    """
    try:
        return act()
    except UserError as error:
        sentences.append(f"{otherwise}: {' '.join(str(error).splitlines())}")
        return None


def write_adapter(run: RunFolder, wanted: Wanted, folder: Path) -> list[str]:
    """Return a plain PEFT adapter: its settings and its weights. It names its model, but no place on this
    machine.
    """
    settings, adapter = model_settings(run), adapter_of(run)
    config = read_adapter_settings(adapter)
    if is_local(settings.name):
        config["base_model_name_or_path"] = short_name(settings.name)
    write_json(folder / CONFIG, config)
    link_or_copy(adapter / WEIGHTS, folder / WEIGHTS, link=False)
    return ["PeftModel.from_pretrained puts this adapter on its model."]


def write_whole_model(run: RunFolder, wanted: Wanted, folder: Path) -> list[str]:
    """Return the merged checkpoint."""
    return told(write_merged(update_of(run, wanted.base), folder, wanted.link))


def write_gguf_files(run: RunFolder, wanted: Wanted, folder: Path) -> list[str]:
    """Return the merged model as one GGUF file, a Modelfile for Ollama, and the adapter alone where it is
    LoRA.
    """
    update = update_of(run, wanted.base)
    checkpoint, name = folder_of(update), f"{run.path.name}-{wanted.kind}.gguf"
    write_gguf(
        checkpoint, folder / name, wanted.kind, lambda tensor, weight: _changed(update, tensor, weight)
    )
    write_atomically(folder / "Modelfile", modelfile(checkpoint, name))
    sentences = [
        f"{counted(len(update.adapted_names), 'tensor')} merged into {name}, stored as {wanted.kind}."
    ]
    if wanted.base == "original":
        alone = lambda: write_gguf_adapter(run.adapter, checkpoint, folder / f"{run.path.name}-lora.gguf")  # noqa: E731
        _or_told(alone, "The adapter alone is not in it", sentences)
    return sentences


def _changed(update: Update, name: str, weight: torch.Tensor) -> torch.Tensor:
    return update.merged(name, weight) if name in update.adapted_names else weight


def folder_of(update: Update) -> Path:
    """Return the checkpoint with its tokenizer, on this machine: fetched where the Hub has it."""
    companion_files(update)
    return next(iter(update.tensors.values())).file.parent


def told(merged: Merged) -> list[str]:
    """Describe in words what was done."""
    sentences = [f"{counted(merged.tensors, 'tensor')} merged, in {counted(len(merged.rewritten), 'file')}."]
    if merged.copied:
        sentences.append(f"{counted(len(merged.copied), 'other file')} of weights copied.")
    if merged.linked:
        sentences.append(
            f"{counted(len(merged.linked), 'other file')} of weights linked: the same file as the "
            "original's, in two places. Never write into it; --copy makes copies."
        )
    if merged.untied:
        sentences.append(
            "The checkpoint stores a separate head though its config.json ties it to the embeddings:"
            " the export's config.json has tie_word_embeddings: false."
        )
    if not merged.checked:
        sentences.append(
            "The run did not record what its model's matrices were: that the checkpoint is still the "
            "same could not be checked."
        )
    return sentences


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count != 1 else ''}"
