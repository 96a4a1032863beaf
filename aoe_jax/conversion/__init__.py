"""Makes a new model from a trained one: exports, converts a router MoE to AoE, upcycles, prunes."""
