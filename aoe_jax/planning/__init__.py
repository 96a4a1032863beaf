"""What a training step costs: plans for absent machines, and checks of the machine here."""
