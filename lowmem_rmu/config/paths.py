"""Paths and Hub names in a preset: which are local, and where relative ones begin."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from lowmem_rmu.errors import UserError, shortened


def is_local(source: str) -> bool:
    """Return whether a model or data source is a path and not a Hub id."""
    return (
        source.startswith(("./", "../", "/", "~", ".\\", "..\\"))
        or source in (".", "..")
        or Path(source).is_absolute()
    )


def as_path(name: str) -> Path:
    """Return a path with `~` spelled out. Raises UserError for what can be no path: too long, with a NUL, in
    the home of nobody.
    """
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UserError(f"The path {name[:80]!r} cannot be read: {reason}.") from error
    return path


def is_folder(start: Path, name: str) -> bool:
    """Return whether a model's name, such as `models/llama`, is a folder that lies in `start`: it is then
    that folder, and no Hub id.
    """
    return bool(name.strip()) and "://" not in name and (start / as_path(name)).is_dir()


def short_name(model: str) -> str:
    """Return a Hub id as it is; of a local path the last two parts, for reports are shared."""
    return "/".join(Path(model).parts[-2:]) if is_local(model) else model


def without_places(settings: Any, where: str = "") -> Any:
    """Return the same settings with every path of this machine cut to its last two parts: for what is
    shared.
    """
    if isinstance(settings, dict):
        return {key: without_places(value, str(key)) for key, value in settings.items()}
    if isinstance(settings, list):
        return [without_places(value, where) for value in settings]
    return short_name(settings) if isinstance(settings, str) and where in ("source", "name") else settings


def resolve_paths(content: Any, folder: Path, overridden: set[str], where: str = "") -> Any:
    """Make local `source` and `model.name` absolute: from the preset's folder, or from here where `--set`
    gave them.
    """
    if isinstance(content, list):
        return [
            resolve_paths(item, folder, overridden, f"{where}.{index}") for index, item in enumerate(content)
        ]
    if not isinstance(content, dict):
        is_source = where.rpartition(".")[2] == "source" or where == "model.name"
        given_here = any(where == key or where.startswith(f"{key}.") for key in overridden)
        start = Path.cwd() if given_here else folder
        if is_source and isinstance(content, str):
            try:
                if is_local(content) or (where == "model.name" and is_folder(start, content)):
                    return str((start / as_path(content)).resolve())
            except UserError as error:
                raise UserError(f"{shortened(where)}: {error}") from error
        return content
    return {
        key: resolve_paths(value, folder, overridden, f"{where}.{key}" if where else str(key))
        for key, value in content.items()
    }
