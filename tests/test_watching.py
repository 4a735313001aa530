"""docs/watching.md: its script is run as it stands there, on a run's files, by TensorBoard and by
Weights & Biases, offline.
"""
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import TINY

PAGE = (TINY.parent / "docs" / "watching.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
STEPS = [{"step": 1, "loss": 0.69, "lines": [3, 1]}, {"step": 2, "loss": 0.5, "lines": [2, 4]},
         {"epoch": 1, "held_out_loss": 0.6}]
MODELS = [{"iteration": t, "actor": {"truth": 2.0 + t, "truth_interval": [1, 3]}, "judge": None}
          for t in (0, 1)]


@pytest.fixture
def watch(tmp_path):
    """watch(number of the block that stands below the first): what the script says."""
    run = tmp_path / "x"
    (run / "iter1").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"settings": {"iters": 1}}))
    (run / "summary.json").write_text(json.dumps(MODELS))
    whole = "".join(json.dumps(step) + "\n" for step in STEPS)
    (run / "iter1" / "train.jsonl").write_text(whole + '{"step": 3, "lo')  # is being written

    def start(block):
        assert BLOCKS[0].count("time.sleep(5)") == 1
        script = tmp_path / "watch.py"
        script.write_text(BLOCKS[0].replace("time.sleep(5)", "time.sleep(0)") + BLOCKS[block])
        done = subprocess.run(
            [sys.executable, script, run], cwd=tmp_path, capture_output=True, text=True,
            timeout=120, env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"})
        assert done.returncode == 0, done.stderr
        return run
    return start


def test_tensorboard_has_the_curves(watch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watch(1) / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/step", "train/loss", "train/epoch", "train/held_out_loss", "model/iteration",
        "model/actor/truth"}
    curves = {name: [(event.step, round(event.value, 3)) for event in events.Scalars(name)]
              for name in ("train/loss", "train/held_out_loss", "model/actor/truth")}
    assert curves == {"train/loss": [(1, 0.69), (2, 0.5)], "train/held_out_loss": [(3, 0.6)],
                      "model/actor/truth": [(0, 2.0), (1, 3.0)]}


def test_weights_and_biases_has_them_offline(watch):
    folder = watch(2).parent / "wandb"
    file, = folder.glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content and b"model/actor/truth" in content
