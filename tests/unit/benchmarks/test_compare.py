"""The table: medians, ratios, verdicts and marks."""

from __future__ import annotations

from pathlib import Path

from benchmarks import compare


def measured(values, generator=0.1):
    comparison = compare.Comparison(
        rows=frozenset(values),
        systems=compare.SYSTEMS,
        rounds=3,
        seconds=1.0,
        warm_seconds=1.0,
        idle_seconds=1.0,
        kill_messages=1,
        data=Path(),
        ours_options=(),
    )
    for row, by_system in values.items():
        for system, figures in by_system.items():
            for figure in figures:
                comparison.results.add(row, system, figure, generator)
    return compare.document(comparison)


def row_of(document, key):
    return next(row for row in document["rows"] if row["row"] == key)


def test_ratios_are_of_medians():
    document = measured({"sends": {"quorate": [30, 50, 40], "dledger": [10, 8, 9], "plain": [80, 80, 81]}})
    row = row_of(document, "sends")
    assert row["median"] == {"quorate": 40, "dledger": 9, "plain": 80}
    assert row["ratio_to_dledger"] == 40 / 9
    assert row["ratio_to_plain"] == 0.5
    assert row["reached"] is True


def test_less_is_better_where_it_is():
    document = measured({"cpu": {"quorate": [40.0], "dledger": [200.0]}, "idle": {"quorate": [7.0]}})
    assert row_of(document, "cpu")["reached"] is False
    assert row_of(document, "idle")["reached"] is False
    document = measured({"cpu": {"quorate": [30.0], "dledger": [200.0]}, "losses": {"quorate": [0.0]}})
    assert row_of(document, "cpu")["reached"] is True
    assert row_of(document, "losses")["reached"] is True


def test_without_the_other_system_nothing_is_claimed():
    row = row_of(measured({"sends": {"quorate": [30]}}), "sends")
    assert row["ratio_to_dledger"] is None
    assert row["reached"] is None


def test_a_generator_above_half_a_core_marks_the_figure():
    document = measured({"sends": {"quorate": [30_000], "dledger": [10_000]}}, generator=0.6)
    assert row_of(document, "sends")["generator_over_limit"] == ["quorate", "dledger"]
    assert "30,000*" in compare.table(document)
    assert "30,000*" not in compare.table(measured({"sends": {"quorate": [30_000]}}, generator=0.4))


def test_table_shows_small_ratios_as_fractions():
    document = measured({"cpu": {"quorate": [10.0], "dledger": [200.0]}})
    assert "1/20" in compare.table(document)
