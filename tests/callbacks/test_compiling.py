"""A compiled stage is the same stage. The backend "eager" traces and compiles nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from tests.conftest import make_job

from spice_pl.callbacks.compiling import Compiling
from spice_pl.errors import UsageError
from spice_pl.job import trainer
from spice_pl.job.run import run_stages


def test_a_compiled_stage_has_the_same_weights(
    tiny: Sequence[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "Compiling", partial(Compiling, backend="eager"))
    torch._dynamo.reset()
    found = []
    for mode in ("false", "true", "auto"):
        caplog.clear()
        overrides = (*tiny, "stage=moco", f"trainer.compile={mode}", f"run={mode}")
        with caplog.at_level("INFO"):
            run_stages(make_job(*overrides))
        # On a processor only networks are compiled, and with `auto` nothing.
        assert ("compiled 2 networks and 0 views" in caplog.text) is (mode == "true")
        path = make_job(*overrides).folder("moco").path
        found.append((path / "encoder.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match=r"trainer\.compile=fast is none of false, true, auto"):
        Compiling("fast")
