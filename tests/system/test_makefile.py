"""What make tells while it waits."""

import subprocess

from tests.support.paths import ROOT


def test_making_an_environment_says_that_it_goes_on_until_it_has_failed() -> None:
    rule = "probe: ; @$(call TELLING,sleep 1.5; exit 3,the probe)"
    made = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "EVERY=0.5", "--eval", rule, "probe"],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert made.returncode != 0
    assert made.stdout.count("still at it: the probe\n") >= 1
    # Every end of the pipe is closed when make has ended, or this would have waited for the last `sleep`.
    assert "Error 3" in made.stderr
