"""Comparisons of AoE with router MoE: commands that train both and report, in figures and pictures."""
