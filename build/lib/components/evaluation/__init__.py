"""Policy bundles + held-out transitions -> counterfactual estimates and a gate's verdict."""
