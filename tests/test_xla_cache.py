"""The cache of verdicts: what decides a verdict decides its key; what is broken is not there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_end_to_end import small_gemma_backbone
from test_xla_compile import program, request

from autoshard.errors import OutOfMemoryError
from autoshard.model.build import build
from autoshard.model.workload import Workload
from autoshard.xla.cache import VerdictCache, verdict_cache


@pytest.fixture
def cache(tmp_path: Path) -> VerdictCache:
    return VerdictCache(folder=tmp_path / "verdicts", model_key="a model")


def test_a_verdict_comes_back_and_only_for_the_same_question(cache: VerdictCache) -> None:
    asked, step = request(), program(2, 4, 100)
    assert cache.get(asked) is None
    cache.put(asked, step)
    assert cache.get(asked) == step
    for other in (
        request(rules=()),
        request(periods=3),
        request(target="tpu:v5e:2x4"),
        request(attention="tpu"),
        request(workload=Workload(kind="prefill", batch=8, seq_len=64)),
    ):
        assert cache.get(other) is None
    assert replace(cache, model_key="another").get(asked) is None


def test_flags_of_the_compiler_are_part_of_the_question(
    cache: VerdictCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(request(), program(2, 4, 100))
    monkeypatch.setenv("XLA_FLAGS", "--xla_another=1")
    assert cache.get(request()) is None


def test_a_cache_that_is_not_read_keeps_the_new_answer(cache: VerdictCache) -> None:
    cache.put(request(), program(2, 4, 100))
    again = replace(cache, reads=False)
    assert again.get(request()) is None
    again.put(request(), program(2, 4, 200))
    assert cache.get(request()) == program(2, 4, 200)


def test_a_refusal_is_kept_as_well(cache: VerdictCache) -> None:
    cache.put(request(), OutOfMemoryError("it does not fit"))
    with pytest.raises(OutOfMemoryError, match="it does not fit"):
        cache.get(request())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"refusal": null}', '{"refusal": null, "step": 3}']
)
def test_a_broken_entry_is_ignored_and_written_again(cache: VerdictCache, text: str) -> None:
    cache.put(request(), program(2, 4, 100))
    (entry,) = cache.folder.iterdir()
    entry.write_text(text)
    assert cache.get(request()) is None
    cache.put(request(), program(2, 4, 100))
    assert cache.get(request()) == program(2, 4, 100)
    # No half-written file stays behind.
    assert list(cache.folder.iterdir()) == [entry]
    assert json.loads(entry.read_text())["step"]


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "verdicts").write_text("a file")
    cache = VerdictCache(folder=tmp_path / "verdicts", model_key="a model")
    cache.put(request(), program(2, 4, 100))
    assert cache.get(request()) is None


def dense() -> object:
    import keras

    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])


def test_a_model_whose_code_may_change_has_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdict_cache(build(dense)) is None
    found = verdict_cache(build(small_gemma_backbone))
    assert found is not None
    assert found.folder == tmp_path / "autoshard" / "verdicts"
    assert found == verdict_cache(build(small_gemma_backbone))
    assert verdict_cache(build(small_gemma_backbone), reads=False) == replace(found, reads=False)
    assert found != verdict_cache(build("gemma_2b_en"))
