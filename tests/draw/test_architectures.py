"""Does `param_groups` find what is right for many architectures: layers, roles, order and streams?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo_plain
import zoo_recorded
import zoo_several
import zoo_text
import zoo_vision
from torch import nn
from zoo import STREAM, Right, Row, expand, spell_out

from misa_kernels.draw.groups import param_groups

TABLES = (zoo_text, zoo_vision, zoo_several, zoo_plain, zoo_recorded)
ROWS: dict[str, Row] = {name: row for table in TABLES for name, row in table.ROWS.items()}
EXECUTED = [name for name, row in ROWS.items() if row.example is not None]


@dataclass
class Case:
    row: Row
    model: nn.Module
    right: Right

    def found(self, **options: Any) -> dict[str, Any]:
        """What is found of each parameter of which something is asked."""
        rows = param_groups(self.model, **options).found
        assert [row.name for row in rows] == [name for name, _ in self.model.named_parameters()]
        assert all(row.param is self.model.get_parameter(row.name) for row in rows)
        return {row.name: row for row in rows if row.name not in self.right.open}

    def layers(self, **options: Any) -> list[str]:
        """The layers that are found, without those in which lies nothing but what is open."""
        return [name for name in param_groups(self.model, **options).layers if not self.is_open(name)]

    def is_open(self, layer: str) -> bool:
        """Whether nobody asks if this is a layer."""
        return layer not in self.right.layers and any(full.startswith(f"{layer}.") for full in self.right.open)


# Of a module's scope, so that the tests of one row follow one another and share its model, which none of them changes.
@pytest.fixture(scope="module", params=ROWS)
def case(request: pytest.FixtureRequest) -> Case:
    row = ROWS[request.param]
    with torch.device("meta" if row.example is None else "cpu"):
        # DETR freezes its backbone, ViT-MAE its tables: what was asked for, not what the architecture says.
        model = row.build().eval().requires_grad_(True)
    return Case(row, model, spell_out(row, model))


def test_layers(case: Case):
    assert case.layers() == case.right.layers
    rows = case.found()
    assert {name: rows[name].layer for name in case.right.layer} == case.right.layer
    # What isn't sampled lies in a layer as well, such as a bias.
    for parameter, row in rows.items():
        around = [layer for layer in case.right.layers if f"{parameter}.".startswith(f"{layer}.")]
        if row.layer is None or not case.is_open(row.layer):
            assert row.layer == (max(around, key=len) if around else None), parameter


@pytest.mark.parametrize(("mode", "rest"), [("finetune", "frozen"), ("pretrain", "dense")])
def test_roles(case: Case, mode: str, rest: str):
    roles = {name: row.role for name, row in case.found(mode=mode).items()}
    assert roles == {name: "sampled" if name in case.right.layer else rest for name in roles}
    assert list(roles.values()).count(rest) == case.row.rest


def test_every_role_has_a_reason(case: Case):
    assert [name for name, row in case.found().items() if not row.why] == []


def test_streams(case: Case):
    rows = case.found()
    parts = {name: part for name, part in case.right.part.items() if part != "unjudged"}
    assert {name: rows[name].part or "none" for name in parts} == parts
    assert {name: rows[name].stream for name in parts} == {name: STREAM[part] for name, part in parts.items()}


@pytest.mark.parametrize("case", EXECUTED, indirect=True, scope="module")
def test_order_of_execution(case: Case):
    assert case.layers(example=case.row.example) == (expand(case.row.order) or case.right.layers)


def test_no_row_hides_another():
    assert len(ROWS) == sum(len(table.ROWS) for table in TABLES)
