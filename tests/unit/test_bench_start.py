"""`bench start` counts what all processes of a command take, phase by phase."""

import sys

import pytest

from orpo_ray.bench.watch import Phase, watch
from orpo_ray.errors import RunError

WORKS_IN_A_CHILD = """
import subprocess, sys, time
def work():
    while time.process_time() < 0.5:
        pass
if sys.argv[1:]:
    work()
else:
    subprocess.run([sys.executable, __file__, "child"])
    print("worked", file=sys.stderr, flush=True)
    time.sleep(0.3)
    subprocess.run([sys.executable, __file__, "child"])
"""


def test_what_children_take_is_counted_in_its_phase(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKS_IN_A_CHILD, encoding="utf-8")
    phases = [
        Phase("first", lambda watched: watched.has_said("worked")),
        Phase("second", lambda watched: False),
    ]
    cost = watch([sys.executable, str(script)], phases)
    assert list(cost.phases) == ["first", "second"]
    assert all(0.3 < phase["cpu_s"] < 2 for phase in cost.phases.values())
    assert cost.cpu_s == pytest.approx(sum(phase["cpu_s"] for phase in cost.phases.values()))
    assert cost.wall_s == pytest.approx(sum(phase["wall_s"] for phase in cost.phases.values()))


def test_a_command_that_fails_is_told_with_its_last_line():
    with pytest.raises(RunError, match="ended with code 3: no more"):
        watch(
            [sys.executable, "-c", "import sys; print('no more', file=sys.stderr); sys.exit(3)"], []
        )
