"""One export, or one plain copy of the same files, in a process of its own that loads nothing else; prints
what it took as JSON.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere


def work_of(kind: str, run: Path, model: Path, to: Path) -> Callable[[], object]:
    """Do the work that is timed, with its libraries imported."""
    if kind == "copy":
        return lambda: shutil.copytree(model, to)
    from lowmem_rmu.export.merge.streamed import merge
    from lowmem_rmu.runs.folder import RunFolder

    return lambda: merge(RunFolder(run), to, link=kind == "links")


def to_the_disk(folder: Path) -> None:
    """Wait until every file is on the disk itself."""
    for file in folder.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())


def resident(what: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at the peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def main(kind: str, run: Path, model: Path, to: Path, sync: bool) -> None:
    work = work_of(kind, run, model, to)
    libraries, started, busy = resident("VmRSS"), perf_counter(), process_time()
    work()
    if sync:
        to_the_disk(to)
    took = {"seconds": perf_counter() - started, "processor": process_time() - busy}
    print(json.dumps(took | {"libraries": libraries, "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5] == "sync")
