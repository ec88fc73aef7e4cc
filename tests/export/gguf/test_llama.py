"""Runs where `llama-cpp-python` is installed, which is built from source."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter

from lowmem_rmu.config.schema import Evaluation, ModelSettings
from lowmem_rmu.data.questions import QuestionSet, load_questions
from lowmem_rmu.evaluation.multiple_choice import Interrupted, evaluate
from lowmem_rmu.export.gguf.llama import ask_llama, is_adapter
from lowmem_rmu.model.loading import load_model, load_tokenizer

TINY = Path(__file__).parents[3] / "lowmem_rmu/tiny"


@pytest.fixture
def questions() -> list[QuestionSet]:
    """The same questions by letters, with examples in front of them, and by the choices' texts."""
    source = str(TINY / "data/questions/compounds.jsonl")
    asked = {
        "letters": {},
        "examples": {"num_fewshot": 2, "examples_split": "test"},
        "cloze": {"scoring": "cloze"},
    }
    tasks = {name: {"source": source, "role": "kept", **how} for name, how in asked.items()}
    return load_questions(Evaluation.model_validate({"tasks": tasks, "limit": 20}))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp")
    writer = pytest.importorskip("lowmem_rmu.export.gguf.writer")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer.write_gguf(TINY / "model", file, "f16")
    return Path(file)


def test_llama_answers_as_transformers_does(gguf_file: Path, questions: list[QuestionSet]) -> None:
    heard: list[int] = []
    answers = ask_llama(gguf_file, questions, lambda done, accuracy: bool(heard.append(done)))
    settings = ModelSettings(name=str(TINY / "model"), quantisation="none", dtype="float32")
    expected = evaluate(
        load_model(settings, torch.device("cpu")), load_tokenizer(settings), questions, 4096
    ).answers
    assert [each.answer for each in answers] == [each.answer for each in expected]
    ours, theirs = (torch.tensor([each.logprobs for each in some]) for some in (answers, expected))
    assert (ours - theirs).abs().max() < 0.1
    assert heard == list(range(1, 61))


def test_a_stop_that_is_asked_for(gguf_file: Path, questions: list[QuestionSet]) -> None:
    with pytest.raises(Interrupted):
        ask_llama(gguf_file, questions, lambda done, accuracy: done == 3)


@pytest.mark.parametrize(("kind", "expected"), [("adapter", True), ("model", False), (None, False)])
def test_a_file_with_an_adapter_alone_is_told_from_a_model(
    tmp_path: Path, kind: str | None, expected: bool
) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    if kind:
        writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert is_adapter(tmp_path / "x.gguf") is expected
