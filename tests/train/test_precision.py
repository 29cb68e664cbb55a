"""What --precision auto stands for."""

from __future__ import annotations

import pytest
import torch
from sae_diffusion.devices import pick_precision
from test_own_frames import trainer


@pytest.mark.parametrize(
    ("bf16", "amx", "chosen"),
    [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32"), (None, None, "fp32")],
)
def test_auto_is_bf16_where_the_cpu_multiplies_in_it(monkeypatch, bf16, amx, chosen):
    for name, answer in (("_is_avx512_bf16_supported", bf16), ("_is_amx_tile_supported", amx)):
        if answer is None:
            monkeypatch.delattr(torch.cpu, name)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer)
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) == chosen
    assert [pick_precision(name, cpu) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert pick_precision("auto", torch.device("meta")) == "fp32"


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_cuda_goes_by_compute_capability(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", torch.device("cuda")) == chosen


@pytest.mark.parametrize("chosen", ["bf16", "fp32"])
def test_a_run_in_auto_is_the_run_in_what_it_stands_for(tmp_path, monkeypatch, chosen):
    monkeypatch.setattr(
        "sae_diffusion.train.loop.pick_precision", lambda name, device: chosen if name == "auto" else name
    )
    runs = [trainer(tmp_path / name, precision=name) for name in ("auto", chosen)]
    for run in runs:
        run.train(until=2)
    assert runs[0].precision == chosen
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
