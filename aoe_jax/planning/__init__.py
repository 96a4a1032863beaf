"""The cost of a training step: plans for absent machines, and checks of this machine."""
