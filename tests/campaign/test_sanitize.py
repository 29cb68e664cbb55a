"""The C++ of the CPU library under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import sanitize


@pytest.mark.parametrize("sanitizer", sanitize.SANITIZERS)
def test_sanitizers_find_the_planted_faults_and_nothing_else(sanitizer):
    reason = sanitize.why_not(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    report = sanitize.sanitize(sanitizer)
    assert report is None, report
