"""What crosses a boundary between stages: the job, the decision log, the stage record."""
