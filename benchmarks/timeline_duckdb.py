"""The timeline's transformation in DuckDB: `python timeline_duckdb.py LOG OUTPUT`. It needs duckdb alone.

Order, next action, time difference, end, and discounted returns of two metrics; no checks, quarantine or report.
"""

import sys
from pathlib import Path

import duckdb

DISCOUNT = 0.99

QUERY = """
COPY (
  WITH placed AS (
    SELECT *, row_number() OVER forwards AS ordinal, count(*) OVER (PARTITION BY mdp_id) - ordinal AS step
    FROM read_parquet('{log}/*.parquet') WINDOW forwards AS (PARTITION BY mdp_id ORDER BY sequence_number)
  )
  SELECT *,
    lead(sequence_number) OVER w - sequence_number AS time_diff,
    lead(action) OVER w AS next_action,
    step = 0 AS terminal,
    sum(metrics['reward'] * pow({discount}, -step)) OVER ahead / pow({discount}, -step) AS return_reward,
    sum(metrics['clicks'] * pow({discount}, -step)) OVER ahead / pow({discount}, -step) AS return_clicks
  FROM placed
  WINDOW w AS (PARTITION BY mdp_id ORDER BY sequence_number),
    ahead AS (PARTITION BY mdp_id ORDER BY sequence_number ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING)
  ORDER BY mdp_id, ordinal
) TO '{output}' (FORMAT parquet)
"""

if __name__ == "__main__":
    log, output = sys.argv[1:]
    connection = duckdb.connect()
    connection.execute(f"SET temp_directory = '{Path(output).parent / 'duckdb'}'")
    connection.execute(QUERY.format(log=log, output=output, discount=DISCOUNT))
