from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal

import pytest
import torch
from sae_diffusion.train import checkpoint
from sae_diffusion.train.checkpoint import (
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)
from sae_diffusion.train.files import check_header, flatten_optimizer, load_into, restore_optimizer
from safetensors.torch import load_file, save_file
from torch import nn


def files(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 2), value), "b": torch.tensor(value)}, "loss": {"c": torch.arange(4)}}


def save(run_dir, step, **options):
    return save_checkpoint(run_dir, step, files(float(step)), {"clips_seen": 8 * step}, **options)


def test_round_trip_and_nothing_but_safetensors_and_json(tmp_path):
    path = save(tmp_path, 12, metadata={"loss": {"note": "x"}})
    assert path.name == "step-0000012"
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    state = read_state(path)
    assert state["step"] == 12 and state["clips_seen"] == 96 and state["versions"]["torch"] == torch.__version__
    assert set(state["sha256"]) == {"model.safetensors", "loss.safetensors"}
    targets = {"a": torch.zeros(2, 3).t(), "b": torch.zeros(())}  # another memory layout is the target's own affair
    load_into(path / "model.safetensors", targets)
    assert torch.equal(targets["a"], torch.full((3, 2), 12.0)) and targets["b"] == 12
    for file in path.iterdir():
        # a pickle stream begins with \x80, a zip (torch.save) with PK
        assert file.read_bytes()[:1] != b"\x80" and file.read_bytes()[:2] != b"PK"


def test_keeps_the_last_n(tmp_path):
    for step in (1, 2, 10, 30):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000010", "step-0000030"]
    for step in (40, 12_345_678):
        save(tmp_path, step, keep=0)
    assert [p.name for p in list_checkpoints(tmp_path)][-1] == "step-12345678"
    assert len(list_checkpoints(tmp_path)) == 4
    assert latest_checkpoint(tmp_path).name == "step-12345678"
    assert latest_checkpoint(tmp_path / "empty") is None


def damage_flip(path):
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def damage_truncate(path):
    file = path / "loss.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def damage_missing(path):
    (path / "loss.safetensors").unlink()


def damage_state_number(path):
    file = path / "state.json"
    file.write_text(file.read_text().replace('"clips_seen": 16', '"clips_seen": 17'))


def damage_state_cut(path):
    file = path / "state.json"
    file.write_text(file.read_text()[:40])


def damage_state_missing(path):
    (path / "state.json").unlink()


def rewrite_state(path, change):
    """A state.json that is consistent in itself, after change(state)."""
    state = json.loads((path / "state.json").read_text())
    state.pop("digest")
    change(state)
    (path / "state.json").write_text(json.dumps({**state, "digest": checkpoint._digest(state)}))


def damage_state_list(path):
    (path / "state.json").write_text("[1, 2]")


def damage_state_deep(path):
    (path / "state.json").write_text("[" * 200_000)


def damage_state_lacks_hashes(path):
    rewrite_state(path, lambda state: state.pop("sha256"))


def damage_state_hashes_are_a_list(path):
    rewrite_state(path, lambda state: state.update(sha256=list(state["sha256"])))


def damage_state_lacks_step(path):
    rewrite_state(path, lambda state: state.pop("step"))


def damage_name_leads_out(path):
    """A hash that holds, of a file that is none of the checkpoint's."""
    outside = path.parent / "outside.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    name = "../outside.safetensors"
    rewrite_state(path, lambda state: state["sha256"].update({name: checkpoint.file_digest(outside)}))


def damage_not_finite(path):
    """As an older version could write it: every hash holds."""
    file = path / "model.safetensors"
    save_file({**load_file(file), "b": torch.tensor(math.nan)}, file)
    rewrite_state(path, lambda state: state["sha256"].update({file.name: checkpoint.file_digest(file)}))


DAMAGES = [
    damage_flip, damage_truncate, damage_missing, damage_state_number, damage_state_cut, damage_state_missing,
    damage_state_list, damage_state_deep, damage_state_lacks_hashes, damage_state_hashes_are_a_list,
    damage_state_lacks_step, damage_name_leads_out, damage_not_finite,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    assert verify_checkpoint(path) is None
    damage(path)
    with pytest.warns(RuntimeWarning, match=r"step-0000002 is damaged and is skipped: .*(state\.json|safetensors)"):
        assert latest_checkpoint(tmp_path).name == "step-0000001"
    # going on from step 1 to step 2 puts a good one in its place, and never deletes the good one for the sake of the bad
    save(tmp_path, 2, keep=1)
    assert verify_checkpoint(tmp_path / "step-0000002") is None
    assert (tmp_path / "corrupt-step-0000002").is_dir()


def test_a_checkpoint_that_is_not_finite_is_refused_by_its_tensor(tmp_path):
    path = save(tmp_path, 2)
    assert find_checkpoint(path) == find_checkpoint(tmp_path) == path
    damage_not_finite(path)
    with pytest.raises(ValueError, match=r"step-0000002/model\.safetensors: tensor b is not finite"):
        find_checkpoint(path)
    with pytest.warns(RuntimeWarning, match="tensor b is not finite"), pytest.raises(FileNotFoundError):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_that_is_not_finite_is_saved(tmp_path, value, dtype):
    save(tmp_path, 1)
    spoilt = torch.zeros(3, 2, dtype=dtype)
    spoilt[2, 1] = value
    content = {**files(2.0), "ema-0.1": {"fine": torch.zeros(0), "deep.weight": spoilt}}
    with pytest.raises(FloatingPointError, match=r"^deep\.weight of ema-0\.1 is no longer finite at step 2; nothing"):
        save_checkpoint(tmp_path, 2, content, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]


def test_the_largest_finite_numbers_are_saved(tmp_path):
    """No sum of squares may overflow in the check."""
    content = {"model": {"a": torch.full((64,), torch.finfo(torch.float32).max), "n": torch.arange(3)}}
    assert verify_checkpoint(save_checkpoint(tmp_path, 1, content, {})) is None


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stage", ["save_file", "fsync_path", "json.dump", "mkdir"])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(monkeypatch, tmp_path, stage):
    save(tmp_path, 1)
    owner = {"json.dump": json, "mkdir": type(tmp_path)}.get(stage, checkpoint)
    monkeypatch.setattr(owner, stage.rpartition(".")[2], lambda *a, **k: full_disk())
    with pytest.raises(OSError) as caught:
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert str(caught.value) == (
        f"{tmp_path}: the checkpoint of step 2 could not be written (No space left on device); the last checkpoint, "
        "step-0000001, is intact"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]
    assert latest_checkpoint(tmp_path).name == "step-0000001"
    assert save(tmp_path, 2, keep=1).name == "step-0000002"


def test_a_write_that_the_system_refuses(tmp_path):
    """A limit on the size of files fails in the middle of one, as a disk that fills up does."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            try:
                save_checkpoint(tmp_path, 1, {"model": {"a": torch.zeros(1000)}}, {})
            except OSError as error:
                wanted = f"{tmp_path}: the checkpoint of step 1 could not be written ("
                code = 0 if str(error).startswith(wanted) and str(error).endswith("no checkpoint yet") else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("clips_seen"), "must have clips_seen"),
        (lambda state: state.update(clips_seen=[1]), "clips_seen has the wrong type, list"),
        (lambda state: state.update(clips_seen=True), "clips_seen has the wrong type, bool"),
    ],
)
def test_what_a_run_needs_of_the_state_is_asked_for_by_name(tmp_path, change, message):
    path = save(tmp_path, 1)
    assert read_state(path, clips_seen=int)["clips_seen"] == 8
    rewrite_state(path, change)
    with pytest.raises(ValueError, match=rf"step-0000001/state\.json: {message}"):
        read_state(path, clips_seen=int)


def test_later_damaged_checkpoints_do_not_push_out_new_ones(tmp_path):
    for step in (1, 5, 6):
        save(tmp_path, step, keep=3)
    damage_flip(tmp_path / "step-0000005")
    damage_flip(tmp_path / "step-0000006")
    save(tmp_path, 2, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000002", "step-0000005", "step-0000006"]
    with pytest.warns(RuntimeWarning) as caught:
        assert latest_checkpoint(tmp_path).name == "step-0000002"
    assert len(caught) == 2


def stages(monkeypatch, tmp_path) -> int:
    """How many times saving forces something to the disk."""
    calls = []
    real = checkpoint.fsync_path
    monkeypatch.setattr(checkpoint, "fsync_path", lambda path: (calls.append(path), real(path)))
    save(tmp_path, 2)
    monkeypatch.undo()
    names = [p.name for p in calls]
    # every file, the directory, and after the rename its parent
    assert names == ["model.safetensors", "loss.safetensors", "state.json", "tmp-step-0000002", tmp_path.name]
    return len(calls)


def test_kill_at_every_stage_of_saving_loses_nothing(monkeypatch, tmp_path):
    (tmp_path / "count").mkdir()
    total = stages(monkeypatch, tmp_path / "count")
    for stage in range(total):
        run_dir = tmp_path / str(stage)
        save(run_dir, 1, keep=1)
        child = os.fork()
        if child == 0:
            left = [stage]

            def die(path, left=left):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

            checkpoint.fsync_path = die
            save(run_dir, 2, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        # the last stage comes after the rename: the new one is whole; before, the old one is
        found = latest_checkpoint(run_dir)
        assert found.name == ("step-0000002" if stage == total - 1 else "step-0000001")
        expected = 2.0 if stage == total - 1 else 1.0
        assert load_file(found / "model.safetensors")["b"] == expected
        save(run_dir, 3, keep=1)
        assert [p.name for p in run_dir.iterdir()] == ["step-0000003"]


def test_saving_a_step_again_changes_nothing(tmp_path):
    path = save(tmp_path, 3)
    before = (path / "state.json").stat().st_mtime_ns
    assert save(tmp_path, 3) == path
    assert (path / "state.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(3, 2)}, "tensor b is missing"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(()), "z": torch.zeros(1)}, "tensor z does not belong to the model"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(())}, r"tensor a must have shape \(3, 2\), got \(2, 3\)"),
        ({"a": torch.zeros(3, 2).half(), "b": torch.zeros(())}, r"tensor a must be torch.float32, got torch.float16"),
    ],
)
def test_loading_names_the_tensor_that_differs_before_touching_any(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    save_file(content, path)
    targets = {"a": torch.ones(3, 2), "b": torch.ones(())}
    with pytest.raises(ValueError, match=message):
        load_into(path, targets)
    assert (targets["a"] == 1).all() and targets["b"] == 1


def test_a_header_that_promises_much_is_refused_before_allocation(tmp_path):
    path = tmp_path / "bomb.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="cannot be read"):
        check_header(path, {"a": torch.zeros(2)})
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        check_header(path, {"a": torch.zeros(2)})


def test_optimizer_state_round_trip(tmp_path):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(9, 9))
        return net, torch.optim.AdamW(net.parameters(), lr=0.1)

    def step(net, optimizer):
        net[1](net[0](torch.ones(1, 3))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    net, optimizer = make()
    for _ in range(3):
        step(net, optimizer)
    flat = flatten_optimizer(net, optimizer)
    # the third layer never had a gradient
    assert set(flat) == {
        f"{i}.{p}.{k}" for i in (0, 1) for p in ("weight", "bias") for k in ("step", "exp_avg", "exp_avg_sq")
    }
    save_file(flat, tmp_path / "o.safetensors")
    other, restored = make()
    other.load_state_dict(net.state_dict())
    restore_optimizer(tmp_path / "o.safetensors", other, restored)
    for pair in ((net, optimizer), (other, restored)):
        step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    flat["0.weight.exp_avg"] = flat["0.weight.exp_avg"][:2].clone()
    save_file(flat, tmp_path / "o.safetensors")
    with pytest.raises(ValueError, match=r"tensor 0\.weight\.exp_avg must have shape \(4, 3\), got \(2, 3\)"):
        restore_optimizer(tmp_path / "o.safetensors", other, restored)
    save_file({"7.weight.step": torch.zeros(())}, tmp_path / "o.safetensors")
    with pytest.raises(ValueError, match=r"tensor 7\.weight\.step belongs to no parameter"):
        restore_optimizer(tmp_path / "o.safetensors", other, restored)
