"""The benchmark of a training step finds what must not be timed."""

from __future__ import annotations

import pytest
import torch
import train
from selection import slow_unless

from rope_export.rope import pairs


@pytest.fixture
def task():
    torch._dynamo.reset()
    yield train.Task("cpu", "float32", 1, 64, 64, 4, 2, "static")
    torch._dynamo.reset()


def compiled(name, task):
    contender = train.Contender(name, task)
    contender.compile(backend="aot_eager")
    return contender


def backward_not_turned(_ctx, *gradients):
    return gradients[0], None, None, None


@pytest.mark.parametrize(
    "name", slow_unless(lambda name: name == "ours", ["ours", "ours interleaved", "no rope"])
)
def test_our_blocks_are_right_and_train_as_eager_does(name, task):
    contender, judge = compiled(name, task), train.Judge(task)
    assert judge.finds_right(contender)
    assert contender.graphs == 1
    assert train.train(contender, judge).agrees


def test_a_wrong_gradient_is_found(task, monkeypatch):
    monkeypatch.setattr(pairs._Compiled, "backward", staticmethod(backward_not_turned))
    contender, judge = compiled("ours", task), train.Judge(task)
    assert not judge.finds_right(contender)
    training = train.train(contender, judge)
    assert not training.agrees
    assert list(train.problems([contender], {"ours": training}))


def test_positions_rounded_to_bfloat16_are_found():
    pytest.importorskip("rotary_embedding_torch")
    task = train.Task("cpu", "bfloat16", 1, 400, 64, 4, 2, "static")
    contender = train.Contender("rotary-embedding-torch", task)  # not compiled
    assert not train.Judge(task).finds_right(contender)


@pytest.mark.slow
def test_lengths_that_vary_compile_to_two_graphs(task):
    contender = train.Contender("ours", task)
    contender.count_graphs_of_lengths()
    assert contender.graphs_of_lengths == 2


def test_what_cannot_take_part_is_left_out_and_said(capsys):
    assert list(train.present(["ours", "liger"], "cpu")) == ["ours"]
    assert "liger left out: needs cuda" in capsys.readouterr().out
