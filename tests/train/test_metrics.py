"""What a run writes down while it trains."""

from __future__ import annotations

import json

from sae_diffusion.train.metrics import FILE, Reporter, truncate_metrics


def test_lines_after_the_checkpoint_and_one_cut_short_are_dropped(tmp_path):
    path = tmp_path / FILE
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 5)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    truncate_metrics(path, 4)
    assert path.read_text() == "".join(lines)
    truncate_metrics(path, 2)
    assert path.read_text() == "".join(lines[:2])
    truncate_metrics(tmp_path / "absent.jsonl", 2)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_run_that_goes_on_writes_after_its_checkpoint(tmp_path):
    (tmp_path / FILE).write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 5)))
    Reporter(tmp_path, start_step=2, total_steps=4, tensorboard=False).close()
    assert [json.loads(line)["step"] for line in (tmp_path / FILE).read_text().splitlines()] == [1, 2]
