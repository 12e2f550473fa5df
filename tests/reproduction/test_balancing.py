"""The methods' rows and the rules that judge them."""

import numpy as np
import pytest

from fairseq_moe_ext.balancing.solve import METHODS
from fairseq_moe_ext.trace import PhaseTrace
from reproduction.balancing import Row, draw, findings, fit, table
from reproduction.models import Model
from reproduction.runs import Run


def test_rows_of_two_layers(tmp_path):
    """Experts 0 and 1 have all the work: contiguous puts both on rank 0, every other method apart."""
    load = np.zeros((6, 2, 4), dtype=np.uint8)
    load[:, :, :2] = 5
    trace = {"prefill": PhaseTrace(("decoder.layers.1.moe_layer", "decoder.layers.3.moe_layer"), load, np.arange(6))}
    model = Model("language_modeling", tmp_path, tmp_path, (), False, 2)
    rows = [Row(**row) for row in fit(model, Run({}, {}, trace), 2, 2, 0.1)]
    assert [row.method for row in rows] == list(METHODS) and {row.batches for row in rows} == {6}
    assert (rows[0].fitted_max, rows[0].held_out_avg) == (1.0, 1.0)
    assert all((row.fitted_avg, row.held_out_max) == (0.5, 0.5) for row in rows[1:])
    assert rows[1].bound == pytest.approx(0.5)
    assert "| LM | 2 | 50.0% | contiguous | 100.0% | 100.0% | 100.0% | 100.0% | 100.0% |" in table(rows)
    draw(tmp_path / "b.png", rows)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert fit(model, Run({}, {}, trace), 5, 2, 0.1) == []  # more ranks than experts


def row(kind, method, held_out_avg, held_out_max=0.5):
    return Row("m", kind, kind, 8, 2, 10, method, 0.3, 0.3, held_out_max, held_out_avg, 0.2)


def test_findings_follow_their_rules():
    rows = [row("LM", "contiguous", 0.4, 0.7), row("LM", "greedy", 0.3, 0.35), row("MT decoder", "contiguous", 0.2),
            row("MT decoder", "greedy", 0.25), row("MT decoder", "anti-correlation", 0.21)]
    rows.append(row("LM", "anti-correlation", 0.2))
    lm_max, lm, decoder, better = findings(rows)
    assert (lm_max.holds, lm.holds, decoder.holds, better.holds) == (True, True, False, True)
    assert "0.70 contiguous, 0.35 greedy" in lm_max.here and "21.0% anti-correlation" in decoder.here
