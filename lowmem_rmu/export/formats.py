"""An export in the format that was asked for, into a folder that is there only once it is whole."""

from pathlib import Path
from typing import Literal, get_args

from lowmem_rmu.errors import UserError
from lowmem_rmu.export.folder import link_or_copy, new_folder
from lowmem_rmu.export.merge import Merged, write_merged
from lowmem_rmu.export.update import Base, adapter_of, update_of
from lowmem_rmu.model.changes import CONFIG, WEIGHTS
from lowmem_rmu.runs import RunFolder

Format = Literal["adapter", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export(run: RunFolder, format: Format, to: Path, base: Base = "original", link: bool = True) -> list[str]:
    """Writes the export into `to` and says what was done, a sentence each. Raises UserError."""
    if format == "adapter":
        return export_adapter(run, to, base)
    update = update_of(run, base)
    with new_folder(to) as folder:
        merged = write_merged(update, folder, link)
    return told(merged)


def export_adapter(run: RunFolder, to: Path, base: Base) -> list[str]:
    """A plain PEFT adapter: its settings and its weights."""
    if base != "original":
        raise UserError("An adapter is added to a model only later, so --base does not go with --format adapter.\nLeave one of them out.")
    adapter = adapter_of(run)
    with new_folder(to) as folder:
        for name in (CONFIG, WEIGHTS):
            link_or_copy(adapter / name, folder / name, link=False)
    return ["PeftModel.from_pretrained puts this adapter on its model."]


def told(merged: Merged) -> list[str]:
    """What was done, in words."""
    sentences = [f"{counted(merged.tensors, 'tensor')} merged, in {counted(len(merged.rewritten), 'file')}."]
    if merged.copied:
        sentences.append(f"{counted(len(merged.copied), 'other file')} of weights copied.")
    if merged.linked:
        sentences.append(
            f"{counted(len(merged.linked), 'other file')} of weights linked: the same file as the original's, in two places."
            " Never write into it; --copy makes copies."
        )
    if not merged.checked:
        sentences.append("The run did not record what its model's matrices were: that the checkpoint is still the same could not be checked.")
    return sentences


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count != 1 else ''}"
