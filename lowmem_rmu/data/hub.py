"""Data sets of the Hub, with what can go wrong told in words."""

from typing import TYPE_CHECKING

from lowmem_rmu.errors import UserError, hub_errors

if TYPE_CHECKING:
    from datasets import Dataset


def load_rows(
    source: str, subset: str | None, split: str, columns: list[str], without_access: str | None = None
) -> "Dataset":
    """Return a split of a data set that has the columns asked for. Raises UserError."""
    from datasets import load_dataset  # slow to import, and only the Hub needs it

    with hub_errors("data set", source, instead=without_access):
        try:
            rows = load_dataset(source, subset, split=split)
        except ValueError as error:  # unknown subset or split
            raise UserError(f"The data set {source} cannot be read: {error}") from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f'The data set {source} has no column "{missing[0]}". There is: {", ".join(rows.column_names)}.'
        )
    return rows
