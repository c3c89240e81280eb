"""The stages wired as one KFP pipeline, the local runner, and the `bluewhale` command."""
