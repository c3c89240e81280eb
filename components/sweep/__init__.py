"""Settings to try + training data -> the settings that counterfactual evaluation prefers, and the policy they give."""
