"""The stages of a training job, one folder each."""
