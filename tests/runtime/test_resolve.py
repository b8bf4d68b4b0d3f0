"""The runtime is the one asked for, or an error that names what works; never another in silence."""

from __future__ import annotations

import pytest

from varptq.errors import InputError
from varptq.runtime import RUNTIMES, resolve
from varptq.runtime.resolve import ENVIRONMENT, PLANNED


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_auto_is_what_is_available() -> None:
    assert resolve() == resolve("auto") == "simulated"
    assert [resolve(name) for name in RUNTIMES] == list(RUNTIMES)


@pytest.mark.parametrize("name", PLANNED)
def test_a_planned_runtime_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputError) as error:
        resolve(name)
    assert str(error.value) == (
        f"runtime {name!r}: not available in this version; use one of auto, simulated"
    )


@pytest.mark.parametrize("name", ["", "CPU", "gpu", "simulated "])
def test_an_unknown_runtime_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown; use one of auto, simulated"):
        resolve(name)


def test_the_environment_decides_for_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("simulated", "auto", "", " simulated\n"):
        monkeypatch.setenv(ENVIRONMENT, value)
        assert resolve("auto") == "simulated"
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    assert resolve("simulated") == "simulated"
    with pytest.raises(InputError, match="VARPTQ_RUNTIME: runtime 'cuda': not available"):
        resolve("auto")
