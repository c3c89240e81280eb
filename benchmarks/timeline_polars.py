"""The timeline's transformation in Polars: `python timeline_polars.py LOG OUTPUT`. It needs polars alone.

Order, next action, time difference, end, and discounted returns of two metrics; no checks, quarantine or report.
"""

import sys

import polars as pl

DISCOUNT = 0.99


def metric(name: str) -> pl.Expr:
    return pl.col("metrics").map.get(name)


def main(log: str, output: str) -> None:
    rows = pl.scan_parquet(f"{log}/*.parquet").sort("mdp_id", "sequence_number")
    ordinal = pl.int_range(1, pl.len() + 1).over("mdp_id")
    rows = rows.with_columns(ordinal=ordinal, step=pl.len().over("mdp_id") - ordinal)
    weight = pl.lit(DISCOUNT).pow(-pl.col("step"))
    returns = {
        f"return_{name}": (metric(name) * weight).cum_sum(reverse=True).over("mdp_id") / weight
        for name in ("reward", "clicks")
    }
    rows = rows.with_columns(
        time_diff=pl.col("sequence_number").shift(-1).over("mdp_id") - pl.col("sequence_number"),
        next_action=pl.col("action").shift(-1).over("mdp_id"),
        terminal=pl.col("step") == 0,
        **returns,
    )
    rows.sink_parquet(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
