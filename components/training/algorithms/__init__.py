"""One file for each family of algorithms; `build` makes what a job's configuration names."""
