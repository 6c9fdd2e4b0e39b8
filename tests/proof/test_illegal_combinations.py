"""Options together: what is not legal is refused by name, and nothing is written."""

from __future__ import annotations

import math
import random
import re
import tempfile
from pathlib import Path

import pytest
from combinations import (
    Request,
    command_of,
    export_of,
    legal,
    offences,
    option,
    run_command,
    seeds,
    sweep,
)
from hypothesis import given, note, settings

from rope_export import BadInputError

WRONG: list[Request] = [
    *({"window": n} for n in (0, -1)),
    *({name: n} for name in ("softcap", "scale") for n in (0.0, -1.0, math.nan, math.inf)),
    *({"qk_norm_eps": n} for n in (-1e-6, 0.0, math.nan)),
    {"value_head_dim": 0},
    *({"rotary_dim": n} for n in (0, 3, 64, -2)),
    {"head_dim": 9, "rotary_dim": None, "scaling": None},
    {"num_heads": 3, "num_kv_heads": 2},
    {"num_heads": 2, "num_kv_heads": 4},
    {"dtype": "bfloat16"},
    {"head_dim": 16, "rotary_dim": 8, "scaling": {"rope_type": "axial"}, "position_ids": False},
    {"cache": True, "causal": False},
    {"cache": True, "static": True},
    {"cache": True, "max_seq_len": 1},
    {"max_seq_len": 0},
    {"padding": "left", "cache": False, "attention_mask": False},
    {"padding": "middle"},
    {"batch": 2, "static": False},
    {"batch": 0, "static": True},
]


def illegal(seed: int) -> Request:
    request, rng = legal(seed), random.Random(seed)
    if request["rotary_dim"] is None:  # a scaling is for one width
        request["rotary_dim"] = request["head_dim"]
    for change in rng.sample(WRONG, rng.choice((1, 1, 2))):
        if "rotary_dim" in change or "head_dim" in change:
            request["scaling"] = None
        request |= change
    return request


def mentions(message: str, argument: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(argument)}(?![\w-])", message) is not None


@settings(sweep, max_examples=100)
@given(seeds)
def test_what_is_not_legal_is_refused_by_name_and_writes_nothing(seed):
    request = illegal(seed)
    note(request)
    wrong = offences(request)
    assert wrong
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(BadInputError) as refused:
            export_of(request, Path(folder))
        message = str(refused.value)
        assert len(message.splitlines()) == 1
        assert any(mentions(message, argument) for argument in set().union(*wrong)), message
        assert list(Path(folder).iterdir()) == []


@settings(sweep, max_examples=40)
@given(seeds)
def test_the_command_refuses_it_in_one_line(seed):
    request = illegal(seed)
    note(request)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "made", "block")
        code, stdout, stderr = run_command([*command_of(request), f"--out={out}"])
        assert (code, stdout) == (2, ""), stderr
        (line,) = [line for line in stderr.splitlines() if "error" in line]
        assert line.startswith("rope-export: error: ")
        assert line == stderr.splitlines()[-1]
        wrong = set().union(*offences(request))
        assert any(mentions(line, option(argument)) for argument in wrong), line
        assert not out.parent.exists()
