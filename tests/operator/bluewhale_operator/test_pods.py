"""What is read from pods."""

from __future__ import annotations

import pytest

from bluewhale_operator.pods import last_lines

TRACEBACK = """\
I1121 11:05:08.045660      14 launcher_v2.go:206] publish success.
Traceback (most recent call last):
  File "ephemeral_component.py", line 35, in timeline
    build_timeline(spec, path)
KeyError: 'action'
E1121 11:12:28.791419      15 launcher_v2.go:449] Component failed to execute successfully: exit status 1
F1121 11:12:28.839580      15 main.go:130] failed to execute component: exit status 1
time=2026-11-21T11:12:29.673Z level=INFO msg="sub-process exited" error="exit status 1" argo=true
Error: exit status 1
"""
LAUNCHER = """\
I1121 11:05:08.045660      14 launcher_v2.go:206] publish success.
F1121 11:05:08.091030      14 main.go:130] failed to execute component: mkdir /minio/mlpipeline: permission denied
time=2026-11-21T11:05:08.891Z level=INFO msg="sub-process exited" argo=true error="exit status 1"
Error: exit status 1
"""


@pytest.mark.parametrize(
    ("log", "words"),
    [(TRACEBACK, "KeyError: 'action'"), (LAUNCHER, "mkdir /minio/mlpipeline: permission denied"), ("", "")],
)
def test_a_log_ends_with_what_went_wrong_and_not_with_its_wrappers(log: str, words: str) -> None:
    assert last_lines(log).endswith(words)
