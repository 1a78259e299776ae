"""Corpus A, 1 to 20: adapters that nobody should have to serve. The case's number is the corpus's; its code what we answer.

Different from the corpus for a reason: 13: the limit here is 64. 17: a catastrophic pattern is harmless (linear time),
so it is refused only for selecting nothing. 19: DoRA and lora_bias are supported, and refused only where their tensors
lack.
"""

from __future__ import annotations

import pytest

from tests.adapters.conftest import encode_file, encode_raw
from tests.adapters.test_bad_adapters import CASES, Tools

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(("name", "spoil", "code", "words"), [pytest.param(*case, id=case[0]) for case in CASES])
def test_adapter_nobody_can_serve_is_422_with_its_code(stage, name, spoil, code, words):
    adapter = f"bad-{name[:2]}-{len(stage.rounds)}"
    spoil(Tools(stage.writer.write(adapter), stage.writer, encode_file, encode_raw))
    answer = stage.refused(lambda: stage.complete(adapter), 422, code)
    assert words in answer.message
    assert adapter in answer.message
    assert str(stage.writer.root) not in answer.message


def test_adapters_refused_again_and_again_cost_nothing(stage):
    stage.check_steady()
