"""The controllers of RLTrainingJob and PolicyService."""
