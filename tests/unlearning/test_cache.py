"""The hidden-state cache: what goes in comes out, within its budget, and a torn file is never trusted."""

from pathlib import Path

import pytest
import torch

from lowmem_rmu.unlearning.cache import HiddenStateCache

CPU = torch.device("cpu")
A_KIB = 1024


def entry(seed: int, size: int = A_KIB) -> dict[str, torch.Tensor]:
    """Two tensors of `size` bytes together."""
    values = torch.rand(size // 4, generator=torch.Generator().manual_seed(seed))
    return {"trunk": values[: size // 8].reshape(2, -1), "frozen": values[size // 8 :]}


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "disk" else None


def test_what_goes_in_comes_out(folder: Path | None) -> None:
    cache = HiddenStateCache(10 * A_KIB, folder)
    assert cache.get("retain-0", CPU) is None
    cache.put("retain-0", entry(1))
    cache.put("0-3", entry(2))
    for key, seed in (("retain-0", 1), ("0-3", 2)):
        found = cache.get(key, CPU)
        assert found is not None
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            name: tensor.tolist() for name, tensor in entry(seed).items()
        }
    assert cache.keys() == ["0-3", "retain-0"]


def test_the_budget_is_kept(folder: Path | None) -> None:
    cache = HiddenStateCache(2 * A_KIB + 100, folder)
    for number in range(4):
        cache.put(f"0-{number}", entry(number))
    assert cache.keys() == ["0-0", "0-1"]
    cache.put("small", entry(9, 64))
    assert cache.keys() == ["0-0", "0-1", "small"]


def test_no_budget_keeps_nothing(folder: Path | None) -> None:
    cache = HiddenStateCache(0, folder)
    cache.put("0-0", entry(0))
    assert cache.keys() == []
    assert folder is None or not folder.exists()


def test_memory_does_not_hold_on_to_what_the_entry_was_cut_from() -> None:
    cache = HiddenStateCache(10 * A_KIB)
    whole = torch.zeros(100, 16)
    cache.put("0-0", {"trunk": whole[:, :4]})
    found = cache.get("0-0", CPU)
    assert found is not None
    assert found["trunk"].untyped_storage().nbytes() == 100 * 4 * 4


def test_a_restored_cache_trusts_only_what_the_checkpoint_names(tmp_path: Path) -> None:
    before = HiddenStateCache(10 * A_KIB, tmp_path)
    before.put("0-0", entry(0))
    before.put("0-1", entry(1))
    (tmp_path / "0-2.safetensors").write_bytes(b"")  # what a power cut may leave
    (tmp_path / ".0-3.safetensors.new").write_bytes(b"half")
    after = HiddenStateCache(10 * A_KIB, tmp_path)
    after.restore(["0-0", "0-9"])
    assert after.keys() == ["0-0"]
    assert [path.name for path in tmp_path.iterdir()] == ["0-0.safetensors"]
    assert after.used == (tmp_path / "0-0.safetensors").stat().st_size
    assert after.get("0-9", CPU) is None


def test_a_new_run_starts_with_an_empty_folder(tmp_path: Path) -> None:
    HiddenStateCache(10 * A_KIB, tmp_path).put("0-0", entry(0))
    fresh = HiddenStateCache(10 * A_KIB, tmp_path)
    fresh.restore([])
    assert fresh.keys() == []
    assert list(tmp_path.iterdir()) == []
