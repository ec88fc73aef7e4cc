"""The folder from which anyone can make a run again: its preset and own texts, versions and seed, and hashes
to hold the result against.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lowmem_rmu.config.paths import is_local, short_name
from lowmem_rmu.config.schema import Corpus, Preset
from lowmem_rmu.data.corpora import TEXT_FILES, read_documents
from lowmem_rmu.data.documents import find_files
from lowmem_rmu.data.questions import QUESTION_FILES
from lowmem_rmu.errors import Fix, ResumeRun, UserError
from lowmem_rmu.runs.files import folder_replaced, write_atomically, write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import read_preset

PRESET, REQUIREMENTS, RECORD = "preset.yaml", "requirements.txt", "record.json"
TEXTS, BASE = "texts", "base_model"
"""Folders next to them: the run's own texts, and a base model that is not on the Hub."""
READ = tuple({*TEXT_FILES, *QUESTION_FILES})
"""Files of a folder that a corpus or a task reads."""
CHECKPOINT = (".json", ".safetensors", ".model", ".jinja", ".txt", ".md")
TERMS = ("LICENSE", "LICENCE", "NOTICE")
LARGEST_BASE = 100 * 2**20
"""Bytes of a local base model that comes along; of a larger one there are its hashes."""


def write_reproduce(run: RunFolder, to: Path) -> None:
    """Write `preset.yaml`, `requirements.txt`, `record.json` and the run's own texts into the folder `to`, in
    place of what was there.

    `record.json` has the seed, the versions, the device, and the sha256 of the base model's files, of every
    corpus as it was read, and of the adapter. Raises UserError where the run has no adapter, or a text of it
    is gone.
    """
    preset, config = read_preset(run, pinned=False), run.config
    if not run.adapter.exists():
        raise UserError(
            f"Run {run.path} has no adapter that could be made again.",
            Fix("Go on with it: {action}", ResumeRun(run.path.name)),
        )
    with folder_replaced(to) as new:
        copied = Copied(new, datetime.fromisoformat(config["created"]).timestamp())
        settings = copied.settings(preset, config["model_revision"])
        header = _header(run.path.name, f"{to.name}/{PRESET}", config, copied)
        write_atomically(
            new / PRESET, header + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)
        )
        write_atomically(new / REQUIREMENTS, _requirements(config))
        write_json(new / RECORD, _record(run, preset, settings))


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class Copied:
    """The local files of a run, copied into a folder next to the preset that names them."""

    def __init__(self, folder: Path, run_began: float) -> None:
        self.folder, self.run_began = folder, run_began
        self.changed: list[str] = []
        """Texts that were written after the run began: what it read may have been another."""
        self.lacks_base = False
        self._sources: dict[str, str] = {}

    def settings(self, preset: Preset, revision: str | None) -> dict[str, Any]:
        """Return the preset, with paths relative to the folder and the base model's revision as it was."""
        content = preset.model_dump()
        corpora = [topic["corpus"] for topic in content["topics"].values()] + content["retain"]["corpora"]
        for each in [*corpora, *content["evaluation"]["tasks"].values()]:
            if is_local(each["source"]):
                each["source"] = self._source(each["source"])
        model = content["model"]
        if is_local(model["name"]):
            model["name"] = self._base(_there(model["name"]))
        else:
            model["revision"] = revision
        return content

    def _source(self, source: str) -> str:
        if source not in self._sources:
            path, number = _there(source), len(self._sources) + 1
            place = f"{TEXTS}/{number:02}-{re.sub(r'[^A-Za-z0-9._-]+', '-', path.name)}"
            for file, name in files_of(path):
                self._copy(file, f"{place}/{name}" if name else place)
            self._sources[source] = f"./{place}"
        return self._sources[source]

    def _copy(self, file: Path, place: str) -> None:
        target = self.folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        if file.stat().st_mtime > self.run_began + 1:  # it is kept in whole seconds
            self.changed.append(place)

    def _base(self, base: Path) -> str:
        files = checkpoint_files(base)
        self.lacks_base = sum(file.stat().st_size for file in files) > LARGEST_BASE
        if not self.lacks_base:
            (self.folder / BASE).mkdir()
            for file in files:
                shutil.copyfile(file, self.folder / BASE / file.name)
        return f"./{BASE}"


def _there(source: str) -> Path:
    if not Path(source).exists():
        raise UserError(
            f"{source}, which the run has read, does not exist any more.",
            "Put it back: without it the run cannot be made again.",
        )
    return Path(source)


def files_of(source: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that a corpus or a task reads, each with its name within a folder; "" for a single
    file.
    """
    if source.is_file():
        yield source, ""
        return
    for file in find_files(source, READ).read:
        yield file, file.relative_to(source).as_posix()


def checkpoint_files(base: Path) -> list[Path]:
    """Return the files that loading a model's folder needs, and its license."""
    return sorted(
        file
        for file in base.iterdir()
        if file.is_file() and (file.suffix in CHECKPOINT or file.stem in TERMS)
    )


def _header(name: str, place: str, config: dict[str, Any], copied: Copied) -> str:
    lines = [
        f"python -m lowmem_rmu.run {place} --device {config['device']}",
        (
            f"Makes the run {name} again: with the versions in {REQUIREMENTS} and on such a device, the "
            f"adapter that {RECORD} has the sha256 of."
        ),
    ]
    if copied.lacks_base:
        lines.append(
            f"The base model is not on the Hub and too large to come along: put it into {BASE}/; "
            f"{RECORD} has the sha256 of its files."
        )
    if copied.changed:
        lines.append(
            f"Changed since the run began, so that the adapter may differ: {json.dumps(copied.changed)}"
        )
    return "".join(f"# {line}\n" for line in lines)


def _requirements(config: dict[str, Any]) -> str:
    """Return the requirements for pip; a build such as `+cpu` is chosen by the machine."""
    versions = dict(config["versions"])
    python, own = (versions.pop(name, "not recorded") for name in ("python", "lowmem-rmu"))
    first = f"# Python {python}, lowmem-rmu {own}, on {config['device']} ({config['device_name']})\n"
    return first + "".join(
        f"{package}=={version.partition('+')[0]}\n" for package, version in versions.items()
    )


def _record(run: RunFolder, preset: Preset, settings: dict[str, Any]) -> dict[str, Any]:
    config, model = run.config, preset.model
    corpora = {f"topics.{name}.corpus": topic.corpus for name, topic in preset.topics.items()}
    corpora |= {f"retain.corpora.{index}": corpus for index, corpus in enumerate(preset.retain.corpora)}
    base = (
        {file.name: sha256(file) for file in checkpoint_files(Path(model.name))}
        if is_local(model.name)
        else {}
    )
    return {
        "run": run.path.name,
        "seed": config["seed"],
        "device": config["device"],
        "device_name": config["device_name"],
        "versions": config["versions"],
        "model": {"name": short_name(model.name), "revision": settings["model"]["revision"], "files": base},
        "corpora": {place: _corpus_record(corpus) for place, corpus in corpora.items()},
        "adapter": {file.name: sha256(file) for file in sorted(run.adapter.glob("*.safetensors"))},
    }


def _corpus_record(corpus: Corpus) -> dict[str, Any]:
    """Return the sha256 of the documents as they are read, each as a line of JSON."""
    name = Path(corpus.source).name if is_local(corpus.source) else corpus.source
    try:
        documents = read_documents(corpus)
    except UserError as error:  # a data set of the Hub without network: an export needs none
        return {"source": name, "sha256": None, "reason": str(error).splitlines()[0]}
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document).encode() + b"\n")
    return {"source": name, "documents": len(documents), "sha256": digest.hexdigest()}
