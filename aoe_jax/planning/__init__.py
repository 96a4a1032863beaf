"""What a run costs before it starts: counts, plans, costs of programs, checks of a machine."""
